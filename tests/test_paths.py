"""Every path against its own formulas in high precision, and the properties that all of them share."""

from __future__ import annotations

import math

import mpmath
import pytest

from fastdiff.errors import PlanError
from fastdiff.sampling.path import (
    EDM,
    PATHS,
    VE,
    VPSDE,
    DiscreteVP,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    SubVPSDE,
    TrigFlow,
    linear_betas,
    log_snr,
    zero_terminal_snr,
)

pytestmark = pytest.mark.fast
mpmath.mp.dps = 50

ALL = {name: factory() for name, factory in PATHS.items()} | {
    "edm_above_zero": EDM(sigma_min=0.01, sigma_max=700.0, t_end=0.01),
    "betas_to_the_first": DiscreteVP(linear_betas(40, 1e-3, 0.4).betas, t_end=1.0),
    "vp_sde_constant": VPSDE(beta_min=3.0, beta_max=3.0),
    "sub_vp_short": SubVPSDE(beta_min=0.2, beta_max=5.0, t_start=0.7),
    "ve_diffusers": VE(sigma_max=1348.0),
    "trigflow_to_80": TrigFlow(t_start=math.atan(160.0)),
    "ou_fast": OrnsteinUhlenbeck(decay=3.0, t_start=2.0),
}
paths = pytest.mark.parametrize("path", ALL.values(), ids=ALL)
# towards both ends, by fractions of the path
FRACTIONS = [1e-9, 1e-6, 1e-3, 0.0404, 0.1733, 0.3337, 0.5123, 0.7771, 0.9004, 0.9997, 1 - 1e-6, 1 - 1e-9]


def inside(path, fractions=FRACTIONS):
    """Times strictly inside the path."""
    return [path.t_end + u * (path.t_start - path.t_end) for u in fractions]


# --- written a second time, in 50 digits, from the papers ------------------------------------------------------------


def _discrete(path):
    bars = [mpmath.mpf(1)]
    for beta in path.betas:
        bars.append(bars[-1] * (1 - mpmath.mpf(beta)))

    def bar(t):
        k = min(max(math.ceil(t) - 1, 0), len(path.betas) - 1)
        part = mpmath.mpf(t) - k
        if bars[k + 1] == 0:
            return bars[k] * (1 - part) ** 2
        return bars[k] * (bars[k + 1] / bars[k]) ** part

    return lambda t: (mpmath.sqrt(bar(t)), mpmath.sqrt(1 - bar(t)))


def _integral(path, t):
    t = mpmath.mpf(t)
    return mpmath.mpf(path.beta_min) * t + (mpmath.mpf(path.beta_max) - mpmath.mpf(path.beta_min)) * t * t / 2


def exact(path):
    """``t -> (alpha, sigma)`` in 50 digits."""
    if isinstance(path, DiscreteVP):
        return _discrete(path)
    if isinstance(path, RectifiedFlow):
        return lambda t: (1 - mpmath.mpf(t), mpmath.mpf(t))
    if isinstance(path, EDM):
        return lambda t: (mpmath.mpf(1), mpmath.mpf(t))
    if isinstance(path, TrigFlow):
        # the float nearest to pi / 2 stands for it
        end = mpmath.mpf(math.pi / 2)
        return lambda t: (mpmath.sin(end - mpmath.mpf(t)), path.sigma_data * mpmath.sin(t))
    if isinstance(path, OrnsteinUhlenbeck):
        return lambda t: (
            mpmath.exp(-path.decay * mpmath.mpf(t)),
            mpmath.sqrt(1 - mpmath.exp(-2 * path.decay * mpmath.mpf(t))),
        )
    if isinstance(path, VPSDE):
        return lambda t: (mpmath.exp(-_integral(path, t) / 2), mpmath.sqrt(1 - mpmath.exp(-_integral(path, t))))
    if isinstance(path, SubVPSDE):
        return lambda t: (mpmath.exp(-_integral(path, t) / 2), 1 - mpmath.exp(-_integral(path, t)))
    assert isinstance(path, VE)
    low, high = mpmath.mpf(path.sigma_min), mpmath.mpf(path.sigma_max)
    return lambda t: (mpmath.mpf(1), low * (high / low) ** mpmath.mpf(t))


@paths
def test_levels_are_exact_to_the_last_digits_also_near_both_ends(path):
    truth = exact(path)
    for t in inside(path):
        for got, want in zip(path.alpha_sigma(t), truth(t), strict=True):
            assert abs(got - want) <= 3e-14 * want, t


@paths
def test_rate_is_the_derivative_of_the_levels(path):
    truth = exact(path)
    for t in inside(path):
        if isinstance(path, DiscreteVP) and abs(t - round(t)) < 1e-3:
            continue  # the rate is piecewise
        for i, rate in enumerate(path.rate(t)):
            # central difference in 50 digits: the error left is the rate's own
            h = mpmath.mpf(1e-15) * min(t - path.t_end, path.t_start - t, 1.0)
            want = (truth(t + h)[i] - truth(t - h)[i]) / (2 * h)
            assert abs(rate - want) <= 1e-11 * abs(want) + 1e-16, (t, i)


@pytest.mark.parametrize("name", PATHS)
def test_rate_agrees_with_a_float64_central_difference(name):
    """The same without the second formula: what is checked above is what the class itself returns."""
    path = PATHS[name]()
    for t in inside(path, [0.0404, 0.3337, 0.5123, 0.9004]):
        h = 1e-4 * min(t - path.t_end, path.t_start - t, 1.0)
        for i, rate in enumerate(path.rate(t)):
            slopes = [(path.alpha_sigma(t + k * h)[i] - path.alpha_sigma(t - k * h)[i]) / (2 * k * h) for k in (1, 2)]
            assert rate == pytest.approx((4 * slopes[0] - slopes[1]) / 3, rel=1e-7, abs=1e-9)


@paths
def test_time_inverts_log_snr(path):
    for t in inside(path):
        at = log_snr(path, t)
        # a digit of log-SNR that float64 does not hold is not asked for
        least = 4e-16 * max(abs(at), 1.0) * abs(_time_per_log_snr(path, t))
        assert path.time(at) == pytest.approx(t, rel=1e-12, abs=4 * least)


def _time_per_log_snr(path, t):
    (alpha, sigma), (alpha_rate, sigma_rate) = path.alpha_sigma(t), path.rate(t)
    return 1 / (alpha_rate / alpha - sigma_rate / sigma)


@paths
def test_log_snr_falls_as_time_rises(path):
    values = [log_snr(path, t) for t in inside(path, [i / 3000 for i in range(3001)])]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


@paths
def test_the_names_of_a_time_invert_each_other(path):
    for t in inside(path, [1e-3, 0.0404, 0.3337, 0.7771, 0.9997]):
        assert path.from_timestep(path.timestep(t)) == pytest.approx(t, rel=1e-12, abs=1e-12)
        assert path.from_sigma(path.field_sigma(t)) == pytest.approx(t, rel=1e-11)
    if path.alpha_sigma(path.t_end)[1] == 0:
        assert path.from_sigma(0.0) == path.t_end


@paths
def test_the_ends_are_ends(path):
    (alpha, sigma), (alpha_end, sigma_end) = path.alpha_sigma(path.t_start), path.alpha_sigma(path.t_end)
    assert math.isfinite(alpha) and sigma > alpha
    assert alpha_end == pytest.approx(1.0, abs=2e-3) and sigma_end < 0.05
    assert all(math.isfinite(rate) for rate in path.rate(path.t_start))
    assert not any(math.isnan(rate) for rate in path.rate(path.t_end))
    assert path.t_end <= max(path.t_min, path.t_end) < path.t_start


@paths
def test_times_outside_are_refused(path):
    for t in (path.t_start * 1.001, path.t_end - 0.001, math.nan):
        with pytest.raises(PlanError, match="outside this path"):
            path.alpha_sigma(t)


@paths
def test_training_times_cover_the_path_without_its_clean_end(path):
    times = [path.train_time(u) for u in (0.0, 0.3, 0.6, 1 - 1e-12)]
    assert all(path.t_end <= t <= path.t_start and path.alpha_sigma(t)[1] > 0 for t in times)
    assert path.t_start in (pytest.approx(times[0]), pytest.approx(times[-1], rel=1e-9))


# --- identities between paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in ALL.values() if isinstance(p, DiscreteVP | VPSDE | OrnsteinUhlenbeck)])
def test_variance_preserving(path):
    for t in inside(path):
        alpha, sigma = path.alpha_sigma(t)
        assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-15)


def test_sub_vp_has_the_square_of_the_noise_of_vp():
    for t in inside(VPSDE()):
        alpha, sigma = VPSDE().alpha_sigma(t)
        assert SubVPSDE().alpha_sigma(t) == pytest.approx((alpha, sigma**2), rel=1e-14)


def test_vp_sde_is_the_limit_of_many_small_betas():
    """Song et al. 2020, app. B: DDPM's chain with beta_i = beta(i / N) / N becomes the SDE."""
    n = 100_000
    path, chain = VPSDE(), DiscreteVP(tuple((0.1 + 19.9 * i / n) / n for i in range(1, n + 1)))
    for u in (0.05, 0.3, 0.6, 1.0):
        assert chain.alpha_sigma(u * n)[0] == pytest.approx(path.alpha_sigma(u)[0], rel=2e-3)


def test_ve_is_diffusers_score_sde_ve():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.ScoreSdeVeScheduler()
    path = VE(sigma_min=0.01, sigma_max=1348.0)
    scheduler.set_timesteps(7)
    scheduler.set_sigmas(7)
    for t, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=True):
        assert path.field_sigma(t) == pytest.approx(sigma, rel=1e-5)
        assert path.timestep(t) == path.field_sigma(t)


def test_ve_jumps_to_clean_data():
    assert VE().alpha_sigma(0.0) == (1.0, 0.0)
    assert VE().alpha_sigma(1e-12)[1] == pytest.approx(0.01)


def test_trigflow_keeps_the_spread_of_the_data_and_has_edm_noise_levels():
    path = TrigFlow(sigma_data=0.5)
    for t in inside(path):
        alpha, sigma = path.alpha_sigma(t)
        assert (alpha * 0.5) ** 2 + sigma**2 == pytest.approx(0.25, rel=1e-14)
    assert path.from_sigma(80.0) == pytest.approx(math.atan(80 / 0.5), rel=1e-15)
    assert path.alpha_sigma(math.pi / 2) == (0.0, 0.5)


# --- lists of betas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("cosine", "cosine"), ("exp", "exp"), ("laplace", "laplace")])
def test_alpha_bar_schedules_are_diffusers_own(name, kind):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.schedulers.scheduling_ddim.betas_for_alpha_bar(1000, alpha_transform_type=kind)
    # theirs is rounded to float32
    assert PATHS[name]().betas == pytest.approx(theirs.tolist(), rel=1e-6)


@pytest.mark.parametrize("name", ["linear", "quadratic", "cosine", "laplace"])
def test_zero_terminal_snr_is_diffusers_own(name):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    betas = torch.tensor(PATHS[name]().betas, dtype=torch.float64)
    theirs = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(betas)
    ours = zero_terminal_snr(PATHS[name]())
    assert ours.betas == pytest.approx(theirs.tolist(), rel=1e-9, abs=1e-12)
    assert ours.betas[-1] == 1.0
    assert ours.alpha_sigma(ours.t_start) == (0.0, 1.0)
    assert ours.alpha_sigma(1.0) == pytest.approx(PATHS[name]().alpha_sigma(1.0), rel=1e-14)
    assert log_snr(ours, ours.t_start) == -math.inf


def test_the_last_interval_of_zero_terminal_snr_is_straight_in_alpha():
    path = PATHS["linear_zero_snr"]()
    last = path.alpha_sigma(999.0)[0]
    for part in (0.0, 0.25, 0.5, 1 - 1e-9):
        assert path.alpha_sigma(999.0 + part)[0] == pytest.approx(last * (1 - part), rel=1e-6)
    assert path.time(log_snr(path, 999.75)) == pytest.approx(999.75, rel=1e-13)
    assert path.time(-math.inf) == 1000.0
    assert path.rate(1000.0) == (pytest.approx(-last), 0.0)


def test_moving_the_end_twice_changes_nothing():
    once = PATHS["linear_zero_snr"]()
    assert zero_terminal_snr(once).betas == pytest.approx(once.betas, rel=1e-12)


@pytest.mark.parametrize("betas", [(), (0.1, 0.0), (0.1, 1.0, 0.2), (0.1, 1.5), (-0.1,), (math.nan, 0.1), (math.nan,)])
def test_bad_betas_are_named(betas):
    with pytest.raises(PlanError, match="betas hold"):
        DiscreteVP(betas)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPSDE(beta_min=0.0), "beta runs from 0.0"),
        (lambda: SubVPSDE(beta_min=2.0, beta_max=1.0), "beta runs from 2.0 to 1.0"),
        (lambda: VE(sigma_min=0.0), "sigma runs from 0.0"),
        (lambda: zero_terminal_snr(DiscreteVP((0.1,))), "1 betas"),
        (lambda: linear_betas(1), "1 betas"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(PlanError, match=message):
        make()
