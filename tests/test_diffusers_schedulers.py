"""Every diffusers scheduler that fits, over its settings, against diffusers itself."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.errors import PlanError
from fastdiff.integrations.schedulers import Plan, from_diffusers_scheduler
from fastdiff.integrations.schedulers.defaults import DEFAULTS, KNOWN, REFUSED
from fastdiff.integrations.schedulers.sampler import FAMILIES

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers (pip install 'fastdiff[test]')")
hypothesis = pytest.importorskip("hypothesis")
from diffusers_reference import SHAPE, distance, network, ours, start, theirs  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

EXACT = 2e-7  # in float64 on both sides; what remains are sums that diffusers makes in float32 before it steps
SDE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")  # exist only beside torchsde


def scheduler_class(name: str) -> Any:
    import diffusers.schedulers

    found = getattr(diffusers.schedulers, name, None)
    if found is None or hasattr(found, "_backends"):
        pytest.skip(f"{name} is not there without its optional library")
    return found


def some(**options: tuple[Any, ...]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in options.items()})


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


FLAGS = (False, True)
FEW = some(num_train_timesteps=(120,))  # classes that list all their steps when made, slowly
BETAS = st.sampled_from([
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [1e-4 * 1.04**k for k in range(120)], "num_train_timesteps": 120},
])  # fmt: skip
SPACED = some(timestep_spacing=("leading", "linspace", "trailing"), steps_offset=(0, 1))
KINDS = some(prediction_type=("epsilon", "v_prediction", "sample"))
TWO_KINDS = some(prediction_type=("epsilon", "v_prediction"))
LEVELS = st.sampled_from([{}, *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))])
THRESHOLD = st.sampled_from(
    [{}, {}, {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}]
)
RESCALE = some(rescale_betas_zero_snr=FLAGS)
FINAL = some(final_sigmas_type=("zero", "sigma_min"))
FLOW = st.fixed_dictionaries({"flow_shift": st.sampled_from([1.0, 3.0])}).map(
    lambda given: given | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
)
CLIP = st.sampled_from([{"clip_sample": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.6}])
VP = merged(BETAS, SPACED)
ANY_LEVELS = st.one_of(merged(LEVELS, KINDS, THRESHOLD), FLOW)
FLOW_LEVELS = merged(LEVELS, some(shift=(1.0, 3.0), shift_terminal=(None, 0.1)))

STRATEGIES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "DDIMScheduler": merged(VP, KINDS, CLIP, THRESHOLD, some(set_alpha_to_one=FLAGS)),
    "DDIMParallelScheduler": merged(VP, KINDS),
    "DDPMScheduler": merged(
        VP, KINDS, CLIP, THRESHOLD, some(variance_type=("fixed_small", "fixed_large", "learned_range"))
    ),
    "DDPMParallelScheduler": merged(VP, some(variance_type=("fixed_small_log",), beta_schedule=("sigmoid", "laplace"))),
    "PNDMScheduler": merged(VP, TWO_KINDS, some(skip_prk_steps=FLAGS, set_alpha_to_one=FLAGS)),
    "CogVideoXDDIMScheduler": merged(SPACED, TWO_KINDS, some(snr_shift_scale=(1.0, 3.0))),
    "CogVideoXDPMScheduler": merged(SPACED, TWO_KINDS, some(set_alpha_to_one=FLAGS)),
    "DDIMInverseScheduler": merged(
        BETAS, TWO_KINDS, some(set_alpha_to_one=FLAGS, timestep_spacing=("leading", "trailing"))
    ).map(lambda given: given | {"clip_sample": False}),
    "LCMScheduler": merged(KINDS, CLIP, THRESHOLD, some(original_inference_steps=(50, 100))),
    "TCDScheduler": merged(KINDS, some(original_inference_steps=(50, 100))),
    "UnCLIPScheduler": merged(
        CLIP, some(prediction_type=("epsilon", "sample"), variance_type=("fixed_small_log", "learned_range"))
    ),
    "EulerDiscreteScheduler": merged(
        VP, KINDS, LEVELS, RESCALE, FINAL, some(interpolation_type=("linear", "linear", "log_linear"))
    ),
    "EulerAncestralDiscreteScheduler": merged(VP, TWO_KINDS, RESCALE),
    "HeunDiscreteScheduler": merged(FEW, VP, KINDS, LEVELS, CLIP),
    "LMSDiscreteScheduler": merged(FEW, VP, KINDS, LEVELS),
    "KDPM2DiscreteScheduler": merged(FEW, VP, TWO_KINDS, LEVELS),
    "KDPM2AncestralDiscreteScheduler": merged(FEW, VP, TWO_KINDS, LEVELS),
    "DPMSolverSDEScheduler": merged(FEW, VP, TWO_KINDS, LEVELS),
    "DPMSolverMultistepScheduler": merged(
        VP, st.one_of(ANY_LEVELS, some(use_lu_lambdas=(True,))), RESCALE, FINAL,
        some(algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun")),
        some(solver_order=(1, 2, 3), lower_order_final=FLAGS, euler_at_final=FLAGS),
        some(lambda_min_clipped=(-math.inf, -5.1)),
    ),
    "DPMSolverSinglestepScheduler": merged(
        BETAS, ANY_LEVELS, FINAL,
        some(algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun")),
        some(solver_order=(1, 2, 3), lower_order_final=FLAGS),
    ),
    "DPMSolverMultistepInverseScheduler": merged(
        VP, KINDS, some(solver_order=(1, 2, 3), algorithm_type=("dpmsolver++", "dpmsolver"), lower_order_final=FLAGS)
    ),
    "DEISMultistepScheduler": merged(VP, ANY_LEVELS, some(solver_order=(1, 2, 3), lower_order_final=FLAGS)),
    "UniPCMultistepScheduler": merged(
        VP, ANY_LEVELS, RESCALE, FINAL, some(predict_x0=(True, True, False), solver_type=("bh1", "bh2")),
        some(solver_order=(1, 2, 3, 4), lower_order_final=FLAGS, disable_corrector=([], [0, 2])),
    ).filter(lambda o: o["final_sigmas_type"] != "zero" or o["predict_x0"] and o["solver_type"] == "bh2"),
    "SASolverScheduler": merged(
        VP, st.one_of(merged(LEVELS, KINDS), FLOW), some(algorithm_type=("data_prediction", "noise_prediction")),
        some(predictor_order=(1, 2, 3, 4), corrector_order=(2, 3, 4), lower_order_final=FLAGS),
    ).filter(lambda given: "use_flow_sigmas" not in given or given["algorithm_type"] == "data_prediction"),
    "EDMEulerScheduler": merged(FINAL, TWO_KINDS, some(sigma_schedule=("karras", "exponential"), sigma_max=(80.0, 7))),
    "EDMDPMSolverMultistepScheduler": merged(
        FINAL, TWO_KINDS, THRESHOLD, some(sigma_schedule=("karras", "exponential"), solver_order=(1, 2)),
        some(algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun")),
    ),
    "CosineDPMSolverMultistepScheduler": merged(FINAL, TWO_KINDS, some(solver_order=(1, 2))),
    "FlowMatchEulerDiscreteScheduler": merged(FLOW_LEVELS, some(invert_sigmas=FLAGS)),
    "FlowMatchLCMScheduler": FLOW_LEVELS,
    "FlowMatchHeunDiscreteScheduler": some(shift=(1.0, 3.0)),
    "LTXEulerAncestralRFScheduler": some(eta=(0.0, 0.5, 1.0), s_noise=(1.0, 0.9)),
    "MiniMaxH3Scheduler": some(shift=(1.0, 12.0)),
    "CMStochasticIterativeScheduler": some(clip_denoised=FLAGS, s_noise=(1.0, 0.5)),
    "DDPMWuerstchenScheduler": some(scaler=(0.5, 1.0, 2.0)),
    "IPNDMScheduler": st.just({}),
    "SCMScheduler": st.just({}),
    "ConsistencyDecoderScheduler": st.just({}),
}  # fmt: skip
STEPS = {"ConsistencyDecoderScheduler": (2,), "SCMScheduler": (2,), "UnCLIPScheduler": (2, 5, 9)}
ETA = {"DDIMScheduler": (0.0, 0.7, 1.0), "TCDScheduler": (0.0, 0.3, 0.9)}
# sums of float32 numbers that these classes make before they step are not made again in float64
ROUNDED = {"DDPMWuerstchenScheduler": 3e-6, "ConsistencyDecoderScheduler": 1e-6}


def reference(name: str, options: dict[str, Any], steps: int | None, how: dict[str, Any], double: bool, **step: Any):
    """Diffusers' result, or None where it crashes or gives no number; and the scheduler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = scheduler_class(name)(**options)
        try:
            scheduler.set_timesteps(steps, **how) if steps else scheduler.set_timesteps(**how)
            end = theirs(scheduler, double, **step)
        except Exception:  # whatever a crash of theirs looks like
            return None, scheduler
    return (end if bool(torch.isfinite(end).all()) else None), scheduler


def check(name: str, options: dict[str, Any], steps: int | None, how: dict[str, Any], eta: float | None) -> bool:
    """Compare, or return False where diffusers has nothing to compare with."""
    step = {} if eta is None else {"eta": eta}
    exact, scheduler = reference(name, options, steps, how, True, **step)
    plain, _ = reference(name, options, steps, how, False, **step)
    sampler = from_diffusers_scheduler({"_class_name": name, **options})
    try:
        plan = sampler.plan(steps, eta=eta, **how)
        single, table, _ = ours(name, plan, False)
    except PlanError:
        if exact is not None or plain is not None:
            raise
        return False  # what they cannot do we may refuse
    assert bool(torch.isfinite(single).all())
    double, _, largest = ours(name, plan, True)
    if exact is not None:
        assert distance(double, exact) < ROUNDED.get(name, EXACT)
    if plain is not None:
        own = 0.0 if exact is None else distance(plain, exact)
        assert distance(single, plain) < max(
            1e-5, 4 * own, rounding(plan) * largest / float(double.abs().max().clamp_min(1e-9))
        )
    told, asked = table.times[:, 0], scheduler.timesteps.float()
    if exact is not None and len(told) == len(asked):
        stages = name.startswith("KDPM2") or name == "DPMSolverSDEScheduler"  # theirs come from rounded levels
        assert torch.allclose(told, asked, rtol=0, atol=2e-3) if stages else torch.equal(told, asked)
    return exact is not None or plain is not None


def rounding(plan: Plan) -> float:
    """What float32 weights that all but cancel lose, in units of the registers.

    It is next to nothing but for steps from a level near 0 to one far away, whose weights are large.
    """
    rows = plan.solver.rows(plan.path, plan.times)
    return 2.0**-22 * max(sum(abs(weight) for weight in row.to_x.values()) for row in rows)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_class_over_its_settings(name):
    compared = []

    @settings(derandomize=True, max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        STRATEGIES[name], st.sampled_from(STEPS.get(name, (1, 2, 5, 9, 16))), st.sampled_from(ETA.get(name, (None,)))
    )
    def holds(options, steps, eta):
        compared.append(check(name, options, steps, {}, eta))

    holds()
    assert sum(compared) >= len(compared) // 2


RUNS: list[tuple[str, dict[str, Any], int | None, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {}, None, {"timesteps": [999, 700, 300, 100]}),
    ("EulerDiscreteScheduler", {}, None, {"sigmas": [14.0, 7.0, 0.3, 0.0]}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}, 6, {}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction",
                                "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}, 6, {}),
    ("HeunDiscreteScheduler", {}, None, {"timesteps": [999, 700, 300, 100]}),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, 6, {}),
    ("DPMSolverMultistepScheduler", {}, None, {"timesteps": [999, 700, 300, 100]}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 7, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, 7, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "dpmsolver", "solver_type": "bh2",
                                     "final_sigmas_type": "sigma_min"}, 20, {}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min",
                                      "solver_order": 3, "solver_type": "heun"}, 7, {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction",
                                 "use_dynamic_shifting": True}, 7, {"mu": 1.1}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift_terminal": 0.1,
                                 "final_sigmas_type": "sigma_min"}, 7, {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "use_karras_sigmas": True, "sigma_max": 50.0,
                                 "sigma_min": 0.01, "prediction_type": "flow_prediction"}, 7, {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, None,
     {"sigmas": np.array([0.99, 0.7, 0.3])}),
    ("SASolverScheduler", {"lambda_min_clipped": -3.1, "thresholding": True}, 9, {}),
    ("DDPMScheduler", {}, None, {"timesteps": [999, 700, 300, 99]}),
    ("LCMScheduler", {}, None, {"timesteps": [999, 700, 300, 99]}),
    ("TCDScheduler", {}, None, {"timesteps": [999, 700, 300, 99]}),
    ("CMStochasticIterativeScheduler", {}, None, {"timesteps": [22, 0]}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 5, {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 5, {"mu": 1.1}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}, 5, {"mu": 1.1}),
    ("FlowMatchEulerDiscreteScheduler", {}, None, {"sigmas": [1.0, 0.7, 0.3]}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None, {"timesteps": [1000.0, 700.0, 300.0]}),
    ("CogVideoXDDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 7, {}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, 9, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "steps", "how"), RUNS, ids=lambda value: str(value)[:40])
def test_lists_given_by_hand_and_rare_settings(name, options, steps, how):
    assert check(name, options, steps, how, None)


CRASHES = [
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}, 8),
    ("UniPCMultistepScheduler", {"predict_x0": False}, 8),
    ("UniPCMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, 8),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 2,
                                 "lower_order_final": False}, 8),
    ("UniPCMultistepScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 8),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min",
                                     "solver_type": "heun"}, 20),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "solver_order": 3,
                                     "final_sigmas_type": "sigma_min"}, 8),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, 8),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", "thresholding": True,
                                      "final_sigmas_type": "sigma_min"}, 8),
    ("DEISMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True, "solver_order": 3}, 8),
    ("SASolverScheduler", {"algorithm_type": "noise_prediction", "thresholding": True}, 8),
    ("KDPM2AncestralDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 2),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}, 8),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, 8),
    ("PNDMScheduler", {}, 3),
    ("DDIMScheduler", {"steps_offset": 200}, 4),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "steps"), CRASHES, ids=lambda value: str(value)[:60])
def test_where_diffusers_breaks_we_give_numbers_or_refuse(name, options, steps):
    check(name, options, steps, {}, None)


UNSUPPORTED = [
    ("DDPMScheduler", {"variance_type": "learned"}, {}, "variance_type"),
    ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, {}, "variance_type"),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, {}, "solver_order"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, {}, "algorithm_type"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, {}, "prediction_type"),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "use_lu_lambdas": True}, {}, "use_lu_lambdas"),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "use_karras_sigmas": True}, {}, "use_flow_sigmas"),
    ("UniPCMultistepScheduler", {"solver_p": "DDIM"}, {}, "solver_p"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "middling"}, {}, "timestep_spacing"),
    ("EulerDiscreteScheduler", {"beta_schedule": "cubic"}, {}, "beta_schedule"),
    ("EulerDiscreteScheduler", {"beta_start": "small"}, {}, "beta_start"),
    ("EulerDiscreteScheduler", {"num_train_timesteps": 0}, {}, "num_train_timesteps"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": "yes"}, {}, "use_karras_sigmas"),
    ("EulerDiscreteScheduler", {}, {"mu": 1.0}, "mu"),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, {}, "prediction_type"),
    ("HeunDiscreteScheduler", {}, {"eta": 0.5}, "eta"),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {}, "mu"),
    ("FlowMatchLCMScheduler", {"scale_factors": [0.5]}, {}, "scale_factors"),
    ("FlowMatchLCMScheduler", {"invert_sigmas": True}, {}, "invert_sigmas"),
    ("DDIMInverseScheduler", {}, {}, "clip_sample"),
    ("IPNDMScheduler", {"trained_betas": [0.1]}, {}, "trained_betas"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "how", "word"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_name(name, options, how, word):
    with pytest.raises(PlanError, match=word):
        from_diffusers_scheduler({"_class_name": name, **options}).plan(8, **how)


def test_noise_predicted_at_pure_noise_is_refused():
    """Diffusers divides by 0 there, and a clip hides it."""
    options = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(PlanError, match="alpha is 0"):
        ours("DDIMScheduler", from_diffusers_scheduler(options).plan(8), False)


@pytest.mark.parametrize("steps", [None, 0, -1, True, 2.5, "8"])
def test_the_number_of_steps_is_checked(steps):
    with pytest.raises(PlanError, match="num_inference_steps"):
        from_diffusers_scheduler({"_class_name": "EulerDiscreteScheduler"}).plan(steps)


def test_every_installed_class_is_built_or_refused_with_its_own_settings():
    import diffusers.schedulers

    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    names = {name for name in names if hasattr(diffusers.schedulers, name)}
    assert names <= set(DEFAULTS) | set(REFUSED) and set(DEFAULTS) == set(FAMILIES)
    assert set(STRATEGIES) | {"FlowMapEulerDiscreteScheduler"} == set(DEFAULTS)
    for name in names:
        cls = getattr(diffusers.schedulers, name)
        parameters = inspect.signature(getattr(cls.__init__, "__wrapped__", cls.__init__)).parameters.values()
        options = {p.name: p.default for p in parameters if p.name != "self" and p.kind == p.POSITIONAL_OR_KEYWORD}
        assert set(options) <= KNOWN, name
        if name in DEFAULTS and not hasattr(cls, "_backends"):
            assert options == DEFAULTS[name], name


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_do_not_fit_are_refused_with_the_reason(name):
    with pytest.raises(PlanError, match=name):
        from_diffusers_scheduler({"_class_name": name})


def test_a_flow_map_is_told_both_ends():
    scheduler = scheduler_class("FlowMapEulerDiscreteScheduler")(shift=3.0)
    scheduler.set_timesteps(4)
    plan = from_diffusers_scheduler(scheduler).plan(4)
    told = plan.prediction.coefficients(plan.path, plan.times[1], plan.times[2])
    assert (told.c_noise, told.c_noise_to) == pytest.approx(scheduler.timesteps[1:3].tolist())
    x, output = torch.randn(2, 1, 1, 1), torch.randn(2, 1, 1, 1)
    want = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    row = plan.solver.rows(plan.path, plan.times)[0]
    c = plan.prediction.coefficients(plan.path, row.t, row.s)
    got = row.to_x["x"] * x + row.to_x["denoised"] * (c.c_skip * x + c.c_out * output)
    assert distance(got, want) < 1e-6


def test_it_reads_objects_settings_files_and_folders(tmp_path):
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    want = from_diffusers_scheduler(scheduler).plan(7)
    scheduler.save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    for source in (file, str(file), file.parent, tmp_path, json.loads(file.read_text())):
        assert from_diffusers_scheduler(source).plan(7).times == want.times
    with pytest.raises(PlanError, match=r"scheduler_config\.json"):
        from_diffusers_scheduler(tmp_path / "elsewhere")
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(PlanError, match="JSON"):
        from_diffusers_scheduler(tmp_path)
    for wrong in (3, {"beta_start": 0.1}, {"_class_name": "DDIMSchedulerFast"}):
        with pytest.raises(PlanError):
            from_diffusers_scheduler(wrong)


def test_settings_carried_over_from_another_class_are_read_as_diffusers_does():
    ddim = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    euler = diffusers.EulerDiscreteScheduler.from_config(ddim.config)
    plan = from_diffusers_scheduler(euler).plan(5)
    euler.set_timesteps(5)
    assert [plan.path.timestep(t) for t in plan.times[:-1]] == euler.timesteps.tolist()
    with pytest.raises(PlanError, match="predict_epsilon"):
        from_diffusers_scheduler({"_class_name": "DDPMScheduler", "predict_epsilon": False})


@pytest.mark.parametrize(
    ("name", "options"),
    [("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
     ("UniPCMultistepScheduler", {}), ("EulerAncestralDiscreteScheduler", {}), ("LCMScheduler", {})],
)  # fmt: skip
def test_a_run_may_start_in_the_middle_of_the_list(name, options):
    """As diffusers' image-to-image pipelines do it: the steps and their rules are those of the whole list."""
    steps, first = 8, 3
    scheduler = scheduler_class(name)(**options)
    scheduler.set_timesteps(steps)
    plan = from_diffusers_scheduler(scheduler).plan(steps)
    plan = plan._replace(times=plan.times[first:], initial_scale=1.0)
    scale = 1.0 / plan.path.alpha_sigma(plan.times[0])[0] if name.startswith("Euler") else 1.0
    want = theirs(scheduler, True, first=first, scale=scale)
    assert distance(ours(name, plan, True)[0], want) < EXACT


def test_sample_takes_it_as_its_sampler():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(7)
    want = theirs(scheduler, False)
    fn, sampler = network("EulerDiscreteScheduler"), from_diffusers_scheduler(scheduler)
    scale = sampler.plan(7).initial_scale
    got = fastdiff.sample(fn, SHAPE, sampler=sampler, num_inference_steps=7, latents=start() * scale)
    assert distance(got, want) < 1e-5
    with pytest.raises(PlanError, match="grid"):
        fastdiff.sample(fn, SHAPE, sampler=sampler, grid="karras")


def test_a_run_that_remembers_cannot_start_in_the_middle():
    plan = from_diffusers_scheduler({"_class_name": "PNDMScheduler"}).plan(8)
    with pytest.raises(PlanError, match="middle"):
        plan.solver.rows(plan.path, plan.times[3:])


def test_diffusers_is_not_imported():
    program = (
        "import sys, fastdiff; "
        "settings = {'_class_name': 'EulerDiscreteScheduler', 'use_beta_sigmas': True}; "
        "fastdiff.from_diffusers_scheduler(settings).plan(8); "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"diffusers", "scipy", "torchsde"} & set(done.stdout.split())
