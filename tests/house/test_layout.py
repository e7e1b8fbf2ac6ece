"""The house stands as it was planned: imports go down, nothing is installed under a bare name, files stay small."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from multipruner.commands import COMMANDS
from multipruner.core.axes import AXES

ROOT = Path(__file__).parents[2]
FLOORS = {
    "core": 0,
    "config": 1, "storage": 1,
    "engine": 2, "search": 2, "eval": 2, "recipes": 2,
    "sources": 3, "importance": 3, "repair": 3, "checkpoint": 3, "console": 3, "report": 3,
    "latency": 4, "export": 4, "publish": 4, "stream": 4, "vocabulary": 4,
    "jobs": 5, "runtimes": 5,
    "jobs.apply": 6, "jobs.prune": 6, "jobs.search": 6, "jobs.sweep": 6, "jobs.tune": 6,
    "jobs.vocabulary": 6,
    "commands": 7,
    "": 8,
}  # fmt: skip
"""Every package and its floor; a package below another one, without a row of its own, is a part of that one."""
MODULES = {"search": 20, "commands": 15}
"""How many modules a package holds at most, where that is not the usual number."""
USUAL = 12
HEAVY = {"torch", "transformers", "datasets", "lm_eval"}
SLOW = HEAVY | {"matplotlib", "scipy", "deap"}
"""What nobody waits for who asks for help."""
SOURCES = [
    path
    for folder in ("multipruner", "search", "eval", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part.is_symlink() for part in path.parents)
]


def module_name(path: Path) -> str:
    """Dotted, below ``multipruner``; a package is called as it is, the whole of it ``""``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "multipruner" else parts).removesuffix("__init__").removesuffix(".")


NAMES = {module_name(path): path for path in SOURCES}
PACKAGES = {name for name, path in NAMES.items() if path.name == "__init__.py"}


def package_of(module: str) -> str:
    """The package whose row of the table counts for a module."""
    parts = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    return next(name for end in range(len(parts), -1, -1) if (name := ".".join(parts[:end])) in FLOORS)


def imported(path: Path) -> set[str]:
    """Every absolute dotted name that a file imports from, wherever in the file it does so."""
    here = ["multipruner", *module_name(path).split(".")]
    package = here if path.name == "__init__.py" else here[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join(part for part in (*base, node.module or "") if part)
            found |= {f"{target}.{alias.name}" for alias in node.names}
    return found


def modules_of_the_house(path: Path) -> set[str]:
    """The modules of this project that a file imports."""
    found = set()
    for name in imported(path):
        head, _, inner = name.partition(".")
        if head == "multipruner":
            while inner not in NAMES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = package_of(module_name(path))
    for name in modules_of_the_house(path):
        there = package_of(name)
        if there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {name} ({FLOORS[there]})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_needs_nothing_and_search_no_torch(path: Path) -> None:
    package = package_of(module_name(path))
    others = {name.partition(".")[0] for name in imported(path)} - {"multipruner"}
    if package == "core":
        assert others <= sys.stdlib_module_names
    if package == "search":
        assert not others & HEAVY


NAME_AXES = {
    "core.axes",
    "core.earlier",
    *(
        name
        for name in NAMES
        if name.startswith("core.families.") and not name.endswith((".patterns", ".tasks", ".towers"))
    ),
}
"""Who may name an axis: the table of axes, the rows of families, and the reader of version 1."""


def axes_named(tree: ast.AST) -> set[str]:
    """The axes that string literals name, alone or in the text of a layout; f-strings are looked at in their parts."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub("[()]", "", node.value).strip("+* ")
            if re.fullmatch(r"\w+(\s*[+*]\s*\w+)*", text):
                found |= set(re.findall(r"\w+", text)) & set(AXES)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_axes_are_named_in_tables_only(path: Path) -> None:
    """Everything else follows from the table, so that a new axis is a row: no key, no layout, no column by its name."""
    found = axes_named(ast.parse(path.read_text()))
    assert not found or module_name(path) in NAME_AXES, f"{path} names {sorted(found)}"


def test_names_of_axes_are_found_where_they_are() -> None:
    named = {
        'a["channels"]': {"channels"}, 'Layout("kv_groups * (queries + 2) * head_dim")': {"kv_groups", "queries"},
        'f"{rest} + channels"': {"channels"}, 'f"channels * {rest} * queries"': {"channels", "queries"},
        '"MLP channels"': set(), '"of channels and queries + more"': set(), "kv_groups = 1": set(),
        'f"{n} channels of a layer"': set(), "size.channels": set(),
    }  # fmt: skip
    assert {code: axes_named(ast.parse(code)) for code in named} == named
    assert set(NAMES) >= NAME_AXES
    found = {name: axes_named(ast.parse(NAMES[name].read_text())) for name in NAME_AXES}
    assert all(found.values()), "an exception that names none is no exception"
    assert set().union(*found.values()) == set(AXES)


def test_no_import_cycles() -> None:
    graph = {
        name: {target for target in modules_of_the_house(path) if target not in PACKAGES and target != name}
        for name, path in NAMES.items()
        if name not in PACKAGES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("package", sorted(PACKAGES - {""}))
def test_packages_stay_small(package: str) -> None:
    modules = [name for name in NAMES if name not in PACKAGES and name.rpartition(".")[0] == package]
    assert len(modules) <= MODULES.get(package, USUAL), sorted(modules)


def test_every_package_has_its_floor() -> None:
    assert set(FLOORS) <= PACKAGES
    assert {name for name in PACKAGES if "." not in name} <= set(FLOORS)


def test_tests_stand_alone() -> None:
    """What several of them need is in tests/support or in a conftest.py."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not module.startswith("tests.") or module.startswith("tests.support"), f"{path} imports {module}"


@pytest.mark.parametrize("name", ["search", "eval"])
def test_bare_names_are_refused(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"import multipruner.{name}" in result.stderr


def test_packages_are_those_of_the_project_file() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {f"multipruner.{name}".removesuffix(".") for name in PACKAGES} == set(setup["packages"])
    for package in ("search", "eval", "recipes"):
        assert setup["package-dir"][f"multipruner.{package}"] == package
        assert (ROOT / "multipruner" / package).resolve() == ROOT / package


HELP = (
    "import contextlib\nfrom multipruner.commands.main import main\nwith contextlib.suppress(SystemExit):\n    main({})"
)


def loaded(code: str) -> set[str]:
    """Which of the slow packages a piece of code loads."""
    last = f"import json, sys\njson.dump(sorted({SLOW} & set(sys.modules)), sys.stderr)"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{last}"], capture_output=True, text=True, check=True)
    return set(json.loads(run.stderr))


@pytest.mark.parametrize("package", ["search", "eval", "recipes", "config", "storage"])
def test_light_packages_leave_torch_alone(package: str) -> None:
    assert not loaded(f"import multipruner.{package}") & HEAVY


HELPS = ["import multipruner", *(HELP.format([word]) for word in ("--help", "--help-all", "--print-completion=bash"))]


@pytest.mark.parametrize("code", [*HELPS, *(HELP.format([name, "--help"]) for name in COMMANDS)])
def test_help_is_quick(code: str) -> None:
    assert not loaded(code)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "one file, one thing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno <= 70, f"{node.name} is long"
