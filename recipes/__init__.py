"""The catalogue of recipes: one YAML file each in this folder, read without torch."""

from __future__ import annotations

import re
from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from multipruner.config.precedence import from_file
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, UnknownModelError, did_you_mean
from multipruner.storage.files import path_of

if __name__ != "multipruner.recipes":
    raise ImportError("import multipruner.recipes: a bare `recipes` would load every class twice")

__all__ = ["catalogue", "mapping_for", "names", "parse", "read", "read_file", "value_of"]

SUFFIX = ".yaml"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and leaves ``44:52:4`` text (YAML 1.1 reads base-60 numbers)."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class's own format)
        first: [
            (tag, pattern) for tag, pattern in rows if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        ]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def parse(text: str, origin: str) -> dict[str, Any]:
    """Return the mapping that a recipe's YAML text holds, for :meth:`Recipe.build` (which checks keys and values).

    Args:
        text: YAML.
        origin: where the text is from, for errors.

    Raises:
        ConfigError: when it is no YAML, no mapping, or gives a key twice.
    """
    try:
        mapping = yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin} is no valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{origin} is nested too deeply for a recipe") from None
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise ConfigError(f"{origin} must be a mapping of recipe keys such as 'model: owner/name'")
    return mapping


def value_of(text: str, origin: str) -> Any:
    """Return the value that a piece of YAML is, read as a recipe's are.

    Raises:
        ConfigError: when it is no YAML.
    """
    return parse(f"value: {text}", origin)["value"]


def read_file(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a recipe file, which may not decide that a model's own code is run (:func:`from_file`).

    Raises:
        ConfigError: when the file cannot be read or parsed.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    return from_file(parse(text, str(path)))


def names() -> list[str]:
    """Return the recipes' names, sorted."""
    return sorted(entry.name.removesuffix(SUFFIX) for entry in files(__name__).iterdir() if entry.name.endswith(SUFFIX))


def read(name: str) -> dict[str, Any]:
    """Return the mapping of one recipe of the catalogue.

    Raises:
        UnknownModelError: naming the closest recipe, when there is none of this name.
    """
    known = names()
    if name not in known:
        raise UnknownModelError(f"no recipe {name!r}{did_you_mean(name, known)}; recipes: {', '.join(known)}")
    return parse((files(__name__) / f"{name}{SUFFIX}").read_text(encoding="utf-8"), f"recipe {name!r}")


def catalogue() -> list[Recipe]:
    """Return every recipe, validated, sorted by name."""
    return [Recipe.build(read(name)) for name in names()]


def mapping_for(model: str) -> dict[str, Any]:
    """Return what ``--model`` means: a recipe of the catalogue, or a bare recipe for a Hub id, folder or ``.gguf``
    file.

    A recipe's name wins over a folder of the same name; write ``./llama`` for the folder.

    Raises:
        UnknownModelError: when the argument has no slash and is neither a recipe nor an existing path, or can be no
            name at all.
    """
    known = names()
    if model in known:
        return read(model)
    path = path_of(model)
    if "/" not in model and not path.exists():
        raise UnknownModelError(
            f"no recipe, folder or file {model!r}{did_you_mean(model, known)}; recipes: {', '.join(known)}; "
            "anything else is a Hub id such as owner/name, a folder, or a .gguf file"
        )
    name = path.resolve().name if path.exists() else path.name
    return {"model": model, "name": name.removesuffix(".gguf") or "custom"}
