"""Tensors of a GGUF file: which there are, under which names, and their values, read one at a time.

llama.cpp's architectures that take sizes per layer do not take every combination; see :func:`written_sizes` for what
stands in for a removed block there.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from multipruner.core.axes import with_unsaid
from multipruner.core.blocks import BlockSpec
from multipruner.core.errors import ConfigError, NumericsError, UnknownModelError
from multipruner.core.families import Family
from multipruner.core.structure import GONE, Size, counts_of

OUTTYPES: dict[str, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
"""Types of the matrices; vectors (norms, biases) are always 32-bit, as llama.cpp wants them."""
_INPUTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
}
"""Input projections of the families that llama.cpp's architectures compute, and their names in the file."""
_FUSED = "attn_qkv"
_NORM_AND_OUTPUT = {
    "attention": ("attn_norm", "attn_output"),
    "mlp": ("ffn_norm", "ffn_down"),
}
_ROTARY = ("q_proj", "k_proj")
_STAND_IN: dict[str, Size] = {"attention": (1, 1), "mlp": (32,)}
"""Sizes of blocks of zeros: one head; as many channels as a block of Q8_0 holds."""
LayerSizes = Mapping[str, Size]
"""What one layer keeps, by the kinds of its blocks."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of llama.cpp's architectures, as far as our files differ between them.

    Attributes:
        name: ``general.architecture``.
        per_layer: whether it reads sizes per layer.
        interleaved: whether it rotates pairs of neighbours, not halves of a head.
        rope_factors: whether it reads factors of the rotary frequencies.
        biases: whether its projections may have biases.
        fused: whether queries, keys and values are one tensor.
        tied: whether its output projection is always the embedding table.
        whole: whether every layer must have both blocks.
        square: whether queries must be as wide as the hidden state.
    """

    name: str
    per_layer: bool = False
    interleaved: bool = False
    rope_factors: bool = False
    biases: bool = False
    fused: bool = False
    tied: bool = False
    whole: bool = False
    square: bool = False


class Weights:
    """The safetensors of a checkpoint folder: shapes at once, values on demand.

    Args:
        folder: holds ``model.safetensors``, or shards with an index.

    Raises:
        UnknownModelError: when there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if not (index.is_file() or single.is_file()):
            raise UnknownModelError(f"{folder} has no model.safetensors; name the folder of a finished run")
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {single.name}
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder / name for name in names):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        self._files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise UnknownModelError(f"{path} cannot be read: {error}") from error

    def read(self, name: str) -> NDArray[np.float32]:
        """Return one tensor's values."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).float().numpy()


@dataclass(frozen=True, slots=True)
class TensorJob:
    """One tensor of the file.

    Attributes:
        name: in the GGUF file.
        shape: as in the checkpoint (the file's own header turns it round).
        sources: the checkpoint's tensors, one below the other, with the rows of each; none if it is made up.
        heads: of a query or key projection whose rows llama.cpp wants interleaved; 0 where they stay.
        fill: the value of a tensor that is made up.
        values: its values, one by one, where they are not all alike.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, int], ...] = ()
    heads: int = 0
    fill: float = 0.0
    values: tuple[float, ...] = ()

    def type(self, outtype: GGMLQuantizationType) -> GGMLQuantizationType:
        """Tell how it is stored: rows that the type's block does not divide stay 16-bit."""
        if len(self.shape) == 1:
            return GGMLQuantizationType.F32
        return outtype if self.shape[-1] % GGML_QUANT_SIZES[outtype][0] == 0 else GGMLQuantizationType.F16

    def nbytes(self, outtype: GGMLQuantizationType) -> int:
        block, size = GGML_QUANT_SIZES[self.type(outtype)]
        return int(np.prod(self.shape)) // block * size

    def encode(self, weights: Weights, outtype: GGMLQuantizationType) -> NDArray:
        """Return its values as they are stored.

        Raises:
            NumericsError: for weights beyond the range of 16-bit floats.
        """
        kind = self.type(outtype)
        with np.errstate(over="ignore"):
            stored = quantize(np.ascontiguousarray(self._values(weights)), kind)
        if kind == GGMLQuantizationType.F16 and not np.isfinite(stored).all():
            raise NumericsError(f"{self.name} holds values that f16 cannot; choose --outtype bf16 or f32")
        return stored

    def _values(self, weights: Weights) -> NDArray[np.float32]:
        if self.values:
            return np.array(self.values, dtype=np.float32)
        if not self.sources:
            return np.full(self.shape, self.fill, dtype=np.float32)
        parts = [weights.read(name) for name, _ in self.sources]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return interleave(values, self.heads) if self.heads else values


def interleave(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Return rows of every head from (first half, second half) to pairs, as llama.cpp's plain rotation wants them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def written_sizes(number: int, sizes: LayerSizes, whole: bool) -> LayerSizes:
    """Return what the file says of a layer: its sizes, or more where llama.cpp would fail or compute something else.

    ``deci`` skips a layer without MLP altogether, attention and all, and takes the width of a head from layer 0;
    ``openelm`` knows only layers with both blocks. Zero weights add nothing to the residual stream, so one zero head
    and 32 zero channels keep the values as they are.
    """
    attention, mlp = sizes["attention"], sizes["mlp"]
    if not attention and (whole or number == 0):
        attention = _STAND_IN["attention"]
    if not mlp and (whole or attention):
        mlp = _STAND_IN["mlp"]
    return {"attention": attention, "mlp": mlp}


def numbers_of(spec: Family, sizes: LayerSizes) -> dict[str, int]:
    """Return what the keys of a family's configuration say of a layer of these sizes; 0 where a block is gone."""
    counts = {name: count for kind, size in sizes.items() for name, count in counts_of(kind, size).items()}
    return spec.numbers(counts)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the tensors' shapes follow from, besides the sizes of the layers.

    Attributes:
        head_norms: norms of single query and key heads: path within the attention block, name in the file.
    """

    hidden_size: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    architecture: Architecture
    head_norms: tuple[tuple[str, str], ...] = ()


def tensor_jobs(spec: Family, layers: Sequence[LayerSizes], shape: Shape, shapes: Shapes) -> list[TensorJob]:
    """Return every tensor of the file, in order; checked against the checkpoint.

    Args:
        spec: the family's row.
        layers: what each layer has.
        shape: the rest of the dimensions, and the architecture.
        shapes: of the checkpoint's tensors, by their names.

    Raises:
        ConfigError: when the checkpoint lacks a tensor, has one too many, or one of another shape.
    """
    head = f"{spec.head}.weight"
    jobs = named_jobs(spec, layers, shape, shapes)
    _check(jobs, shapes, ignored={head} if shape.tied_embeddings else set())
    return jobs


def named_jobs(spec: Family, layers: Sequence[LayerSizes], shape: Shape, names: Container[str]) -> list[TensorJob]:
    """Return every tensor of a file, in order.

    ``names`` are those of the checkpoint's tensors, among which biases may be; for the rest see :func:`tensor_jobs`.
    """
    table, vector = (shape.vocab_size, shape.hidden_size), (shape.hidden_size,)
    jobs = [_job("token_embd.weight", table, f"{spec.decoder}.{spec.embeddings}.weight")]
    for number, sizes in enumerate(layers):
        jobs += _layer_jobs(spec, number, sizes, shape, names)
    jobs.append(_job("output_norm.weight", vector, f"{spec.decoder}.{spec.final_norm}.weight"))
    if not shape.tied_embeddings:
        jobs.append(_job("output.weight", table, f"{spec.head}.weight"))
    return jobs


def _job(name: str, shape: tuple[int, ...], source: str, heads: int = 0, fill: float = 0.0) -> TensorJob:
    return TensorJob(name, shape, ((source, shape[0]),), heads, fill)


def _layer_jobs(spec: Family, layer: int, sizes: LayerSizes, shape: Shape, has: Container[str]) -> Iterator[TensorJob]:
    prefix, written = f"{spec.decoder}.{spec.layers}.{layer}", written_sizes(layer, sizes, shape.architecture.whole)
    for block in spec.blocks:
        if not written[block.kind]:
            continue
        real = sizes[block.kind] != GONE
        jobs = list(_block_jobs(block, f"blk.{layer}", prefix, written[block.kind], shape))
        for job in _fuse(jobs) if shape.architecture.fused else jobs:
            if job.name.endswith(".bias") and not (real and job.sources[0][0] in has):
                continue
            yield job if real else replace(job, sources=(), heads=0)


def _fuse(jobs: Sequence[TensorJob]) -> Iterator[TensorJob]:
    """Yield one tensor of the matrices of queries, keys and values, in place of the first; the rest as it is."""
    names = [_INPUTS[part] for part in ("q_proj", "k_proj", "v_proj")]
    parts = [job for name in names for job in jobs if job.name.endswith(f".{name}.weight")]
    for job in jobs:
        if parts and job is parts[0]:
            rows, columns = sum(part.shape[0] for part in parts), job.shape[1]
            sources = tuple(source for part in parts for source in part.sources)
            yield TensorJob(job.name.replace(names[0], _FUSED), (rows, columns), sources)
        elif job not in parts:
            yield job


def _block_jobs(block: BlockSpec, target: str, prefix: str, size: Size, shape: Shape) -> Iterator[TensorJob]:
    """Yield a block's tensors, each matrix with the bias that it may have."""
    norm, output = _NORM_AND_OUTPUT[block.kind]
    yield _job(f"{target}.{norm}.weight", (shape.hidden_size,), f"{prefix}.{block.before}.weight", fill=1.0)
    counts = with_unsaid({"hidden": shape.hidden_size, "head_dim": shape.head_dim} | counts_of(block.kind, size))
    for tensor in block.inputs:
        part = tensor.path.removesuffix(".weight")
        rows, columns = tensor.shape(counts)
        source, name = f"{prefix}.{block.path}.{part}", _INPUTS[part]
        heads = (rows // shape.head_dim) if shape.architecture.interleaved and part in _ROTARY else 0
        yield _job(f"{target}.{name}.weight", (rows, columns), f"{source}.weight", heads)
        yield _job(f"{target}.{name}.bias", (rows,), f"{source}.bias", heads)
    for path, name in shape.head_norms if block.kind == "attention" else ():
        yield _job(f"{target}.{name}.weight", (shape.head_dim,), f"{prefix}.{block.path}.{path}.weight", fill=1.0)
    source = f"{prefix}.{block.path}.{block.output}"
    yield _job(f"{target}.{output}.weight", block.weight.shape(counts), f"{source}.weight")
    yield _job(f"{target}.{output}.bias", (shape.hidden_size,), f"{source}.bias")


def _check(jobs: Sequence[TensorJob], shapes: Shapes, ignored: set[str]) -> None:
    wanted = {name: (rows, *job.shape[1:]) for job in jobs for name, rows in job.sources}
    missing = sorted(set(wanted) - set(shapes))
    extra = sorted(set(shapes) - set(wanted) - ignored)
    wrong = sorted(name for name in set(wanted) & set(shapes) if wanted[name] != shapes[name])
    faults = {"missing": missing, "unexpected": extra, "of another shape": wrong}
    told = [f"{len(names)} {what}, such as {names[0]}" for what, names in faults.items() if names]
    if told:
        raise ConfigError(f"the weights do not fit config.json: {'; '.join(told)}")
