"""Ask the Hub only when it answers: without a network its clients retry for half a minute per file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

PROBE_SECONDS = 5.0
"""How long the Hub may take for its first answer."""


@cache
def hub_answers() -> bool:
    """Whether the Hub is allowed (``HF_HUB_OFFLINE``) and answers; asked once per process.

    Once, so that the dense and the pruned model of a run are judged on the same text.
    """
    from datasets import config
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the client's errors have another base class in each huggingface_hub
        return False
    return True


@contextmanager
def offline_unless_hub_answers() -> Iterator[None]:
    """Within, an unreachable Hub fails at once and caches are used, as with ``HF_HUB_OFFLINE=1``.

    Both libraries read the variable at import, so what they read is changed, and restored.
    """
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not hub_answers():
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
