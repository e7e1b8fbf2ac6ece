"""Which text a search looks at, which one chooses between its finalists, and which one is for the report alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multipruner.core.errors import CalibrationError
from multipruner.jobs.setting import Setting
from multipruner.sources.calibration import CalibrationSet, load_calibration


@dataclass(frozen=True, eq=False)
class SearchTexts:
    """Token ids, [sequences, length] each.

    Attributes:
        calibration: what the search looks at.
        choice: held-out text that chooses between the finalists.
        held_out: held-out text for nothing but the numbers that are reported.
    """

    calibration: CalibrationSet
    choice: CalibrationSet
    held_out: CalibrationSet

    @classmethod
    def of(cls, setting: Setting) -> SearchTexts:
        """Return the calibration text, and the held-out text in two halves.

        Raises:
            CalibrationError: when there are not two sequences of held-out text.
        """
        spec, model = setting.recipe.text, setting.prunable.model
        held = setting.held_out or load_calibration(spec, setting.tokenizer, model, split="heldout")
        count = len(held.ids)
        if count < 2:
            raise CalibrationError(
                f"{spec.source} has {count} sequence of held-out text left, a search needs two (one chooses between "
                "finalists, one is for the report); lower --sequences or --length, or give more text"
            )
        half = count // 2
        name, ignored = held.name, held.ignore_id
        parts = (CalibrationSet(ids, name, ignored) for ids in (held.ids[:half], held.ids[half:]))
        return cls(setting.calibration, *parts)

    def sizes(self) -> dict[str, Any]:
        """Return tokens of every part, by name."""
        parts = {"calibration": self.calibration, "choice": self.choice, "held_out": self.held_out}
        return {name: part.ids.numel() for name, part in parts.items()}

    def ids(self, screened: int) -> list[Tensor]:
        """Return the texts of all fidelities, the cheapest first: a few sequences (if any), all, those that choose."""
        first = [self.calibration.ids[:screened]] if screened else []
        return [*first, self.calibration.ids, self.choice.ids]
