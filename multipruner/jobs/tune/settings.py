"""How a pruned model is trained after the cut."""

from __future__ import annotations

from dataclasses import dataclass

from multipruner.config.counts import MOST, MOST_UNITS
from multipruner.core.errors import ConfigError

LORA, PROJECTIONS, LAYERS = "lora", "projections", "layers"
LEARN = {
    LORA: "adapters on every linear layer but the head",
    PROJECTIONS: "all weights of the norms and of the output projections",
    LAYERS: "all weights but the embeddings and the head",
}
"""What learns."""
FLY, DISK = "fly", "disk"
LOGITS = {
    FLY: "the dense model runs beside the training",
    DISK: "it runs once, before; its likeliest tokens are kept in the cache (needs --top-k)",
}
"""Where what the dense model says comes from."""
_STEPS, _MOST_STEPS = 200, 2000
_SEQUENCES, _PER_MINUTE = 1024, 32
"""Sequences that the dense model writes at most, and on a CPU for every minute of training: of SmolLM2 they are written
in about half of those minutes, and learned from once or twice."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """How to train. All but ``save_every`` and ``micro_batch`` decide what comes out.

    Attributes:
        data: ``alpaca``, ``wikitext2``, ``c4``, ``self``, a data set of the Hub, or a local file or folder with text;
            default: ``self`` where the dense model teaches, ``alpaca`` elsewhere.
        text_column: of a table.
        chat_template: what conversations are rendered with; default: the tokenizer's own template.
        distill: whether the dense model teaches: the loss is the divergence from its distribution at every position,
            rather than the negative log-likelihood of the text; ``None``: where it is at hand.
        sequences: that the dense model writes at most, where it writes the text; training that needs more goes over
            them again. Default 1,024, or with ``minutes`` on a CPU 32 for each.
        top_k: tokens per position that it teaches, the likeliest ones, the rest taken as one; 0: the whole vocabulary.
        logits: a name of :data:`LOGITS`.
        learn: a name of :data:`LEARN`.
        steps: optimizer steps; default 200, or with ``minutes`` at most 2,000.
        minutes: of training at most, over all processes that take part; the learning rate falls with what is used of
            them. What comes out then depends on the machine.
        rank: of the update of every linear layer; its scale (LoRA's alpha) is twice the rank.
        lr: peak learning rate of AdamW: linear warm-up over 5 % of the steps, then a cosine to a tenth of it.
        batch: sequences per step.
        micro_batch: sequences per forward pass; default: the whole batch.
        length: tokens per sequence.
        seed: of the text's order and of the first adapter weights.
        gradient_checkpointing: compute activations twice instead of keeping them.
        save_every: steps between two states on disk.
    """

    data: str | None = None
    text_column: str | None = None
    chat_template: str | None = None
    distill: bool | None = None
    sequences: int | None = None
    top_k: int = 0
    logits: str = FLY
    learn: str = LORA
    steps: int | None = None
    minutes: float | None = None
    rank: int = 16
    lr: float = 2e-4
    batch: int = 8
    micro_batch: int | None = None
    length: int = 256
    seed: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 25

    def __post_init__(self) -> None:
        allowed = {"steps": (1, MOST), "sequences": (1, MOST), "rank": (1, MOST_UNITS), "batch": (1, MOST_UNITS),
                   "length": (2, MOST), "save_every": (1, MOST), "seed": (0, 2**32 - 1),
                   "top_k": (0, MOST)}  # fmt: skip
        faults = [
            f"{name} = {value}: at least {low}" if value < low else f"{name} = {value}: at most {high}"
            for name, (low, high) in allowed.items()
            if (value := getattr(self, name)) is not None and not low <= value <= high
        ]
        if not 0 < self.lr < 1:
            faults.append(f"lr = {self.lr:g}: between 0 and 1")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            faults.append(f"minutes = {self.minutes:g}: above 0")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            faults.append(f"micro_batch = {self.micro_batch}: it has to divide the batch of {self.batch}")
        for name, table in (("learn", LEARN), ("logits", LOGITS)):
            if (value := getattr(self, name)) not in table:
                faults.append(f"{name} = {value!r}: one of {', '.join(table)}")
        if self.logits == DISK and not self.top_k:
            faults.append("logits = 'disk': whole distributions do not fit there; give --top-k as well, such as 64")
        if self.distill is False and (self.top_k or self.logits == DISK):
            faults.append("top_k and logits are the dense model's: leave --no-distill out")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def alpha(self) -> int:
        """LoRA's scale."""
        return 2 * self.rank

    @property
    def most_steps(self) -> int:
        """Optimizer steps at most."""
        return self.steps or (_STEPS if self.minutes is None else _MOST_STEPS)

    def written(self, device: str) -> int:
        """Tell how many sequences the dense model is asked to write at most.

        Args:
            device: the type of the one that trains.
        """
        if self.sequences is not None or self.minutes is None or device != "cpu":
            return self.sequences or _SEQUENCES
        return min(_SEQUENCES, max(self.batch, round(_PER_MINUTE * self.minutes)))

    @property
    def source(self) -> str:
        """Where the text comes from."""
        return self.data or ("self" if self.distill else "alpaca")
