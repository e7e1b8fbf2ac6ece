"""Models for vLLM to open, cut without any measurement: what is asked is whether they load and compute the same.

    python .ci/vllm_models.py [KIND] FOLDER

KIND is one of :data:`KINDS`; FOLDER gets a folder for every model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import multipruner
from multipruner.core.families import FAMILIES, anatomy_of
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.jobs.tune.settings import TuneSettings
from multipruner.jobs.tune.steps import attach, merged, train
from multipruner.recipes import read
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

ROUND = 10
"""After so many layers the same things are missing again."""
HEAD = {"hidden_size": 128, "head_dim": 32}
"""Of the smallest models that vLLM's attention on processors takes."""
LATENT = {"hidden_size": 128, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 32}
TEXT = Path(__file__).parents[1] / "README.md"
LEARNING = TuneSettings(steps=8, batch=4, length=128, rank=8, lr=2e-3)


def everything_missing(folder: Path) -> None:
    """Write FOLDER/dense, SmolLM2-135M-Instruct as it is, and FOLDER/pruned."""
    recipe = multipruner.Recipe.build({**read("llama"), "ratio": 0.2, "dtype": "float32"})
    found = resolve(recipe, print)
    dense, tokenizer = load_dense(found, recipe)
    dense.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    anatomy = anatomy_of(dense.config)
    plan = _written(folder / "pruned", dense, structure(anatomy), tokenizer)
    for line in told(plan):
        print(line, flush=True)


def families(folder: Path) -> None:
    """Write a small random model of every family, of which the first layer has no attention and the last no MLP.

    Left out are families that bring their code, and those that mix tokens otherwise than by attention, which vLLM's
    Transformers backend refuses ("does not dispatch through the Transformers attention interface").
    """
    from tests.support import tiny

    for name, settings in {**tiny.VARIANTS, **tiny.MORE}.items():
        if name in tiny.OWN_CODE or tiny.mixes(settings["family"]):
            continue
        dense = tiny.tiny_model(**{**settings, **_wide_enough(settings)})
        _written(folder / name, dense, tiny.mixed_structure(anatomy_of(dense.config)))


def _wide_enough(settings: dict[str, Any]) -> dict[str, Any]:
    """Heads as wide as vLLM wants them, where layers attend; KV heads where the family's configuration knows them."""
    if "qk_rope_head_dim" in settings:
        return LATENT
    without, heads = set(settings.get("without", ())), set(FAMILIES[settings["family"]].heads_keys)
    without |= {"num_key_value_heads"} if len(heads) == 1 else set()
    unsaid = "head_dim" in without or settings.get("head_dim", 0) is None
    return {**HEAD, "head_dim": None, "without": tuple(without)} if unsaid else {**HEAD, "without": tuple(without)}


def adapter(folder: Path) -> None:
    """Train LoRA as ``tune`` does over FOLDER/pruned, which is made where it is not there: FOLDER/adapter has what was
    learned, FOLDER/merged the model with it, by peft.
    """
    uneven(folder)
    small = multipruner.load(folder / "pruned", dtype=torch.float32)
    adapted = attach(small, LEARNING)
    done = train(adapted, _ids(folder / "pruned", small.config.vocab_size), LEARNING, folder, {})
    print(f"adapter: {LEARNING.steps} steps, loss {done.losses[0]:.2f} to {done.losses[-1]:.2f}", flush=True)
    adapted.save_pretrained(folder / "adapter")
    merged(adapted).save_pretrained(folder / "merged")


def _ids(folder: Path, vocabulary: int) -> torch.Tensor:
    """Tokens of a text, where there is a tokenizer, or one drawn row again and again."""
    if not (folder / "tokenizer.json").exists():
        row = torch.randint(vocabulary, (1, LEARNING.length), generator=torch.Generator().manual_seed(0))
        return row.expand(LEARNING.batch, -1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8")).input_ids)
    return ids[: len(ids) // LEARNING.length * LEARNING.length].view(-1, LEARNING.length)


def uneven(folder: Path) -> None:
    """Write FOLDER/pruned where it is not there: a random Llama whose KV groups and channels differ between layers,
    and divide by two in all of them.
    """
    from tests.support import tiny

    if (folder / "pruned").exists():
        return
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 384}
    dense = tiny.tiny_model("llama", layers=6, **HEAD, **sizes)
    cut = (4, 2), (256,), (2, 2), (384,), GONE, (128,), (4, 1), GONE, GONE, GONE, (2, 1), (320,)
    _written(folder / "pruned", dense, Structure(cut))


KINDS: dict[str, Callable[[Path], None]] = {
    "": everything_missing,
    "families": families,
    "adapter": adapter,
    "parallel": uneven,
    "quantised": uneven,
}


def _written(folder: Path, dense: PreTrainedModel, kept: Structure, tokenizer: Any = None) -> multipruner.PruningPlan:
    anatomy = anatomy_of(dense.config)
    first = multipruner.Ranking.identity(anatomy)
    plan = multipruner.PruningPlan.from_structure(
        kept, first, anatomy, model="dense", model_type=dense.config.model_type
    )
    multipruner.save(folder, multipruner.apply_plan(dense, plan), tokenizer, plan=plan, report={}, card="")
    return plan


def structure(anatomy: Anatomy) -> Structure:
    """Every tenth layer without attention, without MLP, without both, with fewer groups, with fewer query heads in
    each, with fewer of both, or narrower; the first one has no attention.
    """
    return Structure(tuple(size(place.layer, place.kind, place.dense) for place in anatomy))


def size(layer: int, kind: str, dense: Size) -> Size:
    first, *rest = dense
    if kind == "attention":
        cuts = {0: GONE, 3: GONE, 4: (first - 1, *rest), 5: (first, *(n - 1 for n in rest)),
                6: (first - 1, *(n - 1 for n in rest))}  # fmt: skip
    else:
        cuts = {2: GONE, 3: GONE, 7: (first * 2 // 3,), 8: (1000,)}
    return cuts.get(layer % ROUND, dense)


def told(plan: multipruner.PruningPlan) -> list[str]:
    """Say what is missing, by kind of block."""
    said = []
    for kind in ("attention", "mlp"):
        sizes = [size for place, size in zip(plan.anatomy, plan.structure, strict=True) if place.kind == kind]
        found = {size: sizes.count(size) for size in sorted(set(sizes), reverse=True)}
        named = (f"{n} x {' x '.join(map(str, size)) or 'gone'}" for size, n in found.items())
        said.append(f"{kind}: {', '.join(named)}")
    return [*said, f"layers: {len(plan.layers)} of {plan.anatomy.layers}"]


if __name__ == "__main__":
    *kind, folder = sys.argv[1:]
    KINDS["".join(kind)](Path(folder))
