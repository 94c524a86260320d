"""Adams methods on the noise estimate: DEIS, LMS, iPNDM, PNDM and gradient estimation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdiff.errors import PlanError
from fastdiff.sampling.path import DiscreteVP, Path
from fastdiff.sampling.solvers.base import Row, Weights, ddim_weights
from fastdiff.sampling.solvers.exponential import NOISE, Form, spell
from fastdiff.sampling.solvers.multistep import Multistep

NOISE_FORM = Form("noise", "ratio")

# Adams-Bashforth weights for equal steps, newest first
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def deis(order: int = 3, variable: str = "time", lower_final: str = "never") -> Multistep:
    """DEIS (tAB): the noise estimate as a polynomial in time. Diffusers' "logrho" is ``variable="log_snr"``.

    Source: Zhang and Chen 2022, arXiv:2204.13902, sec. 3 (tAB).
    """
    if order not in (1, 2, 3):
        raise PlanError(f"order is {order!r}; allowed: 1, 2, 3")
    return Multistep(order, form=Form("noise", variable), lower_final=lower_final)


def lms(order: int = 4) -> Multistep:
    """Linear multistep in ``sigma / alpha`` with steps of any length: k-diffusion's ``lms``, iPNDM's variable form.

    Source: Adams-Bashforth by Lagrange's polynomials; Zhang and Chen 2022, arXiv:2204.13902, sec. 3 (rhoAB).
    """
    return Multistep(order, form=Form("noise", "ratio"))


@dataclass(frozen=True)
class IPNDM:
    """DDIM steps whose noise estimate is extrapolated with the Adams-Bashforth weights of equal steps.

    Steps of a smooth grid differ in length by ``O(h^2)``, so the order on such grids is 2 from two estimates on; it
    never reaches ``max_order`` beyond that.

    Source: Liu et al. 2022, PNDM, arXiv:2202.09778, sec. 3; the start of iPNDM in Zhang and Chen 2022,
    arXiv:2204.13902.
    """

    max_order: int = 4
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.max_order not in (1, 2, 3, 4):
            raise PlanError(f"max_order is {self.max_order!r}; allowed: 1, 2, 3, 4")

    @property
    def order(self) -> int:
        return min(self.max_order, 2)

    @property
    def history(self) -> int:
        return self.max_order - 1

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return _extrapolated(path, times, ADAMS[: self.max_order])


@dataclass(frozen=True)
class GradientEstimation:
    """DDIM with the noise estimate ``gamma * new + (1 - gamma) * last``.

    Of first order unless ``gamma`` is 1.5; it damps the estimate's own error rather than the step's.

    Source: Permenter and Yuan 2023, arXiv:2306.04848, sec. 5.
    """

    gamma: float = 2.0
    order: int = field(default=1, init=False)
    history: int = field(default=1, init=False)
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.gamma <= 5:
            raise PlanError(f"gamma is {self.gamma!r}; allowed: 1 (DDIM) to 5")

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        return _extrapolated(path, times, ((1.0,), (self.gamma, 1 - self.gamma)))


def _extrapolated(path: Path, times: Sequence[float], mixes: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """DDIM steps, the i-th with ``mixes[i]``, all later ones with the last."""
    rows = []
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        mix = mixes[min(i, len(mixes) - 1)]
        row = _transfer(path, t, s, t, {"x": 1.0}, mix, [f"h{age}" for age in range(1, len(mix))])
        rows.append(row._replace(to_history=_noise(path, t) if len(mixes) > 1 else None))
    return tuple(rows)


@dataclass(frozen=True)
class PNDM:
    """Pseudo numerical methods: DDIM steps with Runge-Kutta's or Adams' average of noise estimates.

    Of second order, as proven; Adams' weights are those of equal steps.

    Args:
        runge_kutta: start with three Runge-Kutta steps (PNDM, 4 evaluations each); without, with one Heun step (PLMS,
            2 evaluations).

    Source: Liu et al. 2022, arXiv:2202.09778, sec. 3, whose transfer is the DDIM step;
    PLMS as in Rombach et al. 2021, arXiv:2112.10752.
    """

    runge_kutta: bool = False
    order: int = field(default=2, init=False)
    jumps: bool = field(default=False, init=False)

    @property
    def history(self) -> int:
        return 9 if self.runge_kutta else 3

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        rows: list[Row] = []
        ages: list[int] = []  # where the estimates at the starts of the last steps are by now, newest first
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            regular = path.alpha_sigma(t)[0] > 0 and path.alpha_sigma(s)[1] > 0
            if self.runge_kutta and i < 3 and regular:
                rows += _runge_kutta(path, t, s)
                ages = [3, *(age + 3 for age in ages)]
                continue
            if not self.runge_kutta and i == 0 and regular:
                first = _transfer(path, t, s, t, {"x": 1.0}, [1.0], [])
                rows.append(first._replace(to_anchor={"x": 1.0}, to_history=_noise(path, t), ends=False))
                rows.append(_transfer(path, t, s, s, {"anchor": 1.0}, [0.5, 0.5], ["h1"]))
            else:
                mix = ADAMS[min(len(ages), 3)]
                row = _transfer(path, t, s, t, {"x": 1.0}, mix, [f"h{age}" for age in ages[: len(mix) - 1]])
                rows.append(row._replace(to_history=_noise(path, t)))
            ages = [1, *(age + 1 for age in ages)]
        return tuple(rows)


def _runge_kutta(path: Path, t: float, s: float) -> list[Row]:
    """Four evaluations: the start, twice the middle, the end; weights 1/6, 1/3, 1/3, 1/6."""
    # diffusers counts whole timesteps and rounds the middle up; other paths have a true middle
    middle = t - (t - s) // 2 if isinstance(path, DiscreteVP) and t == int(t) and s == int(s) else (t + s) / 2
    start = {"anchor": 1.0}
    rows = [
        _transfer(path, t, middle, t, {"x": 1.0}, [1.0], [])._replace(to_anchor={"x": 1.0}),
        _transfer(path, t, middle, middle, start, [1.0], [])._replace(to_anchor=start),
        _transfer(path, t, s, middle, start, [1.0], [])._replace(to_anchor=start),
    ]
    last = _transfer(path, t, s, s, start, [1 / 6, 1 / 3, 1 / 3, 1 / 6], ["h1", "h2", "h3"])
    return [row._replace(to_history=_noise(path, row.t), ends=False) for row in rows] + [last]


def _noise(path: Path, t: float) -> dict[str, float]:
    return NOISE_FORM.estimate(path, t)


def _transfer(
    path: Path, t: float, s: float, now: float, state: Weights, mix: Sequence[float], older: Sequence[str]
) -> Row:
    """The DDIM step ``t -> s`` from ``state`` with a mix of noise estimates, the newest of them made at ``now``."""
    if path.alpha_sigma(t)[0] == 0:
        return Row(t, t, ddim_weights(path, t, s))
    kept = path.alpha_sigma(s)[0] / path.alpha_sigma(t)[0]
    walked = path.alpha_sigma(s)[1] - kept * path.alpha_sigma(t)[1]
    weights = {name: kept * value for name, value in state.items()}
    weights |= {name: walked * share for name, share in zip(older, mix[1:], strict=True)}
    weights[NOISE] = walked * mix[0]
    return Row(now, now, spell(weights, NOISE_FORM, path, now))
