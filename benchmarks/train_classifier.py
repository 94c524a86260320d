"""Train the classifier behind ``fastdiff.benchmarks.quality`` and record what real digits score.

    python -m fastdiff.benchmarks.train_classifier --data mnist.npz --seed 0

Writes ``classifier.safetensors``, ``reference.safetensors`` and ``reference.json`` beside this file. Equal
seed, thread count, torch version and processor type give equal files, but for the seconds taken. Nothing is
chosen by looking at a held-out score.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.benchmarks import quality
from fastdiff.benchmarks.quality import (
    Classifier,
    extract,
    frechet_distance,
    moments,
    nearest_distances,
    quantiles,
)
from fastdiff.errors import PlanError
from fastdiff.models.files import sha256, write_tensors, write_text
from fastdiff.training import Images, load_images

HELD_OUT = 5000  # the last training images; the bundled diffusion models leave out the same ones
SHIFT = 2  # pixels, in each direction: digits of MNIST are centred by mass and samples need not be
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 128, 2e-3, 1e-2
COUNTS = (500, 1000, 2000, 5000)
COMPARED = 1000


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each of ``images [B, 1, H, W]`` by up to ``SHIFT`` pixels, filling with the background -1."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, [SHIFT] * 4, value=-1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    image = torch.arange(count).view(-1, 1, 1)
    return padded[:, 0][image, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(data: Images, epochs: int, seed: int) -> Classifier:
    """Fit a classifier to ``data``: AdamW, one learning-rate cycle, cross entropy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    per_epoch = len(data.labels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * per_epoch)
    with tqdm(total=epochs * per_epoch, desc="train", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.labels), generator=generator)
            for rows in order[: per_epoch * BATCH_SIZE].split(BATCH_SIZE):
                images = shifted(data.batch(rows), generator)
                loss = nn.functional.cross_entropy(model(images), data.labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(loss=f"{float(loss.detach()):.4f}")
    return model.eval().requires_grad_(False)


def whole(data: Images) -> Tensor:
    """Return all images of ``data`` as ``[N, 1, 28, 28]`` floats in [-1, 1]."""
    return data.batch(torch.arange(len(data.labels)))


def evenly(images: Tensor, count: int) -> Tensor:
    """Return ``count`` of ``images [N, ...]`` at equal strides: the MNIST test set is not in random order."""
    return images[:: len(images) // count][:count]


def measure(model: Classifier, splits: dict[str, Images]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Score real digits: the tensors of ``reference.safetensors`` and the figures of ``reference.json``."""
    tensors: dict[str, Tensor] = {}
    accuracy: dict[str, float] = {}
    nearest: dict[str, Any] = {"images": COMPARED, "training_images": len(splits["train"].labels)}
    features, train_images = {}, whole(splits["train"])
    for name in tqdm(quality.SPLITS, desc="measure", unit="split"):
        images = whole(splits[name])
        features[name] = extract(model, images)
        guessed = model.head(features[name]).argmax(dim=1)
        accuracy[name] = float((guessed == splits[name].labels).double().mean())
        of = moments(features[name])
        tensors |= {f"{name}.mean": of.mean, f"{name}.covariance": of.covariance}
        tensors[f"{name}.count"] = torch.tensor(of.count)
        nearest[name] = quantiles(nearest_distances(evenly(images, COMPARED), train_images))
    target = moments(features["test"])
    # Mean over disjoint blocks of shuffled rows; neighbours share a writer, so slices would lie further off.
    order = torch.randperm(len(features["validation"]), generator=torch.Generator().manual_seed(0))
    by_count = {}
    for count in COUNTS:
        blocks = [rows for rows in order.split(count) if len(rows) == count]
        distances = [frechet_distance(moments(features["validation"][rows]), target) for rows in blocks]
        by_count[str(count)] = round(sum(distances) / len(distances), 4)
    figures = {
        "accuracy": accuracy,
        "real_to_real": by_count[str(HELD_OUT)],
        "real_to_real_by_count": by_count,
        "nearest": nearest,
    }
    return tensors, figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.benchmarks.train_classifier", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz: train_images, train_labels, test_...")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and shifts (default 0)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the 55000 images (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; part of the recipe (default 1)")
    parser.add_argument("--out", type=Path, default=quality.HERE, help="folder to write to (default: beside this file)")
    return parser.parse_args(arguments)


def main() -> None:
    """Train, measure, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    known, test = (load_images(options.data, quality.SIDE, split) for split in ("train", "test"))
    if len(known.labels) <= HELD_OUT or len(test.labels) < COMPARED:
        raise PlanError(f"{options.data}: {len(known.labels)} and {len(test.labels)} images; MNIST has 60000 and 10000")
    splits = {
        "train": Images(known.images[:-HELD_OUT], known.labels[:-HELD_OUT]),
        "validation": Images(known.images[-HELD_OUT:], known.labels[-HELD_OUT:]),
        "test": test,
    }
    model = train(splits["train"], options.epochs, options.seed)
    tensors, figures = measure(model, splits)
    options.out.mkdir(parents=True, exist_ok=True)
    files = {quality.WEIGHTS: model.state_dict(), quality.MOMENTS: tensors}
    for name, values in files.items():
        write_tensors(options.out / name, {key: value.contiguous() for key, value in values.items()}, {"format": "pt"})
    record = {
        "command": f"python -m fastdiff.benchmarks.train_classifier --data {options.data.name} --seed {options.seed}"
        f" --epochs {options.epochs} --threads {options.threads}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.perf_counter() - start, 1),
        "data_sha256": sha256(options.data),
        "counts": {name: len(split.labels) for name, split in splits.items()},
        "sha256": {name: sha256(options.out / name) for name in files},
        **figures,
    }
    write_text(options.out / quality.FIGURES, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
