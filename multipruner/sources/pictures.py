"""Pictures of a local folder, flat or in one sub-folder for each class, as an image classifier reads them.

They are shuffled by the recipe's seed and dealt, so that no part shares a picture with another: some score structures,
some are held out for the comparison at the end, the rest gives the moments behind order and repair.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multipruner.config.recipe import Recipe
from multipruner.core.errors import CalibrationError, ConfigError
from multipruner.eval.accuracy import AT_ONCE

from .calibration import CalibrationSet
from .intake.processor import shape_of

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
EACH = 16
"""Pictures that count as one sequence of the recipe where structures are scored: a picture has one position that is
scored, a text nearly as many as it has tokens."""
_SHARE = 3
"""One picture in so many is held out, and one scores structures, where there are few."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""How Pillow calls pictures of so many channels."""


@dataclass(frozen=True)
class PictureFiles:
    """Pictures on disk, read when they are asked for.

    Attributes:
        paths: their files.
        labels: the class of each; ``None`` where the folder does not say the classes of the model.
        name: what to call them.
        read: files -> pixels, float32 [pictures, channels, height, width].
    """

    paths: Sequence[Path]
    labels: Sequence[int] | None
    name: str
    read: Callable[[Sequence[Path]], Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, places: Sequence[int] | range) -> PictureFiles:
        """Return the pictures at these places."""
        labels = None if self.labels is None else [self.labels[place] for place in places]
        return replace(self, paths=[self.paths[place] for place in places], labels=labels)

    def pixels(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Return pixels of a run of pictures, float32 [pictures, channels, height, width]."""
        paths = self.paths[begin:end]
        parts = [self.read(paths[first : first + AT_ONCE]) for first in range(0, len(paths), AT_ONCE)]
        return torch.cat(parts) if parts else self.read([])


@dataclass(frozen=True, eq=False)
class PictureSet(CalibrationSet):
    """Pixels that losses are measured on: ``ids`` is float32 [pictures, channels, height, width]."""

    each: int = EACH

    @property
    def tokens(self) -> int:
        """How many are scored: every picture counts once."""
        return len(self.ids)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) over shape and bytes of the pixels."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Pictures:
    """What a run reads of a recipe's pictures.

    Attributes:
        calibration: what structures are judged on.
        held_out: what dense and pruned model are compared on.
        moments: further pixels for the moments; ``None`` where nothing needs them.
    """

    calibration: PictureSet
    held_out: PictureFiles
    moments: Tensor | None

    def record(self) -> dict[str, Any]:
        """Return what a report says of them, beside those that score."""
        return {"pictures": len(self.calibration.ids), "moments_pictures": 0 if self.moments is None else
                len(self.moments), "held_out_pictures": len(self.held_out)}  # fmt: skip

    def line(self) -> str:
        """Return what a person is told of them, in one line."""
        found = self.record()
        labelled = "" if self.held_out.labels else " (their folder says no classes of the model)"
        return (
            f"calibration: {self.calibration.name}: {found['pictures']:,} pictures for scores, "
            f"{found['moments_pictures']:,} for moments (order and repair), {found['held_out_pictures']:,} held out"
            f"{labelled}"
        )


def pictures_of(recipe: Recipe, config: Any, processor: Any, name: str, positions: int) -> Pictures:
    """Return the pictures of a recipe, read and dealt.

    Args:
        recipe: its calibration and evaluation sections say which.
        config: of the model.
        processor: its image processor.
        name: what to call the model in errors.
        positions: of a picture in the model.

    Raises:
        CalibrationError: when there is no folder of pictures, or one cannot be read.
        ConfigError: when the recipe asks for what only texts have.
    """
    _check(recipe, name)
    read = _Reader(processor, shape_of(name, config, processor), name)
    scores, moments, rest = _dealt(recipe, files_in(recipe.calibration.source, config, read), positions)
    other = recipe.evaluation.text
    held_out = _some_of(recipe, files_in(other, config, read) if other else rest)
    calibration = PictureSet(scores.pixels(), scores.name)
    if not recipe.text.moments_sequences:
        return Pictures(calibration, held_out, None)
    return Pictures(calibration, held_out, moments.pixels() if len(moments) else calibration.ids)


def judging_pictures(recipe: Recipe, config: Any, processor: Any, name: str, positions: int) -> PictureFiles:
    """Return what a recipe's dense and pruned model are compared on; nothing is read yet.

    Args and errors as for :func:`pictures_of`.
    """
    _check(recipe, name)
    read = _Reader(processor, shape_of(name, config, processor), name)
    if other := recipe.evaluation.text:
        return _some_of(recipe, files_in(other, config, read))
    return _some_of(recipe, _dealt(recipe, files_in(recipe.calibration.source, config, read), positions)[2])


def _dealt(recipe: Recipe, found: PictureFiles, positions: int) -> tuple[PictureFiles, PictureFiles, PictureFiles]:
    """Return the pictures that score, those for moments, and those that are held out."""
    spec, count = recipe.text, len(found)
    found = found.some(np.random.default_rng(spec.seed).permutation(count).tolist())
    few = max(1, count // _SHARE)
    score = min(EACH * spec.sequences, few)
    wanted = math.ceil(spec.moments_sequences * spec.length / positions)
    end = score + max(0, min(wanted, count - score - (0 if recipe.evaluation.text else few)))
    return found.some(range(score)), found.some(range(score, end)), found.some(range(end, count))


def _some_of(recipe: Recipe, held_out: PictureFiles) -> PictureFiles:
    """Return as many held-out pictures as a recipe asks for.

    Raises:
        CalibrationError: when there is none.
    """
    if not len(held_out):
        raise CalibrationError(f"{held_out.name} holds too few pictures to hold some out; give more")
    most = recipe.evaluation.limit
    return held_out if most is None else held_out.some(range(min(most, len(held_out))))


def _check(recipe: Recipe, name: str) -> None:
    """Refuse what only texts have."""
    if recipe.objective == "nll":
        raise ConfigError(f"{name} is an image classifier, judged by its divergence (--objective kl)")
    if not recipe.hidden_size is recipe.value_dim_step is recipe.rope_pair_step is None:
        raise ConfigError(
            f"{name} is an image classifier: give no --hidden-size, no --value-dim-step and no --rope-pair-step"
        )
    if others := [task for task in recipe.evaluation.tasks if task != "ppl"]:
        raise ConfigError(f"{name} is an image classifier, judged by its share of right answers: no {others[0]}")


def files_in(folder: str, config: Any, read: Callable[[Sequence[Path]], Tensor]) -> PictureFiles:
    """Return the pictures of a folder in the order of their names.

    Args:
        folder: holds pictures, or sub-folders of pictures, one for each class. A sub-folder is called as the class is
            in the model's ``id2label``, or by its number; where there are as many sub-folders as classes, their
            order is that of the classes otherwise.
        config: of the model.
        read: see :class:`PictureFiles`.

    Raises:
        CalibrationError: when there is no such folder, or no picture in it.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise CalibrationError(
            f"the model is an image classifier, and {folder!r} is no folder of pictures: give --calibration FOLDER "
            f"with pictures ({', '.join(ENDINGS)}), flat or in one sub-folder for each class"
        )
    flat = _pictures(path)
    classes = {each: _pictures(each) for each in sorted(path.iterdir()) if each.is_dir()}
    classes = {each: files for each, files in classes.items() if files}
    if not flat and not classes:
        raise CalibrationError(f"{folder} holds no picture ({', '.join(ENDINGS)})")
    if flat and classes:
        raise CalibrationError(
            f"{folder} holds pictures ({flat[0].name}) and sub-folders of pictures ({next(iter(classes)).name}); keep "
            "one kind: flat, or one sub-folder for each class"
        )
    if flat:
        return PictureFiles(flat, None, path.resolve().name, read)
    numbers = _numbers([each.name for each in classes], config)
    paths = [file for files in classes.values() for file in files]
    labels = [numbers[each.name] for each, files in classes.items() for _ in files] if numbers else None
    return PictureFiles(paths, labels, path.resolve().name, read)


def _pictures(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in ENDINGS and each.is_file())


def _numbers(names: Sequence[str], config: Any) -> Mapping[str, int] | None:
    """Return the classes that sub-folders are called by; ``None`` where they are none of the model's."""
    labels = [str(label).casefold() for label in config.id2label.values()]
    known = {
        str(label).casefold(): int(number)
        for number, label in config.id2label.items()
        if labels.count(str(label).casefold()) == 1  # ImageNet has two cranes
    }
    if all(name.casefold() in known for name in names):
        return {name: known[name.casefold()] for name in names}
    if all(name.isdecimal() and int(name) < config.num_labels for name in names):
        return {name: int(name) for name in names}
    return {name: number for number, name in enumerate(names)} if len(names) == config.num_labels else None


@dataclass(frozen=True)
class _Reader:
    """Reads files as the model's image processor does."""

    processor: Any
    shape: tuple[int, int, int]
    name: str

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """Return pixels, float32 [pictures, channels, height, width].

        Raises:
            CalibrationError: naming a file that is no picture, or a size that the model does not take.
        """
        if not paths:
            return torch.zeros(0, *self.shape)
        images = [self._opened(path) for path in paths]
        pixels = self.processor(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        if tuple(pixels.shape[1:]) != self.shape:
            raise CalibrationError(
                f"the image processor of {self.name} makes pictures of {list(pixels.shape[1:])}, and the model takes "
                f"{list(self.shape)} (channels, height, width); take the files that belong together"
            )
        return pixels.float()

    def _opened(self, path: Path) -> np.ndarray:
        from PIL import Image

        broken = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
        try:
            with Image.open(path) as image:
                rows = np.asarray(image.convert(_MODES.get(self.shape[0], "RGB")))
        except broken as error:
            raise CalibrationError(f"{path} is no picture that can be read: {' '.join(str(error).split())}") from None
        return rows[..., None] if rows.ndim == 2 else rows
