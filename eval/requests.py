"""lm-eval's model, which tells how many requests it has answered; lm-eval itself offers only bars of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from lm_eval.models.huggingface import HFLM

Progress = Callable[[int, int], None]
"""Called with (requests answered, requests in all)."""
_HFLM: Any = cast("Any", HFLM)  # decorators hide its signatures


class CountingLM(_HFLM):
    """Counts answers by the hook that lm-eval calls with each of them, to keep it.

    Args:
        progress: called before the first answer of a kind, and after every one.
        options: as for ``HFLM``.
    """

    def __init__(self, progress: Progress, **options: Any) -> None:
        super().__init__(**options)
        self._progress = progress

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._expect(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._expect(len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _expect(self, total: int) -> None:
        self.set_cache_hook(_Counter(self._progress, total))
        self._progress(0, total)


class _Counter:
    """Stands where lm-eval's cache of answers may stand."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one more request that has its answer."""
        self._done += 1
        self._progress(self._done, self._total)
