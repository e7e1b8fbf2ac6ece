"""GGUF files for llama.cpp: an architecture for layers of different sizes, the family's own where all are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType

from multipruner.checkpoint.save import check_space
from multipruner.config.choices import QUANTS
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.families import Family
from multipruner.storage.files import whole_file
from multipruner.storage.tensor_headers import check_tied, stored_tensors

from .gguf_model import GgufModel, read_model
from .gguf_quant import Share, fallbacks, quantised, quantiser
from .gguf_tensors import (
    OUTTYPES,
    Architecture,
    LayerSizes,
    TensorJob,
    Weights,
    numbers_of,
    tensor_jobs,
    written_sizes,
)
from .gguf_tokenizer import Field, copied_fields, tokenizer_fields
from .target import target_of

_QUANTIZATION_VERSION = 2
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        architecture: what it tells llama.cpp.
        layers, tensors: how many there are.
        nbytes: its size.
        kept_wide: matrices that stayed 16-bit because the rows do not fit the type's blocks.
        window: the sliding window that cut the context length short, which these architectures do not have.
        shares: what each type has of a quantised file.
    """

    path: Path
    architecture: str
    layers: int
    tensors: int
    nbytes: int
    kept_wide: int
    window: int | None
    shares: tuple[Share, ...] = ()

    def lines(self, outtype: str) -> list[str]:
        """Return what a person is told."""
        said = [
            f"{self.path}: architecture {self.architecture}, {self.layers} layers, {self.tensors} tensors, "
            f"{outtype}, {self.nbytes / 1e6:,.1f} MB"
        ]
        if self.shares:
            said.append(f"by type, with tensors: {', '.join(map(str, self.shares))}")
        if self.kept_wide:
            said.append(f"{self.kept_wide} matrices stay f16: {outtype} needs rows that are a multiple of 32")
        if self.window:
            said.append(
                f"the context length in the file is {self.window}, the sliding window: llama.cpp attends to everything "
                "with this architecture, which is the same only up to there"
            )
        return said


def export_gguf(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    outtype: str = "f16",
    base_gguf: str | Path | None = None,
    quant: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    overwrite: bool = False,
) -> Exported:
    """Write a checkpoint folder as a GGUF file; only one tensor at a time is in memory.

    Args:
        folder: what a run wrote (or a stock checkpoint of a family in :data:`GGUF_FAMILIES`).
        output: the file; default ``FOLDER-OUTTYPE.gguf`` beside the folder. It appears whole or not at all.
        outtype: ``f32 f16 bf16 q8_0``, of the matrices.
        base_gguf: a GGUF file of the base model to copy the tokenizer from.
        quant: a K-quant (:data:`~multipruner.config.choices.QUANTS`), which llama.cpp's own quantiser makes of a file
            with 32 bits; it goes before ``outtype``.
        say: told which rows the K-quant does not fit, before anything is written.
        overwrite: whether an existing file may be replaced.

    Raises:
        UnknownModelError: when the folder holds no checkpoint.
        UnsupportedModelError: when llama.cpp cannot compute this model, or its tokenizer has no name there.
        ConfigError: when the folder contradicts itself, ``base_gguf`` is of another model, or the quantiser is missing.
        OutputError: when the file exists, or cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    target = target_of(folder, output, quant or outtype, "gguf")
    outtype = "f32" if quant else outtype
    if outtype not in OUTTYPES or quant not in (None, *QUANTS):
        raise ConfigError(f"type {quant or outtype!r} is unknown; choose {', '.join((*OUTTYPES, *QUANTS))}")
    if quant:
        quantiser()
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(f"{target} exists already; choose another --output or give --overwrite")
    model, weights = read_model(folder), Weights(folder)
    if model.shape.tied_embeddings:
        embeddings = f"{model.spec.decoder}.{model.spec.embeddings}.weight"
        check_tied(str(folder), stored_tensors(folder), embeddings, f"{model.spec.head}.weight")
    jobs, kind = _jobs(model, weights), OUTTYPES[outtype]
    base = Path(base_gguf) if base_gguf else None
    tokenizer = copied_fields(base, folder, model.config) if base else tokenizer_fields(folder, model.config)
    for line in fallbacks(jobs, model.shape.hidden_size, quant) if quant else ():
        say(line)
    check_space(target.absolute(), sum(job.nbytes(kind) for job in jobs) * (2 if quant else 1))
    shares: list[Share] = []
    with whole_file(target) as partial:
        exact = partial.with_name(f"{partial.name}.exact") if quant else partial
        writer = GGUFWriter(exact, model.architecture.name)
        _add_general(writer, folder, outtype)
        _add_model(writer, model)
        add_fields(writer, tokenizer)
        _write(writer, jobs, weights, kind)
        shares = quantised(exact, partial, quant) if quant else []
    wide = sum(len(job.shape) > 1 and job.type(kind) != kind for job in jobs)
    size, shown = target.stat().st_size, tuple(shares)
    return Exported(target, model.architecture.name, len(model.layers), len(jobs), size, wide, model.window, shown)


def _jobs(model: GgufModel, weights: Weights) -> list[TensorJob]:
    jobs = tensor_jobs(model.spec, model.layers, model.shape, weights.shapes)
    if model.rope_factors:
        jobs.insert(1, TensorJob("rope_freqs.weight", (len(model.rope_factors),), values=model.rope_factors))
    return jobs


def _add_general(writer: GGUFWriter, folder: Path, outtype: str) -> None:
    """Write what the model is called and where it comes from, as far as the folder's model card says."""
    card = _card(folder)
    writer.add_type("model")
    writer.add_name(folder.absolute().name)
    if isinstance(card.get("license"), str):
        writer.add_license(card["license"])
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else list(bases)
    if bases:
        writer.add_base_model_count(len(bases))
    for number, base in enumerate(bases):
        organization, _, name = str(base).rpartition("/")
        writer.add_base_model_name(number, name)
        if organization:
            writer.add_base_model_organization(number, organization)
            writer.add_base_model_repo_url(number, f"https://huggingface.co/{base}")
    for key, add in (("tags", writer.add_tags), ("language", writer.add_languages)):
        values = card.get(key)
        if values:
            add([str(value) for value in ([values] if isinstance(values, str) else values)])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_file_type(_FILE_TYPES[outtype])


def _card(folder: Path) -> dict[str, Any]:
    """Return the metadata at the head of the folder's README.md."""
    path = folder / "README.md"
    parts = path.read_text(encoding="utf-8").split("---\n", 2) if path.is_file() else []
    try:
        record = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        record = None
    return record if isinstance(record, dict) else {}


def _add_model(writer: GGUFWriter, model: GgufModel) -> None:
    """Write the sizes: arrays for layers that differ, single numbers for the family's own architecture."""
    config, head_dim = model.config, model.shape.head_dim
    add_layer_sizes(writer, model.spec, model.layers, model.architecture)
    writer.add_context_length(model.window or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if model.rope_scale != 1.0:
        writer.add_rope_scaling_attn_factors(model.rope_scale)


def add_layer_sizes(writer: GGUFWriter, spec: Family, layers: Sequence[LayerSizes], architecture: Architecture) -> None:
    """Write how many layers there are and what they keep: arrays where the architecture reads sizes per layer."""
    numbers = [numbers_of(spec, written_sizes(n, sizes, architecture.whole)) for n, sizes in enumerate(layers)]
    for add, key in (
        (writer.add_head_count, "num_attention_heads"),
        (writer.add_head_count_kv, "num_key_value_heads"),
        (writer.add_feed_forward_length, "intermediate_size"),
    ):
        values = [one[key] for one in numbers]
        add(values if architecture.per_layer else values[0])
    writer.add_block_count(len(layers))


def add_fields(writer: GGUFWriter, fields: list[Field]) -> None:
    """Add what is not said yet: the folder's own card goes before what another file says."""
    for key, value, kind, sub_type in fields:
        if key in writer.kv_data[0]:
            continue
        writer.add_key_value(key, value, kind, sub_type if kind == GGUFValueType.ARRAY else None)


def _write(writer: GGUFWriter, jobs: list[TensorJob], weights: Weights, kind: GGMLQuantizationType) -> None:
    """Write the header first, from shapes alone; then one tensor after another."""
    for job in jobs:
        stored = job.type(kind)
        writer.add_tensor_info(job.name, job.shape, np.dtype(np.float32), job.nbytes(kind), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for job in jobs:
            writer.write_tensor_data(job.encode(weights, kind))
    finally:
        writer.close()
