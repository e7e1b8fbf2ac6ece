"""The text that perplexity is measured on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from multipruner.config.recipe import EvaluationSpec
from multipruner.core.errors import CalibrationError, ConfigError
from multipruner.storage.hub import offline_unless_hub_answers
from multipruner.storage.text_files import ending, read_text

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_ENDINGS = (".txt", ".raw")
_INSTEAD = "give a text file (evaluation.text, --eval-text), such as wiki.test.raw of WikiText-2"


def wikitext_text(spec: EvaluationSpec) -> tuple[str, str]:
    """Return the name and content of the text for perplexity: ``spec.text`` as it is, or the test split of WikiText-2.

    A file may begin with a byte order mark, and be compressed.

    The rows of WikiText-2 are joined with blank lines, as published numbers have it.

    Raises:
        ConfigError: when the file is no .txt or .raw file.
        CalibrationError: when the file is missing, unreadable or empty, or WikiText-2 is neither in the cache nor
            reachable; without a network this takes seconds, not minutes.
    """
    if spec.text is None:
        return "WikiText-2", _wikitext2()
    path = Path(spec.text).expanduser()
    if ending(path) not in _ENDINGS:
        raise ConfigError(
            f"evaluation.text = {spec.text!r}: expected a {' or '.join(_ENDINGS)} file, compressed or not"
        )
    try:
        text = read_text(path)
    except (OSError, ValueError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CalibrationError(f"cannot read evaluation.text = {spec.text!r}: {reason}") from error
    if not text.strip():
        raise CalibrationError(f"evaluation.text = {spec.text!r} is empty: {_INSTEAD}")
    return path.name, text


@cache
def _wikitext2() -> str:
    import datasets

    try:
        with offline_unless_hub_answers():
            rows = datasets.load_dataset(*WIKITEXT, split="test")
    except Exception as error:  # network, cache and parser errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CalibrationError(f"WikiText-2 cannot be had ({reason}): connect to the Hub, or {_INSTEAD}") from error
    return "\n\n".join(rows["text"])
