"""UniPC and SA-Solver: multistep predictors with a corrector that needs no network evaluation of its own."""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.errors import PlanError
from fastdiff.sampling.solvers.exponential import Form
from fastdiff.sampling.solvers.multistep import Multistep

TYPES = {"bh1": "bh1", "bh2": "midpoint"}  # B(h) of the paper; it matters for a lone difference only


def unipc(
    order: int = 2,
    corrector: bool = True,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_final: str = "to_data",
) -> Multistep:
    """UniPC: UniP of ``order`` estimates and, with ``corrector``, UniC, which raises the order by one.

    With more than one difference B(h) cancels, and the method is exponential Adams-Bashforth-Moulton.

    Source: Zhao et al. 2023, arXiv:2302.04867, algorithms 5 and 7, eq. 9.

    Args:
        order: estimates of the predictor, 1 to 4.
        corrector: apply UniC.
        solver_type: ``"bh1"`` (B(h) = h) or ``"bh2"`` (B(h) = exp(h) - 1).
        predict_x0: integrate the data estimate; else the noise.
        lower_final: when the order falls towards the last step; see ``Multistep``.
    """
    if solver_type not in TYPES:
        raise PlanError(f"solver_type is {solver_type!r}; allowed: 'bh1', 'bh2'")
    form = Form("data" if predict_x0 else "noise", "log_snr", TYPES[solver_type])
    return Multistep(order, order if corrector else 0, form, lower_final=lower_final)


def sa_solver(
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[float], float] = 1.0,
    predicts: str = "data",
    lower_final: str = "to_data",
) -> Multistep:
    """SA-Solver: stochastic Adams with a corrector that draws the step's noise again.

    Source: Xue et al. 2023, arXiv:2309.05019, sec. 5.

    Args:
        predictor_order: estimates of the predictor, 1 to 4.
        corrector_order: estimates of the corrector with the new one, 1 to 4; 0: no corrector.
        tau: stochasticity: 0 is the ODE, 1 the time-reversed SDE; a number, or a function of the time of a step.
        predicts: integrate the ``"data"`` or the ``"noise"`` estimate.
        lower_final: when the order falls towards the last step; see ``Multistep``.
    """
    eta = (lambda t: tau(t) ** 2) if callable(tau) else float(tau) ** 2
    return Multistep(predictor_order, max(corrector_order - 1, 0), Form(predicts), eta, lower_final=lower_final)
