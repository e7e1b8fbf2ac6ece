"""Errors that are the user's to mend: each names the thing, the value, what is allowed and the next step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class MultiprunerError(Exception):
    """Base of every error that the command line prints as one line instead of a traceback."""


class ConfigError(MultiprunerError):
    """A recipe, flag or plan says something that cannot be meant."""


class UnknownModelError(MultiprunerError):
    """The model is neither a recipe, a local folder or file, nor reachable on the Hub."""


class UnsupportedModelError(MultiprunerError):
    """The model was found, but cannot be pruned as it is: its family, its kind of file, or a tensor without a place."""


class CalibrationError(MultiprunerError):
    """Calibration or evaluation text is missing, empty or too short."""


class InfeasibleError(MultiprunerError):
    """No structure satisfies the budget; ``nearest`` is the closest value of the bound that one does."""

    def __init__(self, message: str, nearest: float | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class NumericsError(MultiprunerError):
    """NaN or infinity where a number is needed."""


class MemoryShortError(MultiprunerError):
    """Something needs more memory than there is; the text says how much of both."""


class OutputError(MultiprunerError):
    """The output folder cannot be used."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest choice, or an empty string."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shortened(text: str) -> str:
    """Return a text for one line of a screen: what is very long in it (a number of a thousand digits) is cut."""
    return re.sub(r"(\S{120})\S{40,}", r"\1...", text)


def in_brief(error: Exception) -> str:
    """Return the kind of an error that is another program's, and the beginning of what it says, for part of a line."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
