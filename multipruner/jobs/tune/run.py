"""Train a pruned model a little after the cut, by the dense model or by text, into an ordinary run folder.

This is apart from pruning, which trains nothing: it starts from a finished run and writes another folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from multipruner.checkpoint.classes import family_of
from multipruner.checkpoint.reopen import check_reopened
from multipruner.checkpoint.run_folder import check_name, read_run
from multipruner.checkpoint.save import check_space, check_target, save
from multipruner.config.recipe import EvaluationSpec
from multipruner.console.events import tell
from multipruner.console.progress import counting_display, judging_display, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, OutputError
from multipruner.engine.precision import Precision, cast
from multipruner.eval import Evaluation, evaluate, perplexity
from multipruner.jobs.finish import Run
from multipruner.jobs.record import moved, timed
from multipruner.jobs.workspace import MEASUREMENTS, SEARCH, STATE, TRAJECTORY, refuse_within
from multipruner.report.tuned_card import tuned_card
from multipruner.storage.partial import LOCK, MARK, PartialFolder

from .prepare import Job, prepare
from .record import tuned_report, tuned_table, tuning_record
from .state import STATE as STATE_FILE
from .state import Progress, kept_identity
from .steps import TuneSettings, attach, merged, train

EXTRA = "tuning needs peft, which the extra 'tune' brings: pip install 'multipruner[tune]'"


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
    """Train a pruned model and write the result to a folder of its own.

    Stopped, it leaves ``OUTPUT.partial`` and goes on from there when called again in the same way.

    Args:
        folder: a finished run; it is not changed.
        output: the folder to write; it appears only when everything is there.
        settings: on what and how to train.
        evaluation: what perplexity is measured on before and after; default: the test split of WikiText-2, or the
            held-out text alone where that cannot be had.
        device: ``cpu``, ``cuda`` or ``auto``. Training computes in the type that this machine multiplies fastest; what
            learns is in float32, and the result has the dtype of the checkpoint.
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
        job = prepare(run, settings, evaluation or EvaluationSpec(), device, trust_remote_code, console, partial)
        _check_state(partial, job.identity, overwrite)
        before = _judge(job, job.model, "pruned", console)
        for name, result in before.perplexities.items():
            teller(console)(f"before: perplexity {result.value:.3f} on {name}")
        progress, model = _train(job, partial)
        after = _judge(job, model, "tuned", Console(quiet=True))
        record = tuning_record(
            job.settings, job.text, progress, before, after, computed=job.computed, teacher=job.taught_by,
            evaluation=job.evaluation, seconds=job.seconds, device=model.device.type,
        )  # fmt: skip
        tuned = {**record, "command": command}
        report = tuned_report(run, tuned)
        report["model"] = moved(report["model"], run.path, target)
        trajectory = run.path / TRAJECTORY
        with waiting_display(console, "saving"):
            save(
                target, model, job.tokenizer, plan=run.plan, report=report,
                trajectory=trajectory if trajectory.exists() else None,
                card=tuned_card(report, run.plan, stock=family_of(run.config) is None), replace=overwrite,
                source=run.path, check=lambda folder: check_reopened(folder, model, job.text.held_out),
            )  # fmt: skip
        folder_of_state.remove()
    numbers = {name: tuned[name] for name in ("tokens", "steps", "seconds", "perplexity")}
    tell(console, "result", folder=str(target), **numbers)
    console.print(tuned_table(tuned))
    teller(console)(f"{target}: trained on {tuned['tokens']:,} tokens in {tuned['seconds']['training']:,.0f} s")
    return Run(target, run.plan, report, model, job.tokenizer)


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


def _judge(job: Job, model: Any, who: str, console: Console) -> Evaluation:
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


def _train(job: Job, partial: Path) -> tuple[Progress, Any]:
    """Train what shall learn, and put it into the model's own weights; the model object stays the same one."""
    dtype, dtypes = job.model.dtype, {name: weight.dtype for name, weight in job.model.named_parameters()}
    identity, teacher = job.identity, job.teacher()
    cast(job.model, getattr(torch, job.computed))
    adapted = attach(job.model, job.settings, job.run.plan.model_type)
    with timed(job.seconds, "this_process"), counting_display(job.console, "train") as display:

        def learned(step: int, steps: int, loss: float) -> None:
            display("train", step, steps, f"loss {loss:5.3f}")
            tell(job.console, "loss", what="training", step=step, loss=loss)

        progress = train(adapted, job.text.train, job.settings, partial, identity, learned, teacher)
    with waiting_display(job.console, "merging"):
        model = merged(adapted)
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(dtypes.get(name, dtype))
    return progress, model.eval()
