"""The shell completes commands, flags and their values; the script is made without torch and says nothing hidden."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from multipruner.commands import COMMANDS
from multipruner.commands.base import SHELLS
from multipruner.commands.main import main
from multipruner.config.choices import METHODS
from multipruner.recipes import names


def printed(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--print-completion`` prints."""
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "completion").write_text(printed("bash", capsys))
    return tmp_path / "completion"


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers after some words, the last of which is begun (or empty)."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
    code += f"_shtab_multipruner multipruner '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    run = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_flags_and_values(script: Path) -> None:
    assert completed(script, "multipruner", "") >= set(COMMANDS) - {"prune"}
    assert completed(script, "multipruner", "--method", "") == set(METHODS)
    assert completed(script, "multipruner", "--model", "qwen") == {name for name in names() if name.startswith("qwen")}
    assert completed(script, "multipruner", "search", "--pop") == {"--population"}
    assert completed(script, "multipruner", "search", "--genome", "") == {"structure", "schedule"}
    assert {"--max-memory", "--max-latency"} <= completed(script, "multipruner", "--max")
    assert completed(script, "multipruner", "--compens") == set(), "old names are accepted, not offered"


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_that_it_can_read(shell: str, tmp_path: Path, capsys) -> None:
    text = printed(shell, capsys)
    assert "multipruner" in text and "print-completion" in text and "compensation" not in text
    assert all(command in text for command in COMMANDS if command != "prune")
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        check = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
        assert (check.returncode, check.stderr) == (0, "")


def test_another_shell_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "dos"]) == 2
    said = capsys.readouterr().err
    assert all(shell in said for shell in SHELLS)
