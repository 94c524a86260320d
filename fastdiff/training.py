"""The losses of the field in short form, and a small trainer that resumes exactly.

A regression loss asks for one linear combination of data and noise (``Prediction.target``). The flow-map loss ``lsd``
distils a network into itself: the derivative of its jump with respect to the landing time must be its own velocity at
the landing point. All randomness is a function of the seed and the iteration, so a resumed run equals an unbroken one.
"""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError, PlanError
from fastdiff.models.unet import TargetConfig, UNet, UNetConfig
from fastdiff.models.weights import Model, ModelInfo, read_metadata, read_tensors, save_model, write_tensors, write_text
from fastdiff.sampling.path import PATHS, Path
from fastdiff.sampling.prediction import PREDICTIONS, Prediction

LOSSES = ("eps", "x0", "v", "score", "velocity", "lsd")
CHECKPOINT, LOG = "checkpoint.safetensors", "train_log.jsonl"
JUMP_SHARE = 0.25  # of the batch, once distillation has begun
FROM_NOISE_SHARE = 0.25  # of the jumps start at pure noise, where 1-step sampling starts
ERROR_FLOOR = 0.05
HALF_WIDTH = 0.005  # of the central difference in the landing time

# network(x [B,C,H,W], timestep [B], labels [B], target timestep [B]) -> F [B,C,H,W]
TwoTimeNetwork = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Jumps(NamedTuple):
    """Intervals for the flow-map loss: from ``t`` down to ``s``, float64 ``[B]``, on the host."""

    t: Tensor
    s: Tensor


def _per_image(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(like.device, like.dtype)


def q_sample(path: Path, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw from the forward process, ``alpha(t) * x0 + sigma(t) * noise``.

    Args:
        path: any forward process.
        x0: clean images, ``[B, C, H, W]``.
        t: ``[B]`` times in the path's own unit, on the host.
        noise: standard normal, the shape of ``x0``.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 4.
    """
    levels = [path.alpha_sigma(value) for value in t.tolist()]
    alpha, sigma = (_per_image([level[i] for level in levels], x0).view(-1, 1, 1, 1) for i in (0, 1))
    return alpha * x0 + sigma * noise


def timesteps(path: Path, t: Tensor, like: Tensor) -> Tensor:
    """Map times ``[B]`` to what the network is told, ``[B]`` on the device of ``like``."""
    return _per_image([path.timestep(value) for value in t.tolist()], like)


def regression_error(
    output: Tensor, path: Path, prediction: Prediction, x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Weighted mean squared error of a network's output against its target, ``[B]``."""
    goals = [prediction.target(path, value) for value in t.tolist()]
    data, level, weight = (_per_image([goal[i] for goal in goals], x0).view(-1, 1, 1, 1) for i in range(3))
    return (weight * (output - (data * x0 + level * noise)) ** 2).mean(dim=(1, 2, 3))


def jump_bounds(path: Path, jumps: Jumps) -> tuple[Tensor, Tensor]:
    """Landing times a little below and a little above ``s``, kept inside the path and below ``t``."""
    low = (jumps.s - HALF_WIDTH).clamp(min=path.t_end)
    return low, torch.minimum(jumps.s + HALF_WIDTH, jumps.t)


def lsd_error(
    path: Path, network: TwoTimeNetwork, x: Tensor, labels: Tensor, jumps: Jumps, below: Tensor, above: Tensor
) -> Tensor:
    """Lagrangian self-distillation error of each jump, ``[B]``.

    The jump is ``X_{t->s}(x) = x + (s - t) * F(x, t, s)``; along the landing time it must move with the velocity
    ``F(X, s, s)``, which is held fixed. The derivative is a central difference: the loss needs no forward-mode
    differentiation and its error is of second order in the half width.

    Args:
        path: a path whose velocity the network predicts on the diagonal.
        network: ``F(x, timestep, labels, target)``; called once, without gradient.
        x: ``[B, C, H, W]`` at time ``jumps.t``.
        labels: ``[B]``.
        jumps: the intervals.
        below: ``F`` at the lower landing time of ``jump_bounds``, with gradient.
        above: ``F`` at the upper one, with gradient.

    Source: Boffi, Albergo and Vanden-Eijnden 2025, arXiv:2505.18825, eq. 12 (LSD).
    """
    low, high = jump_bounds(path, jumps)

    def column(values: Tensor) -> Tensor:
        return values.to(x.device, x.dtype).view(-1, 1, 1, 1)

    landed_low = x + column(low - jumps.t) * below
    landed_high = x + column(high - jumps.t) * above
    slope = (landed_high - landed_low) / column(high - low)
    with torch.no_grad():
        middle = timesteps(path, (low + high) / 2, x)
        velocity = network((landed_low + landed_high) / 2, middle, labels, middle)
    return ((slope - velocity) ** 2).mean(dim=(1, 2, 3))


def draw_jumps(path: Path, count: int, generator: torch.Generator) -> Jumps:
    """Draw intervals: two uniform times in falling order, a share of them from pure noise."""
    pair = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    t, s = pair.max(dim=1).values, pair.min(dim=1).values
    t = torch.where(torch.rand(count, generator=generator) < FROM_NOISE_SHARE, 1.0, t.clamp(min=4 * HALF_WIDTH))
    span = path.t_start - path.t_end
    return Jumps(path.t_end + span * t, path.t_end + span * s)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Equal configs on equal machines give equal weights.

    ``iterations`` counts optimiser steps; with ``lsd`` the first ``distil_from`` of them are plain flow matching.
    """

    loss: str = "velocity"
    path: str = "straight"
    iterations: int = 2000
    distil_from: int = 500
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.9995
    jump_weight: float = 0.1
    null_share: float = 0.1
    holdout: int = 5000
    seed: int = 0
    compile: bool = False

    def check(self) -> None:
        """Raise PlanError on a value outside its range."""
        if self.loss not in LOSSES:
            raise PlanError(f"unknown loss {self.loss!r}; allowed: {', '.join(LOSSES)}")
        if self.path not in PATHS:
            raise PlanError(f"unknown path {self.path!r}; allowed: {', '.join(PATHS)}")
        if self.loss == "lsd" and self.path != "straight":
            raise PlanError(f"the lsd loss needs --path straight (its jump is a mean velocity); got {self.path!r}")
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        for name, most in (("ema", 1.0), ("null_share", 1.0), ("learning_rate", math.inf), ("holdout", math.inf)):
            if not (0 <= getattr(self, name) <= most and math.isfinite(getattr(self, name))):
                raise PlanError(f"{name} is {getattr(self, name)!r}; allowed: a finite number from 0 to {most:g}")
        if self.batch_size < 4 and self.loss == "lsd":
            raise PlanError(f"batch_size is {self.batch_size}; the lsd loss needs 4 or more")

    @property
    def prediction(self) -> str:
        """The prediction a network trained with this loss makes."""
        return "mean_velocity" if self.loss == "lsd" else self.loss


class Images(NamedTuple):
    """A labelled data set: ``images [N, C, H, W]`` uint8, padded; ``labels [N]`` int64."""

    images: Tensor
    labels: Tensor
    original_size: int  # of the images before padding

    def batch(self, rows: Tensor) -> Tensor:
        """Rows of the set as float32 in [-1, 1]."""
        return self.images[rows].float() / 127.5 - 1.0


def load_images(file: FilePath, size: int, split: str = "train") -> Images:
    """Read an ``.npz`` with ``{split}_images`` (uint8, HW or HWC) and ``{split}_labels``, padded with 0 to ``size``.

    Raises:
        ArtifactError: if the file or one of its arrays is missing or not as described.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except (OSError, ValueError, KeyError, EOFError, MemoryError, TypeError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{file}: need an .npz with {split}_images and {split}_labels ({error})") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ArtifactError(f"{file}: images are {images.dtype} {images.shape}; allowed: uint8, N x H x W (x C)")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or not labels.size or labels.min() < 0:
        raise ArtifactError(
            f"{file}: labels are {labels.dtype} {labels.shape} for {len(images)} images; allowed: one whole number, "
            "0 or more, for each image"
        )
    tensor = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    missing = size - tensor.shape[-1]
    if missing < 0 or missing % 2 or tensor.shape[-1] != tensor.shape[-2]:
        raise ArtifactError(
            f"{file}: images are {tuple(tensor.shape[-2:])}; they must be square and pad evenly to {size}"
        )
    padded = nn.functional.pad(tensor, [missing // 2] * 4)
    return Images(padded.contiguous(), torch.from_numpy(labels.astype(np.int64)), tensor.shape[-1])


def initialise(network: UNet, seed: int) -> None:
    """Draw fresh weights; the last layer of each residual branch starts at zero, so every block starts as identity."""
    torch.manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, module in network.named_modules():
        if name == "conv_out" or name.endswith(("conv2", "to_out.0", "target_embedding.linear_2")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


class Trainer:
    """Trains one UNet. ``run`` yields a record now and then and leaves a checkpoint and a model folder behind.

    Args:
        config: the run.
        sizes: the network.
        data: training images; the last ``config.holdout`` of them are never seen.
        folder: gets the checkpoint, the log and the model (its averaged weights).
        info: what to write beside the model.
        device: where to train.
        initial: a trained model of the same sizes to start from; fresh weights without one.
    """

    def __init__(
        self,
        config: TrainConfig,
        sizes: UNetConfig,
        data: Images,
        folder: FilePath,
        info: ModelInfo,
        device: torch.device,
        initial: Model | None = None,
    ):
        config.check()
        if sizes.in_channels != data.images.shape[1] or sizes.out_channels != data.images.shape[1]:
            raise PlanError(f"in_channels is {sizes.in_channels} and out_channels {sizes.out_channels}; these images "
                            f"have {data.images.shape[1]}")  # fmt: skip
        if config.holdout >= len(data.labels):
            raise PlanError(f"holdout is {config.holdout}; allowed: fewer than the {len(data.labels)} images")
        self.config, self.data, self.folder, self.device = config, data, folder, device
        target = TargetConfig() if config.loss == "lsd" else None
        self.info = replace(
            info, path=config.path, prediction=config.prediction, target=target, training=asdict(config)
        )
        self.path, self.prediction = PATHS[config.path](), PREDICTIONS[config.prediction]
        self.network = UNet(sizes, target)
        initialise(self.network, config.seed)
        if initial is not None:
            self._start_from(initial)
        self.network.to(device, memory_format=torch.channels_last)
        self.averaged = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.call: Any = torch.compile(self.network, dynamic=False) if config.compile else self.network
        self.iteration = 0

    def _start_from(self, initial: Model) -> None:
        """Copy a model's weights; a flow map may start from an ordinary network, which has no second embedding."""
        if initial.network.config != self.network.config:
            raise PlanError(f"{initial.folder}: has other sizes than the network to train")
        left = self.network.load_state_dict(initial.network.state_dict(), strict=False)
        if left.unexpected_keys:
            raise PlanError(f"{initial.folder}: is a flow map; only --loss lsd can start from one")

    def losses(self, iteration: int) -> dict[str, Tensor]:
        """Draw the batch of one iteration and return its losses, each a scalar; their sum is minimised."""
        config, device = self.config, self.device
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + iteration)
        rows = torch.randint(len(self.data.labels) - config.holdout, (config.batch_size,), generator=generator)
        labels = self.data.labels[rows]
        if self.info.null_label is not None:
            dropped = torch.rand(config.batch_size, generator=generator) < config.null_share
            labels = torch.where(dropped, self.info.null_label, labels)
        x0 = self.data.batch(rows).to(device, memory_format=torch.channels_last)
        noise = torch.randn(x0.shape, generator=generator).to(device, memory_format=torch.channels_last)
        labels = labels.to(device)
        distils = config.loss == "lsd" and iteration >= config.distil_from
        count = int(config.batch_size * JUMP_SHARE) if distils else 0
        plain = config.batch_size - count
        uniform = (torch.rand(plain, generator=generator, dtype=torch.float64) + torch.arange(plain)) / plain
        t = torch.tensor([self.path.train_time(u) for u in uniform.tolist()], dtype=torch.float64)  # stratified
        jumps = draw_jumps(self.path, count, generator)
        x = q_sample(self.path, x0, torch.cat([t, jumps.t]), noise)
        told = timesteps(self.path, torch.cat([t, jumps.t]), x)
        if not distils:
            output = self.call(x, told, labels)
            return {"match": regression_error(output, self.path, self.prediction, x0, t, noise).mean()}
        # One call serves all: diagonal rows, then every jump at its lower and its upper landing time.
        low, high = (timesteps(self.path, s, x) for s in jump_bounds(self.path, jumps))
        output = self.call(
            torch.cat([x, x[plain:]]),
            torch.cat([told, told[plain:]]),
            torch.cat([labels, labels[plain:]]),
            torch.cat([told[:plain], low, high]),
        )
        match = regression_error(output[:plain], self.path, self.prediction, x0[:plain], t, noise[:plain])
        below, above = output[plain : plain + count], output[plain + count :]
        error = lsd_error(self.path, self.call, x[plain:], labels[plain:], jumps, below, above)
        weight = (error.detach() + ERROR_FLOOR).rsqrt()
        return {"match": match.mean(), "jump": config.jump_weight * (weight * error).mean()}

    def step(self) -> dict[str, float]:
        """Do one optimiser step and return its losses."""
        config, i = self.config, self.iteration
        warm = min(1.0, (i + 1) / config.warmup)
        rate = config.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / config.iterations)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.losses(i)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        decay = min(config.ema, (1 + i) / (10 + i))
        current = self.network.state_dict()
        names = list(current)
        torch._foreach_lerp_([self.averaged[n] for n in names], [current[n] for n in names], 1 - decay)
        self.iteration += 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def run(self, log_every: int = 50, save_every: int = 500) -> Iterator[Mapping[str, float]]:
        """Train to the end; yield a record every ``log_every`` iterations, save every ``save_every``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        totals: dict[str, list[float]] = {}
        start = time.perf_counter()
        while self.iteration < self.config.iterations:
            for name, value in self.step().items():
                totals.setdefault(name, []).append(value)
            last = self.iteration == self.config.iterations
            if self.iteration % log_every == 0 or last:
                record = {"iteration": self.iteration, "seconds": round(time.perf_counter() - start, 1)}
                record |= {name: round(sum(v) / len(v), 5) for name, v in totals.items()}
                totals = {}
                with (self.folder / LOG).open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                yield record
            if self.iteration % save_every == 0 or last:
                self.save()

    def save(self) -> None:
        """Write the checkpoint, then the model folder with the averaged weights."""
        tensors = {f"network.{n}": v for n, v in self.network.state_dict().items()}
        tensors |= {f"averaged.{n}": v for n, v in self.averaged.items()}
        for name, parameter in self.network.named_parameters():
            moments = self.optimizer.state.get(parameter)  # none while a parameter has had no gradient
            tensors |= {f"{part}.{name}": value for part, value in (moments or {}).items()}
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        whole["iteration"] = torch.tensor(self.iteration)
        write_tensors(self.folder / CHECKPOINT, whole, {"config": json.dumps(asdict(self.config))})
        model = UNet(self.network.config, self.network.target)
        model.load_state_dict(self.averaged)
        save_model(Model(model, self.info), self.folder)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; False if there is none.

        Raises:
            ArtifactError: if the checkpoint is damaged or of a network of other sizes.
        """
        file = self.folder / CHECKPOINT
        if not file.exists():
            return False
        tensors = read_tensors(file)
        self._check_same_run(file)
        try:
            self.iteration = int(tensors.pop("iteration"))
            groups: dict[str, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                kind, _, rest = name.partition(".")
                groups.setdefault(kind, {})[rest] = value.to(self.device)
            self.network.load_state_dict(groups["network"])
            self.averaged = {n: v.clone() for n, v in groups["averaged"].items()}
            parts = ("step", "exp_avg", "exp_avg_sq")
            for name, parameter in self.network.named_parameters():
                if name in groups["step"]:
                    self.optimizer.state[parameter] = {part: groups[part][name] for part in parts}
        except (KeyError, RuntimeError) as error:
            line = " ".join(str(error).split())
            raise ArtifactError(f"{file}: not a checkpoint of this network ({line[:160]})") from error
        self._trim_log()
        return True

    def _check_same_run(self, file: FilePath) -> None:
        """Refuse a checkpoint of a run with other options; only its length may change."""
        before = json.loads(read_metadata(file).get("config", "{}"))
        for name, value in asdict(self.config).items():
            if name not in ("iterations", "compile") and before.get(name, value) != value:
                raise PlanError(
                    f"{file}: was trained with {name}={before[name]!r}, not {value!r}; "
                    "choose another folder, or the same options"
                )

    def _trim_log(self) -> None:
        log = self.folder / LOG
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines()
            whole = [line for line in lines if line.endswith("}")]  # the last one may have been cut short
            kept = [line for line in whole if json.loads(line)["iteration"] <= self.iteration]
            write_text(log, "".join(line + "\n" for line in kept))
