"""Solvers by the field's short names. To add one: a file here and a line below; the order test finds it."""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.sampling.solvers.base import Row, Solver
from fastdiff.sampling.solvers.ddim import DDIM
from fastdiff.sampling.solvers.ddpm import DDPM
from fastdiff.sampling.solvers.dpmpp import DPMpp2M, DPMppSDE
from fastdiff.sampling.solvers.flow_map import FlowMap
from fastdiff.sampling.solvers.heun import Heun
from fastdiff.sampling.solvers.unipc import UniPC

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_sde": DPMppSDE,
    "heun": Heun,
    "unipc": UniPC,
    "flow_map": FlowMap,
}

__all__ = ["SOLVERS", "Row", "Solver"]
