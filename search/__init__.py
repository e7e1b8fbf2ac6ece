"""Search over structures: needs an objective and costs, never torch.

Everything here works on :class:`~multipruner.core.structure.Structure` values and is tested with toy functions.
"""

from __future__ import annotations

if __name__ != "multipruner.search":
    raise ImportError("import multipruner.search: a bare `search` would load every class twice")

from multipruner.core.axes import DIMENSIONS, Dimension
from multipruner.core.objective import Objective
from multipruner.search.allocation import Allocation, Round, Task, allocate
from multipruner.search.grid import Grid, candidates
from multipruner.search.limits import Limit
from multipruner.search.memo import Memo
from multipruner.search.path import Problem, Progress, Shortlisted, sequential_path, too_small
from multipruner.search.program import Solution, solve
from multipruner.search.reachable import expected_candidates, reachable_ratio
from multipruner.search.step import Step, replay, steps_to

__all__ = [
    "DIMENSIONS",
    "Allocation",
    "Dimension",
    "Grid",
    "Limit",
    "Memo",
    "Objective",
    "Problem",
    "Progress",
    "Round",
    "Shortlisted",
    "Solution",
    "Step",
    "Task",
    "allocate",
    "candidates",
    "expected_candidates",
    "reachable_ratio",
    "replay",
    "sequential_path",
    "solve",
    "steps_to",
    "too_small",
]
