"""The dense model's tokenizer: there, readable, and within the rows of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.core.errors import ConfigError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import Family
from multipruner.storage.tensor_headers import StoredTensor, check_downloaded, json_object

from .recognise import TOKENIZERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
EXTRA = "sentencepiece"
"""The extra, and the package, that tokenizers need that are a ``tokenizer.model`` alone."""


def load_tokenizer(folder: Path, name: str, config: Any, trust: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Args:
        folder: of the model.
        name: what to call it in errors.
        config: the model's.
        trust: whether the model's own code may be run.

    Raises:
        UnknownModelError: when there is no tokenizer, or its files are damaged.
        ConfigError: when it needs a package that is missing, or code that may not be run.
    """
    from transformers import AutoTokenizer

    files = [each for each in TOKENIZERS if (folder / each).exists()]
    for each in files:
        check_downloaded(folder / each)
    settings = json_object(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    own = settings.get("auto_map")
    own = own.get("AutoTokenizer") if isinstance(own, dict) else own
    if own and not trust and "tokenizer.json" not in files:
        raise ConfigError(
            f"the tokenizer of {name} is code of its own ({own}), which loading it runs; read it, then pass "
            "--trust-remote-code"
        )
    if not files and not own:
        raise UnknownModelError(
            f"{name} has no tokenizer (none of {', '.join(TOKENIZERS)}); copy the files of the model it was made "
            "from into the folder"
        )
    if files == ["tokenizer.model"] and find_spec(EXTRA) is None:
        raise ConfigError(
            f"the tokenizer of {name} is tokenizer.model alone, which the package {EXTRA} reads: "
            f"pip install 'multipruner[{EXTRA}]'"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust)
        tokenizer("a")
        empty = not tokenizer.get_vocab()
    except Exception as error:  # of every kind: transformers meets files that nobody checked
        raise UnknownModelError(
            f"cannot load the tokenizer of {name}: {' '.join(str(error).split())[:400] or type(error).__name__}"
        ) from error
    if empty:
        raise UnknownModelError(f"the tokenizer of {name} has no token; copy that of the model it was made from")
    return tokenizer


def check_rows(name: str, tokenizer: Any, stored: Mapping[str, StoredTensor], spec: Family) -> None:
    """Check that no text gives a token without a row; padding alone, which is no text, may lie beyond the last.

    Args:
        name: what to call the model in errors.
        tokenizer: its tokenizer.
        stored: its tensors.
        spec: its family.

    Raises:
        UnsupportedModelError: naming a token that has no row.
    """
    table = stored.get(f"{spec.decoder}.{spec.embeddings}.weight") or stored.get(f"{spec.head}.weight")
    if table is None:
        return
    padding, rows = getattr(tokenizer, "pad_token", None), table.shape[0]
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows and token != padding)
    if beyond:
        raise UnsupportedModelError(
            f"{len(beyond)} tokens of the tokenizer of {name}, such as {beyond[0]!r}, lie beyond the {rows} rows of "
            "the embeddings; give the model rows for them (model.resize_token_embeddings(len(tokenizer)), then "
            "save_pretrained), or take them out of the tokenizer"
        )
