"""The pages hold: the site builds without a warning, links resolve, commands parse, examples run, nothing is copied."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import pytest

from multipruner.commands import COMMANDS
from multipruner.commands.main import main
from multipruner.config.choices import IMPORTANCES
from multipruner.config.choices import TEXTS as SOURCES
from multipruner.config.recipe import CalibrationSpec, EvaluationSpec, PackageSource, Recipe
from multipruner.core.families import FAMILIES
from multipruner.jobs.finish import Run
from multipruner.recipes import names, parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *PAGES]
MEASURED = ("results.md", "notes.md", "performance.md", "correctness.md")
"""Where numbers come from."""
NEEDED = ("sphinx", "furo", "myst_parser")
ABSENT = [name for name in NEEDED if find_spec(name) is None]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def _module(path: Path) -> ModuleType:
    with patch.object(sys, "path", [str(path.parent), *sys.path]):
        return import_module(path.stem)


def _blocks(path: Path, language: str) -> list[str]:
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE) for match in found if match[2] == language]


def _commands(path: Path) -> list[str]:
    """Every ``python -m multipruner`` line of a page: in shell blocks, and within sentences."""
    text = path.read_text(encoding="utf-8")
    lines = [part.strip() for block in _blocks(path, "sh") for line in block.splitlines() for part in line.split("&&")]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    return [line for line in (*lines, *spans) if line.startswith("python -m multipruner")]


COMMAND_LINES = sorted({(path.name, line) for path in TEXTS for line in _commands(path)})
SNIPPETS = [
    pytest.param(path.name, block, id=f"{path.stem}-{number}")
    for path in TEXTS
    for number, block in enumerate(_blocks(path, "python"))
]


# --- what the pages say


def test_commands_were_found() -> None:
    assert len(COMMAND_LINES) > 30
    assert {line.split()[3] for _, line in COMMAND_LINES if len(line.split()) > 3} >= {"eval", "latency", "push"}


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_every_command_of_the_pages_is_understood(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command's own parser; where it prunes, up to the finished recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(_blocks(DOCS / "recipes.md", "yaml")[0])
    # in sentences, square brackets hold what may be left out, and R stands for a ratio
    words = shlex.split(re.sub(r"[\[\]]", "", line).replace("--ratio R", "--ratio 0.2"), comments=True)[3:]
    command = words.pop(0) if words and words[0] in COMMANDS else "prune"
    if not words:
        return  # the command is only named
    ends = bool({"--help", "--print-completion"} & set(words))
    if ends or command != "prune":
        with pytest.raises(SystemExit) if ends else patch.object(sys, "argv", []):
            _module(DOCS / "generated.py").parser_of(command).parse_args(words)
        return
    recipes: list[Recipe] = []
    import_module("multipruner.jobs.prune.run")  # keeps the real one
    for job in (
        "multipruner.jobs.prune.run.prune_recipe",
        "multipruner.jobs.sweep.run.sweep",
        "multipruner.jobs.prune.given_plan.apply_given_plan",
        "multipruner.jobs.forecast.run.foretell",
    ):
        monkeypatch.setattr(job, lambda recipe, *rest, **options: recipes.append(recipe))
    monkeypatch.setattr("multipruner.console.quiet.quiet_libraries", lambda: None)
    monkeypatch.setattr("multipruner.console.trackers._is_installed", lambda name: True)  # as if all were installed
    monkeypatch.setattr("multipruner.console.trackers.Tracker.hear", lambda self, event: None)
    assert import_module("multipruner.commands.prune").run(words) == 0
    assert recipes or "list" in words


def test_recipe_files_of_the_pages_are_valid() -> None:
    blocks = [block for path in TEXTS for block in _blocks(path, "yaml")]
    assert blocks
    for block in blocks:
        Recipe.build(parse(block, "page"))


@pytest.mark.parametrize("page", ["../README.md", "faq.md", "how.md", "quickstart.md"])
def test_numbers_in_sentences_are_those_of_the_results(page: str) -> None:
    known = "".join((DOCS / name).read_text(encoding="utf-8") for name in MEASURED)
    text = FENCE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    versions = r"`[^`]+`|arXiv [\d.]+|arxiv\.org/abs/[\d.]+|(?:Python|transformers)(?: >=)? \d+\.\d+"
    sentences = re.sub(versions, "", text)
    numbers = set(re.findall(r"(?<![\w.:])\d+\.\d+(?![\w.]*/)|\d+(?= GB)", sentences))
    missing = [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", known)]
    assert missing == []


@pytest.mark.parametrize(("page", "block"), SNIPPETS)
def test_python_of_the_pages_compiles(page: str, block: str) -> None:
    compile(block, page, "exec")
    imported = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    for node in imported:
        module = import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.fixture
def place(run: Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the names that the pages use."""
    shutil.copytree(dense, tmp_path / "my-model")
    shutil.copyfile(dense / "text.txt", tmp_path / "my.txt")
    for name in ("runs/mine", "runs/llama-0.2"):
        shutil.copytree(run.folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _execute(page: str) -> dict[str, object]:
    """The examples of a page, top to bottom, in one namespace; those that prune a real model are left out."""
    space: dict[str, object] = {"__name__": page}
    with patch.dict(FAMILIES), patch.dict(IMPORTANCES), patch.dict(SOURCES):
        for block in _blocks(DOCS / page, "python"):
            if "multipruner.prune(" not in block:
                exec(compile(block, page, "exec"), space)
    return space


def test_the_examples_of_an_importance_and_an_objective_run(place: Path) -> None:
    space = _execute("extending.md")
    losses, prunable, structure = space["losses"], space["prunable"], space["structure"]
    assert isinstance(losses, dict) and len(set(losses.values())) == 3, "three orders, three losses"
    assert prunable.costs.ratio(structure) == pytest.approx(0.1, abs=0.05)  # pyright: ignore[reportAttributeAccessIssue]
    counted = sum(parameter.numel() for parameter in space["pruned"].parameters())  # pyright: ignore[reportAttributeAccessIssue]
    assert counted == prunable.costs.parameters(structure)  # pyright: ignore[reportAttributeAccessIssue]
    assert "output-norm" not in IMPORTANCES and "proverbs" not in SOURCES
    assert space["proverbs"].ids.shape == (2, 16)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_example_of_a_family_runs(place: Path) -> None:
    assert "Pruned" in type(_execute("adding-a-family.md")["pruned"]).__name__


def test_the_examples_of_loading_and_training_run(place: Path) -> None:
    _execute("quickstart.md")
    _execute("faq.md")
    assert (place / "runs/tuned/model.safetensors").is_file()


# --- what is read off the code


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_on_the_page_is_the_help(command: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = _module(DOCS / "generated.py")
    monkeypatch.setenv("COLUMNS", generated.WIDTH)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert generated.help_of(command) == capsys.readouterr().out.rstrip()


def test_every_key_family_and_recipe_is_on_its_page() -> None:
    generated = _module(DOCS / "generated.py")
    rows = re.findall(r"^\| `(\w+)` \|", generated.keys(), re.MULTILINE)
    sections = ("calibration", "evaluation", "fallback")
    own = [key for key in Recipe.model_fields if key not in sections]
    assert rows == own + [
        key for model in (CalibrationSpec, EvaluationSpec, PackageSource) for key in model.model_fields
    ]
    assert re.findall(r"^\| `([^`]+)` \|", generated.families(), re.MULTILINE) == list(FAMILIES)
    assert re.findall(r"^\| `([^`]+)` \|", generated.recipes(), re.MULTILINE) == names()


def test_defaults_and_bounds_are_the_recipes_own() -> None:
    keys = _module(DOCS / "generated.py").keys()
    assert "| `ratio` | `--ratio` | number > 0 < 1 or nothing | `0.2` |" in keys
    assert f"| `length` | `--length` | integer, ≥ 2 | `{CalibrationSpec().length}` |" in keys
    assert "| `model` | `--model` | text | (needed) |" in keys


@pytest.mark.parametrize("name", ["how_it_works", "pipeline"])
def test_the_figures_in_the_repository_are_what_their_scripts_draw(name: str) -> None:
    script = _module(DOCS / "figures" / f"{name}.py")
    drawn = script.drawn()
    kept = script.PICTURE.read_text(encoding="utf-8")
    for pattern in (r"<text[^>]*>([^<]*)<", r'<g id="(\w+)">'):
        assert re.findall(pattern, drawn) == re.findall(pattern, kept) != []


def test_the_parts_of_the_picture_are_packages() -> None:
    named = {part for box in _module(DOCS / "figures" / "pipeline.py").BOXES for part in box.packages}
    assert named and [name for name in named if find_spec(f"multipruner.{name}") is None] == []


# --- what was measured


RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_tables_of_results_are_those_that_were_recorded(page: Path) -> None:
    """``python docs/generated.py`` writes them anew."""
    text = page.read_text(encoding="utf-8")
    assert _module(DOCS / "generated.py").with_results(text) == text


def test_every_result_is_on_a_page() -> None:
    asked = re.findall(r"<!-- results: ([\w-]+) -->", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert sorted(asked) == sorted(path.stem for path in RESULTS) != []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_is_from(path: Path) -> None:
    results = _module(ROOT / "benchmarks/results.py")
    found = results.read(path)
    assert found["name"] and all(found[key] for key in ("command", "commit"))
    assert {"processor", "isa", "cores", "threads"} <= set(found["machine"])
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert results.text_of(found) == path.read_text(encoding="utf-8"), "one line per row, so that changes can be read"


# --- the site


class Links(HTMLParser):
    """Where a page points, what it fetches by itself, and the places that others can point at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name == "href" and value and tag == "a":
                self.links.append(value)
            elif value and ((name == "src") or (name == "href" and tag == "link")):
                self.fetched.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if ABSENT:
        pytest.skip(f"{', '.join(ABSENT)} not installed (pip install -e '.[docs]')")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{target}.doctrees", DOCS, target]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return target


def test_the_site_has_a_page_for_every_text(site: Path) -> None:
    for page in PAGES:
        text = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        assert "generated:" not in text and "<h1>" in text
    assert "multipruner.Recipe" in (site / "api.html").read_text(encoding="utf-8")


def test_links_within_the_site_resolve(site: Path) -> None:
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    seen = 0
    for path, page in pages.items():
        for link in (*page.links, *page.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name} points at {link}"
            if parts.fragment and target in pages:
                anchor = unquote(parts.fragment)
                assert anchor in pages[target].anchors, f"{path.name} points at {link}"
                seen += 1
    assert seen > 50


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        fetched = Links(path.read_text(encoding="utf-8")).fetched
        assert fetched and not [link for link in fetched if urlsplit(link).netloc]
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path
