"""A dense model in a GGUF file, seen through its file: what it says of itself, and where its tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import ReaderTensor
from numpy.typing import NDArray

from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import FAMILIES, Family
from multipruner.core.plan import PruningPlan
from multipruner.export.gguf_model import GGUF_FAMILIES, GgufFamily, refusal, sizes_by_layer
from multipruner.export.gguf_tensors import Shape, interleave, named_jobs, numbers_of
from multipruner.export.gguf_tokenizer import Field
from multipruner.sources.intake.gguf_content import opened

from .blocks import Piece, shape_of

ROTARY = "rope_freqs.weight"
"""What divides the rotary frequencies: the one tensor that is no part of a layer's blocks."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file that holds the dense model of a plan.

    Attributes:
        path: the file.
        spec: the family's row.
        family: how that is said in GGUF.
        facts: its metadata without the tokenizer's, those of the architecture by their keys without its name.
        fields: all metadata, with their types.
        shape: the dimensions that all tensors share.
        pieces: every tensor by its name in the stock model, its rows as they are there.
        factors: of the rotary frequencies, where the file has any.
    """

    path: Path
    spec: Family
    family: GgufFamily
    facts: Mapping[str, Any]
    fields: tuple[Field, ...]
    shape: Shape
    pieces: Mapping[str, Piece]
    factors: ReaderTensor | None

    @property
    def plain(self) -> bool:
        """Whether rotary embeddings are the plain ones."""
        return self.factors is None and self.facts.get("rope.scaling.type", "none") == "none"

    def values(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as the stock model has it.

        Args:
            name: in the stock model.
        """
        piece = self.pieces[name]
        return np.concatenate(list(piece.values())).reshape(shape_of(piece.tensor))


class _Anything:
    def __contains__(self, name: object) -> bool:
        return True


def open_source(path: Path, plan: PruningPlan) -> GgufSource:
    """Return what a GGUF file holds of a plan's dense model.

    Raises:
        UnknownModelError: for a pointer in place of the file.
        UnsupportedModelError: when the file is damaged, one part of several, or of a family that llama.cpp computes
            in no architecture of layers that differ; or has tensors that nobody knows.
        ConfigError: when the plan is one of another model.
    """
    if plan.model_type not in GGUF_FAMILIES:
        raise UnsupportedModelError(refusal(plan.model_type, False))
    spec, family = FAMILIES[plan.model_type], GGUF_FAMILIES[plan.model_type]
    reader, all_facts, tensors = opened(path)
    name = str(all_facts.get("general.architecture"))
    if name != family.stock.name:
        raise ConfigError(f"the plan was made for a {plan.model_type} model; {path.name} is of {name!r}")
    facts = {key.removeprefix(f"{name}."): value for key, value in all_facts.items()}
    _check_sizes(path, facts, plan, spec)
    hidden = int(facts["embedding_length"])
    head_dim = int(facts.get("attention.key_length") or hidden // _first(facts["attention.head_count"]))
    if (rotated := int(facts.get("rope.dimension_count", head_dim))) != head_dim:
        raise UnsupportedModelError(
            f"{path.name} rotates {rotated} of {head_dim} dimensions of a head (rope.dimension_count), which the "
            "smaller file could not say; take the model's own checkpoint"
        )
    rows = shape_of(tensors["token_embd.weight"])[0] if "token_embd.weight" in tensors else 0
    shape = Shape(hidden, head_dim, rows, "output.weight" not in tensors, family.stock, family.head_norms)
    fields = tuple(
        (key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in reader.fields.items()
        if len(field.data) and not key.startswith("GGUF.")
    )
    pieces = _pieces(path, plan, spec, shape, tensors)
    return GgufSource(path, spec, family, facts, fields, shape, pieces, tensors.get(ROTARY))


def _pieces(
    path: Path, plan: PruningPlan, spec: Family, shape: Shape, tensors: Mapping[str, ReaderTensor]
) -> dict[str, Piece]:
    """Find every tensor of the stock model; rows that llama.cpp has interleaved come back as they were."""
    jobs = named_jobs(spec, sizes_by_layer(plan.anatomy, plan.dense), shape, _Anything())
    jobs = [job for job in jobs if job.name in tensors or not job.name.endswith(".bias")]
    if lost := [job.name for job in jobs if job.name not in tensors]:
        raise UnsupportedModelError(f"{path.name} lacks {len(lost)} tensors, such as {lost[0]}; it is no whole model")
    if more := sorted(set(tensors) - {job.name for job in jobs} - {ROTARY}):
        raise UnsupportedModelError(f"{path.name} has {len(more)} tensors that nothing is known of, such as {more[0]}")
    found = {}
    for job in jobs:
        tensor = tensors[job.name]
        if shape_of(tensor) != job.shape:
            there = f"{job.name} is {shape_of(tensor)} in {path.name}"
            raise ConfigError(f"{there}, the plan was made for a model where it is {job.shape}")
        rows = np.argsort(interleave(np.arange(job.shape[0]), job.heads)) if job.heads else None
        found[job.sources[0][0]] = Piece(tensor, rows)
    return found


def _check_sizes(path: Path, facts: Mapping[str, Any], plan: PruningPlan, spec: Family) -> None:
    """Refuse a plan of a model of other sizes, by what the file says of its own."""
    layers = sizes_by_layer(plan.anatomy, plan.dense)
    if facts["block_count"] != len(layers):
        raise ConfigError(f"the plan is of a model of {len(layers)} layers; {path.name} has {facts['block_count']}")
    heads, groups = facts["attention.head_count"], facts.get("attention.head_count_kv")
    said = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if groups is None else groups,
        "intermediate_size": facts["feed_forward_length"],
    }
    for number, sizes in enumerate(layers):
        for key, wanted in numbers_of(spec, sizes).items():
            value = said.get(key, wanted)
            there = value[number] if isinstance(value, list) else value
            if there != wanted:
                raise ConfigError(
                    f"the plan is of a model with {key} {wanted} in layer {number}; {path.name} has {there}"
                )


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)
