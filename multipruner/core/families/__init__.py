"""Model families as rows of data: where the parts of a decoder layer are, how they lie over its axes, and how the
configuration names them.

A new family is a new row in one of the modules here (and a tiny-model fixture in the contract tests), never a branch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any

from multipruner.core.axes import AXES
from multipruner.core.errors import UnsupportedModelError, did_you_mean
from multipruner.core.structure import Anatomy, Place

from . import dense, hybrids
from .dense import DENSE
from .experts import EXPERTS
from .family import ROTATION, Family
from .hybrids import HYBRIDS
from .latent import LATENT
from .vision import CLASSIFIERS

FAMILIES: dict[str, Family] = {row.model_type: row for row in (*DENSE, *EXPERTS, *LATENT, *HYBRIDS)}
"""The families of language models that can be pruned, by ``config.model_type``."""
REFUSED: dict[str, str] = {**dense.REFUSED, **hybrids.REFUSED}
"""Model types that no row can describe, and why."""


def spec_for(config: Any) -> Family:
    """Return the row for a model's configuration, an object or a dictionary.

    Raises:
        UnsupportedModelError: naming the supported families, when there is none, or the settings that a row is for.
    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    model_type = str(values.get("model_type") or getattr(config, "model_type", None) or "?")
    if (first := first_row(model_type)) is not None:
        return row_for(first, values)
    check_refused(model_type)
    raise UnsupportedModelError(
        f"model family {model_type!r} is not supported{did_you_mean(model_type, {**FAMILIES, **CLASSIFIERS})}; "
        f"supported: {', '.join(sorted(FAMILIES))}, and image classifiers: "
        f"{', '.join(sorted(CLASSIFIERS))}. A family is one row in multipruner/core/families/: see "
        "docs/adding-a-family.md."
    )


def first_row(model_type: Any) -> Family | None:
    """Return the first row of a model type, of language models or of image classifiers; ``None`` where there is
    none.
    """
    return FAMILIES.get(str(model_type)) or CLASSIFIERS.get(str(model_type))


def check_refused(model_type: Any) -> None:
    """Refuse a model type that no row can describe.

    Raises:
        UnsupportedModelError: saying why.
    """
    if isinstance(model_type, str) and model_type in REFUSED:  # a configuration may say anything
        raise UnsupportedModelError(f"models of the family {model_type!r} cannot be pruned: {REFUSED[model_type]}")


def row_for(first: Family, values: Mapping[str, Any]) -> Family:
    """Return the row of a model type that is right for a configuration's values.

    Args:
        first: the one in :data:`FAMILIES`.
        values: of the configuration.

    Raises:
        UnsupportedModelError: naming the settings, when there is none.
    """
    rows = (first, *first.others)
    found = next((row for row in rows if row.fits(values)), None)
    if found is not None:
        return found
    asked = ", ".join({f"{key} = {values[key]!r}": None for row in rows for key in row.needs if key in values})
    known = [", ".join(f"{key} = {' or '.join(map(repr, some))}" for key, some in row.needs.items()) for row in rows]
    raise UnsupportedModelError(
        f"this {first.model_type} model, with {asked}, is not supported; there are rows for {'; for '.join(known)} "
        "(docs/adding-a-family.md says how to add one)"
    )


def cache_argument(model: Any) -> str:
    """Return what a model's forward pass calls its cache, as an argument and in what it returns."""
    return "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"


def constants_of(config: Any) -> dict[str, int]:
    """Read a dense model's configuration for the numbers that no structure changes, by their names in layouts."""
    counts = spec_for(config).counts(_values(config))
    return {name: count for name, count in counts.items() if name not in AXES or AXES[name].unsaid}


def anatomy_of(config: Any, along: Collection[str] = ()) -> Anatomy:
    """Return the residual blocks of a dense model, from its configuration.

    Args:
        config: of the model.
        along: the axes that sizes name besides those that every size does, such as ``value_dim``.

    Raises:
        UnsupportedModelError: when the family's blocks cannot be cut along these.
    """
    family, constants, values = spec_for(config), constants_of(config), _values(config)
    for name in sorted(set(along) - {axis.name for axis in family.further}):
        raise UnsupportedModelError(
            f"{family.model_type}: {AXES[name].label} cannot leave in this family: {AXES[name].missing}; give no "
            f"{AXES[name].step} ({AXES[name].setting})"
        )
    layers = range(getattr(family.part_of(config), family.depth))
    sizes = ((layer, family.sizes(values, layer, along)) for layer in layers)
    rows = (Place(layer, kind, size) for layer, found in sizes for kind, size in found.items() if size)
    return Anatomy(tuple(rows), constants)


def _values(config: Any) -> dict[str, Any]:
    family = spec_for(config)
    return {key: getattr(family.part_of(config), key, None) for key in (*family.keys, ROTATION)}
