"""Multistep solvers: one network evaluation a step, the rest remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastdiff.errors import PlanError
from fastdiff.sampling.path import Path
from fastdiff.sampling.solvers.base import Row
from fastdiff.sampling.solvers.exponential import Form, can_correct, can_interpolate, spell, step, usable

FEW_STEPS = 15  # diffusers' number
FALLS = ("never", "few_steps", "to_data", "always")


@dataclass(frozen=True)
class Multistep:
    """Exponential Adams-Bashforth predictor, optionally with an Adams-Moulton corrector that costs no evaluation.

    The evaluation at a predicted state first corrects that state (the new anchor), then predicts the next one from it.
    The first steps use what is known so far; steps that touch pure noise or clean data are of first order where the
    polynomial's variable is infinite.

    Args:
        estimates: number of estimates the predictor uses; its order.
        corrector: number of remembered estimates the corrector uses beside the new one; 0: none.
        form: what is integrated, and how.
        eta: share of the time-reversed SDE: 0 (the ODE), 1, or a function of the time a step starts at.
        lower_final: when the order falls towards the last step: ``"never"``, ``"few_steps"`` (in runs of fewer than 15
            steps), ``"to_data"`` (where the last step lands on clean data, which makes it of first order) or
            ``"always"``.
        orders: estimates of each step's predictor, in place of those rules; empty: by the rules. A run over the last
            times of a list (image to image) takes the last of them, started anew.
        corrections: estimates remembered by the corrector at the start of each step, 0 for no correction there; empty:
            as many as the last predictor used, up to ``corrector``.
    """

    estimates: int = 2
    corrector: int = 0
    form: Form = field(default_factory=Form)
    eta: float | Callable[[float], float] = 0.0
    lower_final: str = "never"
    orders: tuple[int, ...] = ()
    corrections: tuple[int, ...] = ()
    jumps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.estimates not in (1, 2, 3, 4):
            raise PlanError(f"order is {self.estimates!r}; allowed: 1, 2, 3, 4")
        if not 0 <= self.corrector <= 4:
            raise PlanError(f"corrector order is {self.corrector!r}; allowed: 0 to 4")
        if not callable(self.eta) and not 0 <= self.eta <= 10:
            raise PlanError(f"eta is {self.eta!r}; allowed: 0 (no fresh noise) to 10")
        if self.lower_final not in FALLS:
            raise PlanError(f"lower_final is {self.lower_final!r}; allowed: {', '.join(FALLS)}")

    @property
    def order(self) -> int:
        """With fresh noise 1: old estimates are correlated with noise already drawn."""
        if callable(self.eta) or self.eta > 0:
            return 1
        order = min(self.estimates, self.corrector) + 1 if self.corrector else self.estimates
        return min(order, 2) if self.form.halved_quadratic else order

    @property
    def history(self) -> int:
        return max(self.estimates - 1, self.corrector)

    def rows(self, path: Path, times: Sequence[float]) -> tuple[Row, ...]:
        steps = len(times) - 1
        falls = {
            "never": False,
            "few_steps": steps < FEW_STEPS,
            "to_data": path.alpha_sigma(times[-1])[1] == 0,
            "always": True,
        }[self.lower_final]
        given: Sequence[int] = self.orders or [min(self.estimates, steps - i if falls else steps) for i in range(steps)]
        orders = [min(i + 1, order) for i, order in enumerate(given[-steps:])]
        given = self.corrections or [0] + [min(order, self.corrector) for order in orders[:-1]]
        corrections = [min(i, order) for i, order in enumerate(given[-steps:])]
        if len(orders) != steps or len(corrections) != steps:
            raise PlanError(f"{len(orders)} orders and {len(corrections)} corrections for {steps} steps")
        rows: list[Row] = []
        past = [times[0]]  # times of the current estimate, of h1, h2...
        last_draw: int | None = None  # number of the noise that the last step added
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            anchor: dict[str, float] = {"x": 1.0}
            again = 0.0
            if corrections[i] and can_correct(self.form, path, past[1], t):
                anchor, again = self._correct(path, past, corrections[i])
                if again:  # the corrected state holds the noise of the step that led here, so it is drawn again
                    anchor["n1"] = again
            ahead, fresh = self._predict(path, past, s, orders[i])
            scale = ahead.pop("state")
            to_x = {n: scale * anchor.get(n, 0.0) + ahead.get(n, 0.0) for n in {*anchor, *ahead}}
            if fresh:
                to_x["n2" if again else "n1"] = fresh
            draws = (last_draw, i if fresh else None) if again else (i if fresh else None, None)
            pushed = self.form.estimate(path, t) if self.history else None
            rows.append(Row(t, t, to_x, anchor if self.corrector else None, pushed, True, draws))
            past.insert(0, s)
            last_draw = i if fresh else None
        return tuple(rows)

    def _share(self, t: float) -> float:
        return float(self.eta(t)) if callable(self.eta) else self.eta

    def _predict(self, path: Path, past: Sequence[float], s: float, order: int) -> tuple[dict[str, float], float]:
        """Weights of the step from ``past[0]``, where the network has just been evaluated."""
        t = past[0]
        if s == t:  # published lists may repeat their last time, so that the last evaluation only corrects
            return {"state": 1.0}, 0.0
        # at pure noise the noise estimate has no step of its own; of first order the two are the same
        form = self.form if path.alpha_sigma(t)[0] > 0 else Form()
        known = usable(form, path, past, order) if can_interpolate(form, path, t, s) else [t]
        names = [form.current, "h1", "h2", "h3"][: len(known)]
        weights, fresh = step(form, path, t, s, known, names, "state", self._share(t))
        return spell(weights, form, path, t), fresh

    def _correct(self, path: Path, past: Sequence[float], order: int) -> tuple[dict[str, float], float]:
        """Weights of the step that led to ``past[0]``, done again now that the estimate there is known."""
        known = usable(self.form, path, past[1:], order)
        names = ["h1", "h2", "h3", "h4"][: len(known)] + [self.form.current]
        weights, fresh = step(
            self.form, path, past[1], past[0], [*known, past[0]], names, "anchor", self._share(past[1])
        )
        return spell(weights, self.form, path, past[0]), fresh
