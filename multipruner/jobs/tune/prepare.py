"""What a training needs: the pruned model, its text, and the dense model where it teaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from multipruner.checkpoint.classes import check_reads_text
from multipruner.checkpoint.load import load_run
from multipruner.checkpoint.run_folder import RunFolder
from multipruner.config.precedence import trusts
from multipruner.config.recipe import EvaluationSpec
from multipruner.console.progress import counting_display, named, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, MultiprunerError, OutputError
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.precision import AUTO, Precision, cast, name_of
from multipruner.eval.scoring import context_length
from multipruner.jobs.record import Clock, timed

from .settings import DISK, LORA, TuneSettings
from .state import kept_identity
from .teacher import Teacher, keep_predictions
from .text import TuningText, dense_model, tuning_text


@dataclass(frozen=True)
class Job:
    """What the stages share.

    Attributes:
        computed: the name of the type that training computes in.
        dense: the dense model, where it teaches.
    """

    run: RunFolder
    settings: TuneSettings
    evaluation: EvaluationSpec
    model: Any
    tokenizer: Any
    text: TuningText
    console: Console
    seconds: dict[str, float]
    computed: str
    dense: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """All that what is learned depends on."""
        settings = self.settings
        return {
            "model": fingerprint(self.model),
            "data": self.text.hash,
            "teacher": self.taught_by,
            "learn": settings.learn,
            "steps": settings.most_steps,
            "minutes": settings.minutes,
            "rank": settings.rank,
            "lr": settings.lr,
            "batch": settings.batch,
            "micro_batch": settings.micro_batch or settings.batch,
            "length": settings.length,
            "seed": settings.seed,
            "device": self.model.device.type,
            "computed": self.computed,
        }

    @property
    def taught_by(self) -> dict[str, Any] | None:
        """The dense model, and how much of what it says is used; ``None`` where the text alone teaches."""
        if self.dense is None:
            return None
        return {"fingerprint": self.run.report["model"]["fingerprint"], "top_k": self.settings.top_k or None,
                "logits": self.settings.logits}  # fmt: skip

    def teacher(self) -> Teacher | None:
        """Return the teacher, which computes in the same type as the training; its predictions are written to the cache
        first, if they are to be kept on disk.
        """
        if self.dense is None:
            return None
        cast(self.dense, getattr(torch, self.computed))
        self.dense.requires_grad_(False)
        if self.settings.logits != DISK:
            return Teacher(self.dense.to(self.model.device), self.settings.top_k)
        weights = self.run.report["model"]["fingerprint"]
        with timed(self.seconds, "teacher"), counting_display(self.console, "teacher") as display:
            told = named(display, "teacher")
            dense = self.dense.to(self.model.device)
            kept = keep_predictions(dense, weights, self.text.train, self.text.hash, self.settings.top_k, told)
        return Teacher(None, self.settings.top_k, kept)


def prepare(
    run: RunFolder,
    settings: TuneSettings,
    evaluation: EvaluationSpec,
    device: str,
    trust_remote_code: bool,
    console: Console,
    partial: Path,
) -> Job:
    """Load model and text, and the dense model where it teaches.

    Args as for :func:`.run.tune`; ``partial`` is the folder of the state.
    """
    check_reads_text(run.path, "tune")
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
    settings, dense = _with_dense(run, settings, trust_remote_code, teller(console))
    with timed(seconds, "text"), counting_display(console, "text") as display:
        text = tuning_text(
            settings.source, tokenizer, run.report, run.path,
            sequences=settings.most_steps * settings.batch, written=settings.written(where.type),
            length=settings.length, seed=settings.seed, column=settings.text_column,
            template=settings.chat_template, trust=trust_remote_code, dense=dense, say=teller(console),
            progress=lambda done, total: display("text", done, total),
        )  # fmt: skip
    model = model.to(where).eval()
    return Job(
        run, settings, evaluation, model, tokenizer, text, console, seconds, _computed(model, settings, partial), dense
    )


def _with_dense(
    run: RunFolder, settings: TuneSettings, trust: bool, say: Callable[[str], None]
) -> tuple[TuneSettings, Any]:
    """Return settings that say whether the dense model teaches, and that model; it is not asked for otherwise.

    Raises:
        MultiprunerError: when it shall teach and cannot be had.
    """
    if settings.distill is False:
        return settings, None
    try:
        dense = dense_model(run.report, run.path, trust, say)
    except MultiprunerError as error:
        if settings.distill or settings.top_k or settings.logits == DISK:
            raise
        say(f"the dense model is not at hand ({error}): the text alone teaches")
        return replace(settings, distill=False), None
    say("the dense model teaches (--no-distill: the text alone does)")
    return replace(settings, distill=True), dense


def _computed(model: Any, settings: TuneSettings, partial: Path) -> str:
    """Return the type to compute in: that of a state on disk, else what is fastest here.

    Adapters, and weights that learn, are in float32 and compute with others in bfloat16; float16 would need its losses
    scaled, so there it is float32.
    """
    kept = (kept_identity(partial) or {}).get("computed", AUTO)
    found = name_of(Precision.of(model, kept if kept in ("float32", "bfloat16") else AUTO).computed)
    return found if found == "bfloat16" or (model.device.type != "cpu" and settings.learn == LORA) else "float32"


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {name!r}: give auto, cpu or cuda (CUDA_VISIBLE_DEVICES picks a GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' cannot be used: torch sees no GPU; give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
