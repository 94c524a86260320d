"""Networks that jump: flow maps from ``t`` to any ``s``, and consistency networks from ``t`` to the end of the path.

``D`` is defined as the value that makes the first-order step land exactly on the network's own jump. Solvers that
re-noise (``flow_map`` with ``gamma = 1``) then are the multistep sampling of the consistency papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path, RectifiedFlow
from fastdiff.sampling.prediction.base import (
    Coefficients,
    Prediction,
    Target,
    both_times,
    landing,
    need_signal,
)
from fastdiff.sampling.prediction.one_time import Eps, TrigPreconditioned, Velocity, angle


@dataclass(frozen=True)
class MeanVelocity:
    """The mean of ``dx/dt`` over [s, t] along the ODE: a flow map. At s = t it is the velocity.

    Source: Geng et al. 2025, MeanFlow, arXiv:2505.13447, eq. 3; Boffi et al. 2024, arXiv:2406.07507, eq. 9.
    """

    two_time: bool = field(default=True, init=False)
    jumps: bool = field(default=True, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        if s == t:
            return Velocity().coefficients(path, t, s)
        return Coefficients(1.0, *landing(path, t, s, 1.0, s - t), *both_times(path, t, s))

    def target(self, path: Path, t: float) -> Target:
        return Velocity().target(path, t)


@dataclass(frozen=True)
class Shortcut:
    """The mean velocity, from a network that is told the length of its step instead of where the step ends.

    The length is ``timestep(t) - timestep(s)``; 0 asks for the velocity. The paper's time rises from noise to data:
    its network gives ``-dx/dt`` in these terms and its code tells it ``log2(1 / length)``, so wrap such a network.

    Source: Frans et al. 2024, arXiv:2410.12557, sec. 3.
    """

    two_time: bool = field(default=True, init=False)
    jumps: bool = field(default=True, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        c = MeanVelocity().coefficients(path, t, s)
        return c._replace(c_noise_to=c.c_noise - c.c_noise_to)

    def target(self, path: Path, t: float) -> Target:
        return Velocity().target(path, t)


@dataclass(frozen=True)
class DirectMap:
    """The landing point ``x_s`` itself: a flow map. Source: Kim et al. 2023, CTM, arXiv:2310.02279, eq. 4."""

    two_time: bool = field(default=True, init=False)
    jumps: bool = field(default=True, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        if s == t:
            raise PlanError(f"a direct map has no denoised estimate at s = t = {t!r}: give it a target below t")
        return Coefficients(1.0, *landing(path, t, s, 0.0, 1.0), *both_times(path, t, s))

    def target(self, path: Path, t: float) -> Target:
        raise PlanError("a direct map is not learned by regression at one time: train 'velocity' and distil")


IMM_FORMS = ("simple_edm", "identity", "euler_fm")


@dataclass(frozen=True)
class IMM:
    """Inductive moment matching: a jump from ``t`` to ``s`` in one of the paper's three forms.

    - ``"simple_edm"``: a first-order step with ``D`` in TrigFlow's preconditioning.
    - ``"identity"``: a first-order step with the network's output as ``D``.
    - ``"euler_fm"``: the output is the mean velocity, ``x_s = x_t - (t - s) sigma_data F``; on the straight path only.

    The paper draws noise with the standard deviation of the data: divide the data by it, and both are 1.

    Source: Zhou et al. 2025, arXiv:2503.07565, sec. 5.
    """

    sigma_data: float = 1.0
    form: str = "simple_edm"
    two_time: bool = field(default=True, init=False)
    jumps: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.form not in IMM_FORMS:
            raise PlanError(f"form is {self.form!r}; allowed: {', '.join(map(repr, IMM_FORMS))}")

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        if s == t:
            raise PlanError(f"an IMM network is not trained at s = t = {t!r}: give it a target below t")
        scale, cos, sin = angle(path, t, self.sigma_data)
        data, told = self.sigma_data, both_times(path, t, s)
        alpha, sigma = path.alpha_sigma(t)
        if self.form == "simple_edm":
            return Coefficients(1 / (data * scale), cos / scale, -sin * data, *told)
        c_in = 1 / (data * math.hypot(alpha, sigma))
        if self.form == "identity":
            return Coefficients(c_in, 0.0, 1.0, *told)
        if not isinstance(path, RectifiedFlow):
            raise PlanError(f"IMM's form 'euler_fm' is for the 'straight' path; this one is {path!r}")
        return Coefficients(c_in, *landing(path, t, s, 1.0, (s - t) * data), *told)

    def target(self, path: Path, t: float) -> Target:
        raise PlanError("an IMM network matches moments of whole batches; there is no target for one image")


def _need_end(kind: str, path: Path, t: float, s: float) -> None:
    if s != path.t_end or s == t:
        raise PlanError(
            f"{kind} jumps to the end of its path only, t={path.t_end!r}; asked to go from {t!r} to {s!r}: use "
            "'flow_map' with gamma=1, or a single step"
        )


def _no_target(kind: str) -> PlanError:
    return PlanError(f"{kind} is not learned by regression at one time: train 'edm', 'eps' or 'velocity' and distil")


@dataclass(frozen=True)
class Consistency:
    """A consistency network in EDM's preconditioning, which is the identity at ``sigma_min``; on any path by scaling.

    It is told ``1000 * log(sigma / alpha) / 4``. The jump lands at ``sigma_min``: on ``EDM(t_end=sigma_min)`` the
    steps are the paper's to the last digit, on a path that ends at 0 they differ by that much noise.

    Source: Song et al. 2023, arXiv:2303.01469, eq. 5 and app. C; the time as in its released networks and in
    diffusers' ``CMStochasticIterativeScheduler``.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=True, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        _need_end("a consistency network", path, t, s)
        alpha, sigma = need_signal("consistency", path, t)
        ratio, data, above = sigma / alpha, self.sigma_data, sigma / alpha - self.sigma_min
        wide = math.hypot(ratio, data)
        back = path.alpha_sigma(s)[0]
        skip = data * data / (above * above + data * data)
        told = 250.0 * math.log(ratio)
        jump = landing(path, t, s, back * skip / alpha, back * data * above / wide)
        return Coefficients(1 / (alpha * wide), *jump, told, told)

    def target(self, path: Path, t: float) -> Target:
        raise _no_target("a consistency network")


@dataclass(frozen=True)
class LCM:
    """A latent consistency network: ``c_skip * x + c_out * D`` with the D of a one-time network.

    ``c_skip`` and ``c_out`` depend on the timestep alone and are the identity at timestep 0; from timestep 1 on they
    are all but 0 and 1.

    Args:
        inner: what the network itself predicts.
        sigma_data: as published, 0.5.
        timestep_scaling: factor on the timestep, as published 10.

    Source: Luo et al. 2023, arXiv:2310.04378, sec. 4; the constants as in diffusers' ``LCMScheduler``.
    """

    inner: Prediction = field(default_factory=Eps)
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.inner.two_time or self.inner.jumps:
            raise PlanError(f"inner is {self.inner!r}; allowed: a prediction with one time that does not jump")

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        _need_end("a latent consistency network", path, t, s)
        c = self.inner.coefficients(path, t, t)
        scaled, data = path.timestep(t) * self.timestep_scaling, self.sigma_data
        wide = scaled * scaled + data * data
        skip, out = data * data / wide, scaled / math.sqrt(wide)
        jump = landing(path, t, s, skip + out * c.c_skip, out * c.c_out)
        return Coefficients(c.c_in, *jump, c.c_noise, c.c_noise_to)

    def target(self, path: Path, t: float) -> Target:
        raise _no_target("a latent consistency network")


@dataclass(frozen=True)
class SCM:
    """A continuous-time consistency network: TrigFlow's output, read as a jump to clean data.

    Source: Lu and Song 2024, arXiv:2410.11081, sec. 3.1.
    """

    sigma_data: float = 0.5
    two_time: bool = field(default=False, init=False)
    jumps: bool = field(default=True, init=False)

    def coefficients(self, path: Path, t: float, s: float) -> Coefficients:
        _need_end("a continuous-time consistency network", path, t, s)
        return TrigPreconditioned(self.sigma_data).coefficients(path, t, s)

    def target(self, path: Path, t: float) -> Target:
        raise _no_target("a continuous-time consistency network")
