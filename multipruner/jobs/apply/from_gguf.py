"""A plan and a dense GGUF file made into the pruned GGUF file, without unpacking either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multipruner.console.events import tell
from multipruner.console.progress import bytes_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.plan import PruningPlan
from multipruner.engine.fingerprint import fingerprint
from multipruner.export.from_gguf.blocks import FLOATS
from multipruner.export.from_gguf.cut import CutModel, cut_model, write_cut
from multipruner.export.from_gguf.source import GgufSource, open_source
from multipruner.export.gguf_model import OTHER_HEADS, sizes_by_layer
from multipruner.export.gguf_tensors import numbers_of
from multipruner.report.words import UNREPAIRED
from multipruner.storage.files import path_of
from multipruner.stream.dense import LOADED, shell_of
from multipruner.stream.plans import find_plan

_PATHS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
"""Where biases may be, and what a configuration calls that."""


def cut_gguf(
    plan_name: str,
    dense: Path,
    output: Path,
    *,
    console: Console | None = None,
    overwrite: bool = False,
    any_weights: bool = False,
) -> CutModel:
    """Write the GGUF file that a plan leaves of a dense one, tensor by tensor; metadata and tokenizer are copied.

    Args:
        plan_name: see :func:`.find_plan`.
        dense: the dense model's file.
        output: the smaller file; it appears whole or not at all.
        console: where progress goes; default: nowhere.
        overwrite: whether an existing file may be replaced.
        any_weights: take weights of the same shapes that are not those that the plan was made of.

    Returns:
        What was written.

    Raises:
        ConfigError: when the plan is none, or one of another model.
        UnknownModelError: when there is no such file.
        UnsupportedModelError: when the file is damaged, or llama.cpp cannot compute the smaller model.
        NumericsError: for weights that are not finite.
        OutputError: when the file exists already, or cannot be written; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    say, target = teller(console), output.absolute().resolve()
    if target == dense.absolute().resolve():
        raise ConfigError(f"--output {output} is the dense model's own file; name another one")
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(f"{output} exists already; choose another --output or give --overwrite")
    if not path_of(str(dense)).is_file():
        raise ConfigError(f"there is no file {dense}; give a .gguf file of the plan's dense model with --model")
    plan = find_plan(plan_name)
    if plan.along:
        raise ConfigError(
            f"{plan_name} leaves heads of {OTHER_HEADS}, which no architecture of llama.cpp reads by the layer; take "
            "the run's own folder, or prune without --value-dim-step and --rope-pair-step"
        )
    if plan.bases:
        raise ConfigError(f"{plan_name}: its {plan.turned} are of a basis of the run's own; export the run's folder")
    source = open_source(dense, plan)
    model = cut_model(source, plan)
    _check_weights(plan, source, any_weights, console)
    say(f"note: {UNREPAIRED}")
    for line in model.lines():
        say(line)
    with bytes_display(console, "writing", model.nbytes) as tick:
        write_cut(model, target, tick)
    before, after = _parameters(model)
    size = target.stat().st_size
    say(f"parameters: {before:,} -> {after:,} (-{1 - after / before:.2%}); written to {output}: architecture "
        f"{model.architecture.name}, {len(model.layers)} layers, {size / 1e6:,.1f} MB")  # fmt: skip
    tell(console, "result", file=str(output), parameters={"before": before, "after": after}, nbytes=size)
    return model


def _parameters(model: CutModel) -> tuple[int, int]:
    """Count the weights of the dense file, and those of the smaller one that come from there."""
    before = sum(int(piece.tensor.n_elements) for piece in model.source.pieces.values())
    after = (torch.Size(tensor.shape).numel() for tensor in model.tensors if tensor.pieces)
    return before, sum(after) - (0 if model.source.factors is None else int(model.source.factors.n_elements))


def _check_weights(plan: PruningPlan, source: GgufSource, any_weights: bool, console: Console) -> None:
    """Refuse weights that are not those that the plan was made of, unless they are meant."""
    if plan.fingerprint is None or any_weights:
        return
    size = sum(4 * int(piece.tensor.n_elements) for piece in source.pieces.values())
    with bytes_display(console, "comparing", size) as tick:
        if is_of(source, plan, tick):
            return
    raise ConfigError(
        f"the plan was made for {plan.model}, and the weights of {source.path.name} differ from those it was made of "
        f"(fingerprint {plan.fingerprint[:12]}), as those of a quantised file do when the plan was made of the model "
        "itself; pass --any-weights to cut these all the same"
    )


def is_of(source: GgufSource, plan: PruningPlan, tick: Callable[[int], object]) -> bool:
    """Tell whether the weights in a file are those of a plan: unpacked to bfloat16, as a run unpacks them, or as they
    are.

    Args:
        source: the file; all of its weights are read once for each type that is tried.
        plan: with a fingerprint.
        tick: called with the bytes of every tensor that was read.
    """
    model = _shell(source, plan)
    names = {id(weight): name for name, weight in model.named_parameters()}
    if set(names.values()) - set(source.pieces):
        return False

    def values(weight: torch.Tensor, first: torch.dtype, then: torch.dtype) -> torch.Tensor:
        found = torch.from_numpy(source.values(names[id(weight)]))
        tick(found.nbytes)
        return found.to(first).to(then)

    unpacked = [(torch.bfloat16, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    floats = all(piece.kind in FLOATS for piece in source.pieces.values())
    tried = dict.fromkeys([*unpacked, *((dtype, dtype) for dtype in LOADED if floats)])
    return any(
        fingerprint(model, lambda weight, types=types: values(weight, *types)) == plan.fingerprint for types in tried
    )


def _shell(source: GgufSource, plan: PruningPlan) -> torch.nn.Module:
    """Return the dense model without weights: the order of its parameters is part of a fingerprint."""
    from transformers import CONFIG_MAPPING

    shape = source.shape
    sizes = sizes_by_layer(plan.anatomy, plan.dense)[0]
    biases = {path: any(f".{path}." in name and name.endswith(".bias") for name in source.pieces) for path in _PATHS}
    make: Any = CONFIG_MAPPING[plan.model_type]
    config = make(
        **numbers_of(source.spec, sizes), **{key: biases[path] for path, key in _PATHS.items()},
        hidden_size=shape.hidden_size, head_dim=shape.head_dim, vocab_size=shape.vocab_size,
        num_hidden_layers=plan.anatomy.layers, tie_word_embeddings=shape.tied_embeddings,
    )  # fmt: skip
    return shell_of(config, source.spec, False)
