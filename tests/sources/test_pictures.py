"""Pictures of a folder: how classes are read, how they are dealt, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multipruner.config.recipe import Recipe
from multipruner.core.errors import CalibrationError, ConfigError, UnsupportedModelError
from multipruner.sources.dense import load_dense
from multipruner.sources.intake.processor import shape_of
from multipruner.sources.pictures import EACH, Pictures, files_in, pictures_of
from multipruner.sources.resolve import resolve
from tests.support.pictures import SIDE, processor, tiny_classifier, write_classifier, write_pictures

CONFIG = tiny_classifier("vit").config


def _pictures(folder: Path, config: Any = CONFIG, processor_of: Any = None, **more: Any) -> Pictures:
    calibration = {"source": str(folder), "sequences": 1, "moments_sequences": 2, "length": 34}
    recipe = Recipe.build({"model": "m", "calibration": calibration}, more)
    return pictures_of(recipe, config, processor_of or processor(), "m", 17)


def _unread(paths: Sequence[Path]) -> torch.Tensor:
    raise AssertionError("classes are read off names alone")


@pytest.mark.parametrize(
    ("names", "known", "labels"),
    [
        (("cat", "Dog"), {0: "dog", 1: "x", 2: "CAT", 3: "y", 4: "z"}, {"cat": 2, "Dog": 0}),
        (("2", "4"), {}, {"2": 2, "4": 4}),
        (tuple("abcde"), {}, {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}),
        (("a", "b"), {}, None),
        (("1", "7"), {}, None),
    ],
)
def test_classes_are_told_by_the_names_of_folders(
    names: tuple[str, ...], known: dict[int, str], labels: dict[str, int] | None, tmp_path: Path
) -> None:
    config = tiny_classifier("vit").config
    if known:
        config.id2label = known
    found = files_in(str(write_pictures(tmp_path, 2, names)), config, _unread)
    assert len(found) == 2 * len(names)
    expected = None if labels is None else [labels[path.parent.name] for path in found.paths]
    assert found.labels == expected


def test_parts_share_no_picture_and_are_dealt_by_the_seed(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", 20)
    one, again = _pictures(folder), _pictures(folder)
    other = _pictures(folder, calibration={"seed": 1})
    assert one.calibration.hash == again.calibration.hash != other.calibration.hash
    assert one.moments is not None and one.calibration.ids.shape == (EACH, 3, SIDE, SIDE)
    assert one.calibration.each == EACH and one.calibration.tokens == EACH
    assert len(one.moments) == 4, "two sequences of 34 tokens are as many positions as four pictures of 17"
    assert len(one.held_out) == 100 - EACH - 4
    rows = torch.cat([one.calibration.ids, one.moments, one.held_out.pixels()])
    assert len(rows.flatten(1).unique(dim=0)) == 100
    assert one.record() == {"pictures": 16, "moments_pictures": 4, "held_out_pictures": 80}
    assert one.calibration.head(3).ids.shape[0] == 3


def test_few_pictures_are_shared_out(tmp_path: Path) -> None:
    found = _pictures(write_pictures(tmp_path / "p", 9, ()))
    assert (len(found.calibration.ids), len(found.held_out)) == (3, 3) and found.held_out.labels is None
    assert found.moments is not None and len(found.moments) == 3
    assert "no classes of the model" in found.line()
    one = _pictures(write_pictures(tmp_path / "one", 1, ()), evaluation={"text": str(tmp_path / "p")})
    assert one.moments is one.calibration.ids and len(one.held_out) == 9


def test_a_folder_of_its_own_judges(tmp_path: Path) -> None:
    judge = {"text": str(write_pictures(tmp_path / "judge", 3)), "limit": 7}
    found = _pictures(write_pictures(tmp_path / "p", 6), evaluation=judge)
    assert len(found.held_out) == 7 and found.held_out.name == "judge" and found.held_out.labels is not None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_become_as_many_channels_as_the_model_has(channels: int, tmp_path: Path) -> None:
    config = tiny_classifier("vit", num_channels=channels).config
    own = processor()
    own.image_mean = own.image_std = [0.5] * channels
    found = _pictures(write_pictures(tmp_path / "p", 3, mode="RGB"), config, own)
    assert found.calibration.ids.shape[1:] == (channels, SIDE, SIDE)


def test_pictures_beside_classes_are_one_line(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", 2)
    (folder / "cover.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    with pytest.raises(CalibrationError, match=r"cover\.png\) and sub-folders of pictures"):
        _pictures(folder)


def test_a_label_that_two_classes_share_names_neither(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "p", 8, ("crane", "heron"))
    config = tiny_classifier("vit", num_labels=3).config
    config.id2label = {0: "crane", 1: "crane", 2: "heron"}
    assert _pictures(folder, config).held_out.labels is None


def test_where_any_size_will_do_the_processor_says_it(tmp_path: Path) -> None:
    """DINOv2 was trained on larger pictures than its classifiers are given."""
    folder = write_pictures(tmp_path / "p", 4)
    config = tiny_classifier("dinov2", image_size=12).config
    assert shape_of("m", config, processor()) == (3, SIDE, SIDE)
    assert _pictures(folder, config).calibration.ids.shape[1:] == (3, SIDE, SIDE)
    with pytest.raises(ConfigError, match="image processor of m cannot read a picture"):
        shape_of("m", config, lambda **asked: {}["pixel_values"])
    model = write_classifier(tmp_path / "dinov2", "dinov2", image_size=12)
    assert type(_load(model, pictures=True)[0]).__name__ == "Dinov2ForImageClassification"


def test_sizes_within_another_configuration_are_read_there(tmp_path: Path) -> None:
    config = tiny_classifier("siglip").config
    assert shape_of("m", config, processor()) == (3, SIDE, SIDE)
    folder = write_classifier(tmp_path / "siglip", "siglip")
    assert type(_load(folder, pictures=True)[0]).__name__ == "SiglipForImageClassification"
    record = json.loads((folder / "config.json").read_text())
    for wrong, said in (("hidden_size", "hidden_size is 'wide'"), ("num_hidden_layers", "num_hidden_layers is 'wide'")):
        part = {**record["vision_config"], wrong: "wide"}
        (folder / "config.json").write_text(json.dumps({**record, "vision_config": part}))
        with pytest.raises(ConfigError, match=said):
            _load(folder, pictures=True)
    (folder / "config.json").write_text(json.dumps({**record, "vision_config": "none"}))
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"config\.json|siglip"):
        _load(folder, pictures=True)


def test_bad_pictures_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no picture"):
        _pictures(tmp_path / "empty")
    with pytest.raises(CalibrationError, match=r"no folder of pictures: give --calibration FOLDER"):
        _pictures(Path("self"))
    folder = write_pictures(tmp_path / "p", 4)
    config = tiny_classifier("vit", image_size=16).config
    with pytest.raises(CalibrationError, match=r"makes pictures of \[3, 8, 8\], and the model takes \[3, 16, 16\]"):
        _pictures(folder, config)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"\.png is no picture that can be read"):
        _pictures(folder)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"objective": "nll"}, "--objective kl"),
        ({"hidden_size": 32}, "no --hidden-size"),
        ({"value_dim_step": 4}, "no --value-dim-step"),
        ({"evaluation": {"tasks": ["ppl", "piqa"]}}, "no piqa"),
    ],
)
def test_what_only_texts_have_is_refused(more: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        _pictures(write_pictures(tmp_path / "p", 4), **more)


def _with_pooler(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), "vit.pooler.dense.weight": torch.ones(48, 48)}
    save_file(tensors, path, metadata={"format": "pt"})


def _with_two_heads(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    (folder / "config.json").write_text(json.dumps(record))


def _without_size(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "image_size": "large"}))


def _load(folder: Path, **how: Any) -> Any:
    recipe = Recipe.build({"model": str(folder)})
    return load_dense(resolve(recipe, lambda text: None), recipe, **how)


def test_a_classifier_is_loaded_with_its_processor_where_pictures_will_do(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "vit")
    _with_pooler(folder)  # base models have it, and classifiers do not run it
    model, found = _load(folder, pictures=True)
    assert type(model).__name__ == "ViTForImageClassification" and found.size == processor().size
    with pytest.raises(UnsupportedModelError, match=r"vit is an image classifier: .* the rest is for language models"):
        _load(folder)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("deit", _with_two_heads, "not the image classifier DeiTForImageClassification"),
        ("vit", _without_size, "config.json"),
    ],
)
def test_other_classifiers_are_one_line(family: str, change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / family, family)
    change(folder)
    with pytest.raises((UnsupportedModelError, ConfigError), match=said) as caught:
        _load(folder, pictures=True)
    assert "\n" not in str(caught.value)
