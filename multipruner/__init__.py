"""Make Hugging Face causal language models smaller and faster without training.

    import multipruner

    run = multipruner.prune("llama", ratio=0.2)     # a folder that stock transformers loads
    model = multipruner.load("runs/llama-0.2")

Importing this package is cheap: torch and transformers are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .core import __version__ as __version__

_EXPORTS = {
    "Anatomy": "core.structure",
    "PruningPlan": "core.plan",
    "Ranking": "core.plan",
    "Structure": "core.structure",
    "Recipe": "config.recipe",
    "MultiprunerError": "core.errors",
    "Run": "jobs.finish",
    "prune": "jobs.prune.run",
    "apply_plan": "checkpoint.cut",
    "load": "checkpoint.load",
    "save": "checkpoint.save",
}

if TYPE_CHECKING:
    from .checkpoint.cut import apply_plan as apply_plan
    from .checkpoint.load import load as load
    from .checkpoint.save import save as save
    from .config.recipe import Recipe as Recipe
    from .core.errors import MultiprunerError as MultiprunerError
    from .core.plan import PruningPlan as PruningPlan
    from .core.plan import Ranking as Ranking
    from .core.structure import Anatomy as Anatomy
    from .core.structure import Structure as Structure
    from .jobs.finish import Run as Run
    from .jobs.prune.run import prune as prune

__all__ = [*_EXPORTS, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
