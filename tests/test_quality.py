"""The yardstick itself: Frechet distance against closed forms, the shipped classifier, nearest neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.benchmarks import quality
from fastdiff.benchmarks.quality import (
    Moments,
    extract,
    frechet_distance,
    judge,
    load_classifier,
    moments,
    nearest_distances,
    quantiles,
    reference_figures,
    reference_moments,
)
from fastdiff.errors import FastdiffError, PlanError, ShapeError
from fastdiff.models.files import sha256

pytestmark = pytest.mark.fast
EXACT = 1e-10  # relative; what float64 leaves of a 128-wide eigenvalue problem


def features(count: int = 400, width: int = 12, seed: int = 0) -> Tensor:
    """Correlated normal features ``[count, width]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + seed


def digits(count: int, seed: int = 0) -> Tensor:
    """Images ``[count, 1, 28, 28]`` of noise in [-1, 1]."""
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_moments_agree_with_numpy():
    values = features()
    found = moments(values)
    assert found.count == 400 and found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.mean, values.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values.numpy(), rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (4, 2, 2)], ids=str)
def test_moments_reject_other_shapes(shape):
    with pytest.raises(ShapeError, match=r"allowed: \[N, D\]"):
        moments(torch.zeros(shape))


@pytest.mark.parametrize("rank", [12, 5])  # 5: fewer directions than features, as with units that never fire
def test_distance_to_itself_is_zero(rank):
    values = features()
    values[:, rank:] = 0.0
    own = moments(values)
    assert 0.0 <= frechet_distance(own, own) <= EXACT * float(own.covariance.trace())


def test_distance_of_diagonal_gaussians_has_a_closed_form():
    generator = torch.Generator().manual_seed(3)
    mean_a, mean_b = torch.randn(2, 128, generator=generator, dtype=torch.float64)
    var_a, var_b = torch.rand(2, 128, generator=generator, dtype=torch.float64)
    var_a[:30] = 0.0
    wanted = float((mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum())
    found = frechet_distance(Moments(mean_a, var_a.diag(), 2), Moments(mean_b, var_b.diag(), 2))
    assert math.isclose(found, wanted, rel_tol=EXACT)


def test_distance_agrees_with_the_matrix_root_of_scipy():
    from scipy import linalg

    a, b = moments(features(seed=1)), moments(features(seed=2))
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy())
    wanted = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root).real
    assert math.isclose(frechet_distance(a, b), float(wanted), rel_tol=1e-8)


def test_distance_is_symmetric():
    a, b = moments(features(seed=1)), moments(features(seed=2))
    assert frechet_distance(a, b) > 1.0
    assert math.isclose(frechet_distance(a, b), frechet_distance(b, a), rel_tol=EXACT)


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
def test_a_shift_costs_its_squared_length(length):
    own = moments(features())
    shift = torch.ones(12, dtype=torch.float64) * length / math.sqrt(12)
    moved = own._replace(mean=own.mean + shift)
    slack = EXACT * float(own.covariance.trace())
    assert math.isclose(frechet_distance(own, moved), length**2, rel_tol=EXACT, abs_tol=slack)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": torch.zeros(3)}, "equally wide"),
        ({"covariance": torch.eye(3)}, r"allowed: \[D\] and \[D, D\]"),
        ({"covariance": torch.eye(4)[:, :3]}, r"allowed: \[D\] and \[D, D\]"),
        ({"covariance": torch.ones(4, 4).triu()}, "asymmetric"),
        ({"covariance": torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1]))}, "eigenvalue"),
        ({"covariance": torch.full((4, 4), math.nan)}, "undefined"),
        ({"mean": torch.full((4,), math.inf)}, "infinite"),
    ],
    ids=["width", "small", "oblong", "asymmetric", "negative", "nan", "inf"],
)
def test_distance_rejects_what_is_not_a_gaussian(change, message):
    good = Moments(torch.zeros(4), torch.eye(4), 2)
    bad = good._replace(**change)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ShapeError, match=message):
            frechet_distance(*pair)


def test_shipped_files_are_the_recorded_ones():
    figures = reference_figures()
    for name in (quality.WEIGHTS, quality.MOMENTS):
        assert sha256(quality.HERE / name) == figures["sha256"][name]
    assert figures["accuracy"]["test"] >= 0.99 and figures["accuracy"]["validation"] >= 0.99


def test_shipped_moments_give_the_recorded_distance():
    figures, test, validation = reference_figures(), reference_moments(), reference_moments("validation")
    assert (test.count, validation.count) == (figures["counts"]["test"], figures["counts"]["validation"])
    assert test.mean.shape == (quality.WIDTH,) and test.covariance.dtype == torch.float64
    assert math.isclose(frechet_distance(validation, test), figures["real_to_real"], abs_tol=1e-4)
    with pytest.raises(PlanError, match="allowed: test, validation"):
        reference_moments("train")


def test_features_do_not_depend_on_the_batch():
    classifier, images = load_classifier(), digits(7)
    together = extract(classifier, images)
    assert together.shape == (7, quality.WIDTH) and float(together.min()) >= 0 and not together.requires_grad
    torch.testing.assert_close(extract(classifier, images, batch_size=3), together)
    torch.testing.assert_close(classifier(images), classifier.head(together))


def test_judge_counts_and_measures():
    classifier, images = load_classifier(), digits(200)
    own = moments(extract(classifier, images))
    labels = classifier(images).argmax(dim=1)
    labels[:50] = (labels[:50] + 1) % quality.CLASSES
    found = judge(images, labels, own, batch_size=64)
    assert (found.accuracy, found.count) == (0.75, 200)
    assert found.frechet == pytest.approx(0.0, abs=1e-6)
    assert judge(images, labels, reference_moments()).frechet > 10 * reference_figures()["real_to_real"]


@pytest.mark.parametrize(
    "images, labels",
    [
        (digits(4)[:, 0], torch.zeros(4, dtype=torch.int64)),
        (digits(4)[..., :27], torch.zeros(4, dtype=torch.int64)),
        (digits(4)[:0], torch.zeros(0, dtype=torch.int64)),
        (digits(4) * 1.5, torch.zeros(4, dtype=torch.int64)),
        (digits(4) * math.nan, torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        (digits(4), torch.zeros(3, dtype=torch.int64)),
        (digits(4), torch.zeros(4)),
    ],
    ids=["3d", "narrow", "none", "overshoot", "nan", "bytes", "few_labels", "float_labels"],
)
def test_judge_rejects_other_images_and_labels(images, labels):
    with pytest.raises(FastdiffError, match="allowed|needed"):
        judge(images, labels, reference_moments())


def test_nearest_distances_are_those_of_brute_force():
    images, real = digits(9, seed=1), digits(50, seed=2)
    wanted = torch.cdist(images.double().flatten(1), real.double().flatten(1)).min(dim=1).values
    torch.testing.assert_close(nearest_distances(images, real, chunk=4), wanted)


def test_a_copy_has_distance_zero():
    real = digits(50, seed=2)
    assert nearest_distances(real[20:22], real).tolist() == [0.0, 0.0]


def test_recorded_neighbour_distances_are_ordered():
    nearest = reference_figures()["nearest"]
    for split in quality.SPLITS:
        values = list(nearest[split].values())
        assert values == sorted(values) and values[0] > 0
        assert list(nearest[split]) == list(quantiles(torch.arange(5)))
