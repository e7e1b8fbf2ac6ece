"""The dense model's image processor: there, readable, and of the size of picture that the model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, UnknownModelError
from multipruner.core.families import Family, spec_for
from multipruner.storage.tensor_headers import check_downloaded

PROCESSOR = "preprocessor_config.json"
_BLANK = 64
"""Pixels in a row of the picture that an image processor is tried with."""


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


def shape_of(name: str, config: Any, processor: Any, spec: Family | None = None) -> tuple[int, int, int]:
    """Return channels, height and width of the pictures that a model takes: as its configuration says, or, where it
    takes others as well, as its image processor makes them.

    Args:
        name: what to call it in errors.
        config: the model's.
        processor: its image processor.
        spec: its family's row; default: that of a dense model's configuration.

    Raises:
        ConfigError: when they are no numbers, or the image processor makes none of so many channels.
    """
    spec = spec or spec_for(config)
    own = spec.part_of(config)
    size = own.image_size
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    shape: tuple[Any, Any, Any] = (own.num_channels, height, width)
    if not all(isinstance(number, int) and 1 <= number <= 65536 for number in shape):
        raise ConfigError(f"config.json of {name}: num_channels and image_size are {shape}; whole numbers are needed")
    return (shape[0], *_made_of_a_blank(name, shape[0], processor)) if spec.any_picture else shape


def _made_of_a_blank(name: str, channels: int, processor: Any) -> tuple[int, int]:
    """Return height and width of the picture that an image processor makes of a blank one."""
    import numpy as np

    blank = np.zeros((_BLANK, _BLANK, channels), np.uint8)
    try:
        pixels = processor(images=[blank], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    except Exception as error:  # of every kind: its settings may be anybody's
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ConfigError(f"the image processor of {name} cannot read a picture: {reason}") from error
    return tuple(pixels.shape[2:])
