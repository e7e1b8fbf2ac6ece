"""Training steps with transformers' Trainer, kept in safetensors: a killed training goes on to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from multipruner.core.errors import ConfigError, NumericsError
from multipruner.core.families import FAMILIES, row_for
from multipruner.engine.precision import cast

from .settings import LAYERS, LORA, TuneSettings
from .state import STATE, Progress, keep, restore
from .teacher import Teacher

_WARMUP = 0.05  # of the steps
_FLOOR = 0.1  # of the learning rate, where the cosine ends

Tell = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss of the last one)."""


class _Rows(IterableDataset):
    """Sequences in an order that depends on the seed and the position alone: every pass is shuffled anew."""

    def __init__(self, ids: Tensor, seed: int, start: int) -> None:
        self._ids, self._seed, self._start = ids, seed, start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        turn, position = divmod(self._start, len(self._ids))
        while True:
            generator = torch.Generator().manual_seed(self._seed + turn)
            for number in torch.randperm(len(self._ids), generator=generator)[position:].tolist():
                row = torch.tensor(number)
                yield {"input_ids": self._ids[number], "labels": self._ids[number], "rows": row}
            turn, position = turn + 1, 0


class _Learner(Trainer):
    """Trains by the divergence from the dense model where it teaches, by the text's own likelihood elsewhere."""

    teacher: Teacher | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = inputs.pop("rows")
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = self.teacher.loss(logits, inputs["input_ids"], rows)
        return (loss, {"logits": logits}) if return_outputs else loss


def attach(model: PreTrainedModel, settings: TuneSettings, model_type: str | None = None) -> Any:
    """Make what shall learn of a model learn, and nothing else; the model computes as before.

    Args:
        model: changed in place.
        settings: its ``learn`` counts.
        model_type: of the family whose row names layers, norms and output projections; needed to train those.

    Returns:
        peft's ``PeftModel`` with new LoRA adapters on every linear layer but the head, or the model itself.
    """
    if settings.learn != LORA:
        return _with_weights(model, str(model_type), settings.learn)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, lora)


def _with_weights(model: PreTrainedModel, model_type: str, learn: str) -> PreTrainedModel:
    """Have the layers, or their norms and output projections alone, learn, in float32 whatever the others are in."""
    family = row_for(FAMILIES[model_type], vars(model.config))
    ends = [f".{part}" for block in family.blocks for part in (*block.norms, block.within(block.output))]
    wanted = [f"{family.decoder}.{family.layers}"] if learn == LAYERS else ends
    norms = {f"{family.decoder}.{family.final_norm}"}
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name in norms or name.endswith(tuple(wanted)):
            cast(module, torch.float32)
            module.requires_grad_(True)
    return model


def merged(adapted: Any) -> Any:
    """Return the model with what was learned in its own weights."""
    return adapted.merge_and_unload() if hasattr(adapted, "merge_and_unload") else adapted.requires_grad_(True)


def train(
    adapted: Any,
    ids: Tensor,
    settings: TuneSettings,
    folder: Path,
    identity: Mapping[str, Any],
    tell: Tell = lambda step, steps, loss: None,
    teacher: Teacher | None = None,
) -> Progress:
    """Train what learns, going on from the state in ``folder`` where there is one.

    The Trainer's own checkpoints are not used: they hold pickles. What learns and AdamW's moments are kept as
    plain tensors instead; the data's order and the learning rate follow from the step.

    Args:
        adapted: what :func:`attach` gave.
        ids: int64 [sequences, length].
        settings: how.
        folder: for the state; exists.
        identity: what the state is of.
        tell: called after every step.
        teacher: gives the loss; default: the text does.

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
    if begin >= settings.most_steps or _used(progress, settings) >= 1:
        return progress

    def rate(step: int) -> float:
        return _rate(max(begin + step, round(_used(progress, settings) * settings.most_steps)), settings.most_steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    keeper = _Keeper(progress, settings, weights, optimizer, folder / STATE, identity, tell)
    with _ready_to_learn(adapted, settings), torch.random.fork_rng():
        trainer = _Learner(
            model=adapted,
            args=_arguments(settings, adapted.device.type, folder, settings.most_steps - begin, _is_narrow(adapted)),
            train_dataset=_Rows(ids, settings.seed, begin * settings.batch),
            data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
            optimizers=(optimizer, scheduler),
            callbacks=[keeper],
        )
        trainer.teacher = teacher
        if teacher is not None:
            trainer.model_accepts_loss_kwargs = False  # ours is a mean, which the Trainer divides over micro-batches
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return progress


def _arguments(settings: TuneSettings, device: str, folder: Path, steps: int, narrow: bool) -> TrainingArguments:
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
        remove_unused_columns=False,
        bf16=narrow,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on several, the batch would grow with their number
    return arguments


@contextmanager
def _ready_to_learn(adapted: Any, settings: TuneSettings) -> Iterator[None]:
    """Train without a cache of keys and values, with gradient checkpointing if asked; all as before afterwards."""
    base, training = _base(adapted), adapted.training
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


def _base(adapted: Any) -> Any:
    """Return the model below the adapters, if there are any."""
    return adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted


def _is_narrow(adapted: Any) -> bool:
    """Tell whether weights of the model itself learn in float32 among others in bfloat16, which autocast brings
    together; peft does so itself for its adapters.
    """
    return adapted is _base(adapted) and any(weight.dtype == torch.bfloat16 for weight in adapted.parameters())


def _used(progress: Progress, settings: TuneSettings) -> float:
    """Return the share of its time that a training has used; 0 without a limit."""
    return 0.0 if settings.minutes is None else progress.seconds / (60 * settings.minutes)


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
        most, used = self._settings.most_steps, _used(progress, self._settings)
        done = progress.step == most or used >= 1
        self._tell(progress.step, most if used == 0 else min(most, round(progress.step / used)), progress.losses[-1])
        control.should_training_stop = control.should_training_stop or done
        if done or progress.step % self._settings.save_every == 0:
            keep(self._path, progress, self._weights, self._optimizer, self._identity)
