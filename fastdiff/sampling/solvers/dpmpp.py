"""DPM-Solver and DPM-Solver++: multistep, for the ODE and the SDE, and the two-stage stochastic form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, log_snr
from fastdiff.sampling.solvers.base import Row, Weights, ddim_weights, log_snr_step
from fastdiff.sampling.solvers.exponential import Form
from fastdiff.sampling.solvers.multistep import Multistep


def solver_form(predicts: str, solver_type: str, compat: str | None = None) -> Form:
    """The form of a DPM-Solver, by diffusers' ``solver_type``: ``"midpoint"`` or ``"heun"`` (the exact integral)."""
    if solver_type not in ("midpoint", "heun"):
        raise PlanError(f"solver_type is {solver_type!r}; allowed: 'midpoint', 'heun'")
    if compat not in (None, "diffusers"):
        raise PlanError(f"compat is {compat!r}; allowed: 'diffusers', or none")
    single = "midpoint" if solver_type == "midpoint" else "exact"
    return Form(predicts, "log_snr", single, halved_quadratic=compat is not None)


def dpmpp_2m(solver_type: str = "midpoint", lower_final: str = "never") -> Multistep:
    """DPM-Solver++(2M). Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2."""
    return Multistep(2, form=solver_form("data", solver_type), lower_final=lower_final)


def dpmpp_3m(lower_final: str = "never", compat: str | None = None) -> Multistep:
    """DPM-Solver++(3M), of order 3. ``compat="diffusers"`` halves the square's integral as their code does (order 2).

    Source: Lu et al. 2022, arXiv:2211.01095, sec. 4.1, with a quadratic.
    """
    return Multistep(3, form=solver_form("data", "midpoint", compat), lower_final=lower_final)


def dpm_2m(solver_type: str = "midpoint", lower_final: str = "never") -> Multistep:
    """DPM-Solver multistep of order 2, on the noise estimate. Source: Lu et al. 2022, arXiv:2206.00927."""
    return Multistep(2, form=solver_form("noise", solver_type), lower_final=lower_final)


def dpm_3m(lower_final: str = "never", compat: str | None = None) -> Multistep:
    """DPM-Solver multistep of order 3, on the noise estimate. Source: Lu et al. 2022, arXiv:2206.00927."""
    return Multistep(3, form=solver_form("noise", "midpoint", compat), lower_final=lower_final)


def dpmpp_2m_sde(eta: float = 1.0, solver_type: str = "midpoint", lower_final: str = "never") -> Multistep:
    """SDE-DPM-Solver++(2M); ``eta = 0`` is 2M. Source: Lu et al. 2022, arXiv:2211.01095, sec. 5; eta as k-diffusion."""
    return Multistep(2, 0, solver_form("data", solver_type), eta, lower_final)


def dpmpp_3m_sde(eta: float = 1.0, lower_final: str = "never", compat: str | None = None) -> Multistep:
    """SDE-DPM-Solver++ with three estimates; ``eta = 0`` is 3M. Source: as ``dpmpp_2m_sde``."""
    return Multistep(3, 0, solver_form("data", "midpoint", compat), eta, lower_final)


def dpm_2m_sde(solver_type: str = "midpoint", lower_final: str = "never") -> Multistep:
    """SDE-DPM-Solver multistep on the noise estimate. Source: Lu et al. 2022, arXiv:2211.01095, sec. 5."""
    return Multistep(2, 0, solver_form("noise", solver_type), 1.0, lower_final)


def res_multistep(order: int = 2) -> Multistep:
    """Exponential Adams with exact integrals of the data estimate (the field's ``res_multistep``).

    Source: Hochbruck and Ostermann 2010, "Exponential integrators", sec. 2.5; Zhang et al. 2023, arXiv:2308.02157.
    """
    return Multistep(order, form=Form("data", "log_snr"))


@dataclass(frozen=True)
class DPMppSDE:
    """SDE-DPM-Solver++ with two stages a step; ``eta = 0`` is DPM-Solver++(2S).

    The stages walk one Brownian path: the first stage's noise is part of the second's. Steps that touch pure noise or
    clean data have one stage.

    Source: Lu et al. 2022, arXiv:2211.01095, sec. 5 and algorithm 1; the shared noise is as in k-diffusion.
    """

    eta: float = 1.0
    history: int = field(default=0, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise PlanError(f"eta is {self.eta!r}; allowed: 0 to 1")

    @property
    def order(self) -> int:
        return 2 if self.eta == 0 else 1

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        for i, (t, s) in enumerate(pairwise(times)):
            first, second = 2 * i, 2 * i + 1
            if not math.isfinite(log_snr_step(path, t, s)):
                weights = ddim_weights(path, t, s, self.eta)
                rows.append(Row(t, t, weights, draws=(first if "n1" in weights else None, None)))
                continue
            middle = path.time((log_snr(path, t) + log_snr(path, s)) / 2)
            stage = self._stage(path, t, middle, {"x": 1.0}, {"denoised": 1.0}, {"n1": 1.0})
            rows.append(Row(t, t, stage, {"anchor": 1.0}, None, False, self._draws(first, None)))
            ratio_t, ratio_m, ratio_s = (math.exp(-log_snr(path, v)) for v in (t, middle, s))
            share = (ratio_t - ratio_m) / (ratio_t - ratio_s)  # of the Brownian path that the first stage walked
            walk = {"n1": math.sqrt(share), "n2": math.sqrt(1 - share)}
            # the stage sits at half the log-SNR step, so 1 / (2 * 1/2) = 1: its estimate alone carries the step
            full = self._stage(path, t, s, {"anchor": 1.0}, {"denoised": 1.0}, walk)
            rows.append(Row(middle, middle, full, draws=self._draws(first, second)))
        return tuple(rows)

    def _draws(self, n1: int, n2: int | None) -> tuple[int | None, int | None]:
        return (n1, n2) if self.eta > 0 else (None, None)

    def _stage(self, path: Path, t: float, s: float, state: Weights, data: Weights, noise: Weights) -> Weights:
        """An ancestral first-order step: the noise level falls below ``s`` and fresh noise brings it back."""
        weights = ddim_weights(path, t, s, self.eta)
        sources = ((weights["x"], state), (weights["denoised"], data), (weights.get("n1", 0.0), noise))
        return {name: scale * value for scale, part in sources for name, value in part.items() if scale}
