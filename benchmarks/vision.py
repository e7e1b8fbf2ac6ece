"""A small DeiT, trained here on scikit-learn's digits and pruned: share of right answers, with and without repair.

    python benchmarks/vision.py --work runs/vision [--ratios 0.2,0.3,0.4,0.5] [--epochs 20] [--record FILE]
        [FLAGS OF A RUN]

The digits are 1,797 pictures of 8 x 8 pixels that scikit-learn brings (a part of Alpaydin and Kaynak's data set, UCI).
Of every class a share is kept for judging alone; the others train the model and are the calibration. Both are written
as PNG files, one folder for each class, and everything else is the command that anybody would give. A model, and runs,
that are in ``--work`` already are taken as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results import Cell, flag, markdown, record
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import DeiTConfig, DeiTForImageClassification, DeiTImageProcessorPil

from multipruner.commands.main import main as command
from multipruner.console.quiet import quiet_libraries

TEST = 597
"""Pictures that judge, a third."""
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
SHAPE = {"image_size": 8, "patch_size": 2, "num_channels": 3, "num_labels": 10}
SPREAD = 0.125
"""Of the first weights, one over the root of the hidden size: the usual 0.02 is for models ten times as wide."""
BATCH, RATE = 32, 2e-3
GROUP = 8
"""MLP channels that leave together."""
REPAIRS = {"repaired": "lstsq", "cut alone": "none"}
COLUMNS = (("", "{}"), ("removed", "{:.1f} %"), ("of the layers", "{:.1f} %"), ("KL, nats", "{:.5f}"),
           ("right", "{:.1f} ± {:.1f} %"), ("difference", "{:+.1f} ± {:.1f}"))  # fmt: skip


def write_digits(folder: Path) -> None:
    """Write the digits as PNG files: ``train`` and ``test``, one folder for each class."""
    digits: Any = load_digits()
    places = np.arange(len(digits.target))
    parts = train_test_split(places, test_size=TEST, stratify=digits.target, random_state=0)
    for part, numbers in zip(("train", "test"), parts, strict=True):
        for number in numbers:
            target = folder / part / str(digits.target[number])
            target.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[number] * 255 / 16).astype(np.uint8)  # of 17 greys
            Image.fromarray(pixels).save(target / f"{number:04}.png")


def pixels_of(folder: Path, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [pictures, 3, 8, 8] and classes of a folder."""
    paths = sorted(folder.glob("*/*.png"))
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    pixels = processor(images=images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return pixels.float(), torch.tensor([int(path.parent.name) for path in paths])


def train(folder: Path, pictures: Path, epochs: int, seed: int = 0, **sizes: int) -> None:
    """Train a DeiT on a folder of pictures and save it with its image processor."""
    torch.manual_seed(seed)
    processor = DeiTImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    pixels, labels = pixels_of(pictures, processor)
    settings: dict[str, Any] = {**SIZES, **SHAPE, "initializer_range": SPREAD, **sizes}
    model = DeiTForImageClassification(DeiTConfig(**settings))
    steps = epochs * -(-len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def pruned(work: Path, ratio: float, repair: str, flags: list[str]) -> dict[str, Any]:
    """The report of a run, made where it is not there yet."""
    folder = work / f"{ratio:g}-{repair}"
    given = ["--model", str(work / "dense"), "--ratio", str(ratio), "--calibration", str(work / "train"),
             "--eval-text", str(work / "test"), "--repair", repair, "--channel-group", str(GROUP),
             "--output", str(folder)]  # fmt: skip
    if not (folder / "report.json").exists() and command([*given, *flags]):
        raise SystemExit(f"pruning {ratio:g} with repair {repair} failed")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def table(work: Path, ratios: list[float], flags: list[str]) -> Iterator[list[Cell]]:
    """Yield the rows: the dense model, then what is left of it."""
    first = True
    for ratio in ratios:
        for name, repair in REPAIRS.items():
            report = pruned(work, ratio, repair, flags)
            (found,) = next(iter(report["tasks"].values())).values()
            if first:
                yield ["dense", 0.0, 0.0, 0.0, _percent(found, "dense"), None]
            first = False
            yield [f"{ratio:.0%}, {name}", 100 * report["ratio"], 100 * report["backbone_ratio"],
                   report["search"]["loss"], _percent(found, "pruned"), _percent(found, "difference")]  # fmt: skip


def _percent(found: dict[str, float], what: str) -> list[float]:
    """A share and its standard error."""
    return [100 * found[what], 100 * found[f"{what}_stderr"]]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, help="folder of pictures, model and runs")
    found.add_argument("--ratios", default="0.2,0.3,0.4,0.5", help="shares of all parameters that go")
    found.add_argument("--epochs", type=int, default=20, help="of the training (default: 20)")
    flag(found)
    return found


def main() -> None:
    args, flags = parser().parse_known_args()
    quiet_libraries()
    if not (args.work / "test").exists():
        write_digits(args.work)
    if not (args.work / "dense").exists():
        train(args.work / "dense", args.work / "train", args.epochs)
    rows = []
    for row in table(args.work, [float(one) for one in args.ratios.split(",")], flags):
        rows.append(row)
        print(markdown(COLUMNS, [row]).splitlines()[-1], flush=True)
    print(markdown(COLUMNS, rows))
    record(args.record, "vision", COLUMNS, rows, setting={"pictures": TEST, "epochs": args.epochs, **SIZES, **SHAPE})


if __name__ == "__main__":
    main()
