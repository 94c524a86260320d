"""Which class is built by what, and what each takes of a caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import (
    adams,
    distilled,
    flow,
    levels,
    multistep,
    preconditioned,
    singlestep,
    tables,
    trained,
)
from fastdiff.integrations.schedulers.options import Options, read
from fastdiff.integrations.schedulers.parts import Request
from fastdiff.sampling.path import DiscreteVP
from fastdiff.sampling.prediction import X0, Eps, Prediction, V
from fastdiff.sampling.run import Plan


class Family(NamedTuple):
    """How one class is built, and which arguments of a run it takes beside the number of steps."""

    build: Callable[[Options, Request], Plan]
    takes: tuple[str, ...] = ()


PREDICTED: dict[str, Prediction] = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}
_BOTH = ("timesteps", "sigmas")
FAMILIES: dict[str, Family] = {
    "DDIMScheduler": Family(trained.ddim, ("eta",)),
    "DDIMParallelScheduler": Family(trained.ddim, ("eta",)),
    "CogVideoXDDIMScheduler": Family(trained.ddim),
    "CogVideoXDPMScheduler": Family(trained.cogvideo_dpm),
    "DDIMInverseScheduler": Family(trained.inverse),
    "DDPMScheduler": Family(trained.ddpm, ("timesteps",)),
    "DDPMParallelScheduler": Family(trained.ddpm, ("timesteps",)),
    "UnCLIPScheduler": Family(trained.unclip),
    "DDPMWuerstchenScheduler": Family(trained.wuerstchen, ("timesteps",)),
    "LCMScheduler": Family(distilled.lcm, ("timesteps",)),
    "TCDScheduler": Family(distilled.tcd, ("timesteps", "eta")),
    "ConsistencyDecoderScheduler": Family(distilled.consistency_decoder),
    "PNDMScheduler": Family(adams.pndm),
    "IPNDMScheduler": Family(adams.ipndm),
    "EulerDiscreteScheduler": Family(levels.euler, _BOTH),
    "EulerAncestralDiscreteScheduler": Family(levels.euler_ancestral),
    "HeunDiscreteScheduler": Family(levels.heun, ("timesteps",)),
    "LMSDiscreteScheduler": Family(levels.lms),
    "KDPM2DiscreteScheduler": Family(levels.kdpm2),
    "KDPM2AncestralDiscreteScheduler": Family(levels.kdpm2_ancestral),
    "DPMSolverSDEScheduler": Family(levels.dpmpp_sde),
    "DPMSolverMultistepScheduler": Family(multistep.dpm, ("timesteps", "mu")),
    "DEISMultistepScheduler": Family(multistep.deis, ("mu",)),
    "UniPCMultistepScheduler": Family(multistep.unipc, ("sigmas", "mu")),
    "SASolverScheduler": Family(multistep.sa_solver),
    "DPMSolverSinglestepScheduler": Family(singlestep.singlestep, ("timesteps", "mu")),
    "DPMSolverMultistepInverseScheduler": Family(singlestep.inverse),
    "EDMEulerScheduler": Family(preconditioned.edm_euler),
    "EDMDPMSolverMultistepScheduler": Family(preconditioned.edm_dpm),
    "CosineDPMSolverMultistepScheduler": Family(preconditioned.cosine_dpm),
    "CMStochasticIterativeScheduler": Family(preconditioned.consistency, ("timesteps",)),
    "SCMScheduler": Family(preconditioned.scm, ("timesteps",)),
    "FlowMatchEulerDiscreteScheduler": Family(flow.euler, (*_BOTH, "mu")),
    "FlowMatchLCMScheduler": Family(flow.lcm, (*_BOTH, "mu")),
    "FlowMatchHeunDiscreteScheduler": Family(flow.heun),
    "FlowMapEulerDiscreteScheduler": Family(flow.flow_map, _BOTH),
    "LTXEulerAncestralRFScheduler": Family(flow.ltx_ancestral, _BOTH),
    "MiniMaxH3Scheduler": Family(flow.minimax, ("sigmas",)),
}


@dataclass(frozen=True)
class Sampler:
    """A scheduler's settings, ready to plan runs. It holds nothing of a run, so runs may share it.

    Args:
        options: the settings.
        mu: shift of flow times that runs take unless they are given another.
    """

    options: Options
    mu: float | None = None

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        mu: float | None = None,
    ) -> Plan:
        """Plan one run, as the class's ``set_timesteps`` and ``step`` would walk it.

        Args:
            num_inference_steps: steps, as the class counts them.
            timesteps: steps in its own units instead, where the class takes them.
            sigmas: levels in its own units instead, where the class takes them.
            eta: what diffusers' ``step`` takes: DDIM's share of fresh noise (0 unless given), or TCD's (0.3).
            mu: shift of flow times, where ``use_dynamic_shifting`` asks for it.

        Raises:
            PlanError: if the class takes no such argument, or cannot make a list of it.
        """
        mu = self.mu if mu is None else mu
        given = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta, "mu": mu}
        build, takes = FAMILIES[self.options.name]
        for name, value in given.items():
            if value is not None and name not in takes:
                allowed = ", ".join(("num_inference_steps", *takes))
                raise PlanError(f"{self.options.name} takes no {name}; allowed: {allowed}")
        return build(self.options, Request(num_inference_steps, timesteps, sigmas, eta, mu))

    def trained(self) -> tuple[DiscreteVP, Prediction]:
        """What the network was trained on and predicts, to walk it with another sampler.

        Raises:
            PlanError: if the class has no list of betas, or its prediction has no name here.
        """
        if not self.options.has("beta_schedule"):
            raise PlanError(f"{self.options.name} says nothing of betas; allowed here: schedulers that have them")
        products = tables.signal(self.options).double()
        ratios = products / torch.cat([products.new_ones(1), products[:-1]])
        return DiscreteVP(tuple((1 - ratios).tolist())), self.options.choose("prediction_type", PREDICTED)


def from_diffusers_scheduler(source: Any, *, mu: float | None = None) -> Sampler:
    """Make the sampler that a diffusers scheduler stands for. Diffusers need not be installed.

    Args:
        source: a scheduler of diffusers, its ``config`` or a dict of it with ``_class_name``, or the path of a
            ``scheduler_config.json``, of the folder around it, or of a model's folder.
        mu: shift of flow times, where ``use_dynamic_shifting`` asks for one: it depends on the size of the images.

    Raises:
        PlanError: if the class or one of its settings has no counterpart; the message names it.
    """
    return Sampler(read(source), mu)
