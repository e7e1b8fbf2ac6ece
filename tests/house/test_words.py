"""What the code says of itself: functions are described by a verb, placeholders are words, old names are gone."""

from __future__ import annotations

import argparse
import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from multipruner.commands import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDERS = ("multipruner", "search", "eval", "recipes")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(part.is_symlink() for part in path.parents)
]
VERBS = set(
    re.findall(
        r"\w+",
        """
    accept add allocate announce answer append apply ask begin bound build call cap carry cast catch change check choose
    claim close compare compile compute copy count create cut decide decode describe do draw drop embed encode end
    estimate evaluate exchange fetch fill find fit follow gather get give go group grow hand have hold import
    index interpolate join judge keep leave lend let list load look lower make mark measure merge move multiply name
    note open order paint pick prune print publish push put raise read rebuild recompute record refit refuse register
    remember remove rename reorder replace report reset restore return round run sample save say score search
    see select send set show silence slice solve sort split start stop sum summarise swap take tell tick time
    train truncate turn undo update use wait walk weigh write yield
    """,
    )
)
"""What a function may be said to do; a new verb is added here, another kind of word is not."""
PLACEHOLDERS = set(
    re.findall(
        r"\w+",
        """
    N NAME NAMES FILE DIR FOLDER RUN PLAN MODEL TEXT TASKS KEY VALUE VALUES BUDGET USER RATIO SHARE NUMBER RATE
    MINUTES BYTES MS REVISION BLOCKS MLP HEADS LOW HIGH POINT SENTENCE TOKENS SEQUENCES ID auto COMMAND
    """,
    )
)
"""Words that stand for the value of a flag."""


def described(path: Path) -> list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """The functions of a file with their docstrings; properties are things, and called by nouns."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text, thing = ast.get_docstring(node), any("property" in ast.unparse(one) for one in node.decorator_list)
        if text and not thing:
            found.append((node, text))
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_docstrings_of_functions_begin_with_a_verb(path: Path) -> None:
    others = [
        f"{relative(path)}:{node.lineno} {node.name}: {text.splitlines()[0]}"
        for node, text in described(path)
        if text.split()[0].strip(",.:").lower() not in VERBS
    ]
    assert others == []


@pytest.mark.parametrize("command", COMMANDS)
def test_placeholders_of_flags_are_words(command: str) -> None:
    for action in import_module(f"multipruner.commands.{command}").make_parser()._actions:
        if action.nargs == 0 or action.choices or action.help == argparse.SUPPRESS:
            continue
        words = re.findall(r"\w+", str(action.metavar or action.dest))
        assert words and set(words) <= PLACEHOLDERS, f"{command} {action.option_strings or action.dest}: {words}"


def test_one_language() -> None:
    german = re.compile(
        r"\b(und|nicht|eine[mnrs]?|für|oder|wird|sind|wenn|aber|dass|manieth|wieviel\w*)\b", re.IGNORECASE
    )
    for path in (*SOURCES, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.py")):
        found = german.findall(path.read_text(encoding="utf-8"))
        assert found == [], f"{relative(path)} says {found}"


def test_old_words_are_in_the_table_of_spellings_alone() -> None:
    """Files hold identities in the spelling of version 1, which the journals' modules write."""
    old = re.compile(r"--compensat\w+|--strategy\b|--statistics-sequences|--sweep-sequential|--method global")
    for path in (*SOURCES, *(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "benchmarks").glob("*.py")):
        found = old.findall(path.read_text(encoding="utf-8"))
        assert found == [], f"{relative(path)} says {found}"
