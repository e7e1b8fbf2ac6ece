"""The dense model's image processor: there, readable, and of the size of picture that the model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, UnknownModelError
from multipruner.storage.tensor_headers import check_downloaded

PROCESSOR = "preprocessor_config.json"


def load_processor(folder: Path, name: str) -> Any:
    """Load the image processor that lies beside a model.

    Args:
        folder: of the model.
        name: what to call it in errors.

    Raises:
        UnknownModelError: when there is none, or its file is damaged.
    """
    from transformers import AutoImageProcessor

    if not (folder / PROCESSOR).is_file():
        raise UnknownModelError(
            f"{name} has no image processor ({PROCESSOR}); copy that of the model it was made from into the folder"
        )
    check_downloaded(folder / PROCESSOR)
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of every kind: transformers meets files that nobody checked
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UnknownModelError(f"cannot load the image processor of {name}: {reason}") from error


def shape_of(name: str, config: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the pictures that a model takes.

    Args:
        name: what to call it in errors.
        config: the model's.

    Raises:
        ConfigError: when they are no numbers.
    """
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    shape: tuple[Any, Any, Any] = (config.num_channels, height, width)
    if not all(isinstance(number, int) and 1 <= number <= 65536 for number in shape):
        raise ConfigError(f"config.json of {name}: num_channels and image_size are {shape}; whole numbers are needed")
    return shape
