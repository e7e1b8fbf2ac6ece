"""The house stands as it was planned: imports go down, nothing is installed under a bare name, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "errors": 0, "structure": 0, "plan": 0, "architecture": 0, "costs": 0, "latency": 0, "hub": 0,
    "recipe": 1, "merging": 0,
    "cli": 5, "commands": 5, "__main__": 5,
    "pipeline": 4, "export": 4, "card": 4, "report": 4, "journal": 4, "workspace": 4, "summary": 4, "progress": 4,
    "publish": 4, "hub_package": 4, "hub_upload": 4, "judge": 4, "quiet": 4, "api": 4, "setting": 4,
    "strategies": 4, "budgets": 4, "record": 4, "notebook": 4, "tuning": 4, "tuning_record": 4, "tuned_card": 4,
    "sweep": 4, "sweep_points": 4, "sweep_figures": 4, "sweep_folder": 4, "sequential_points": 4, "given_plan": 4,
    "searching": 4, "search_options": 4, "search_files": 4, "search_figures": 4, "search_texts": 4, "search_display": 4,
    "structure_search": 4, "schedule_search": 4, "schedule_path": 4, "losses": 4,
    "search": 3, "eval": 3, "recipes": 1,
}  # fmt: skip
DEFAULT_FLOOR = 2
SOURCES = [
    path
    for folder in ("multipruner", "search", "eval", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    if not any(part.is_symlink() for part in path.parents)
]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts if parts[0] == "multipruner" else ["multipruner", *parts]).removesuffix(".__init__")


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{target}.{alias.name}" for alias in node.names} if target == "multipruner" else {target}
    return {name for name in found if name == "multipruner" or name.startswith("multipruner.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = room(module_name(path))
    if here == "__init__":
        return
    floor = FLOORS.get(here, DEFAULT_FLOOR)
    for name in imports(path):
        there = room(name)
        if there in (here, "__init__", "__version__"):
            continue
        other = FLOORS.get(there, DEFAULT_FLOOR)
        assert other <= floor, f"{here} (floor {floor}) imports {there} (floor {other})"
        if here in ("search", "eval"):
            assert other <= 1, f"{here} may use floors 0 and 1 only, not {there}"


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    modules = {module_name(path): path for path in SOURCES}
    for name, path in modules.items():
        if path.stem != "__init__":
            graph[name] = {target for target in imports(path) if target in modules and target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", ["search", "eval"])
def test_bare_names_are_refused(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"import multipruner.{name}" in result.stderr


def test_packages_are_those_of_the_project_file() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {module_name(path) for path in SOURCES if path.name == "__init__.py"} == set(setup["packages"])
    for package in ("search", "eval", "recipes"):
        assert setup["package-dir"][f"multipruner.{package}"] == package
        assert (ROOT / "multipruner" / package).resolve() == ROOT / package


@pytest.mark.parametrize(
    "code", ["import multipruner", "import multipruner.eval", "from multipruner.commands.main import main"]
)
def test_light_imports_leave_torch_alone(code: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval'}"
    run = subprocess.run([sys.executable, "-c", f"import sys; {code}; sys.exit(bool({heavy} & set(sys.modules)))"])
    assert run.returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "one file, one thing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno <= 70, f"{node.name} is long"
