"""Every grid falls strictly, and equals diffusers' where diffusers has it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from fastdiff.errors import PlanError
from fastdiff.sampling.grid import (
    GRIDS,
    beta,
    beta_time,
    dynamic_shift,
    explicit,
    exponential,
    from_table,
    gits_sd15,
    karras,
    kl_optimal,
    laplace,
    lcm,
    leading,
    linear_quadratic,
    linspace,
    log_snr_uniform,
    perflow,
    polyexponential,
    quadratic,
    shift_time,
    shifted,
    trailing,
    uniform,
)
from fastdiff.sampling.grid.incomplete_beta import beta_quantile
from fastdiff.sampling.path import EDM, PATHS, DiscreteVP, RectifiedFlow, linear_betas, log_snr, quadratic_betas

pytestmark = pytest.mark.fast
LEVEL_GRIDS = {
    "log_snr": log_snr_uniform, "karras": karras, "exponential": exponential, "polyexponential": polyexponential,
    "kl_optimal": kl_optimal, "laplace": laplace, "beta": beta,
}  # fmt: skip
PATH_OF = {
    "ays_svd": EDM(sigma_max=700.0),
    "shifted": RectifiedFlow(),
    "linear_quadratic": RectifiedFlow(),
    "perflow": RectifiedFlow(),
} | {name: RectifiedFlow() for name in GRIDS if name.startswith("oss")}
LEAST = {"perflow": 4}  # a step for each window
MOST = {"quadratic": 29, "lcm": 50, "laplace": 400}  # beyond these two times coincide


def sigmas_of(path, times):
    return [path.field_sigma(t) for t in times]


def check(path, times, n):
    assert len(times) == n + 1
    assert all(a > b for a, b in pairwise(times))
    assert times[0] <= path.t_start and times[-1] == path.t_end
    assert all(math.isfinite(path.timestep(t)) for t in times[:-1])


@pytest.mark.parametrize("name", GRIDS)
def test_times_fall_strictly_for_every_number_of_steps(name):
    path = PATH_OF.get(name, quadratic_betas())
    most = MOST.get(name, 1000)
    numbers = (
        range(1, 1001) if name in ("leading", "trailing", "linspace", "uniform") else [*range(1, 51), 100, 333, 1000]
    )
    for n in numbers:
        if LEAST.get(name, 1) <= n <= most:
            check(path, GRIDS[name](path, n), n)
        else:
            with pytest.raises(PlanError, match=f"num_inference_steps is {n}"):
                GRIDS[name](path, n)


@pytest.mark.parametrize("path", ["straight", "cosine", "linear_zero_snr", "vp_sde", "sub_vp", "ve", "edm", "trigflow"])
@pytest.mark.parametrize("name", [*LEVEL_GRIDS, "beta_time", "uniform"])
def test_general_grids_hold_on_every_kind_of_path(name, path):
    path = PATHS[path]()
    for n in (1, 2, 3, 7, 50):
        times = GRIDS[name](path, n)
        check(path, times, n)
        assert times[0] == path.t_start
        if name in LEVEL_GRIDS and n > 1:
            assert times[-2] == path.t_min


@pytest.mark.parametrize("name", LEVEL_GRIDS)
def test_a_path_that_ends_above_zero_noise_is_walked_to_its_end(name):
    path = EDM(t_end=0.002)
    for n in (1, 2, 9):
        check(path, LEVEL_GRIDS[name](path, n), n)


@pytest.mark.parametrize("name", LEVEL_GRIDS)
def test_limits_are_kept(name):
    path = quadratic_betas()
    times = LEVEL_GRIDS[name](path, 8, sigma_min=0.1, sigma_max=9.0)
    levels = sigmas_of(path, times)
    assert (levels[0], levels[-2], levels[-1]) == (pytest.approx(9.0), pytest.approx(0.1), 0.0)
    check(path, times, 8)


@pytest.mark.parametrize("options", [{"sigma_min": 0.0}, {"sigma_min": 20.0}, {"sigma_min": 3.0, "sigma_max": 2.0}])
def test_a_bad_sigma_min_is_named(options):
    with pytest.raises(PlanError, match=f"sigma_min is {options['sigma_min']}; allowed"):
        karras(quadratic_betas(), 5, **options)


@pytest.mark.parametrize("sigma_max", [0.0, 15.0, math.nan])
def test_a_bad_sigma_max_is_named(sigma_max):
    with pytest.raises(PlanError, match=f"sigma_max is {sigma_max}; allowed"):
        exponential(quadratic_betas(), 5, sigma_max=sigma_max)


# --- diffusers -------------------------------------------------------------------------------------------------------

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def _diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("total", [1000, 50])
def test_trained_steps_are_diffusers_own(total):
    ddim, path = _diffusers().DDIMScheduler, linear_betas(total)
    for kind, grid in (("leading", leading), ("trailing", trailing), ("linspace", linspace)):
        scheduler = ddim(num_train_timesteps=total, timestep_spacing=kind)
        for n in [*range(2 if kind == "linspace" else 1, 131), *range(131, 1001, 13), 1000]:
            if n > total:
                break
            scheduler.set_timesteps(n)
            theirs = scheduler.timesteps.tolist()
            if len(theirs) == n + 1:  # numpy's arange went one too far: a step at timestep -1
                assert theirs.pop() == -1
            assert [t - 1 for t in grid(path, n)[:-1]] == theirs, (kind, n)


def test_leading_with_an_offset_is_diffusers_own():
    scheduler = _diffusers().DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    for n in [*range(1, 100), *range(100, 1000, 13)]:
        scheduler.set_timesteps(n)
        assert [t - 1 for t in leading(linear_betas(), n, steps_offset=1)[:-1]] == scheduler.timesteps.tolist()
    # there diffusers goes on to timestep 1000 of 0..999
    with pytest.raises(PlanError, match="steps_offset is 1; allowed with 1000 steps on this path: 0 to 0"):
        leading(linear_betas(), 1000, steps_offset=1)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 50])
@pytest.mark.parametrize(("option", "grid"), [("karras", karras), ("exponential", exponential), ("beta", beta)])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_noise_levels_are_diffusers_own(scheduler, option, grid, n):
    # Euler's range is that of the timesteps it spaced first, and one linspace step stands at timestep 0
    spacing = "trailing" if n == 1 else "linspace"
    theirs = getattr(_diffusers(), scheduler)(**{f"use_{option}_sigmas": True}, timestep_spacing=spacing, **SD)
    theirs.set_timesteps(n)
    path = quadratic_betas()
    # theirs comes from float32 products
    assert sigmas_of(path, grid(path, n)) == pytest.approx(theirs.sigmas.tolist(), rel=2e-4)


def test_limits_are_diffusers_own():
    options = {"sigma_min": 0.1, "sigma_max": 9.0}
    for option, grid in (("karras", karras), ("exponential", exponential), ("beta", beta)):
        theirs = _diffusers().EulerDiscreteScheduler(**{f"use_{option}_sigmas": True}, **options, **SD)
        theirs.set_timesteps(12)
        path = quadratic_betas()
        assert sigmas_of(path, grid(path, 12, **options)) == pytest.approx(theirs.sigmas.tolist(), rel=1e-6)


def test_lu_lambdas_are_equal_steps_in_log_snr():
    theirs = _diffusers().DPMSolverMultistepScheduler(use_lu_lambdas=True, **SD)
    theirs.set_timesteps(12)
    path = quadratic_betas()
    assert sigmas_of(path, log_snr_uniform(path, 12)) == pytest.approx(theirs.sigmas.tolist(), rel=2e-4)


def test_levels_from_pure_noise_are_diffusers_own():
    theirs = _diffusers().EulerDiscreteScheduler(use_karras_sigmas=True, rescale_betas_zero_snr=True)
    theirs.set_timesteps(9)
    path = PATHS["linear_zero_snr"]()
    ours = sigmas_of(path, karras(path, 9))
    assert ours[0] == math.inf
    assert ours[1:] == pytest.approx(theirs.sigmas.tolist()[1:], rel=1e-3)


@pytest.mark.parametrize(("kind", "grid"), [("karras", karras), ("exponential", exponential)])
def test_edm_levels_are_diffusers_own(kind, grid):
    theirs = _diffusers().EDMEulerScheduler(sigma_schedule=kind)
    for n in (2, 18, 100):
        theirs.set_timesteps(n)
        assert list(grid(EDM(), n)) == pytest.approx(theirs.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 31, 50])
def test_lcm_times_are_diffusers_own(n):
    scheduler = _diffusers().LCMScheduler()
    scheduler.set_timesteps(n)
    assert [t - 1 for t in lcm(quadratic_betas(), n)[:-1]] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [1, 2, 7, 28])
def test_shifted_times_are_diffusers_own(n):
    diffusers, np = _diffusers(), pytest.importorskip("numpy")
    path, shift = RectifiedFlow(), 3.0
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    static.set_timesteps(n)
    # the scheduler shifts its least time once when made and once more when asked for steps
    assert list(shifted(path, n, shift, t_last=shift_time(0.001, shift))) == pytest.approx(
        static.sigmas.tolist(), rel=1e-6
    )
    static.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n))
    assert list(shifted(path, n, shift)) == pytest.approx(static.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("length", [256, 1024, 4096, 6000])
def test_dynamic_shift_is_diffusers_own(kind, length):
    diffusers, np = _diffusers(), pytest.importorskip("numpy")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = math.log(dynamic_shift(length))
    assert mu == pytest.approx(0.5 + (length - 256) * 0.65 / 3840, rel=1e-12)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 9, 9), mu=mu)
    ours = shifted(RectifiedFlow(), 9, dynamic_shift(length, linear=kind == "linear"))
    assert list(ours) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize(("option", "grid"), [("karras", karras), ("exponential", exponential), ("beta", beta)])
def test_levels_of_the_straight_path_are_diffusers_own(option, grid):
    scheduler = _diffusers().FlowMatchEulerDiscreteScheduler(**{f"use_{option}_sigmas": True})
    scheduler.set_timesteps(14)
    assert list(grid(RectifiedFlow(), 14)) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("ays_sd15", "StableDiffusionSigmas"),
        ("ays_sdxl", "StableDiffusionXLSigmas"),
        ("ays_svd", "StableDiffusionVideoSigmas"),
    ],
)
def test_align_your_steps_is_diffusers_own(name, theirs):
    table = _diffusers().schedulers.AysSchedules[theirs]
    path = PATH_OF.get(name, quadratic_betas())
    # theirs has three digits, of which the last is off by up to two
    assert sigmas_of(path, GRIDS[name](path, 10)) == pytest.approx(table, rel=1e-3, abs=1.7e-3)


# --- against other libraries and closed forms ------------------------------------------------------------------------


def test_quantiles_of_the_beta_distribution_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for a, b in [(0.6, 0.6), (0.5, 0.7), (1.0, 1.0), (2.0, 3.0), (5.0, 0.5), (30.0, 40.0)]:
        for p in [1e-12, 1e-6, 1 - 1e-9, *(i / 40 for i in range(41))]:
            assert beta_quantile(p, a, b) == pytest.approx(float(stats.beta.ppf(p, a, b)), rel=1e-12), (p, a, b)


def test_quantiles_invert_a_known_distribution():
    """I_x(1/2, 1/2) = 2 / pi * asin(sqrt(x)), without scipy."""
    for x in (1e-9, 0.03, 0.5, 0.8):
        assert beta_quantile(2 / math.pi * math.asin(math.sqrt(x)), 0.5, 0.5) == pytest.approx(x, rel=1e-11)


def test_beta_times_are_quantiles_over_the_trained_steps():
    stats, path = pytest.importorskip("scipy.stats"), quadratic_betas()
    want = [1 + 999 * stats.beta.ppf(1 - i / 12, 0.6, 0.6) for i in range(12)]
    assert list(beta_time(path, 12))[:-1] == pytest.approx(want, rel=1e-12)


def test_equal_steps_are_equal():
    path = linear_betas()
    halves = [log_snr(path, t) for t in log_snr_uniform(path, 9)[:-1]]
    assert [b - a for a, b in pairwise(halves)] == pytest.approx([halves[1] - halves[0]] * 8, rel=1e-9)
    roots = [s ** (1 / 5) for s in karras(EDM(), 9, rho=5.0)[:-1]]
    assert [b - a for a, b in pairwise(roots)] == pytest.approx([roots[1] - roots[0]] * 8, rel=1e-9)
    angles = [math.atan(s) for s in kl_optimal(EDM(), 9)[:-1]]
    assert [b - a for a, b in pairwise(angles)] == pytest.approx([angles[1] - angles[0]] * 8, rel=1e-9)
    logs = [math.log(s / 0.002) ** (1 / 3) for s in polyexponential(EDM(), 9, rho=3.0)[:-1]]
    assert [b - a for a, b in pairwise(logs)] == pytest.approx([logs[1] - logs[0]] * 8, rel=1e-6)
    assert uniform(RectifiedFlow(), 4) == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_polyexponential_with_rho_1_is_exponential():
    assert polyexponential(EDM(), 9, rho=1.0) == pytest.approx(exponential(EDM(), 9), rel=1e-12)


def test_laplace_levels_are_quantiles():
    """The distribution function of log(level) at every inner level is how far along it stands, but for the 1e-5."""
    levels = laplace(EDM(), 11, mu=0.3, scale=0.4)
    for i, level in list(enumerate(levels))[2:9]:
        away = (math.log(level) - 0.3) / 0.4
        rest = 0.5 * math.exp(-abs(away))
        assert (rest if away > 0 else 1 - rest) == pytest.approx(i / 10, abs=1e-5)


def test_quadratic_is_the_published_sequence():
    """Song et al. 2020: floor(c i^2), reaching 0.8 of the trained steps."""
    assert [t - 1 for t in quadratic(linear_betas(), 5)[:-1]] == [800, 450, 200, 50, 0]


@pytest.mark.parametrize(("n", "options"), [(10, {}), (7, {}), (30, {"threshold": 0.1, "linear_steps": 10})])
def test_linear_quadratic_joins_smoothly(n, options):
    times = linear_quadratic(RectifiedFlow(), n, **options)
    count, threshold = options.get("linear_steps", n // 2), options.get("threshold", 0.025)
    steps = [a - b for a, b in pairwise(times)]
    assert steps[:count] == pytest.approx([threshold / count] * count, rel=1e-9)
    growth = [b - a for a, b in pairwise(steps[count:])]
    assert growth == pytest.approx([growth[0]] * len(growth), rel=1e-6) and growth[0] > 0
    assert steps[count] - steps[count - 1] == pytest.approx(growth[0] / 2, rel=1e-6)  # one slope on both sides


def test_linear_quadratic_is_mochis():
    """What diffusers' Mochi pipeline makes of 10 steps at 0.025; to import it takes transformers."""
    want = [1.0, 0.995, 0.99, 0.985, 0.98, 0.975, 0.932, 0.813, 0.618, 0.347, 0.0]
    assert list(linear_quadratic(RectifiedFlow(), 10)) == pytest.approx(want, abs=1e-12)


def test_perflow_takes_equal_steps_in_equal_windows():
    assert perflow(RectifiedFlow(), 4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert perflow(RectifiedFlow(), 7, windows=3) == (1.0, 0.888, 0.777, 0.666, 0.5, 0.333, 0.166, 0.0)


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0])
def test_multistep_levels_of_the_straight_path_are_diffusers_own(shift):
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    scheduler = _diffusers().UniPCMultistepScheduler(**options)
    for n in (1, 4, 10, 33):
        scheduler.set_timesteps(n)
        times = shifted(RectifiedFlow(), n, shift=shift, t_last=1 - 0.999 * (n - 1) / n if n > 1 else None)
        assert times == pytest.approx(scheduler.sigmas.tolist(), abs=2e-6)  # theirs begin at 1 - 1e-6


def test_a_walk_may_start_below_pure_noise():
    assert shifted(RectifiedFlow(), 4, shift=1.0, t_first=0.8) == pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))


def test_shift_multiplies_the_noise_ratio():
    for t in (0.0, 0.2, 0.9, 1.0):
        moved = shift_time(t, 3.0)
        assert moved * (1 - t) == pytest.approx(3.0 * t * (1 - moved))
    assert shifted(RectifiedFlow(), 6, 1.0) == pytest.approx(uniform(RectifiedFlow(), 6))


def test_tables_are_log_linear_between_their_levels():
    path = EDM(sigma_max=16.0)
    levels = (16.0, 4.0, 1.0, 0.25)
    assert from_table(path, 3, levels) == (16.0, 4.0, 1.0, 0.0)
    assert from_table(path, 6, levels) == pytest.approx((16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0))


def test_gits_has_its_own_levels_up_to_20_steps():
    path = quadratic_betas()
    assert sigmas_of(path, gits_sd15(path, 4)) == pytest.approx((14.6146412, 2.36326075, 0.92192322, 0.36617002, 0.0))
    assert sigmas_of(path, gits_sd15(path, 20))[1:3] == pytest.approx((7.49001646, 4.65472794))


# --- what the user gives ---------------------------------------------------------------------------------------------


def test_explicit_times_end_at_the_end():
    assert explicit(RectifiedFlow(), [0.9, 0.4]) == (0.9, 0.4, 0.0)
    assert explicit(RectifiedFlow(), [1, 0]) == (1.0, 0.0)


def test_explicit_times_may_be_rounded_at_the_start_only():
    path = quadratic_betas()
    rounded = path.from_sigma(14.6147)
    assert rounded > path.t_start
    assert explicit(path, [rounded, 3.0])[0] == path.t_start
    with pytest.raises(PlanError, match=r"allowed: 1000\.0 to 0\.0"):
        explicit(path, [1001.0, 3.0])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "one or more finite"),
        ([math.nan], "one or more finite"),
        ([0.5, 0.5], "fall strictly"),
        ([0.4, 0.5], "fall strictly"),
        ([1.5, 0.5], "allowed: 1.0 to 0.0"),
        ([0.5, -0.1], "allowed: 1.0 to 0.0"),
    ],
)
def test_bad_times_are_named(times, message):
    with pytest.raises(PlanError, match=message):
        explicit(RectifiedFlow(), times)


@pytest.mark.parametrize("n", [0, -1, 2.0, True, 10_001])
@pytest.mark.parametrize("name", GRIDS)
def test_a_bad_number_of_steps_is_named(name, n):
    with pytest.raises(PlanError, match=f"num_inference_steps is {n}; allowed: a whole number"):
        GRIDS[name](PATH_OF.get(name, quadratic_betas()), n)


BAD = [
    (lambda: leading(EDM(), 5), "does not have"),
    (lambda: trailing(linear_betas(10), 11), "at most 10"),
    (
        lambda: leading(linear_betas(), 5, steps_offset=-1),
        "steps_offset is -1; allowed with 5 steps on this path: 0 to 199",
    ),
    (lambda: leading(DiscreteVP(linear_betas().betas, t_end=1.0), 5), "steps_offset is 0; allowed"),
    (lambda: quadratic(linear_betas(), 5, reach=1.5), "reach is 1.5"),
    (lambda: lcm(linear_betas(), 5, original_steps=2000), "original_steps is 2000"),
    (lambda: karras(EDM(), 5, rho=0.0), "rho is 0.0"),
    (lambda: polyexponential(EDM(), 5, rho=-1.0), "rho is -1.0"),
    (lambda: laplace(EDM(), 5, scale=0.0), "scale is 0.0"),
    (lambda: beta(EDM(), 5, a=0.0), "a is 0.0"),
    (lambda: beta_time(EDM(), 5, b=math.inf), "b is inf"),
    (lambda: shifted(linear_betas(), 5), "made for the straight path"),
    (lambda: shifted(RectifiedFlow(), 5, shift=0.0), "shift is 0.0"),
    (lambda: shifted(RectifiedFlow(), 5, t_last=1.0), "t_last is 1.0"),
    (lambda: shifted(RectifiedFlow(), 5, t_first=1.1), "t_first is 1.1"),
    (lambda: dynamic_shift(0), "length is 0"),
    (lambda: dynamic_shift(1, base_shift=0.0, linear=True), "mu is"),
    (lambda: linear_quadratic(EDM(), 5), "made for the straight path"),
    (lambda: linear_quadratic(RectifiedFlow(), 5, threshold=0.9), "threshold is 0.9"),
    (lambda: linear_quadratic(RectifiedFlow(), 5, linear_steps=5), "1 to 4 linear steps"),
    (lambda: perflow(RectifiedFlow(), 5, windows=0), "windows is 0"),
    (lambda: GRIDS["ays_sd15"](linear_betas(), 10), "noise starts at 14.6146"),
    (lambda: GRIDS["oss_flux"](EDM(), 10), "noise starts at 0.9968"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options_are_named(make, message):
    with pytest.raises(PlanError, match=message):
        make()
