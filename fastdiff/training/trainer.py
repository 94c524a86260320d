"""A small trainer that resumes exactly: all randomness is a function of the seed and the iteration."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError, PlanError
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import read_metadata, read_tensors, write_tensors, write_text
from fastdiff.models.unet import TargetConfig, UNet
from fastdiff.models.weights import Model, ModelInfo, save_model
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS
from fastdiff.training.data import Images
from fastdiff.training.losses import draw_jumps, jump_bounds, lsd_error, q_sample, regression_error, timesteps

LOSSES = ("eps", "x0", "v", "score", "velocity", "lsd")
CHECKPOINT, LOG = "checkpoint.safetensors", "train_log.jsonl"
JUMP_SHARE = 0.25  # of the batch, once distillation has begun
ERROR_FLOOR = 0.05


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
