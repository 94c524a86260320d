"""Data with known answers: exact denoisers, and for Gaussians the exact flow map, in any precision.

For tests and for whoever wants to measure a sampler: the network is replaced by the truth, so that all error left is
the sampler's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.errors import PlanError
from fastdiff.sampling.denoiser import Cond, Prepared
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import DirectMap, Prediction
from fastdiff.sampling.solvers.base import Row


class Gaussian:
    """Independent Gaussian pixels, ``x0 ~ N(mean, std^2)``.

    Args:
        mean: broadcastable to ``[C, H, W]``.
        std: likewise, above 0.
    """

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x0 | x_t = x]``. Source: Karras et al. 2022, arXiv:2206.00364, app. B.3, for any alpha."""
        variance = self.std**2
        return self.mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * self.mean)

    def flow(self, path: Path, x: Tensor, t: float, s: float) -> Tensor:
        """The exact solution at ``s`` of the probability-flow ODE that passes ``x`` at ``t``.

        It maps the marginal at ``t`` to the marginal at ``s`` monotonically: both are Gaussian.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        wide_t, wide_s = ((a * self.std) ** 2 + b**2 for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        return alpha_s * self.mean + (wide_s / wide_t).sqrt() * (x - alpha_t * self.mean)


class Mixture:
    """A mixture of isotropic Gaussians over whole images.

    Args:
        means: ``[M, C, H, W]``.
        std: standard deviation of every component, above 0.
        weights: ``[M]``, summing to 1.
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor):
        self.means, self.std, self.weights = means, std, weights

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x0 | x_t = x]``: each component's own estimate, weighted by its responsibility for ``x [B, C, H, W]``."""
        wide = (alpha * self.std) ** 2 + sigma**2
        gaps = x[:, None] - alpha * self.means[None]
        logits = self.weights.log() - gaps.flatten(2).square().sum(2) / (2 * wide)
        estimates = self.means[None] + alpha * self.std**2 / wide * gaps
        return (logits.softmax(1)[:, :, None, None, None] * estimates).sum(1)


class Oracle:
    """A perfect network: it outputs what a trained one would, for any path and prediction.

    It evaluates image by image, since each may stand at another time; it is for measuring, not for speed.

    Args:
        data: ``Gaussian`` or ``Mixture``.
        path: the forward process.
        prediction: what it is to predict. Two-time predictions need ``Gaussian`` data, whose flow map is known.
        tables: the rows of every place (or of one place, for all): their exact times, which float32 would round.
    """

    def __init__(self, data: Gaussian | Mixture, path: Path, prediction: Prediction, tables: Sequence[Sequence[Row]]):
        self.data, self.path, self.prediction, self.tables = data, path, prediction, tables

    def output(self, x: Tensor, t: float, s: float) -> Tensor:
        """The network's output for ``x [B, C, H, W]`` at time ``t`` with target ``s``, before any ``c_in``."""
        if self.prediction.two_time and s != t:
            if not isinstance(self.data, Gaussian):
                raise PlanError("the flow map is known for Gaussian data only; use a one-time prediction")
            landing = self.data.flow(self.path, x, t, s)
            return landing if isinstance(self.prediction, DirectMap) else (landing - x) / (s - t)
        denoised = self.data.denoised(x, *self.path.alpha_sigma(t))
        c = self.prediction.coefficients(self.path, t, s)
        return (denoised - c.c_skip * x) / c.c_out

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``; nothing is needed beyond what the constructor got."""
        return None

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        """See ``Network.__call__``."""
        outputs = []
        for i, index in enumerate(row_index.tolist()):
            row = self.tables[i if len(self.tables) > 1 else 0][index]
            c_in = self.prediction.coefficients(self.path, row.t, row.s).c_in
            outputs.append(self.output(x[i : i + 1] / c_in, row.t, row.s))
        return torch.cat(outputs)
