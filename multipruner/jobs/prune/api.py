"""The main job as a Python function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.recipe import Recipe
from multipruner.jobs.finish import Run
from multipruner.jobs.finish import prune as run_recipe
from multipruner.recipes import mapping_for


def default_output(recipe: Recipe) -> Path:
    """``runs/NAME-RATIO``, where a run goes when no folder is named."""
    limits = [f"{recipe.ratio:g}"] if recipe.ratio is not None else []
    limits += [f"{name}-{amount}" for name, amount in recipe.budgets.items()]
    return Path("runs") / f"{recipe.name}-{'-'.join(limits)}"


def prune(
    model: str | Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> Run:
    """Prune a model, as ``python -m multipruner`` does.

    Args:
        model: a recipe name, Hub id, local folder or ``.gguf`` file, or a whole recipe.
        output: the folder to write; default ``runs/NAME-RATIO``.
        overwrite: give up what another run left there.
        console: where progress and summary go; default: nowhere.
        **overrides: recipe fields, such as ``ratio=0.3`` or ``calibration={"source": "self"}``.

    Returns:
        The finished run, with the pruned model in memory.

    Raises:
        MultiprunerError: a subclass that says what to do, such as :class:`ConfigError` for an unknown key,
            :class:`UnknownModelError`, :class:`CalibrationError` or :class:`InfeasibleError`. Nothing half-written is
            left, and the same call goes on where an interrupted one was.
    """
    base = model.model_dump(exclude_unset=True) if isinstance(model, Recipe) else mapping_for(model)
    recipe = Recipe.build(base, overrides)
    return run_recipe(recipe, Path(output or default_output(recipe)), console=console, overwrite=overwrite)
