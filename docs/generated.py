"""The parts of the pages that are read off the code: families, recipes and their keys, commands, importances.

A page asks for one by a line ``<!-- generated: NAME -->``; ``NAME`` is a key of :data:`PARTS`. A line
``<!-- results: NAME -->`` asks for the table of ``benchmarks/results/NAME.json``. It stands in the page too, for those
who read it unbuilt: ``python docs/generated.py`` writes it anew. Needs no Sphinx, so that tests can compare what the
pages say with what the code does.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin
from unittest.mock import patch

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from multipruner.commands import COMMANDS
from multipruner.commands.base import Parser
from multipruner.config.choices import IMPORTANCES, METHODS, OneOf, loaded
from multipruner.config.counts import MOST
from multipruner.config.effort import EFFORTS
from multipruner.config.fields import described
from multipruner.config.recipe import CalibrationSpec, EvaluationSpec, PackageSource, Recipe
from multipruner.core import errors
from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.blocks import BlockSpec
from multipruner.core.costs import COSTS
from multipruner.core.families import FAMILIES, Family
from multipruner.core.families.towers import TOWERS
from multipruner.core.families.vision import CLASSIFIERS
from multipruner.recipes import catalogue

MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
RESULT = re.compile(r"^(<!-- results: ([\w-]+) -->\n)(?:\n\|.*(?:\n\|.*)*\n)?", re.MULTILINE)
"""The mark of a table of results, and the table below it."""
DOCS = Path(__file__).parent
WIDTH = "96"
"""Columns of the help texts."""


def fill(text: str) -> str:
    """A page's text with every mark replaced.

    Raises:
        KeyError: when a mark names no part.
        FileNotFoundError: when a mark names no result.
    """
    text = RESULT.sub(lambda match: f"{result(match[2])}\n", text)
    return MARK.sub(lambda match: PARTS[match[1]](), text)


def with_results(text: str) -> str:
    """A page's text with the tables of results written anew below their marks.

    Raises:
        FileNotFoundError: when a mark names no result.
    """
    return RESULT.sub(lambda match: f"{match[1]}\n{result(match[2])}\n", text)


def result(name: str) -> str:
    """The table of a result of a benchmark."""
    with patch.object(sys, "path", [str(DOCS.parent / "benchmarks"), *sys.path]):
        results: Any = import_module("results")
    found = results.read(results.FOLDER / f"{name}.json")
    return results.markdown(found["columns"], found["rows"])


def parser_of(command: str) -> Parser:
    """The parser of a command."""
    return import_module(f"multipruner.commands.{command}").make_parser()


def help_of(command: str) -> str:
    """What ``--help`` of a command prints, at a fixed width and without colours."""
    with patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1"}):
        return parser_of(command).format_help().rstrip()


def full_help_of(command: str) -> str:
    """What ``--help-all`` of a command prints; empty where ``--help`` shows everything."""
    parser = parser_of(command)
    with patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1"}):
        return parser.format_all().rstrip() if parser.everyday else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(value: object) -> str:
    """A value as inline code."""
    return f"`{value}`"


def families() -> str:
    """One row per family, straight from the table of architectures."""
    from multipruner.export.gguf_model import GGUF_FAMILIES

    labels = dict.fromkeys(kind.label for kind in BLOCK_KINDS.values())
    rows = (
        (code(name), f"{code(spec.class_name)}{', code of its own' if spec.remote_code else ''}",
         *(_of_label(spec, label) for label in labels), _only(spec),
         "yes" if name in GGUF_FAMILIES else "no")
        for name, spec in FAMILIES.items()
    )  # fmt: skip
    titles = (f"{label[0].upper()}{label[1:]}" for label in labels)
    return table(("model type", "class", *titles, "only with", "GGUF export"), rows)


def _of_label(spec: Family, label: str) -> str:
    """The blocks of a family that people call so, of any of its rows."""
    blocks = (block for row in (spec, *spec.others) for block in row.blocks if BLOCK_KINDS[block.kind].label == label)
    return " or ".join(dict.fromkeys(map(_block, blocks)))


def towers() -> str:
    """One row per model of several modalities whose text tower is taken out."""
    rows = (
        (code(name), code(row.class_name), " or ".join(f"{code(f'{start}*')}" for start in dict.fromkeys(row.starts)),
         ", ".join(f"{code(own)} as {code(family)}" for own, family in row.text.items()))
        for name, row in TOWERS.items()
    )  # fmt: skip
    return table(("model type", "class", "the tower's tensors", "pruned as another family"), rows)


def classifiers() -> str:
    """One row per family of image classifiers."""
    rows = (
        (code(name), code(spec.class_name), *(_either(spec, kind) for kind in spec.kinds), spec.task.judged)
        for name, spec in CLASSIFIERS.items()
    )
    labels = (BLOCK_KINDS[kind].label for kind in next(iter(CLASSIFIERS.values())).kinds)
    titles = (f"{label[0].upper()}{label[1:]}" for label in labels)
    return table(("model type", "class", *titles, "the head reads"), rows)


def _either(spec: Family, kind: str) -> str:
    """The blocks of a kind that the rows of a family have."""
    return " or ".join(dict.fromkeys(_block(row.block(kind)) for row in (spec, *spec.others)))


def _only(spec: Family) -> str:
    """The settings that a family's rows are for: one row, then another."""
    rows = [row.needs for row in (spec, *spec.others)]
    said = (", ".join(code(f"{key} = {' or '.join(map(repr, some))}") for key, some in needs.items()) for needs in rows)
    return "" if not all(rows) else "; or ".join(said)


def _block(block: BlockSpec) -> str:
    """Its projections, and the layout of those in which several parts share one matrix."""
    inputs = ", ".join(
        code(tensor.path.removesuffix(".weight"))
        + next((f" ({layout.text})" for layout in tensor.dims if "+" in layout.text), "")
        for tensor in block.inputs
    ) or code(block.path)
    if block.routed:
        return f"{code(block.tensors[0].path.removesuffix('.weight'))}, {code(block.routed)}"
    return f"{inputs} → {code(block.output)}"


def recipes() -> str:
    """The catalogue."""
    rows = (
        (code(recipe.name), recipe.method, f"{recipe.ratio or 0:g}", recipe.shares_text(), str(recipe.channel_group),
         f"{code(recipe.model)}: {recipe.description}")
        for recipe in catalogue()
    )  # fmt: skip
    headings = ("recipe", "method", "ratio", "shares", "channels per group", "model")
    return table(headings, rows)


SECTIONS: dict[str, tuple[str, type[BaseModel]]] = {
    "": ("The run", Recipe),
    "calibration": ("`calibration`", CalibrationSpec),
    "evaluation": ("`evaluation`", EvaluationSpec),
    "fallback": ("`fallback`", PackageSource),
}
"""Prefix of the keys -> heading and model. Within a recipe the prefix is a key that holds the others."""


def keys() -> str:
    """Every key of a recipe: its flag, the values it takes, its default, what it means."""
    flags = _flags()
    parts = []
    for prefix, (heading, model) in SECTIONS.items():
        about = "" if model is Recipe else f"{_paragraphs(model.__doc__)}\n\n"
        rows = []
        for name, field in model.model_fields.items():
            if name in SECTIONS:
                continue
            flag, said = flags.get(f"{prefix}.{name}".lstrip("."), ("", ""))
            rows.append((code(name), code(flag) if flag else "", _values(field), _default(field),
                         described(field) or said))  # fmt: skip
        parts.append(f"### {heading}\n\n{about}{table(('key', 'flag', 'values', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts)


def _paragraphs(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("``", "`")


def _flags() -> dict[str, tuple[str, str]]:
    """Recipe key -> flag of the main command and its help (the flags' destinations are the keys)."""
    return {
        action.dest: (max(action.option_strings, key=len), action.help or "")
        for action in parser_of("prune")._actions
        if action.option_strings
    }


def _values(field: FieldInfo) -> str:
    return _names(field.metadata) or ", ".join([_type(field.annotation), *_bounds(field.metadata)])


def _names(metadata: Iterable[Any]) -> str:
    """The names of the table that a field chooses from; empty where it chooses from none."""
    return ", ".join(code(name) for item in metadata if isinstance(item, OneOf) for name in item.table)


def _bounds(constraints: Iterable[Any]) -> list[str]:
    return [
        f"{sign} {value:g}"
        for item in constraints
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if (value := getattr(item, name, None)) not in (None, MOST)
    ]


def _type(kind: Any) -> str:
    if kind is None or kind is type(None):
        return "nothing"
    arguments = get_args(kind)
    if str(get_origin(kind)) == "typing.Literal":
        return ", ".join(code(value) for value in arguments)
    if hasattr(kind, "__metadata__"):
        if names := _names(kind.__metadata__):
            return names
        inner = [part for item in kind.__metadata__ for part in getattr(item, "metadata", [])]
        return " ".join([_type(kind.__origin__), *_bounds(inner)])
    if get_origin(kind) is dict:
        return f"mapping from {_type(arguments[0])} to {_type(arguments[1])}"
    if get_origin(kind) is tuple:
        return f"list of {_type(arguments[0])}"
    if arguments:
        return " or ".join(_type(part) for part in arguments)
    name = str(kind.__name__)
    return {"str": "text", "int": "integer", "float": "number", "bool": "yes or no"}.get(name, name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {part:g}" for key, part in value.items())
    elif isinstance(value, tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, bool):
        value = str(value).lower()
    if value is None:
        return "none"
    return code(value) if value != "" else ""


def methods() -> str:
    """What each method sets, and what it is by default."""
    return table(("method", "sets"), ((code(name), _settings(row.preset)) for name, row in METHODS.items()))


def efforts() -> str:
    """What each effort sets for each method, and about what it costs."""
    columns = ("effort", *(f"sets for {name}" for name in METHODS), "costs")
    rows = (
        (code(name), *(_settings(row.by_method.get(method, {})) for method in METHODS), row.costs)
        for name, row in EFFORTS.items()
    )
    return table(columns, rows)


def _settings(values: Mapping[str, Any]) -> str:
    """Recipe fields by their dotted keys."""
    flat = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    for prefix, inner in values.items():
        if isinstance(inner, Mapping):
            flat |= {f"{prefix}.{key}": value for key, value in inner.items()}
    return ", ".join(code(f"{key}: {value}") for key, value in flat.items())


def budgets() -> str:
    """The flags of the budgets and the units they take."""
    rows = ((code(cost.flag), code(name), cost.help, ", ".join(code(unit) for unit in cost.typed if unit))
            for name, cost in COSTS.items())  # fmt: skip
    return table(("flag", "key within `budgets`", "of what", "units"), rows)


def commands() -> str:
    """The help of every command, as it is printed."""
    parts = []
    for name, summary in COMMANDS.items():
        typed = "python -m multipruner" + ("" if name == "prune" else f" {name}")
        parts.append(f"## {name}\n\n`{typed}`: {summary}.\n\n```text\n{help_of(name)}\n```")
        if everything := full_help_of(name):
            parts.append(f"`{typed} --help-all`:\n\n```text\n{everything}\n```")
    return "\n\n".join(parts)


def importances() -> str:
    """The orders there are, with the first paragraph of what each says about itself."""
    rows = (
        (code(name), "yes" if row.moments else "no", _plain(loaded(row.by).__doc__))
        for name, row in IMPORTANCES.items()
    )
    return table(("name", "needs moments", "what it looks at"), rows)


def faults() -> str:
    """The errors that are a user's to mend."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return table(("class", "when"), ((code(kind.__name__), _plain(kind.__doc__)) for kind in kinds))


def _plain(text: str | None) -> str:
    """The first paragraph of a docstring as Markdown."""
    first = inspect.cleandoc(text or "").split("\n\n")[0]
    return re.sub(r":\w+:`\.?([^`]+)`", r"`\1`", first).replace("``", "`")


PARTS: dict[str, Callable[[], str]] = {
    "families": families,
    "towers": towers,
    "classifiers": classifiers,
    "recipes": recipes,
    "keys": keys,
    "methods": methods,
    "efforts": efforts,
    "budgets": budgets,
    "commands": commands,
    "importances": importances,
    "errors": faults,
}


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := with_results(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(page)
