"""ONNX files: one forward pass from token ids and mask to logits, any batch and length, no cache."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import check_space, weight_bytes
from multipruner.console.quiet import quieted
from multipruner.core.errors import ConfigError, OutputError
from multipruner.storage.files import output_errors, publish, scratch

from .experts import batch_experts, check_mixers
from .target import target_of

EXTRA = "ONNX needs the extra 'onnx': pip install 'multipruner[onnx]'"
_PACKAGES = ("onnx", "onnxscript")
_TYPES = {"f32": torch.float32, "f16": torch.float16}
_INPUTS, _OUTPUT = ("input_ids", "attention_mask"), "logits"
_LIMIT = 1_800_000_000
"""Bytes of weights within the file itself (a protobuf message ends at 2 GiB); above, they go beside it."""


@dataclass(frozen=True, slots=True)
class ExportedOnnx:
    """What was written.

    Attributes:
        path: the file.
        weights: the file of the weights beside it, where they do not fit into the first.
        nodes: operators in the graph.
        nbytes: size of both.
    """

    path: Path
    weights: Path | None
    nodes: int
    nbytes: int

    def lines(self, outtype: str) -> list[str]:
        """Return what a person is told."""
        beside = f", weights in {self.weights.name} beside it" if self.weights else ""
        return [f"{self.path}: {self.nodes} operators, {outtype}, {self.nbytes / 1e6:,.1f} MB{beside}"]


class _Logits(nn.Module):
    """The model with the two inputs and the one output that the file has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def export_onnx(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    outtype: str = "f32",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportedOnnx:
    """Write a checkpoint folder as an ONNX file.

    Inputs ``input_ids`` and ``attention_mask``, int64 [batch, length]; output ``logits`` [batch, length, vocabulary].
    Padding may be on either side; the logits of padding tokens mean nothing.

    Args:
        folder: what a run wrote.
        output: the file; default ``FOLDER-OUTTYPE.onnx`` beside the folder. It appears whole or not at all; weights
            that do not fit into it (2 GB) are beside it, under its name and ``.data``.
        outtype: ``f32`` or ``f16``, of weights and arithmetic.
        trust_remote_code: run the model's own code, for families that bring it.
        overwrite: whether an existing file may be replaced.

    Raises:
        ConfigError: when onnx or onnxscript is not installed, or for an unknown type.
        OutputError: when the file exists, or cannot be written; nothing is left behind.
        UnknownModelError, UnsupportedModelError: as :func:`multipruner.load`.
    """
    if any(find_spec(package) is None for package in _PACKAGES):
        raise ConfigError(EXTRA)
    if outtype not in _TYPES:
        raise ConfigError(f"outtype {outtype!r}: ONNX files are written as {' or '.join(_TYPES)}")
    folder = Path(folder)
    target = target_of(folder, output, outtype, "onnx")
    beside = target.with_name(f"{target.name}.data")
    for path in (target, beside):
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError(f"{path} exists already; choose another --output or give --overwrite")
    model = load(folder, dtype=_TYPES[outtype], trust_remote_code=trust_remote_code).eval()
    check_mixers(model, "ONNX", cached=False)
    size = weight_bytes(model)
    check_space(target.absolute(), size)
    program = _program(model)
    external = size > _LIMIT
    # the name of the file with the weights is written into the graph: a folder of its own keeps it
    with output_errors(target), scratch(target) as work:
        program.save(work / target.name, external_data=external)
        if external:
            publish(work / beside.name, beside)
        publish(work / target.name, target)
    if not external:
        beside.unlink(missing_ok=True)  # of an older, larger export under the same name
    files = [target, *([beside] if external else [])]
    nodes = len(program.model.graph)
    return ExportedOnnx(target, beside if external else None, nodes, sum(path.stat().st_size for path in files))


def _program(model: Any) -> Any:
    """Return the graph with free batch and length, from an example that has neither of size 1."""
    ids = torch.arange(18).reshape(2, 9) % model.config.vocab_size
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    batch_experts(model)
    with quieted("torch.onnx"):  # it tells of every package that it does without
        program: Any = torch.onnx.export(
            _Logits(model), (ids, torch.ones_like(ids)), dynamo=True, verbose=False, optimize=True,
            input_names=_INPUTS, output_names=(_OUTPUT,), dynamic_shapes=dict.fromkeys(_INPUTS, free),
        )  # fmt: skip
    graph = program.model.graph
    for node in graph.all_nodes():  # the exporter notes the Python stack of each, with this machine's paths
        for part in (node, *node.outputs):
            part.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return program
