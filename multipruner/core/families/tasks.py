"""What a model is for, as rows of data: what it reads, which of its positions are scored, and which class opens it."""

from __future__ import annotations

from dataclasses import dataclass


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
        position: the one position of a row that is scored, by the head's distribution over classes; ``None`` where all
            but the last are, by that over the next token.
        reader: the class that opens what turns text or pictures into a batch.
        reader_name: what people call that.
    """

    name: str
    what: str
    data: str
    auto_class: str
    ending: str
    inputs: str
    position: int | None
    reader: str
    reader_name: str

    @property
    def reads_text(self) -> bool:
        """Whether it goes on with texts token by token: with a tokenizer, a causal mask and a cache."""
        return self.position is None


CAUSAL_LM = Task(
    "text-generation", "causal language model", "text", "AutoModelForCausalLM", "ForCausalLM", "input_ids", None,
    "AutoTokenizer", "tokenizer",
)  # fmt: skip
IMAGE_CLASSIFIER = Task(
    "image-classification", "image classifier", "pictures", "AutoModelForImageClassification", "ForImageClassification",
    "pixel_values", 0, "AutoImageProcessor", "image processor",
)  # fmt: skip
