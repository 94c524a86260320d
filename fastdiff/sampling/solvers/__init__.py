"""Solvers by the field's short names. To add one: a file here and a line below; the order test finds it."""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.sampling.solvers.adams import IPNDM, PNDM, GradientEstimation, deis, lms
from fastdiff.sampling.solvers.base import Row, Solver
from fastdiff.sampling.solvers.ddim import DDIM, euler_ancestral
from fastdiff.sampling.solvers.ddpm import DDPM
from fastdiff.sampling.solvers.dpmpp import (
    DPMppSDE,
    dpm_2m,
    dpm_2m_sde,
    dpm_3m,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    res_multistep,
)
from fastdiff.sampling.solvers.er_sde import ERSDE
from fastdiff.sampling.solvers.flow_map import FlowMap
from fastdiff.sampling.solvers.inversion import DDIMInversion
from fastdiff.sampling.solvers.renoise import TCD, Renoise
from fastdiff.sampling.solvers.reverse_sde import EulerMaruyama, PredictorCorrector
from fastdiff.sampling.solvers.runge_kutta import heun, rk2, rk3, rk4
from fastdiff.sampling.solvers.singlestep import dpm_2s, dpm_3s, dpmpp_2s, dpmpp_3s
from fastdiff.sampling.solvers.unipc import sa_solver, unipc

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": DDIM,
    "euler": DDIM,  # in sigma / alpha, as k-diffusion walks it; the same step
    "euler_ancestral": euler_ancestral,
    "ddpm": DDPM,
    "euler_maruyama": EulerMaruyama,
    "predictor_corrector": PredictorCorrector,
    "heun": heun,
    "rk2": rk2,
    "rk3": rk3,
    "rk4": rk4,
    "dpm_2m": dpm_2m,
    "dpm_3m": dpm_3m,
    "dpm_2s": dpm_2s,
    "dpm_3s": dpm_3s,
    "dpm2": dpm_2s,  # k-diffusion's name for DPM-Solver-2
    "dpm_2m_sde": dpm_2m_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpmpp_sde": DPMppSDE,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "res_multistep": res_multistep,
    "unipc": unipc,
    "sa_solver": sa_solver,
    "er_sde": ERSDE,
    "deis": deis,
    "lms": lms,
    "ipndm_v": lms,  # iPNDM with steps of any length
    "ipndm": IPNDM,
    "pndm": lambda: PNDM(runge_kutta=True),
    "plms": PNDM,
    "gradient_estimation": GradientEstimation,
    "flow_map": FlowMap,
    "lcm": Renoise,
    "tcd": TCD,
    "ddim_inversion": DDIMInversion,
}

__all__ = ["SOLVERS", "Row", "Solver"]
