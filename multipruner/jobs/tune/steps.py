"""LoRA training steps with transformers' Trainer, kept in safetensors: a killed training goes on to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from multipruner.config.counts import MOST, MOST_UNITS
from multipruner.core.errors import ConfigError, NumericsError

from .state import STATE, Progress, keep, restore

_WARMUP = 0.05  # of the steps
_FLOOR = 0.1  # of the learning rate, where the cosine ends

Tell = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss of the last one)."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """How to train. All but ``save_every`` and ``micro_batch`` decide what comes out.

    Attributes:
        data: ``alpaca``, ``wikitext2``, ``c4``, ``self``, a data set of the Hub, or a local file or folder with text.
        text_column: of a table.
        chat_template: what conversations are rendered with; default: the tokenizer's own template.
        steps: optimizer steps.
        rank: of the update of every linear layer; its scale (LoRA's alpha) is twice the rank.
        lr: peak learning rate of AdamW: linear warm-up over 5 % of the steps, then a cosine to a tenth of it.
        batch: sequences per step.
        micro_batch: sequences per forward pass; default: the whole batch.
        length: tokens per sequence.
        seed: of the text's order and of the first adapter weights.
        gradient_checkpointing: compute activations twice instead of keeping them.
        save_every: steps between two states on disk.
    """

    data: str = "alpaca"
    text_column: str | None = None
    chat_template: str | None = None
    steps: int = 200
    rank: int = 16
    lr: float = 2e-4
    batch: int = 8
    micro_batch: int | None = None
    length: int = 256
    seed: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 25

    def __post_init__(self) -> None:
        allowed = {"steps": (1, MOST), "rank": (1, MOST_UNITS), "batch": (1, MOST_UNITS), "length": (2, MOST),
                   "save_every": (1, MOST), "seed": (0, 2**32 - 1)}  # fmt: skip
        faults = [
            f"{name} = {value}: at least {low}" if value < low else f"{name} = {value}: at most {high}"
            for name, (low, high) in allowed.items()
            if not low <= (value := getattr(self, name)) <= high
        ]
        if not 0 < self.lr < 1:
            faults.append(f"lr = {self.lr:g}: between 0 and 1")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            faults.append(f"micro_batch = {self.micro_batch}: it has to divide the batch of {self.batch}")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def alpha(self) -> int:
        """LoRA's scale."""
        return 2 * self.rank


class _Rows(IterableDataset):
    """Sequences in an order that depends on the seed and the position alone: every pass is shuffled anew."""

    def __init__(self, ids: Tensor, seed: int, start: int) -> None:
        self._ids, self._seed, self._start = ids, seed, start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        turn, position = divmod(self._start, len(self._ids))
        while True:
            generator = torch.Generator().manual_seed(self._seed + turn)
            for number in torch.randperm(len(self._ids), generator=generator)[position:].tolist():
                yield {"input_ids": self._ids[number], "labels": self._ids[number]}
            turn, position = turn + 1, 0


def attach(model: PreTrainedModel, settings: TuneSettings) -> Any:
    """Put new LoRA adapters on every linear layer but the head; the model computes as before.

    Returns:
        peft's ``PeftModel``; only the adapters' weights learn.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, lora)


def train(
    adapted: Any,
    ids: Tensor,
    settings: TuneSettings,
    folder: Path,
    identity: Mapping[str, Any],
    tell: Tell = lambda step, steps, loss: None,
) -> Progress:
    """Train adapters, going on from the state in ``folder`` where there is one.

    The Trainer's own checkpoints are not used: they hold pickles. Adapter weights and AdamW's moments are kept as
    plain tensors instead; the data's order and the learning rate follow from the step.

    Args:
        adapted: what :func:`attach` gave.
        ids: int64 [sequences, length].
        settings: how.
        folder: for the state; exists.
        identity: what the state is of.
        tell: called after every step.

    Returns:
        How it went; ``adapted`` holds the result.

    Raises:
        ConfigError: when the model's code knows no gradient checkpointing.
        NumericsError: when the loss is not finite any more.
    """
    weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.lr, weight_decay=0.0)
    progress = restore(folder / STATE, weights, optimizer)
    begin = progress.step
    if begin >= settings.steps:
        return progress
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(begin + step, settings.steps))
    keeper = _Keeper(progress, settings, weights, optimizer, folder / STATE, identity, tell)
    with _ready_to_learn(adapted, settings), torch.random.fork_rng():
        trainer = Trainer(
            model=adapted,
            args=_arguments(settings, adapted.device.type, folder, settings.steps - begin),
            train_dataset=_Rows(ids, settings.seed, begin * settings.batch),
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
            optimizers=(optimizer, scheduler),
            callbacks=[keeper],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return progress


def _arguments(settings: TuneSettings, device: str, folder: Path, steps: int) -> TrainingArguments:
    micro = settings.micro_batch or settings.batch
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch // micro,
        max_grad_norm=1.0,
        use_cpu=device == "cpu",
        seed=settings.seed,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on several, the batch would grow with their number
    return arguments


@contextmanager
def _ready_to_learn(adapted: Any, settings: TuneSettings) -> Iterator[None]:
    """Train without a cache of keys and values, with gradient checkpointing if asked; all as before afterwards."""
    base, training = adapted.get_base_model(), adapted.training
    known = vars(base.config).get("use_cache")
    if settings.gradient_checkpointing:
        if not base.supports_gradient_checkpointing:
            raise ConfigError(f"{base.config.model_type}: its code has no gradient checkpointing; use --micro-batch")
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        base.config.use_cache = False
        yield
    finally:
        del base.config.use_cache
        if known is not None:
            base.config.use_cache = known
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_disable()
        adapted.train(training)


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step."""
    warm = max(1, round(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _Keeper(TrainerCallback):
    """Writes the losses down, tells them, and keeps the state on disk."""

    def __init__(
        self,
        progress: Progress,
        settings: TuneSettings,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        path: Path,
        identity: Mapping[str, Any],
        tell: Tell,
    ) -> None:
        self._progress, self._settings, self._weights, self._optimizer = progress, settings, weights, optimizer
        self._path, self._identity, self._tell = path, identity, tell
        self._clock = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return  # the Trainer's summary at the end
        now, progress = time.perf_counter(), self._progress
        progress.step += 1
        progress.seconds += now - self._clock
        self._clock = now
        progress.losses.append(float(logs["loss"]))
        if not math.isfinite(progress.losses[-1]):
            raise NumericsError(f"the loss is not finite at step {progress.step}; give a smaller --lr")
        self._tell(progress.step, self._settings.steps, progress.losses[-1])
        if progress.step % self._settings.save_every == 0 or progress.step == self._settings.steps:
            keep(self._path, progress, self._weights, self._optimizer, self._identity)
