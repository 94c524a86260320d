"""Latency and quality of every sampler and backend beside the peer, from one interleaved run.

The peer is the code a user of diffusers writes today: ``UNet2DModel`` and ``FlowMatchEulerDiscreteScheduler``, 50
steps, the same weights, the same guidance. Speed is reported as a ratio to it, and never without the quality beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.backends.ort import FILE
from fastdiff.benchmarks.environment import environment
from fastdiff.benchmarks.quality import judge, load_classifier, nearest_distances, quantiles, reference_figures
from fastdiff.benchmarks.quality import reference_moments as reference
from fastdiff.errors import FastdiffError
from fastdiff.export.onnx import export_unet
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline
from fastdiff.training import load_images

PEER = "diffusers"
PEER_STEPS = 50
SAMPLERS = [("ddim", 50), ("dpmpp_2m", 20), ("dpmpp_2m", 10), ("flow_map", 4), ("flow_map", 2), ("flow_map", 1)]
BATCH = 16
JUDGED_BATCH = 100
NEAREST = 1000
COMPARED = 4  # images on which the backends' outputs are compared

Draw = Callable[[Sequence[int], Tensor], Tensor]  # labels, latents [B,1,32,32] -> images [B,1,28,28] in [-1, 1]


class Arm(NamedTuple):
    """One way to draw images."""

    backend: str
    sampler: str
    steps: int
    draw: Draw


def fastdiff_arm(pipe: Pipeline, backend: str, sampler: str, steps: int, guidance: float | None = None) -> Arm:
    """An arm of ours; guidance is the model's own unless given."""

    def draw(labels: Sequence[int], latents: Tensor) -> Tensor:
        images = pipe(
            labels, latents=latents, sampler=sampler, num_inference_steps=steps, guidance_scale=guidance,
            output_type="pt",
        ).images  # fmt: skip
        return images * 2 - 1

    return Arm(backend, sampler, steps, draw)


def diffusers_arm(folder: Path, guidance: float, null_label: int, crop: int) -> Arm:
    """What people write today, with the same weights and the same guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def draw(labels: Sequence[int], latents: Tensor) -> Tensor:
        scheduler.set_timesteps(PEER_STEPS)
        x, conditional = latents, torch.tensor(labels)
        unconditional = torch.full_like(conditional, null_label)
        for t in scheduler.timesteps:
            if guidance == 1:
                velocity = unet(x, t, class_labels=conditional).sample
            else:
                both = unet(torch.cat([x, x]), t, class_labels=torch.cat([conditional, unconditional])).sample
                cond, uncond = both.chunk(2)
                velocity = uncond + guidance * (cond - uncond)
            x = scheduler.step(velocity, t, x).prev_sample
        return x[..., crop:-crop, crop:-crop].clamp(-1, 1)

    return Arm(PEER, "euler", PEER_STEPS, draw)


def make_arms(folder: Path, backends: Sequence[str], scratch: Path) -> tuple[list[Arm], dict[str, str]]:
    """Load every backend that runs here; for the others, say why not."""
    model = load_model(folder)
    info = model.info
    arms = [diffusers_arm(folder, float(info.guidance_scale), int(info.null_label or 0), info.crop)]
    missing: dict[str, str] = {}
    for backend in backends:
        try:
            artifact = None
            if backend == "onnxruntime":
                artifact = folder / FILE if (folder / FILE).exists() else scratch / FILE
                if not artifact.exists():
                    export_unet(model, artifact)
            pipe = Pipeline.from_pretrained(folder, backend=backend, artifact=artifact)
            arms += [fastdiff_arm(pipe, backend, sampler, steps) for sampler, steps in SAMPLERS]
        except FastdiffError as error:
            missing[backend] = str(error)
    return arms, missing


def inputs(count: int, first: int = 0) -> tuple[list[int], Tensor]:
    """Balanced labels and seeded latents for images ``first`` to ``first + count``."""
    generator = torch.Generator()
    latents = [torch.randn(1, 32, 32, generator=generator.manual_seed(first + i)) for i in range(count)]
    return [(first + i) % 10 for i in range(count)], torch.stack(latents)


def time_arms(arms: Sequence[Arm], batch: int, rounds: int, label: str) -> list[list[float]]:
    """Milliseconds of every arm in every round; the arms take turns, so that drift hits all alike."""
    labels, latents = inputs(batch)
    for arm in arms:
        arm.draw(labels, latents)  # warm-up: compiles, allocates, picks algorithms
    spent: list[list[float]] = [[] for _ in arms]
    for _ in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):
        for arm, times in zip(arms, spent, strict=True):
            start = time.perf_counter()
            arm.draw(labels, latents)
            times.append(1000 * (time.perf_counter() - start))
    return spent


def draw_many(arm: Arm, samples: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 28, 28]`` from the noise of seeds ``offset`` onwards, and the labels asked for ``[N]``."""
    images, asked = [], []
    progress = tqdm(range(0, samples, JUDGED_BATCH), desc=f"{arm.sampler}-{arm.steps}", leave=False, disable=None)
    for first in progress:
        labels, latents = inputs(min(JUDGED_BATCH, samples - first), offset + first)
        images.append(arm.draw(labels, latents).clamp(-1, 1))
        asked += labels
    return torch.cat(images), torch.tensor(asked)


def judged(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy and Frechet distance of images ``[N, 1, 28, 28]`` that were asked for by these labels ``[N]``."""
    quality = judge(images, labels, reference("test"), load_classifier())
    return {"accuracy": round(quality.accuracy, 4), "frechet": round(quality.frechet, 2), "samples": quality.count}


def measure_quality(arm: Arm, samples: int, training: Tensor | None) -> dict[str, Any]:
    """Accuracy and Frechet distance of one arm; with training images also the distance to the nearest of them."""
    images, labels = draw_many(arm, samples)
    result = judged(images, labels)
    if training is not None:
        result["nearest"] = quantiles(nearest_distances(images[:NEAREST], training))
    return result


def run_table(
    folder: Path, samples: int, rounds: int, backends: Sequence[str], data: Path | None = None
) -> dict[str, Any]:
    """Measure everything.

    Args:
        folder: the model.
        samples: images for each quality figure, balanced over the classes.
        rounds: interleaved rounds of the timing.
        backends: which to time.
        data: the training set, for the nearest-neighbour check.

    Returns:
        Environment, arms with latencies, ratios, qualities and differences to the eager arm, ready for JSON.
    """
    training = None
    if data is not None:
        everything = load_images(data, 28)
        training = everything.batch(torch.arange(len(everything.labels) - 5000))
    with tempfile.TemporaryDirectory() as scratch:
        arms, missing = make_arms(folder, backends, Path(scratch))
        one = time_arms(arms, 1, rounds, "batch 1")
        many = time_arms(arms, BATCH, max(rounds // 3, 1), f"batch {BATCH}")
        ours = {arm.backend for arm in arms[1:]}
        judged = "onnxruntime" if "onnxruntime" in ours else next(iter(sorted(ours)))
        qualities = {
            (arm.sampler, arm.steps): measure_quality(arm, samples, training)
            for arm in arms
            if arm.backend in (PEER, judged)
        }
        records = [_record(arm, a, b) for arm, a, b in zip(arms, one, many, strict=True)]
        _compare(arms, records)
    peer = records[0]
    for record in records:
        record |= qualities[record["sampler"], record["steps"]]
        record["latency_ratio"] = round(record["ms_batch_1"] / peer["ms_batch_1"], 4)
        record["throughput_ratio"] = round(record["images_per_second"] / peer["images_per_second"], 2)
    figures = reference_figures()
    judged_count = samples if str(samples) in figures["real_to_real_by_count"] else 5000
    return {
        "environment": environment(),
        "command": f"fastdiff bench --samples {samples} --rounds {rounds}",
        "guidance_scale": load_model(folder).info.guidance_scale,
        "real_to_real": figures["real_to_real_by_count"][str(judged_count)],
        "real_to_real_count": judged_count,
        "nearest_of_real": figures["nearest"]["validation"],
        "judged_backend": judged,
        "missing": missing,
        "arms": records,
    }


def _record(arm: Arm, one: Sequence[float], many: Sequence[float]) -> dict[str, Any]:
    return {
        "backend": arm.backend,
        "sampler": arm.sampler,
        "steps": arm.steps,
        "ms_batch_1": round(statistics.median(one), 3),
        "ms_batch_1_best": round(min(one), 3),
        "images_per_second": round(1000 * BATCH / statistics.median(many), 2),
    }


def _compare(arms: Sequence[Arm], records: list[dict[str, Any]]) -> None:
    """Largest difference of each arm's images to those of the eager arm of the same sampler."""
    labels, latents = inputs(COMPARED)
    eager = {(arm.sampler, arm.steps): arm.draw(labels, latents) for arm in arms if arm.backend == "eager"}
    for arm, record in zip(arms, records, strict=True):
        base = eager.get((arm.sampler, arm.steps))
        if base is not None:
            record["difference_to_eager"] = float((arm.draw(labels, latents) - base).abs().max())
