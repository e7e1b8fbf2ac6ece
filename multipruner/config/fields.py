"""What a field of a recipe says of itself on the command line: group, placeholder, tier; and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from multipruner.core.costs import COSTS

from .choices import METHODS, ListsTexts, OneOf
from .effort import defaults_of, effort_of

BUDGETS = "budgets"
"""The key whose flags are the rows of :data:`multipruner.core.costs.COSTS`."""


def shown(group: str, metavar: str = "", *, flag: str = "", everyday: bool = False, brief: str = "") -> dict[str, Any]:
    """Return metadata of a field that has a flag.

    Args:
        group: under which ``--help-all`` lists it.
        metavar: what stands for its value; of no use where it is chosen from names.
        flag: default: ``--`` and the field's name with hyphens.
        everyday: whether the short ``--help`` shows it, too.
        brief: what that says of it, where the description is long.
    """
    return {"group": group, "metavar": metavar, "flag": flag, "everyday": everyday, "brief": brief}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that sets one key of a recipe.

    Attributes:
        key: dotted, such as ``calibration.seed``.
        flag, group, metavar, everyday, brief: see :func:`shown`.
        help: a phrase, with the default.
        kind: ``int``, ``float``, ``bool`` (a switch) or ``str``.
        choices: the names it is chosen from; empty where it is free.
    """

    key: str
    flag: str
    group: str
    metavar: str
    everyday: bool
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()
    brief: str = ""


def flags_of(model: type[BaseModel], prefix: str = "") -> Iterator[Flag]:
    """Yield the flags of a model's fields and of the sections within it, in the order of the fields."""
    for name, field in model.model_fields.items():
        about, key = field.json_schema_extra, f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from flags_of(field.annotation, f"{key}.")
        elif isinstance(about, dict) and key == BUDGETS:
            for cost in COSTS.values():
                group, help_ = str(about["group"]), f"at most so many {cost.help}"
                yield Flag(f"{key}.{cost.name}", cost.flag, group, cost.metavar, cost.everyday, help_)
        elif isinstance(about, dict):
            kind, choices = _kind(field)
            flag = str(about["flag"]) or f"--{name.replace('_', '-')}"
            default = _default(field, key)
            help_ = f"{described(field)}{default}"
            brief = f"{described(field, str(about['brief']))}{default}" if about["brief"] else ""
            yield Flag(key, flag, str(about["group"]), str(about["metavar"]), bool(about["everyday"]), help_, kind,
                       choices, brief)  # fmt: skip


def described(field: FieldInfo, brief: str = "") -> str:
    """Return what a field says of itself, or the short form of it, with what its table holds now."""
    text = brief or field.description or ""
    for item in field.metadata:
        if isinstance(item, ListsTexts):
            text = item.put_into(text, brief=bool(brief))
    return text


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key of a model, sections themselves and, dotted, what is within them."""
    found = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        for part in inner:
            if issubclass(part, BaseModel):
                found += keys_of(part, f"{prefix}{name}.")
    return found


def _kind(field: FieldInfo) -> tuple[type, tuple[str, ...]]:
    """Return what a flag's text becomes, and the names it is chosen from."""
    for item in field.metadata:
        if isinstance(item, OneOf):
            return str, tuple(item.table)
    parts = [part for part in (get_args(field.annotation) or (field.annotation,)) if part is not type(None)]
    if get_origin(field.annotation) is Literal:
        return str, tuple(map(str, parts))
    plain = [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]
    return (plain[0], ()) if len(plain) == 1 and plain[0] in (int, float, bool) else (str, ())


def _default(field: FieldInfo, key: str) -> str:
    """Return what is taken where nothing is said, for every method; nothing for what is off then."""
    by_method = {name: _within(defaults_of(name, effort_of(name)), key) for name in METHODS}
    own = None if field.is_required() else field.get_default(call_default_factory=True)
    said = {name: _text(own if value is None else value) for name, value in by_method.items()}
    (_, usual), *others = said.items()
    different = [f"{name}: {text}" for name, text in others if text != usual and text]
    return f" (default {'; '.join([usual, *different])})" if usual else ""


def _within(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, {})  # pyright: ignore[reportAssignmentType]
    return values if not isinstance(values, dict) else None


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, dict):
        return ":".join(f"{part:g}" for part in value.values())
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
