"""Folders for OpenVINO: a stateful graph with its tokenizer, which openvino-genai and its servers open as they are."""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from multipruner.checkpoint.carry import SAMPLES, ids_of, write_generation, write_tokenizer
from multipruner.checkpoint.classes import family_of
from multipruner.checkpoint.load import load
from multipruner.checkpoint.run_folder import TOKENIZER
from multipruner.checkpoint.save import check_space, weight_bytes
from multipruner.core.errors import ConfigError, OutputError
from multipruner.storage.files import whole_folder

from .experts import check_mixers
from .target import target_of

EXTRA = "OpenVINO needs the extra 'openvino': pip install 'multipruner[openvino]'"
MODEL, ENTER, LEAVE = "openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"
BOUNDS = {"f32": 1e-3, "f16": 1e-2, "int8": 0.5}
"""Types of the weights, and how far logits may be off: mean difference, over the spread of the model's own. Another
model is off by 1.1; what int8 costs differs from model to model, and is said."""
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Nothing is rounded but the weights."""


@dataclass(frozen=True, slots=True)
class ExportedOpenvino:
    """What was written.

    Attributes:
        path: the folder.
        attentions: how many keep keys and values.
        nbytes: size of all files.
        error: of the logits of the folder, opened again: mean difference, over the spread of the model's own.
        tokenizer: why there is no converted tokenizer; empty where there is one.
        uneven: KV heads of layers whose groups have several sizes, and these sizes.
    """

    path: Path
    attentions: int
    nbytes: int
    error: float
    tokenizer: str
    uneven: dict[int, list[int]]

    def lines(self, outtype: str) -> list[str]:
        """Return what a person is told."""
        said = [
            f"{self.path}: {self.attentions} attentions, {outtype}, {self.nbytes / 1e6:,.1f} MB; opened again, its "
            f"logits differ by {self.error:.1e} of their spread"
        ]
        if self.tokenizer:
            said.append(f"the tokenizer is not converted ({self.tokenizer}): hand the model token ids")
        if self.uneven:
            rows = (f"{kv} KV heads with {' and '.join(map(str, each))}" for kv, each in self.uneven.items())
            said.append(
                f"openvino-genai's default attention backend is wrong for this model (layers of {'; '.join(rows)} "
                "query heads each): open it with LLMPipeline(folder, 'CPU', ATTENTION_BACKEND='SDPA')"
            )
        return said


def export_openvino(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    outtype: str = "f16",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportedOpenvino:
    """Write a checkpoint folder as a folder for OpenVINO, and compare what is there with the model.

    Args:
        folder: what a run wrote.
        output: the new folder; default ``FOLDER-OUTTYPE.openvino`` beside the folder. It appears whole or not at all.
        outtype: of the weights: ``f32``, ``f16``, or ``int8`` (which nncf makes of them). Arithmetic is the device's.
        trust_remote_code: run the model's own code, for families that bring it.
        overwrite: whether an earlier export may be replaced.

    Raises:
        ConfigError: when openvino, or nncf for ``int8``, is not installed, or for an unknown type.
        OutputError: when the folder exists or cannot be written, or does not compute what the model does; nothing is
            left behind.
        UnknownModelError, UnsupportedModelError: as :func:`multipruner.load`, and for models that cannot be traced.
    """
    if outtype not in BOUNDS:
        raise ConfigError(f"outtype {outtype!r}: OpenVINO folders are written as {', '.join(BOUNDS)}")
    if any(find_spec(name) is None for name in ("openvino", *(["nncf"] if outtype == "int8" else []))):
        raise ConfigError(EXTRA)
    _send_nothing()
    from .openvino_model import converted

    folder = Path(folder)
    target = target_of(folder, output, outtype, "openvino")
    _check_target(target, overwrite)
    model: Any = load(folder, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    check_mixers(model, "OpenVINO", cached=True)
    check_space(target.absolute(), weight_bytes(model))
    graph = converted(model)
    attentions = len(graph.get_sinks())
    with whole_folder(target) as partial:
        _write_graph(graph, partial / MODEL, outtype)
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record.pop("auto_map", None)  # its code stays where it is: nothing here runs any
        (partial / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_generation(partial, model, folder)
        missing = _write_tokenizer(folder, partial, trust_remote_code)
        error = _error(partial, model)
        if not error < BOUNDS[outtype]:
            raise OutputError(
                f"the OpenVINO folder does not compute what {folder} does: logits are off by {error:.2g} of their "
                f"spread, {BOUNDS[outtype]} is allowed for {outtype}; nothing was written"
            )
        nbytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return ExportedOpenvino(target, attentions // 2, nbytes, error, missing, uneven_groups(model.config))


def _send_nothing() -> None:
    """Have OpenVINO and nncf find no ``openvino_telemetry``, through which they send statistics of use wherever nobody
    has said no; both go on without that package. An answer that somebody has given is for their own programs."""
    sys.modules.setdefault("openvino_telemetry", cast("Any", None))


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not (overwrite and (target / MODEL).is_file()):
        other = "" if (target / MODEL).is_file() else ", and is no such export"
        raise OutputError(f"{target} exists already{other}; choose another --output or give --overwrite")


def _write_graph(graph: Any, path: Path, outtype: str) -> None:
    import openvino

    if outtype == "int8":
        import nncf

        nncf.set_log_level(logging.ERROR)
        with redirect_stdout(StringIO()):  # bars of its own
            graph = nncf.compress_weights(graph)
    openvino.save_model(graph, path, compress_to_fp16=outtype == "f16")


def _write_tokenizer(folder: Path, partial: Path, trust: bool) -> str:
    """Write the tokenizer as it is, and as a pair of graphs; return why the pair is not there."""
    from transformers import AutoTokenizer

    if not any(path for name in TOKENIZER for path in folder.glob(name)):
        return "the folder has none"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    write_tokenizer(partial, tokenizer, folder)
    if find_spec("openvino_tokenizers") is None:
        return "openvino-tokenizers is not installed"
    import openvino
    from openvino_tokenizers import convert_tokenizer

    try:
        graphs: Any = convert_tokenizer(tokenizer, with_detokenizer=True)
        enter = openvino.compile_model(graphs[0], "CPU")
        found = [enter([text])["input_ids"][0].tolist() for text in SAMPLES]
    except Exception as error:  # of every kind: it reads what tokenizers say of themselves
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    wrong = [text for text, ids, right in zip(SAMPLES, found, ids_of(tokenizer), strict=True) if ids != right]
    if wrong:
        return f"converted, it makes other tokens of {wrong[0]!r}"
    for graph, name in zip(graphs, (ENTER, LEAVE), strict=True):
        openvino.save_model(graph, partial / name)
    return ""


@torch.no_grad()
def _error(folder: Path, model: Any) -> float:
    """Return how far the logits of a folder are off: of two texts, the first padded on the left, in three steps between
    which they change places.
    """
    import openvino

    compiled = openvino.Core().compile_model(folder / MODEL, "CPU", _EXACT)
    request = compiled.create_infer_request()
    ids = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    right = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    order, found = [0, 1], []
    for begin, end, turned in ((0, 7, False), (7, 8, True), (8, 12, True)):
        order = order[::-1] if turned else order
        given = {"input_ids": ids[order, begin:end], "attention_mask": mask[order, :end],
                 "position_ids": places[order, begin:end]}  # fmt: skip
        beams = np.array([1, 0] if turned else [0, 1], dtype=np.int32)
        said = request.infer({**{name: value.numpy() for name, value in given.items()}, "beam_idx": beams})
        found.append(torch.from_numpy(said["logits"].copy())[order])
    there = mask.bool()
    return float((torch.cat(found, 1) - right)[there].abs().mean() / right[there].std())


def uneven_groups(config: Any) -> dict[int, list[int]]:
    """Return the sizes of the groups of layers with as many KV heads, where these differ and none is 1.

    openvino-genai 2026.4 gives wrong tokens there, or ends the process, unless it is told ``ATTENTION_BACKEND="SDPA"``.
    """
    spec, sizes = family_of(config), defaultdict(set)
    for own in (config.per_layer_config or ()) if spec else ():
        if spec and "attention" not in getattr(own, "skip", ()):
            heads, kv_heads = (getattr(own, key) for key in spec.heads_keys)
            sizes[kv_heads].add(heads // kv_heads)
    larger = {kv_heads: sorted(each - {1}) for kv_heads, each in sizes.items()}
    return {kv_heads: each for kv_heads, each in larger.items() if len(each) > 1}
