"""ONNX files: one forward pass from token ids and mask, or from pixels, to logits; any batch and length, no cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multipruner.checkpoint.classes import spec_of
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import check_space, weight_bytes
from multipruner.console.quiet import quieted
from multipruner.core.errors import ConfigError, OutputError
from multipruner.sources.intake.processor import load_processor, shape_of
from multipruner.storage.files import output_errors, publish, scratch

from .experts import batch_experts, check_mixers
from .target import target_of

EXTRA = "ONNX needs the extra 'onnx': pip install 'multipruner[onnx]'"
_PACKAGES = ("onnx", "onnxscript")
_TYPES = {"f32": torch.float32, "f16": torch.float16}
_OUTPUT = "logits"
_MOST_OFF = {"f32": 1e-3, "f16": 5e-2}
"""How far logits of pictures may be from those of transformers, in the mean, relative to how far they spread."""
_LEAST_SPREAD = 1e-3
"""That is reckoned with: a model may give the same whatever it sees."""
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


class _OfText(nn.Module):
    """The model with the two inputs and the one output that the file has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class _OfPictures(nn.Module):
    """An image classifier with the one input and the one output that the file has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


@dataclass(frozen=True)
class _Traced:
    """What is followed through a model.

    Attributes:
        module: has the inputs and the output of the file.
        examples: by the inputs' names; no side that is free has length 1.
        free: the sides of the inputs that may have any length.
        compared: whether the file is opened and compared before it takes its name.
    """

    module: nn.Module
    examples: Mapping[str, Tensor]
    free: tuple[int, ...]
    compared: bool = False

    @torch.no_grad()
    def error(self, path: Path) -> float:
        """Return how far the logits of a file are off on fewer and more rows than the example has, in the mean and
        relative to how far they spread; infinite where they are none.
        """
        right, found = [], []
        for rows in (1, 3):
            given = {name: one.repeat(2, *[1] * (one.ndim - 1))[:rows] for name, one in self.examples.items()}
            right.append(self.module(*given.values()).float())
            found.append(_computed(path, given))
        theirs, ours = torch.cat(found), torch.cat(right)
        error = float((theirs - ours).abs().mean() / ours.std().clamp(min=_LEAST_SPREAD))
        return error if error == error else float("inf")


def _computed(path: Path, given: Mapping[str, Tensor]) -> Tensor:
    """Return what a file computes: by ONNX Runtime, or, where that is not installed, by the reference in onnx."""
    arrays = {name: one.numpy() for name, one in given.items()}
    if find_spec("onnxruntime") is not None:
        from onnxruntime import InferenceSession

        (found,) = InferenceSession(path, providers=["CPUExecutionProvider"]).run([_OUTPUT], arrays)
    else:
        from onnx.reference import ReferenceEvaluator

        (found,) = ReferenceEvaluator(str(path)).run([_OUTPUT], arrays)
    return torch.from_numpy(found).float()


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
    Padding may be on either side; the logits of padding tokens mean nothing. An image classifier has the input
    ``pixel_values``, [batch, channels, height, width] in the file's type, of the size that it takes, and the output
    ``logits`` [batch, classes]; its file is opened and compared with the folder before it takes its name.

    Args:
        folder: what a run wrote.
        output: the file; default ``FOLDER-OUTTYPE.onnx`` beside the folder. It appears whole or not at all; weights
            that do not fit into it (2 GB) are beside it, under its name and ``.data``.
        outtype: ``f32`` or ``f16``, of weights and arithmetic.
        trust_remote_code: run the model's own code, for families that bring it.
        overwrite: whether an existing file may be replaced.

    Raises:
        ConfigError: when onnx or onnxscript is not installed, or for an unknown type.
        OutputError: when the file exists, cannot be written, or computes something else; nothing is left behind.
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
    traced = _traced(model, folder)
    program = _program(model, traced)
    external = size > _LIMIT
    # the name of the file with the weights is written into the graph: a folder of its own keeps it
    with output_errors(target), scratch(target) as work:
        program.save(work / target.name, external_data=external)
        if traced.compared and (off := traced.error(work / target.name)) > _MOST_OFF[outtype]:
            raise OutputError(
                f"{target.name}, opened again, gives logits that are off by {off:.2g} of their spread; the installed "
                "onnx and torch may not go together: nothing was written"
            )
        if external:
            publish(work / beside.name, beside)
        publish(work / target.name, target)
    if not external:
        beside.unlink(missing_ok=True)  # of an older, larger export under the same name
    files = [target, *([beside] if external else [])]
    nodes = len(program.model.graph)
    return ExportedOnnx(target, beside if external else None, nodes, sum(path.stat().st_size for path in files))


def _traced(model: Any, folder: Path) -> _Traced:
    """Return what is followed through a model: free batch, and of texts free length."""
    spec = spec_of(model.config)
    if spec.task.reads_text:
        ids = torch.arange(18).reshape(2, 9) % model.config.vocab_size
        return _Traced(_OfText(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (0, 1))
    shape = shape_of(str(folder), model.config, load_processor(folder, str(folder)), spec)
    pixels = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    return _Traced(_OfPictures(model), {spec.task.inputs: pixels}, (0,), compared=True)


def _program(model: Any, traced: _Traced) -> Any:
    """Return the graph."""
    names = tuple(traced.examples)
    free = dict.fromkeys(traced.free, torch.export.Dim.DYNAMIC)
    batch_experts(model)
    with quieted("torch.onnx"):  # it tells of every package that it does without
        program: Any = torch.onnx.export(
            traced.module, tuple(traced.examples.values()), dynamo=True, verbose=False, optimize=True,
            input_names=names, output_names=(_OUTPUT,), dynamic_shapes=dict.fromkeys(names, free),
        )  # fmt: skip
    graph = program.model.graph
    for node in graph.all_nodes():  # the exporter notes the Python stack of each, with this machine's paths
        for part in (node, *node.outputs):
            part.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return program
