"""Progress: a moving line on a terminal, plain lines without one, also while the code below calls nobody back."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from multipruner.config.recipe import EvaluationSpec, Recipe
from multipruner.console import plain_lines
from multipruner.console.generations import generation_display
from multipruner.console.plain_lines import PlainLines, spoken
from multipruner.console.progress import (
    counting_display,
    judging_display,
    search_display,
    sharing_display,
    waiting_display,
)
from multipruner.eval import evaluate
from multipruner.eval.harness import run_tasks
from multipruner.jobs import finish
from multipruner.jobs.prune import run as job
from multipruner.publish import push as pushing
from multipruner.search import Dimension
from multipruner.search import Progress as SearchProgress
from multipruner.search.settings import Settings
from tests.support.tiny import tiny_model, tiny_tokenizer

SOON, NEVER, PATIENCE = 0.01, 3600.0, 60.0


def piped() -> tuple[Console, Callable[[], str]]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=80), file.getvalue


def until(holds: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.001)


def beating() -> int:
    """Threads that print lines."""
    return sum(thread.name == "progress" for thread in threading.enumerate())


def saw(said: Callable[[], str], pattern: str) -> Callable[[], object]:
    return lambda: re.search(pattern, said(), re.MULTILINE)


def test_a_count_is_told_while_nobody_calls() -> None:
    console, said = piped()
    with counting_display(console, "text", every=SOON) as tell:
        until(saw(said, r"^text, \d+ s$"))
        tell("moments", 24, 60)
        until(saw(said, r"^moments 24/60 \(40 %\), \d+ s, about \d+ s left$"))
        count = said().count("24/60")
        until(lambda: said().count("24/60") > count + 3)
        tell("moments", 60, 60)
        until(saw(said, r"^moments 60/60 \(100 %\), \d+ s$"))
        tell("order", 0, 0)
        until(saw(said, r"^order, \d+ s$"))
    assert re.search(r"^text: \d+ s\n(.*\n)*moments: 60 in \d+ s\n(.*\n)*order: \d+ s\n$", said(), re.MULTILINE)
    lines = said().splitlines()
    assert all(re.fullmatch(r"(text|moments|order).* s( left)?", line) for line in lines), "a line each"


def test_a_display_says_what_it_knows() -> None:
    console, said = piped()
    expected: dict[Dimension, float] = {"blocks": 300.0, "mlp": 100.0}
    with search_display(console, expected, 0.2, every=SOON) as show:
        show(SearchProgress("blocks", 3, 0.05, 0.0, 0.1, 1.5, 10, 40))
        until(saw(said, r"^blocks \d+ %, \d+ s, about \d+ s left, step 3  ratio 5\.00% of 20%  ppl 4\.482 "))
    assert re.search(r"^search: \d+ s\n$", said(), re.MULTILINE)
    console, said = piped()
    with sharing_display(console, "latency", every=SOON) as share:
        share("prefill-b1-t512", 0.25, 1)
        until(saw(said, r"^prefill-b1-t512 25 %, \d+ s, about \d+ s left$"))
    console, said = piped()
    with waiting_display(console, "loading the model", every=SOON):
        until(saw(said, r"^loading the model, \d+ s$"))
    assert re.search(r"^loading the model: \d+ s\n$", said(), re.MULTILINE)
    console, said = piped()
    with generation_display(console, Settings(population=8, generations=3), "evolution", 1, every=SOON) as generations:
        generations.tick()
        until(saw(said, r"^evolution \d+ %, \d+ s, about \d+ s left, first population$"))


DISPLAYS: dict[str, Callable[..., Any]] = {
    "count": partial(counting_display, what="text"),
    "search": partial(search_display, expected={"blocks": 1.0}, target=0.2),
    "generation": partial(generation_display, settings=Settings(), name="evolution", share=1),
    "share": partial(sharing_display, what="latency"),
    "waiting": partial(waiting_display, what="saving"),
    "judging": partial(judging_display, who="dense"),
}


@pytest.mark.parametrize("name", DISPLAYS)
def test_what_is_quick_or_quiet_prints_nothing(name: str) -> None:
    console, said = piped()
    with DISPLAYS[name](console, every=NEVER):
        assert beating() == 1
    assert beating() == 0
    assert said() == ""
    console.quiet = True
    with DISPLAYS[name](console, every=SOON):
        time.sleep(5 * SOON)
    assert said() == ""


@pytest.mark.parametrize("name", DISPLAYS)
def test_a_terminal_has_its_bar_and_no_lines(name: str) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, _environ={})
    with DISPLAYS[name](console, every=SOON):
        time.sleep(5 * SOON)
    assert "━" in file.getvalue()
    assert not re.search(r"\d s\b", file.getvalue())


def test_the_bar_of_a_count_is_as_it_was() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None, _environ={})
    with counting_display(console, "text") as tell:
        tell("moments", 24, 60)
        until(lambda: re.search(r"moments +━+.* 24/60 ", file.getvalue()))


def test_an_error_ends_the_lines_and_is_not_summed_up() -> None:
    console, said = piped()
    with pytest.raises(KeyboardInterrupt), counting_display(console, "text", every=SOON) as tell:
        tell("text", 1, 2)
        until(said)
        raise KeyboardInterrupt
    assert beating() == 0
    assert "text: " not in said()


def test_a_broken_pipe_does_not_end_the_run() -> None:
    class Broken(io.StringIO):
        tried = False

        def write(self, text: str) -> int:
            self.tried = True
            raise OSError("no space left on device")

    file = Broken()
    with waiting_display(Console(file=file, force_terminal=False), "saving", every=SOON):
        until(lambda: file.tried)


def test_lines_come_while_standard_output_is_kept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """As lm-eval's is; afterwards the console follows standard output again."""
    own, other = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    console = Console(force_terminal=False)
    with waiting_display(console, "requests", every=SOON), redirect_stdout(io.StringIO()) as kept:
        until(own.getvalue)
        assert kept.getvalue() == ""
    monkeypatch.setattr(sys, "stdout", other)
    console.print("more")
    assert other.getvalue() == "more\n"


def test_time_left_is_judged_by_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a resumed run finds done already took no time."""
    now = 1000.0
    monkeypatch.setattr(plain_lines.time, "monotonic", lambda: now)
    lines = PlainLines(Console(quiet=True), "rounds", counts=True, every=NEVER)
    lines.show("rounds", 500, 1000)
    said = []
    for done in range(500, 560):
        now += 30
        lines.show("rounds", done, 1000)
        said.append(lines._line())
    assert said[0] == "rounds 500/1000 (50 %), 30 s, about 30 s left"
    assert said[-1] == "rounds 559/1000 (56 %), 30 min, about 3.7 h left"


def test_durations_are_spoken_in_a_suitable_unit() -> None:
    assert [spoken(seconds) for seconds in (0.4, 599, 601, 10800)] == ["0 s", "599 s", "10 min", "3.0 h"]


def test_a_push_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    console, said = piped()
    monkeypatch.setattr(plain_lines, "EVERY", SOON)
    monkeypatch.setattr(pushing, "prepare", lambda *args, **options: SimpleNamespace(run=SimpleNamespace(foreign=())))
    monkeypatch.setattr(pushing, "read_token", lambda file: "token")
    monkeypatch.setattr(pushing, "_ask", lambda repo, console: beating() == 0)  # no line in the middle of the question

    def sent(package: Any, *, public: bool, confirm: Callable[[], bool] | None, **options: Any) -> pushing.Pushed:
        assert confirm is None or confirm()
        before = said().count("push, ")
        until(lambda: said().count("push, ") > before + 1)
        return pushing.Pushed("me/it", "url", "commit", "v1", (), (), (), public)

    monkeypatch.setattr(pushing, "push_to_hub", sent)
    for public in (False, True):
        assert pushing.push("folder", "me/it", public=public, console=console)
    assert beating() == 0
    assert len(re.findall(r"^push: \d+ s$", said(), re.MULTILINE)) == 2


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(2000)))
    return path


def test_evaluation_tells_how_far_it_is(text: Path) -> None:
    spec = EvaluationSpec(text=str(text), length=32, max_tokens=128)
    told: list[tuple[str, int, int]] = []
    evaluate(tiny_model("llama"), tiny_tokenizer(), spec, progress=lambda *at: told.append(at))
    assert told == [("perplexity", 0, 0), *(("perplexity", done, 4) for done in range(5))]


def test_requests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "tiny.jsonl").write_text('{"q": "w5 w6", "a": "w7 w8"}\n{"q": "w9", "a": "w7"}\n')
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'tiny.jsonl'}}}}}\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    )
    kinds = {
        "multiple_choice": "doc_to_choice: ['w7 w8', 'w7', 'w11']\nmetric_list: [{metric: acc}]\n",
        "loglikelihood_rolling": "metric_list: [{metric: word_perplexity}]\n",
        "generate_until": "generation_kwargs: {until: ['w3'], max_gen_toks: 2}\nmetric_list: [{metric: exact_match}]\n",
    }
    for kind, more in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(f"task: tiny_{kind}\noutput_type: {kind}\n{common}{more}")
    told: list[tuple[int, int]] = []
    names = [f"tiny_{kind}" for kind in kinds]
    run_tasks(tiny_model("llama"), tiny_tokenizer(), names, include_path=tmp_path, progress=lambda *at: told.append(at))
    assert told == [(done, total) for total in (6, 2, 2) for done in range(total + 1)]


def test_a_piped_run_is_never_silent(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the evaluation waits for the line that it should lead to."""
    tiny_model("llama", layers=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(plain_lines, "EVERY", SOON)
    console, said = piped()

    def watched(*args: Any, progress: Callable[[str, int, int], None], **options: Any) -> Any:
        who = ("dense", "pruned")[len(seen) > 0]

        def tell(what: str, done: int, total: int) -> None:
            progress(what, done, total)
            if done:
                until(saw(said, rf"^{who} {what} {done}/{total} \(\d+ %\), \d+ s"))
                seen.append(done)

        return evaluate(*args, progress=tell, **options)

    seen: list[int] = []
    monkeypatch.setattr(finish, "evaluate", watched)
    recipe = Recipe.build(
        {
            "model": str(tmp_path / "dense"), "ratio": 0.2, "channel_group": 10, "repair": "none",
            "importance": "magnitude",
            "calibration": {"source": str(text), "sequences": 2, "length": 16},
            "evaluation": {"text": str(text), "length": 32, "max_tokens": 96},
        }
    )  # fmt: skip
    torch.manual_seed(0)
    job.prune_recipe(recipe, tmp_path / "out", console=console)
    assert seen == [1, 2, 3, 1, 2, 3]
    assert "pruned perplexity: 3 in " in said()
