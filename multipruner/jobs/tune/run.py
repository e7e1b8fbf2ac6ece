"""Train a pruned model a little after the cut (LoRA), and merge the result into an ordinary run folder.

This is apart from pruning, which trains nothing: it starts from a finished run and writes another folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from transformers import AutoTokenizer

from multipruner.checkpoint.classes import family_of
from multipruner.checkpoint.load import load_run
from multipruner.checkpoint.reopen import check_reopened
from multipruner.checkpoint.run_folder import RunFolder, check_name, read_run
from multipruner.checkpoint.save import check_space, check_target, save
from multipruner.config.precedence import trusts
from multipruner.config.recipe import EvaluationSpec
from multipruner.console.events import tell
from multipruner.console.progress import counting_display, judging_display, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, OutputError
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.precision import Precision, cast
from multipruner.eval import Evaluation, evaluate, perplexity
from multipruner.eval.scoring import context_length
from multipruner.jobs.finish import Run
from multipruner.jobs.record import Clock, moved, timed
from multipruner.jobs.workspace import MEASUREMENTS, SEARCH, STATE, TRAJECTORY, refuse_within
from multipruner.report.tuned_card import tuned_card
from multipruner.storage.partial import LOCK, MARK, PartialFolder

from .record import tuned_report, tuned_table, tuning_record
from .state import STATE as STATE_FILE
from .state import Progress, kept_identity
from .steps import TuneSettings, attach, train
from .text import TuningText, tuning_text

EXTRA = "tuning needs peft, which the extra 'tune' brings: pip install 'multipruner[tune]'"


@dataclass(frozen=True)
class _Job:
    """What the stages share."""

    run: RunFolder
    settings: TuneSettings
    evaluation: EvaluationSpec
    model: Any
    tokenizer: Any
    text: TuningText
    console: Console
    seconds: dict[str, float]

    @property
    def identity(self) -> dict[str, Any]:
        """All that the adapters depend on."""
        settings = self.settings
        return {
            "model": fingerprint(self.model),
            "data": self.text.hash,
            "steps": settings.steps,
            "rank": settings.rank,
            "lr": settings.lr,
            "batch": settings.batch,
            "micro_batch": settings.micro_batch or settings.batch,
            "length": settings.length,
            "seed": settings.seed,
            "device": self.model.device.type,
        }


def tune(
    folder: str | Path,
    output: str | Path,
    settings: TuneSettings,
    *,
    evaluation: EvaluationSpec | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> Run:
    """Train a pruned model with LoRA and write the merged model to a folder of its own.

    Stopped, it leaves ``OUTPUT.partial`` and goes on from there when called again in the same way.

    Args:
        folder: a finished run; it is not changed.
        output: the folder to write; it appears only when everything is there.
        settings: on what and how to train.
        evaluation: what perplexity is measured on before and after; default: the test split of WikiText-2, or the
            held-out text alone where that cannot be had.
        device: ``cpu``, ``cuda`` or ``auto``. On a CPU training computes in float32; the result has the dtype of the
            checkpoint.
        trust_remote_code: run the model's own code, for families that bring it.
        console: where progress and results go; default: nowhere.
        command: the command line, for the record.
        overwrite: replace what is in the output folder, or give up what another training left beside it.

    Returns:
        The new run, with the merged model in memory.

    Raises:
        MultiprunerError: see :mod:`multipruner.core.errors`; nothing half-written is left.
    """
    if find_spec("peft") is None:
        raise ConfigError(EXTRA)
    run, target, console = read_run(folder), Path(output), console or Console(quiet=True)
    if not isinstance(run.report.get("model"), Mapping):
        raise OutputError(f"{run.path}/report.json is damaged: it names no model; make the run again")
    folder_of_state = _check_output(run.path, target, overwrite)
    partial = folder_of_state.path
    with _held(folder_of_state, target):
        job = _prepare(run, settings, evaluation or EvaluationSpec(), device, trust_remote_code, console)
        _check_state(partial, job.identity, overwrite)
        before = _judge(job, job.model, "pruned", console)
        for name, result in before.perplexities.items():
            teller(console)(f"before: perplexity {result.value:.3f} on {name}")
        progress, merged = _train(job, partial)
        after = _judge(job, merged, "tuned", Console(quiet=True))
        record = tuning_record(
            settings, job.text, progress, before, after,
            evaluation=job.evaluation, seconds=job.seconds, device=merged.device.type,
        )  # fmt: skip
        tuned = {**record, "command": command}
        report = tuned_report(run, tuned)
        report["model"] = moved(report["model"], run.path, target)
        trajectory = run.path / TRAJECTORY
        with waiting_display(console, "saving"):
            save(
                target, merged, job.tokenizer, plan=run.plan, report=report,
                trajectory=trajectory if trajectory.exists() else None,
                card=tuned_card(report, run.plan, stock=family_of(run.config) is None), replace=overwrite,
                source=run.path, check=lambda folder: check_reopened(folder, merged, job.text.held_out),
            )  # fmt: skip
        folder_of_state.remove()
    tell(console, "result", folder=str(target), tokens=tuned["tokens"], seconds=tuned["seconds"])
    console.print(tuned_table(tuned))
    teller(console)(f"{target}: trained on {tuned['tokens']:,} tokens in {tuned['seconds']['training']:,.0f} s")
    return Run(target, run.plan, report, merged, job.tokenizer)


def _check_output(source: Path, target: Path, overwrite: bool) -> PartialFolder:
    """Return the folder for the state, beside an output folder that may be written."""
    check_name(target)
    place = target.absolute().resolve()
    if place in (source.resolve(), Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{target} cannot be the output, it is in use; choose another --output")
    refuse_within(target, str(source))
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; choose another --output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target} exists already; choose another --output, or replace it with --overwrite")
    check_target(place, overwrite)
    check_space(place, sum(path.stat().st_size for path in source.glob("*.safetensors")))
    partial = place.with_name(place.name + ".partial")
    if not overwrite and any((partial / name).exists() for name in (TRAJECTORY, MEASUREMENTS, SEARCH)):
        raise OutputError(
            f"{partial} holds an interrupted run, no training; choose another --output, or give it up with --overwrite"
        )
    return PartialFolder(partial, STATE)


@contextmanager
def _held(folder: PartialFolder, target: Path) -> Iterator[None]:
    """Hold the folder, so that no other process writes there; nothing is left behind of a training that has not kept a
    state.
    """
    partial, lock = folder.path, FileLock(folder.path / LOCK, timeout=0)
    folder.claim()
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"another process is writing to {target}; wait, or choose another --output") from None
    except OSError as error:
        raise OutputError(f"cannot write to {partial}: {error.strerror}") from error
    try:
        yield
    finally:
        if kept_identity(partial) is None and {path.name for path in partial.glob("*")} <= {LOCK, MARK}:
            folder.remove()
        lock.release()  # last: what another process has begun here must not be removed


def _check_state(partial: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Go on with a state of this very training only."""
    kept = kept_identity(partial)
    if kept is None or kept == dict(identity):
        return
    if not overwrite:
        differing = [
            f"{name}: {kept.get(name)}, now {value}" for name, value in identity.items() if kept.get(name) != value
        ]
        raise OutputError(
            f"{partial} holds a training with other settings ({'; '.join(differing)}); choose another --output, or "
            "give that training up with --overwrite"
        )
    (partial / STATE_FILE).unlink(missing_ok=True)


def _prepare(
    run: RunFolder,
    settings: TuneSettings,
    evaluation: EvaluationSpec,
    device: str,
    trust_remote_code: bool,
    console: Console,
) -> _Job:
    """Load model and text."""
    seconds = Clock(console)
    where = _device(device)
    with timed(seconds, "load"), waiting_display(console, "loading the model"):
        model: Any = load_run(run.path, trust_remote_code=trust_remote_code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(run.path, trust_remote_code=trusts(trust_remote_code))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"the tokenizer in {run.path} cannot be opened: {error}; make the run again") from error
    if settings.length > (context := context_length(model.config)):
        teller(console)(f"length = {settings.length}: cut to {context:,} tokens, the context of the model")
        settings = replace(settings, length=context)
    with timed(seconds, "text"), counting_display(console, "text") as display:
        text = tuning_text(
            settings.data, tokenizer, run.report, run.path,
            sequences=settings.steps * settings.batch, length=settings.length, seed=settings.seed,
            column=settings.text_column, template=settings.chat_template, trust=trust_remote_code,
            say=teller(console),
            progress=lambda done, total: display("text", done, total),
        )  # fmt: skip
    return _Job(run, settings, evaluation, model.to(where).eval(), tokenizer, text, console, seconds)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {name!r}: give auto, cpu or cuda (CUDA_VISIBLE_DEVICES picks a GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' cannot be used: torch sees no GPU; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _judge(job: _Job, model: Any, who: str, console: Console) -> Evaluation:
    """Measure perplexity on the evaluation text, and on what was held out of the training text."""
    computing = Precision.of(model).computing(model)
    with timed(job.seconds, "evaluation"), computing, judging_display(job.console, who) as display:
        name, ids = f"held-out {job.text.name}", job.text.held_out
        result = evaluate(
            model, job.tokenizer, job.evaluation, fallback_ids=ids, fallback_name=name, say=teller(console),
            progress=display,
        )  # fmt: skip
        held_out = {}
        if name not in result.perplexities:
            held_out[name] = perplexity(model, ids, progress=lambda *at: display("held-out text", *at))
        return Evaluation({**result.perplexities, **held_out}, result.tasks)


def _train(job: _Job, partial: Path) -> tuple[Progress, Any]:
    """Put adapters on, train, and merge them; the model object stays the same one."""
    dtype = job.model.dtype
    identity = job.identity
    if job.model.device.type == "cpu":
        cast(job.model, torch.float32)
    adapted = attach(job.model, job.settings)
    with timed(job.seconds, "this_process"), counting_display(job.console, "train") as display:

        def tell(step: int, steps: int, loss: float) -> None:
            display("train", step, steps, f"loss {loss:5.3f}")

        progress = train(adapted, job.text.train, job.settings, partial, identity, tell)
    with waiting_display(job.console, "merging"):
        merged = adapted.merge_and_unload()
        cast(merged, dtype)
    return progress, merged.eval()
