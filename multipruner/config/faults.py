"""What is wrong with a recipe, in the words of who wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import ValidationError

from multipruner.core.errors import did_you_mean, shortened

_BRANCH = re.compile(r"(constrained-|literal\[|int$|float$|str$)")
"""What pydantic calls a part of a union, in the place of a fault."""


def explained(error: ValidationError, keys: Iterable[str]) -> str:
    """Return one line per fault: the field, the value, what is allowed."""
    lines: dict[str, str] = {}
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"] if not _BRANCH.match(str(part))) or "recipe"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            lines[field] = f"unknown key {field!r}{did_you_mean(field, keys)}"
        elif field in lines:
            lines[field] += f", or {message[:1].lower()}{message[1:]}"
        else:
            said = "" if field == "recipe" else f"{field} = {shortened(repr(fault.get('input')))}: "
            lines[field] = f"{said}{message}"
    return "; ".join(lines.values())
