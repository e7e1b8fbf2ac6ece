"""What a recipe or a flag chooses by name: one table each. Rows say where the code is; listing them loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError, did_you_mean

Where = str | Callable[..., Any]
"""``"module:function"``, or the function itself."""
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Importance:
    """An order of the channels and KV groups of a layer.

    Attributes:
        by: LayerView -> LayerRanking.
        moments: whether it looks at second moments of calibration text.
    """

    by: Where
    moments: bool = False


@dataclass(frozen=True, slots=True)
class Export:
    """A file format of other programs.

    Attributes:
        by: (folder, output, options) -> what was written, which has ``lines(outtype)``.
        outtype: of the matrices, where none is asked for.
        options: further options that it takes.
    """

    by: Where
    outtype: str
    options: tuple[str, ...] = ()


IMPORTANCES: dict[str, Importance] = {
    "magnitude": Importance("multipruner.importance.orders:by_magnitude"),
    "activation": Importance("multipruner.importance.orders:by_activation", moments=True),
    "second-order": Importance("multipruner.importance.orders:by_second_order", moments=True),
    "none": Importance("multipruner.importance.orders:as_it_is"),
}
STRATEGIES: dict[str, Where] = {
    "milp": "multipruner.jobs.prune.program:program",
    "sequential": "multipruner.jobs.prune.greedy:greedy",
}
"""How a structure is found."""
EXPORTS: dict[str, Export] = {
    "gguf": Export("multipruner.export.gguf:export_gguf", "f16", ("base_gguf",)),
    "onnx": Export("multipruner.export.onnx:export_onnx", "f32", ("trust_remote_code",)),
}
METHODS: dict[str, dict[str, Any]] = {
    "global": {"calibration": {"source": "self"}},
    "paper": {
        "strategy": "sequential",
        "objective": "nll",
        "importance": "magnitude",
        "compensation": "none",
    },
}
"""Presets: what a method stands for, beside how much it measures (:mod:`.effort`); what is given explicitly wins."""

LEVELS = ("error", "info", "debug")
"""What is said on the screen: nothing but errors; stages, decisions and results; libraries' words as well."""


def row_of(table: Mapping[str, Row], name: str, what: str) -> Row:
    """The row of a table.

    Args:
        table: by name.
        name: as asked for.
        what: of what kind the rows are, for the error.

    Raises:
        ConfigError: naming the closest, and all that there are.
    """
    if name not in table:
        raise ConfigError(f"no {what} {name!r}{did_you_mean(name, table)}; there are {', '.join(table)}")
    return table[name]


def loaded(where: Where) -> Callable[..., Any]:
    """The function that a row names, its module imported only now."""
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class OneOf:
    """Metadata of a text field: its value is a name of a table, also of one that has grown since.

    Attributes:
        table: by name.
        what: of what kind its rows are.
    """

    table: Mapping[str, Any]
    what: str

    def checked(self, name: str) -> str:
        """The name.

        Raises:
            ValueError: when the table has no such row.
        """
        try:
            row_of(self.table, name, self.what)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.checked, handler(source))


A_BUDGET = OneOf(COSTS, "budget")
