"""How good are generated digits? Accuracy, Frechet distance, and a check that samples are not copies.

One small fixed classifier judges every sampler. It was trained on the first 55 000 training images of MNIST;
neither it nor the bundled diffusion models saw the last 5 000 ("validation") or the test set. Its weights and
the moments of both sets lie beside this file, so judging needs no data set. Images are ``[N, 1, 28, 28]`` in
[-1, 1]. Distances depend on the classifier, and with few images on the count: compare equal counts, with each
other and with ``real_to_real_by_count`` of ``reference.json``, which tells how far real digits are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.errors import ArtifactError, PlanError, ShapeError
from fastdiff.models.files import read_json, read_tensors
from fastdiff.models.weights import load_strictly

HERE = Path(__file__).resolve().parent
WEIGHTS, MOMENTS, FIGURES = "classifier.safetensors", "reference.safetensors", "reference.json"
SPLITS = ("test", "validation")
SIDE, WIDTH, CLASSES = 28, 128, 10
QUANTILES = (0.0, 0.01, 0.05, 0.5)
# A covariance computed in float64 misses symmetry and positivity by about 1e-15 of its largest entry.
ROUNDING = 1e-9


class Classifier(nn.Module):
    """Digits to logits. No normalisation and no dropout: each image is judged alone, in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),  # 14 x 14
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),  # 7 x 7
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),  # 4 x 4
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, WIDTH),
            nn.ReLU(),
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Return what the last layer sees: ``x [B, 1, 28, 28]`` in [-1, 1] to ``[B, 128]``, not negative."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: ``x [B, 1, 28, 28]`` in [-1, 1] to ``[B, 10]``."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Moments(NamedTuple):
    """Mean ``[D]`` and unbiased covariance ``[D, D]`` of ``count`` feature vectors, float64."""

    mean: Tensor
    covariance: Tensor
    count: int


class Quality(NamedTuple):
    """The judgement on one set of images."""

    accuracy: float  # share classified as the class asked for, 0 to 1
    frechet: float  # squared Frechet distance of features to the reference, 0 is best
    count: int


def load_classifier(folder: Path = HERE) -> Classifier:
    """Load the shipped classifier onto the CPU, frozen, in eval mode.

    Raises:
        ArtifactError: if its file is missing, damaged or of another model.
    """
    with torch.device("meta"):
        classifier = Classifier()
    load_strictly(classifier, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return classifier.eval().requires_grad_(False)


def reference_moments(split: str = "test", folder: Path = HERE) -> Moments:
    """Return the shipped moments of real digits, ``[128]`` and ``[128, 128]``.

    Args:
        split: ``test`` (10 000 images, what samples are compared with) or ``validation`` (5 000).
        folder: where the shipped files lie.

    Raises:
        PlanError: if there is no such split.
        ArtifactError: if the file is missing or damaged.
    """
    if split not in SPLITS:
        raise PlanError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    tensors = read_tensors(folder / MOMENTS)
    try:
        mean, covariance, count = (tensors[f"{split}.{name}"] for name in Moments._fields)
    except KeyError as error:
        raise ArtifactError(f"{folder / MOMENTS}: tensor {error} is missing") from error
    return Moments(mean, covariance, int(count))


def reference_figures(folder: Path = HERE) -> dict[str, Any]:
    """Return what real digits score (``reference.json``): the yardstick for every figure of this module."""
    return read_json(folder / FIGURES)


def moments(features: Tensor) -> Moments:
    """Return the moments of ``features [N, D]``, computed in float64 on the CPU.

    Raises:
        ShapeError: if it is not two-dimensional or has fewer than two rows.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ShapeError(f"features are {list(features.shape)}; allowed: [N, D] with N of 2 or more")
    values = features.detach().to("cpu", torch.float64)
    mean = values.mean(dim=0)
    centred = values - mean
    return Moments(mean, centred.T @ centred / (len(values) - 1), len(values))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, ``|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)``.

    The trace of the last root is the sum of the singular values of ``A^1/2 B^1/2``. They cannot be negative
    and, unlike roots of eigenvalues of ``A B``, do not magnify rounding errors where a feature is never on.

    Args:
        a: ``mean [D]``, ``covariance [D, D]``; the counts are not used.
        b: of the same width.

    Raises:
        ShapeError: if widths differ, or a covariance is not finite, symmetric and positive semidefinite.

    Source: Dowson and Landau 1982, J. Multivariate Analysis 12(3), pages 450-455; Heusel et al. 2017,
    arXiv:1706.08500, eq. 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ShapeError(f"means are {list(a.mean.shape)} and {list(b.mean.shape)}; they must be equally wide")
    root_a, root_b = _root(a), _root(b)
    shift = (a.mean.double() - b.mean.double()).square().sum()
    spread = a.covariance.double().trace() + b.covariance.double().trace()
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    # Both covariances were checked, so the exact value is at least 0 and anything below is rounding.
    return max(float(shift + spread - 2 * overlap), 0.0)


def _root(of: Moments) -> Tensor:
    """Symmetric square root ``[D, D]`` of a covariance; the one place that checks moments."""
    mean, covariance = of.mean, of.covariance.double()
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ShapeError(f"moments are {list(mean.shape)}, {list(covariance.shape)}; allowed: [D] and [D, D]")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ShapeError("moments hold infinite or undefined values; allowed: finite ones")
    limit = ROUNDING * float(covariance.abs().max())
    skew = float((covariance - covariance.T).abs().max())
    if skew > limit:
        raise ShapeError(f"covariance is asymmetric by {skew:.3g}; allowed: {limit:.3g}")
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < -limit:
        raise ShapeError(f"covariance has the eigenvalue {float(values[0]):.3g}; allowed: {-limit:.3g} or more")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def judge(
    images: Tensor,
    labels: Tensor,
    reference: Moments,
    classifier: Classifier | None = None,
    batch_size: int = 500,
) -> Quality:
    """Judge images against the classes asked for and a set of real ones.

    Args:
        images: ``[N, 1, 28, 28]`` floats in [-1, 1]; a sampler's overshoot is for the caller to clamp.
        labels: ``[N]`` integers 0 to 9, the class each image was asked to be.
        reference: usually ``reference_moments()``.
        classifier: the shipped one if not given.
        batch_size: images classified at once; limits memory only.

    Raises:
        ShapeError: if images or labels are not as described.
    """
    _check_images(images)
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ShapeError(f"labels are {labels.dtype} {list(labels.shape)}; needed: integers [{len(images)}]")
    model = load_classifier() if classifier is None else classifier
    features = extract(model, images, batch_size)
    with torch.no_grad():
        guessed = model.head(features).argmax(dim=1).cpu()
    accuracy = float((guessed == labels.cpu()).double().mean())
    return Quality(accuracy, frechet_distance(moments(features), reference), len(images))


@torch.no_grad()
def extract(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Return features ``[N, 128]`` of ``images [N, 1, 28, 28]``, in batches, on the classifier's device."""
    home = classifier.head.weight
    return torch.cat([classifier.features(part.to(home.device, home.dtype)) for part in images.split(batch_size)])


@torch.no_grad()
def nearest_distances(images: Tensor, real_images: Tensor, chunk: int = 1000) -> Tensor:
    """Return the L2 distance of each image to the closest real one, ``[N]`` float64.

    Samples are not copies when these distances are distributed like those of real images that were held out
    (``nearest`` in ``reference.json``, for as many images); a copy has a distance near 0.

    Args:
        images: ``[N, 1, 28, 28]`` in [-1, 1].
        real_images: ``[M, 1, 28, 28]`` in [-1, 1], the training set.
        chunk: rows compared at once; ``chunk * M`` floats are held.

    Raises:
        ShapeError: if either is not as described.
    """
    _check_images(images)
    _check_images(real_images)
    real = real_images.flatten(1).float()
    half_norms = real.square().sum(dim=1) / 2
    found = []
    for part in images.to(real.device).flatten(1).split(chunk):
        # |a - b|^2 by products cancels near a copy, so it only picks the neighbour.
        closest = torch.addmm(half_norms, part.float(), real.T, alpha=-1).argmin(dim=1)
        found.append((part.double() - real[closest].double()).norm(dim=1))
    return torch.cat(found)


def quantiles(distances: Tensor) -> dict[str, float]:
    """Return the quantiles of ``distances [N]`` that ``reference.json`` keeps, by name."""
    values = torch.quantile(distances.double().cpu(), torch.tensor(QUANTILES, dtype=torch.float64))
    return {str(share): round(value, 4) for share, value in zip(QUANTILES, values.tolist(), strict=True)}


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1:] != (1, SIDE, SIDE) or not len(images):
        raise ShapeError(f"images are {list(images.shape)}; allowed: [N, 1, {SIDE}, {SIDE}] with N of 1 or more")
    if not images.is_floating_point():
        raise ShapeError(f"images are {images.dtype}; allowed: floats in [-1, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 and high <= 1):
        raise ShapeError(f"images lie in [{low:.4g}, {high:.4g}]; allowed: [-1, 1], clamped by the caller")
