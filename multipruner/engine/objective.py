"""The loss of any structure on calibration text, without computing anything twice.

Candidates of a search step differ from the structure at hand in one block, so everything below that block is
already known. :class:`CalibrationObjective` keeps the hidden states at the input of every residual block for its
base structure and re-runs only from the first block that differs. :class:`PlainObjective` runs the stock model
from end to end; it is the reference that tests and benchmarks compare with.

The loss is the mean over sequences of the mean loss per scored token, in nats: the negative log-likelihood (the
official protocol; its exponential is the calibration perplexity), or the divergence from the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multipruner.core.errors import UnsupportedModelError
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import Anatomy, Structure

from .layer_calls import Inputs, State, stream_of
from .moments import positions_of
from .prunable import Prunable
from .token_losses import DivergenceFromDense, NegativeLogLikelihood, Scored, Scores, TokenLoss, tokens_at_once

STATE_BYTES = 1 << 30
"""Default memory for the hidden states of the base structure; above it they are recomputed batch by batch."""

Progress = Callable[[int, int], None]
"""Called with (candidates done, candidates in all)."""


@dataclass
class Work:
    """What an objective has computed so far.

    Attributes:
        evaluations: of structures.
        token_blocks: tokens times residual blocks run.
        head_tokens: tokens whose distribution over the vocabulary was computed.
        per_layer: residual blocks that a decoder layer has, in the mean.
    """

    evaluations: int = 0
    token_blocks: int = 0
    head_tokens: int = 0
    per_layer: float = 2.0

    @classmethod
    def on(cls, anatomy: Anatomy) -> Work:
        """Return no work yet, on a model of these blocks."""
        return cls(per_layer=len(anatomy) / anatomy.layers)

    @property
    def token_layers(self) -> float:
        """Tokens times decoder layers run."""
        return self.token_blocks / self.per_layer


@dataclass
class _Batch:
    """Sequences that are scored together, ready for the first block, with the states of the base structure."""

    inputs: Inputs
    loss: TokenLoss
    scored: Scored
    states: list[State] = field(default_factory=list)  # input of every block, then the output of the last one


class CalibrationObjective:
    """Loss of a structure, with everything below the first changed block re-used.

    Satisfies the ``Objective`` protocol of :mod:`multipruner.search`.

    Args:
        prunable: the model, its weights in ranked order (inside :meth:`Prunable.in_order`).
        ids: calibration token ids [sequences, length], or pixels [pictures, channels, height, width].
        ignore_id: a label that is not scored (the official code skips the end-of-sequence token).
        batch_size: sequences that run together at most.
        loss: ``"nll"``, or ``"kl"``: the divergence from the model as it is when the objective is made.
        state_bytes: memory for the base structure's hidden states; where those of all sequences do not fit, they are
            recomputed in every step for one batch after another, the batches as large as fit. None are kept where
            layers are on disk: every structure is one walk over the model, of all sequences together.
    """

    def __init__(
        self,
        prunable: Prunable,
        ids: Tensor,
        *,
        ignore_id: int | None = None,
        batch_size: int = 8,
        loss: Literal["nll", "kl"] = "nll",
        state_bytes: int = STATE_BYTES,
    ) -> None:
        self.prunable, self.base = prunable, prunable.dense
        length = positions_of(prunable, ids)
        self.tokens = len(ids) * length
        self.work = Work.on(prunable.anatomy)
        self._scores = Scores(prunable.head, prunable.cap)
        per_sequence, self._walks = prunable.state_bytes(length), prunable.on_disk is not None
        self._hold = self._walks or per_sequence * len(ids) <= state_bytes
        batch_size = batch_size if self._hold else max(1, min(batch_size, state_bytes // per_sequence))
        self._prepare(ids, ignore_id, batch_size, loss)

    @torch.inference_mode()
    def _prepare(self, ids: Tensor, ignore_id: int | None, batch_size: int, loss: str) -> None:
        pictures = not self.prunable.spec.task.reads_text
        if loss == "nll" and pictures:
            raise UnsupportedModelError("pictures are judged by the divergence from the dense model: --objective kl")
        self._batches: list[_Batch] = []
        parts = ids.to(self.prunable.model.device).split(batch_size)
        for rows in parts:
            scored = Scored.of(rows, ignore_id, len(ids), whole=pictures)
            self._batches.append(_Batch(self.prunable.inputs(rows), NegativeLogLikelihood(scored.labels), scored))
        if loss == "kl":
            self._describe_dense(parts)
        self.work = Work.on(self.prunable.anatomy)

    def _describe_dense(self, rows: Sequence[Tensor]) -> None:
        """Have every batch, of rows of token ids, judged by the divergence from the dense model."""
        if self.prunable.cap is not None:
            raise UnsupportedModelError("capped logits have no divergence from the dense model: --objective nll")
        original = self.prunable.original
        for part in self._together(list(zip(self._batches, rows, strict=True))):
            if original is self.prunable:
                with self._states(batches := [batch for batch, _ in part]):
                    finals = self._through(batches, self.base)
            else:
                finals = [_dense_end(original, ids) for _, ids in part]
            for (batch, _), final in zip(part, finals, strict=True):
                normed = original.normed(batch.scored.among(stream_of(final)))
                batch.loss = DivergenceFromDense.of(original.head, normed, self._chunk, self.prunable.head)

    def _together(self, items: list[Any]) -> list[list[Any]]:
        """Return what goes through the blocks together: all, where layers are on disk."""
        return [items] if self._walks else [[item] for item in items]

    def __call__(self, structure: Structure) -> float:
        """Return the loss of one structure in nats.

        Raises:
            NumericsError: when it is not finite.
        """
        return self.argmin([structure]).loss

    def commit(self, structure: Structure) -> None:
        """Make a structure the base that the next candidates are compared with."""
        start = self._first_change(structure)
        self.base = structure
        for batch in self._batches:
            if batch.states:
                self._fill(batch, start)

    @torch.inference_mode()
    def argmin(self, structures: Sequence[Structure], progress: Progress | None = None) -> Choice:
        """Score candidates and name the best two.

        A candidate whose running loss already exceeds the second best is abandoned: no decision changes.

        Raises:
            NumericsError: when no candidate has a finite loss.
        """
        totals = [0.0] * len(structures)
        groups = [self._batches] if self._hold else [[batch] for batch in self._batches]
        for number, group in enumerate(groups):
            with self._states(group):
                for index, structure in enumerate(structures):
                    bound = _second(totals[:index]) if number == len(groups) - 1 else math.inf
                    totals[index] = self._add(structure, group, totals[index], bound)
                    if progress is not None:
                        progress(number * len(structures) + index + 1, len(groups) * len(structures))
        self.work.evaluations += len(structures)
        return best_two(structures, totals)

    @contextmanager
    def _states(self, group: list[_Batch]) -> Iterator[None]:
        """Have the base's states for these batches; let go of them afterwards unless all fit in memory."""
        for batch in group:
            if not (batch.states or self._walks):
                self._fill(batch, 0)
        yield
        if not self._hold:
            for batch in group:
                batch.states.clear()

    @torch.inference_mode()
    def _fill(self, batch: _Batch, start: int) -> None:
        """Recompute the base's states from block ``start`` on."""
        states = batch.states[: start + 1] or [batch.inputs.hidden]
        for block in range(len(states) - 1, len(self.base)):
            states.append(self._block(states[-1], batch, block, self.base))
        batch.states = states

    def _block(self, state: State, batch: _Batch, block: int, structure: Structure) -> State:
        if structure[block]:
            self.work.token_blocks += stream_of(state)[..., 0].numel()
        return self.prunable.block(state, batch.inputs, block, structure[block])

    def _first_change(self, structure: Structure) -> int:
        """Index of the first residual block in which a structure differs from the base."""
        changed = (block for block, (a, b) in enumerate(zip(structure, self.base, strict=True)) if a != b)
        return next(changed, len(self.base))

    def _add(self, structure: Structure, group: list[_Batch], total: float, bound: float) -> float:
        """Add a candidate's loss on some batches to its running total; infinity when that exceeds the bound, or is no
        number."""
        for batches in self._together(group):
            if total > bound or total == math.inf:
                return math.inf
            for batch, state in zip(batches, self._through(batches, structure), strict=True):
                total += self._token_losses(stream_of(state), batch, bound - total)
                if math.isnan(total):  # this candidate overflows; others need not
                    return math.inf
        return total

    def _through(self, batches: Sequence[_Batch], structure: Structure) -> list[State]:
        """Return the states after the last block, from the first block on that is not as in the base."""
        start = 0 if self._walks else self._first_change(structure)
        states = [batch.inputs.hidden if self._walks else batch.states[start] for batch in batches]
        for block in range(start, len(structure)):
            states = [self._block(state, batch, block, structure) for state, batch in zip(states, batches, strict=True)]
        return states

    @property
    def _chunk(self) -> int:
        return tokens_at_once(self.prunable.head_weight)

    def _token_losses(self, hidden: Tensor, batch: _Batch, bound: float) -> float:
        """Return weighted loss of a batch, logits reduced in chunks; past the bound it stops, but waits for no GPU."""
        flat, chunk, on_cpu, total = batch.scored.among(hidden), self._chunk, hidden.device.type == "cpu", 0.0
        for begin in range(0, len(flat), chunk):
            part = slice(begin, begin + chunk)
            normed = self.prunable.normed(flat[part])
            loss = batch.loss(self._scores, normed, part).double() @ batch.scored.weights[part]
            total = total + (float(loss) if on_cpu else loss)
            self.work.head_tokens += len(normed)
            if on_cpu and total > bound:
                break
        return math.inf if (found := float(total)) > bound else found


class PlainObjective:
    """The same loss by whole forwards of the stock model, full logits, nothing re-used: the reference."""

    def __init__(self, prunable: Prunable, ids: Tensor, *, ignore_id: int | None = None, batch_size: int = 8) -> None:
        self.prunable, self.ids, self.ignore_id, self.batch_size = prunable, ids, ignore_id, batch_size
        self.work = Work.on(prunable.anatomy)

    @torch.inference_mode()
    def __call__(self, structure: Structure) -> float:
        """Return the loss of one structure in nats."""
        total, device = 0.0, self.prunable.model.device
        with self.prunable.applied(structure):
            for rows in self.ids.to(device).split(self.batch_size):
                logits = self.prunable.model(input_ids=rows, use_cache=False).logits[:, :-1].float()
                nll = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
                scored = Scored.of(rows, self.ignore_id, len(self.ids))
                total += float(nll[scored.places].double() @ scored.weights)
                self.work.token_blocks += rows.numel() * len(structure)
                self.work.head_tokens += rows.numel()
        self.work.evaluations += 1
        return total

    def commit(self, structure: Structure) -> None:
        """Do nothing: nothing is kept, so nothing moves."""

    def argmin(self, structures: Sequence[Structure], progress: Progress | None = None) -> Choice:
        """Score candidates and name the best two."""
        totals = []
        for index, structure in enumerate(structures):
            totals.append(self(structure))
            if progress is not None:
                progress(index + 1, len(structures))
        return best_two(structures, totals)


def _dense_end(prunable: Prunable, ids: Tensor) -> State:
    """Return the state after the last block of a dense model."""
    inputs = prunable.inputs(ids)
    state: State = inputs.hidden
    for block, size in enumerate(prunable.dense):
        state = prunable.block(state, inputs, block, size)
    return state


def _second(totals: Sequence[float]) -> float:
    """Return the second smallest total so far: what a candidate must not exceed to matter."""
    return sorted(totals)[1] if len(totals) > 1 else math.inf
