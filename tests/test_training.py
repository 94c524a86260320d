"""The losses have their minimum at the truth, and a resumed run is the unbroken one."""

from __future__ import annotations

import math

import pytest
import torch
from small import SIZES
from torch import Tensor

from fastdiff import training
from fastdiff.errors import ArtifactError, PlanError
from fastdiff.models.config import UNetConfig
from fastdiff.models.weights import ModelInfo
from fastdiff.sampling.analytic import Gaussian, Oracle
from fastdiff.sampling.path import PATHS
from fastdiff.sampling.prediction import PREDICTIONS, MeanVelocity
from fastdiff.training import (
    Images,
    Jumps,
    TrainConfig,
    Trainer,
    draw_jumps,
    jump_bounds,
    lsd_error,
    q_sample,
    regression_error,
    timesteps,
)

pytestmark = pytest.mark.fast


def spread(start: float, end: float, n: int = 1000) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def discrete(betas: Tensor):
    """Ho et al. 2020, eq. 4: the products of the published betas, at whole times."""
    bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    return lambda t: (bar[int(t)].sqrt(), (1 - bar[int(t)]).sqrt())


def cosine() -> Tensor:
    bar = ((spread(0, 1, 1001) + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


LEVELS = {  # written a second time here, from the papers
    "straight": lambda t: (1 - t, t),
    "linear": discrete(spread(1e-4, 0.02)),
    "quadratic": discrete(spread(0.00085**0.5, 0.012**0.5) ** 2),
    "sigmoid": discrete(1e-4 + (0.02 - 1e-4) * spread(-6, 6).sigmoid()),
    "cosine": discrete(cosine()),
    "ornstein_uhlenbeck": lambda t: (math.exp(-t), math.sqrt(1 - math.exp(-2 * t))),
    "edm": lambda t: (1.0, t),
}


@pytest.mark.parametrize("name", LEVELS)  # other paths: test_paths.py
def test_q_sample_is_the_formula(name):
    path = PATHS[name]()
    u = [0.0, 0.2, 0.5, 0.77, 1.0]
    t = torch.tensor([path.t_end + v * (path.t_start - path.t_end) for v in u], dtype=torch.float64)
    x0, z = torch.randn(2, len(u), 2, 3, 3, dtype=torch.float64)
    got = q_sample(path, x0, t, z)
    for i, time in enumerate(t.tolist()):
        alpha, sigma = LEVELS[name](time)
        assert torch.allclose(got[i], alpha * x0[i] + sigma * z[i], rtol=1e-9, atol=1e-9), time
    assert q_sample(path, x0.float(), t, z.float()).dtype == torch.float32


def perturbations(exact: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Wrong in every way a linear denoiser can be: too strong, too weak, shifted, leaning on the input."""
    size = exact.square().mean().sqrt()
    return {
        "stronger": 1.05 * exact,
        "weaker": 0.95 * exact,
        "up": exact + 0.05 * size,
        "down": exact - 0.05 * size,
        "towards x": exact + 0.05 * size * x / x.square().mean().sqrt(),
        "away from x": exact - 0.05 * size * x / x.square().mean().sqrt(),
    }


@pytest.mark.parametrize("loss", ["eps", "x0", "v", "score", "velocity"])
@pytest.mark.parametrize("name", ["straight", "cosine", "edm"])
def test_a_regression_loss_is_least_at_the_truth(loss, name):
    """Common random numbers: only the perturbation differs, so a few thousand pixels at each time decide."""
    path, prediction = PATHS[name](), PREDICTIONS[loss]
    data = Gaussian(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    oracle = Oracle(data, path, prediction, ())
    for time in [0.5] if name == "edm" else [0.3 * path.t_start, 0.7 * path.t_start]:
        t = torch.full((4000,), time, dtype=torch.float64)
        z = torch.randn(4000, 1, 4, 4, dtype=torch.float64)
        x0 = data.mean + data.std * torch.randn_like(z)
        x = q_sample(path, x0, t, z)
        exact = oracle.output(x, time, time)

        def mean_loss(output: Tensor, x0=x0, t=t, z=z) -> float:
            errors = regression_error(output, path, prediction, x0, t, z)
            assert errors.shape == t.shape
            return float(errors.mean())

        best = mean_loss(exact)
        for kind, wrong in perturbations(exact, x).items():
            assert mean_loss(wrong) > best, (time, kind)


# --- the flow-map loss ----------------------------------------------------------------------------------------------

PATH = PATHS["straight"]()
DATA = Gaussian(torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))


def flow_map(x: Tensor, timestep: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The exact mean velocity of Gaussian data, as a network."""
    oracle = Oracle(DATA, PATH, MeanVelocity(), ())
    pairs = zip(timestep.tolist(), target.tolist(), strict=True)
    rows = [oracle.output(x[i : i + 1], t / 1000, s / 1000) for i, (t, s) in enumerate(pairs)]
    return torch.cat(rows)


def jumps_and_x(count: int = 32) -> tuple[Jumps, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    s = 0.02 + 0.6 * torch.rand(count, generator=generator, dtype=torch.float64)
    t = s + 0.05 + (0.95 - s) * torch.rand(count, generator=generator, dtype=torch.float64)
    return Jumps(t, s), torch.randn(count, 1, 3, 3, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)


def lsd(network) -> Tensor:
    jumps, x, labels = jumps_and_x()
    low, high = (timesteps(PATH, s, x) for s in jump_bounds(PATH, jumps))
    t = timesteps(PATH, jumps.t, x)
    return lsd_error(PATH, network, x, labels, jumps, network(x, t, labels, low), network(x, t, labels, high))


def test_lsd_vanishes_at_the_exact_flow_map_with_the_fourth_power_of_the_width(monkeypatch):
    exact = lsd(flow_map)
    assert exact.shape == (32,) and 0 < exact.max() < 1e-6
    monkeypatch.setattr(training.losses, "HALF_WIDTH", training.losses.HALF_WIDTH / 2)
    assert 12 < float(exact.mean() / lsd(flow_map).mean()) < 20  # (h^2)^2: 16


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f, t, s: 1.05 * f,
        lambda f, t, s: f + 0.05,
        lambda f, t, s: f + 0.05 * (t - s) / 1000,  # right on the diagonal, wrong as a jump
        lambda f, t, s: f * (1 + 0.1 * (t - s) / 1000),
    ],
    ids=["scaled", "shifted", "jumps shifted", "jumps scaled"],
)
def test_lsd_is_positive_for_any_other_map(wrong):
    def network(x, t, labels, s):
        column = (slice(None), None, None, None)
        return wrong(flow_map(x, t, labels, s), t[column], s[column])

    exact, other = lsd(flow_map), lsd(network)
    assert other.mean() > 100 * exact.mean() and other.mean() > 1e-5


def test_the_gradient_of_lsd_goes_through_the_jump_and_not_through_the_teacher():
    jumps, x, labels = jumps_and_x()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def teacher(x, t, labels, s):
        assert torch.equal(t, s)  # its velocity, on the diagonal
        return weight * flow_map(x, t, labels, s)

    below, above = (torch.randn_like(x).requires_grad_() for _ in range(2))
    lsd_error(PATH, teacher, x, labels, jumps, below, above).sum().backward()
    assert weight.grad is None
    low, high = (v.view(-1, 1, 1, 1) for v in jump_bounds(PATH, jumps))
    t = jumps.t.view(-1, 1, 1, 1)
    with torch.no_grad():
        landed = x + (low - t) * below, x + (high - t) * above
        middle = timesteps(PATH, (low + high).flatten() / 2, x)
        gap = (landed[1] - landed[0]) / (high - low) - flow_map(sum(landed) / 2, middle, labels, middle)
        pixels = x[0].numel()
        assert torch.allclose(above.grad, 2 * gap / pixels * (high - t) / (high - low), rtol=1e-9)
        assert torch.allclose(below.grad, -2 * gap / pixels * (low - t) / (high - low), rtol=1e-9)


def test_jumps_stay_inside_the_path():
    jumps = draw_jumps(PATH, 2000, torch.Generator().manual_seed(0))
    low, high = jump_bounds(PATH, jumps)
    assert float(low.min()) >= PATH.t_end and bool((high <= jumps.t).all()) and bool((low < high).all())
    share = float((jumps.t == PATH.t_start).double().mean())
    assert abs(share - training.losses.FROM_NOISE_SHARE) < 5 * (0.25 * 0.75 / 2000) ** 0.5


# --- the trainer ----------------------------------------------------------------------------------------------------


def make_trainer(folder, loss: str = "velocity", sizes=(), **options) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = Images(images, torch.arange(24) % 3, 8)
    config = TrainConfig(**{"loss": loss, "iterations": 4, "batch_size": 8, "distil_from": 1, "holdout": 4, **options})
    sizes = UNetConfig.from_dict({**SIZES, "num_class_embeds": 4, **dict(sizes)})
    info = ModelInfo(classes=("0", "1", "2"), null_label=3)
    return Trainer(config, sizes, data, folder, info, torch.device("cpu"))


@pytest.mark.parametrize("loss", ["velocity", "lsd"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, loss):
    whole = make_trainer(tmp_path / "a", loss)
    records = [whole.step() for _ in range(4)]
    first = make_trainer(tmp_path / "b", loss)
    again = [first.step() for _ in range(2)]
    first.folder.mkdir()
    first.save()
    torch.randn(7)  # the global generator must not matter
    second = make_trainer(tmp_path / "b", loss)
    assert second.resume() and second.iteration == 2
    again += [second.step() for _ in range(2)]
    assert again == records
    for name in ("network", "averaged"):
        wanted, got = (getattr(who, name) for who in (whole, second))
        wanted, got = (v if isinstance(v, dict) else v.state_dict() for v in (wanted, got))
        assert sorted(wanted) == sorted(got) and all(torch.equal(wanted[key], got[key]) for key in wanted)
    for mine, other in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        for key, value in whole.optimizer.state[mine].items():
            assert torch.equal(value, second.optimizer.state[other][key])


def test_training_changes_every_weight_and_starts_as_identity(tmp_path):
    trainer = make_trainer(tmp_path, "lsd", learning_rate=0.01, iterations=10, warmup=1)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([900.0, 100.0]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(trainer.network(x, t, labels, t / 2), torch.zeros_like(x))
    for _ in range(10):
        assert all(math.isfinite(value) for value in trainer.step().values())
    same = [name for name, value in trainer.network.state_dict().items() if torch.equal(value, before[name])]
    # softmax does not see a constant added to its logits; the interval's embedding is less its value at 0
    assert set(same) <= {n for n in before if n.endswith("to_k.bias")} | {"target_embedding.linear_2.bias"}


@pytest.mark.parametrize(("loss", "iteration"), [("velocity", 0), ("lsd", 0), ("lsd", 3)])
def test_times_are_stratified_over_the_whole_path(tmp_path, monkeypatch, loss, iteration):
    seen = []
    real = training.q_sample

    def spy(path, x0, t, noise):
        seen.append(t)
        return real(path, x0, t, noise)

    monkeypatch.setattr(training.trainer, "q_sample", spy)
    trainer = make_trainer(tmp_path, loss, batch_size=16)
    trainer.losses(iteration)
    jumps = 4 if loss == "lsd" and iteration >= 1 else 0
    plain = seen[0][: 16 - jumps]
    assert len(seen[0]) == 16
    strata = ((1 - plain) * len(plain)).floor().long()  # train_time is 1 - u on the straight path
    assert sorted(strata.tolist()) == list(range(len(plain)))


def test_the_held_out_images_and_the_null_label(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, null_share=0.5)
    rows, labels = [], []
    monkeypatch.setattr(Images, "batch", lambda self, r: rows.extend(r.tolist()) or self.images[r].float())
    trainer.call = lambda x, told, given: labels.extend(given.tolist()) or torch.zeros_like(x)
    for iteration in range(50):
        trainer.losses(iteration)
    assert set(rows) == set(range(20))  # of 24, the last 4 are held out
    assert set(labels) == {0, 1, 2, 3}
    assert abs(labels.count(3) / 400 - 0.5) < 5 * 0.5 / 20


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, "lsd")
    assert not trainer.resume()
    trainer.step()
    trainer.save()
    with pytest.raises(ArtifactError, match="not a checkpoint of this network"):
        make_trainer(tmp_path, "lsd", sizes={"layers_per_block": 2}).resume()
    with pytest.raises(PlanError, match="lsd loss needs --path straight"):
        make_trainer(tmp_path, "lsd", path="cosine")


def test_resuming_with_other_options_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, "x0")
    trainer.step()
    trainer.save()
    with pytest.raises(PlanError, match="was trained with loss='x0', not 'v'"):
        make_trainer(tmp_path, "v").resume()
    with pytest.raises(PlanError, match="was trained with seed=0, not 7"):
        make_trainer(tmp_path, "x0", seed=7).resume()
    assert make_trainer(tmp_path, "x0", iterations=9).resume()
