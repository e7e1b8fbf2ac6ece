"""What to run before a change is offered: ``nox`` for lint, types and the fast tests, ``nox --list`` for all sessions.

Every session makes an environment of its own, with the pinned versions. ``nox --no-venv`` uses the one at hand instead,
in which ``pip install -c constraints.txt -e '.[dev]'`` was done. What stands behind ``--`` is handed on:
``nox -s quick -- tests/search -x``.
"""

from __future__ import annotations

import os

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "quick"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *what: str) -> None:
    """Into the session's own environment; where it has none, what is there counts."""
    if session.virtualenv.is_sandboxed:
        session.install("-c", "constraints.txt", *what)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: faults and formatting."""
    install(session, "ruff")
    session.run("ruff", "check", *(session.posargs or ["."]))
    session.run("ruff", "format", "--check", *(session.posargs or ["."]))


@nox.session
def types(session: nox.Session) -> None:
    """pyright, of everything."""
    install(session, "-e", ".[dev]")
    session.run("pyright", *session.posargs)


@nox.session
def quick(session: nox.Session) -> None:
    """The tests that need no real model, in one process."""
    install(session, "-e", ".[test,docs]")
    session.run("python", "-m", "pytest", "-q", "-p", "no:xdist", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests on the real SmolLM2-135M model: minutes each, and the first one fetches the model."""
    install(session, "-e", ".[test,docs]")
    session.run("python", "-m", "pytest", "-q", "-m", "slow", "--timeout", "3000", "--durations", "5", *session.posargs)


@nox.session
@nox.parametrize("transformers", ["4.57.*", "5.14.0"])
def readers(session: nox.Session, transformers: str) -> None:
    """Results of this version, opened by older transformers in an environment of their own: the same logits."""
    session.install("-c", "constraints.txt", "torch", "numpy", "safetensors")
    session.install(f"transformers=={transformers}")
    reader = session.run("python", "-c", "import sys; print(sys.executable)", silent=True)
    test = ["python", "-m", "pytest", "-q", "-m", "slow", "tests/checkpoint/test_readers.py", *session.posargs]
    session.run(*test, external=True, env={"MULTIPRUNER_READER": str(reader).strip(), "PATH": os.environ["PATH"]})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in build/docs; a warning is an error."""
    install(session, "-e", ".[docs]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "docs", "build/docs", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """A benchmark by name, such as ``nox -s bench -- passes --record passes.json``; without one the exact program's."""
    install(session, "-e", ".")
    name, *flags = session.posargs or ["program"]
    session.run("python", f"benchmarks/{name}.py", *flags)
