"""What a network was trained to predict, as five host numbers that turn its output into a denoised estimate.

``D = c_skip * x + c_out * F(c_in * x, c_noise, c_noise_to)``. For most networks ``D`` estimates the clean image. For
a network that jumps (``jumps``: flow maps and consistency networks) ``D`` is *defined* as the value that makes the
first-order step from ``t`` to ``s`` land exactly on the network's own jump, so that it needs no solver of its own.
"""

from __future__ import annotations

from fastdiff.sampling.prediction.base import Coefficients, Prediction, Target, first_order
from fastdiff.sampling.prediction.jumps import IMM, LCM, SCM, Consistency, DirectMap, MeanVelocity, Shortcut
from fastdiff.sampling.prediction.one_time import (
    X0,
    EDMPreconditioned,
    Eps,
    Score,
    TrigPreconditioned,
    V,
    Velocity,
)
from fastdiff.sampling.prediction.perflow import PeRFlow

PREDICTIONS: dict[str, Prediction] = {
    "eps": Eps(),
    "x0": X0(),
    "v": V(),
    "score": Score(),
    "velocity": Velocity(),
    "edm": EDMPreconditioned(),
    "trigflow": TrigPreconditioned(),
    "mean_velocity": MeanVelocity(),
    "shortcut": Shortcut(),
    "direct_map": DirectMap(),
    "imm": IMM(),
    "consistency": Consistency(),
    "lcm": LCM(),
    "scm": SCM(),
    "perflow": PeRFlow(),
}

__all__ = [
    "IMM",
    "LCM",
    "PREDICTIONS",
    "SCM",
    "X0",
    "Coefficients",
    "Consistency",
    "DirectMap",
    "EDMPreconditioned",
    "Eps",
    "MeanVelocity",
    "PeRFlow",
    "Prediction",
    "Score",
    "Shortcut",
    "Target",
    "TrigPreconditioned",
    "V",
    "Velocity",
    "first_order",
]
