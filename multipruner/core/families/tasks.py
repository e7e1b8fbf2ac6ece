"""What a model is for, as rows of data: what it reads, which of its positions are scored, and which class opens it."""

from __future__ import annotations

from dataclasses import dataclass, replace

Run = tuple[int, int | None]
"""Positions from one on, up to another that is no part of it; ``None``: to the end."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: as the Hub calls it (``pipeline_tag``).
        what: what people call such a model.
        data: what people call what it reads.
        auto_class: opens a checkpoint of any family.
        ending: how the names of the families' classes end.
        inputs: the argument of the forward pass that takes a batch, one row for each text or picture.
        pooled: the runs of positions of a row whose means, side by side, the head turns into one distribution over
            classes; empty where it gives every position but the last one of its own, over the next token.
        judged: what people call these positions.
        outputs: the key of the configuration that says how many logits the head gives.
        reader: the class that opens what turns text or pictures into a batch.
        reader_name: what people call that.
    """

    name: str
    what: str
    data: str
    auto_class: str
    ending: str
    inputs: str
    pooled: tuple[Run, ...]
    judged: str
    outputs: str
    reader: str
    reader_name: str

    @property
    def reads_text(self) -> bool:
        """Whether it goes on with texts token by token: with a tokenizer, a causal mask and a cache."""
        return not self.pooled


CAUSAL_LM = Task(
    "text-generation", "causal language model", "text", "AutoModelForCausalLM", "ForCausalLM", "input_ids", (),
    "every position", "vocab_size", "AutoTokenizer", "tokenizer",
)  # fmt: skip
IMAGE_CLASSIFIER = Task(
    "image-classification", "image classifier", "pictures", "AutoModelForImageClassification", "ForImageClassification",
    "pixel_values", ((0, 1),), "the first position", "num_labels", "AutoImageProcessor", "image processor",
)  # fmt: skip
"""A linear head on the first position, which stands for no patch."""
MEAN_CLASSIFIER = replace(IMAGE_CLASSIFIER, pooled=((0, None),), judged="the mean of all positions")
"""A linear head on the mean of all patches; no position stands for anything else."""
BOTH_CLASSIFIER = replace(
    IMAGE_CLASSIFIER, pooled=((0, 1), (1, None)), judged="the first position beside the mean of the others"
)
"""A linear head on the first position and the mean of all patches, side by side."""
