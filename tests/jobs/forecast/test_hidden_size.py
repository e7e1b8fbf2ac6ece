"""What a forecast says of runs that make the residual stream narrower."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from multipruner.commands.main import main
from tests.support.commands import arguments


@pytest.mark.parametrize("hidden", ["16", "auto"])
def test_a_dry_run_names_the_ratios_that_a_hidden_size_can_reach(
    hidden: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond those of the model's own width: narrower embeddings and a narrower head count as well."""
    flags = ["--hidden-size", hidden, "--hidden-step", "8", "--dry-run"]
    assert main(arguments(dense, tmp_path / "run", *flags)) == 0
    said = capsys.readouterr().out
    low, high, at = re.findall(r"ratios from ([\d.]+) to ([\d.]+) can be reached at hidden size (\d+)", said)[0]
    assert at == ("48" if hidden == "auto" else hidden) and "of the decoder layers'" not in said
    assert ("up to 3 hidden sizes are searched" in said) is (hidden == "auto")
    if hidden == "16":
        assert float(low) > 0.6
        for ratio, code in ((float(high) - 0.001, 0), (float(high) + 0.002, 2)):
            assert main(arguments(dense, tmp_path / "run", *flags, "--ratio", f"{ratio:.3f}")) == code
