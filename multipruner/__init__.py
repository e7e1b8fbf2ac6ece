"""Make Hugging Face causal language models smaller and faster without training.

    import multipruner

    run = multipruner.prune("llama", ratio=0.2)     # a folder that stock transformers loads
    model = multipruner.load("runs/llama-0.2")

Importing this package is cheap: torch and transformers are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "LayerSize": "structure",
    "PruningPlan": "plan",
    "Ranking": "plan",
    "Structure": "structure",
    "Recipe": "recipe",
    "MultiprunerError": "errors",
    "Run": "pipeline",
    "prune": "api",
    "apply_plan": "modeling",
    "load": "export.checkpoint",
    "save": "export.checkpoint",
}

if TYPE_CHECKING:
    from .api import prune as prune
    from .errors import MultiprunerError as MultiprunerError
    from .export.checkpoint import load as load
    from .export.checkpoint import save as save
    from .modeling import apply_plan as apply_plan
    from .pipeline import Run as Run
    from .plan import PruningPlan as PruningPlan
    from .plan import Ranking as Ranking
    from .recipe import Recipe as Recipe
    from .structure import LayerSize as LayerSize
    from .structure import Structure as Structure

__all__ = [*_EXPORTS, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
