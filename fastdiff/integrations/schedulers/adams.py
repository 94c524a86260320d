"""PNDM and iPNDM, as diffusers steps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import tables
from fastdiff.integrations.schedulers.options import Options
from fastdiff.integrations.schedulers.parts import Request, Told, Written, circle, prediction
from fastdiff.integrations.schedulers.trained import Table
from fastdiff.sampling.prediction import V
from fastdiff.sampling.run import Plan
from fastdiff.sampling.solvers import Row
from fastdiff.sampling.solvers.adams import ADAMS


@dataclass(frozen=True)
class _Walk:
    """PNDM's steps: the output of the network is averaged, and only the average is turned into a noise estimate."""

    path: Told
    of_v: bool  # the network predicts v, and averages of v are taken

    def output(self, now: float) -> dict[str, float]:
        """What the network has just said, in registers."""
        alpha, sigma = self.path.alpha_sigma(now)
        return {"x": (alpha if self.of_v else 1.0) / sigma, "denoised": -(1.0 if self.of_v else alpha) / sigma}

    def move(
        self, t: float, s: float, now: float, state: str, mix: Sequence[float], older: Sequence[str]
    ) -> dict[str, float]:
        """Weights of the DDIM step ``t -> s`` from ``state`` along a mix of outputs, the newest made at ``now``."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.path.alpha_sigma(t), self.path.alpha_sigma(s)
        kept = alpha_s / alpha_t
        walked = sigma_s - kept * sigma_t
        along = walked * (alpha_t if self.of_v else 1.0)
        weights = {state: kept + (walked * sigma_t if self.of_v else 0.0)}
        for name, share in zip(older, mix[1:], strict=True):
            weights[name] = weights.get(name, 0.0) + along * share
        for name, part in self.output(now).items():
            weights[name] = weights.get(name, 0.0) + along * mix[0] * part
        return weights


def pndm(options: Options, request: Request) -> Plan:
    """PNDM, started by Runge-Kutta steps, or PLMS. Steps go ``T // n`` trained steps down, wherever the next starts."""
    kind = prediction(options, "epsilon", "v_prediction")
    table = Table.of(options, tables.signal(options), options.flag("set_alpha_to_one"))
    count = request.counted()
    tables.need_steps(options, count)
    steps = [int(k) for k in tables.spaced(options, count)]
    down, plms = options["num_train_timesteps"] // count, options.flag("skip_prk_steps")
    if not plms and len(steps) < 4:
        raise PlanError(
            f"num_inference_steps is {count}; allowed for {options.name} with skip_prk_steps=False: 4 or more"
        )
    asked = [*steps[:1], *(steps[1:2] * 2), *steps[2:]] if plms else _runge_kutta_steps(steps, down // 2)
    walk = _Walk(table.path([*asked, *([] if plms else steps[3:])]), options["prediction_type"] == "v_prediction")
    rows = _plms_start(walk, table, steps, down) if plms else _runge_kutta(walk, table, asked, down // 2)
    ages = [1] if plms else [3, 6, 9]  # where the outputs at the starts of the last steps are by now, newest first
    for k in steps[1 if plms else 3 :]:
        mix, t = ADAMS[min(len(ages), 3)], table.at(k)
        weights = walk.move(t, table.at(k - down), t, "x", mix, [f"h{age}" for age in ages[: len(mix) - 1]])
        rows.append(Row(t, t, weights, None, walk.output(t)))
        ages = [1, *(age + 1 for age in ages)][:3]
    times = (*(table.at(k) for k in steps), table.at(steps[-1] - down))
    return Plan(walk.path, kind, Written(tuple(rows), 3 if plms else 9, remembers=True), times)


def _plms_start(walk: _Walk, table: Table, steps: Sequence[int], down: int) -> list[Row]:
    """The first step, done twice: along the output at its start, then along the mean of both ends."""
    first = table.at(steps[0])
    ahead = walk.move(first, table.at(steps[0] - down), first, "x", [1.0], [])
    if len(steps) == 1:
        return [Row(first, first, ahead, None, walk.output(first))]
    second = table.at(steps[1])
    again = walk.move(table.at(steps[1] + down), second, second, "anchor", [0.5, 0.5], ["h1"])
    return [Row(first, first, ahead, {"x": 1.0}, walk.output(first), False), Row(second, second, again)]


def _runge_kutta_steps(steps: Sequence[int], half: int) -> list[int]:
    asked = []
    for start, end in zip(steps[:3], steps[1:4], strict=True):
        asked += [start, end + half, end + half, end]
    return asked


def _runge_kutta(walk: _Walk, table: Table, asked: Sequence[int], half: int) -> list[Row]:
    rows = []
    for i in range(0, 12, 4):
        start, middle, _, end = asked[i : i + 4]
        t, m, s = table.at(start), table.at(middle), table.at(end)
        keep = {"anchor": 1.0}
        ahead = walk.move(t, table.at(start - half), t, "x", [1.0], [])
        rows.append(Row(t, t, ahead, {"x": 1.0}, walk.output(t), False))
        rows.append(Row(m, m, walk.move(t, m, m, "anchor", [1.0], []), keep, walk.output(m), False))
        ahead = walk.move(t, table.at(middle - half), m, "anchor", [1.0], [])
        rows.append(Row(m, m, ahead, keep, walk.output(m), False))
        mix, older = [1 / 6, 1 / 3, 1 / 3, 1 / 6], ["h1", "h2", "h3"]
        rows.append(Row(s, s, walk.move(t, s, s, "anchor", mix, older)))
    return rows


def ipndm(options: Options, request: Request) -> Plan:
    """Improved PNDM on the angle. Its first step starts at pure noise, where diffusers takes the image to be 0."""
    if options["trained_betas"] is not None:
        raise options.refuse("trained_betas", "this class takes them for noise levels of one fixed number of steps")
    count = request.counted()
    marks = torch.cat([torch.linspace(1, 0, count + 1)[:-1], torch.tensor([0.0])])
    sigmas = torch.sin(marks * math.pi / 2) ** 2
    alphas = (1.0 - sigmas**2) ** 0.5
    told = (torch.atan2(sigmas, alphas) / math.pi * 2)[:-1].tolist()
    times = [math.atan2(s, a) for s, a in zip(sigmas.double().tolist(), alphas.double().tolist(), strict=True)]
    path, rows = circle(times, told), []
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        sigma_s = path.alpha_sigma(s)[1]
        if i == 0:
            rows.append(Row(t, t, {"x": sigma_s}, None, {"x": 1.0}))
            continue
        mix = ADAMS[min(i, 3)]
        walk = _Walk(path, of_v=False)
        weights = walk.move(t, s, t, "x", mix, [f"h{age}" for age in range(1, len(mix))])
        rows.append(Row(t, t, weights, None, walk.output(t)))
    return Plan(path, V(), Written(tuple(rows), 3, remembers=True), tuple(times))
