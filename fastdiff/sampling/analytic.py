"""Data with known answers: exact networks for Gaussians and mixtures of them, and for Gaussians the exact flow map.

For tests and for whoever wants to measure a sampler, of this library or of another: the network is replaced by the
truth, so that all error left is the sampler's own. Everything runs in the precision of the data given; float64 is
what measurements want.

``Oracle`` serves the loop and knows the exact times of a table; ``network`` is a plain ``fn(x, timestep)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.errors import BackendError, PlanError, ShapeError
from fastdiff.sampling.denoiser import Cond, Prepared
from fastdiff.sampling.path import Path
from fastdiff.sampling.prediction import Prediction, first_order
from fastdiff.sampling.solvers.base import Row


class Data(Protocol):
    """A distribution of images whose noised marginals are known. ``x`` is ``[B, C, H, W]`` everywhere."""

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x0 | x_t = x]``, valid at both ends of any path."""

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``grad log p_t(x)``, valid at both ends of any path."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` clean images."""

    def velocity(self, path: Path, x: Tensor, t: float) -> Tensor:
        """``dx/dt`` of the probability-flow ODE.

        The noise in it is taken from the score, ``E[z | x] = -sigma * score``, which stays finite at ``sigma = 0``.

        Source: Lipman et al. 2022, arXiv:2210.02747, eq. 13.
        """
        alpha, sigma = path.alpha_sigma(t)
        alpha_rate, sigma_rate = path.rate(t)
        return alpha_rate * self.denoised(x, alpha, sigma) - sigma_rate * sigma * self.score(x, alpha, sigma)


class Gaussian(Data):
    """Gaussian images. Without a basis pixels are independent: ``x0 ~ N(mean, std^2)``.

    Args:
        mean: broadcastable to ``[C, H, W]``; exactly that shape with a basis.
        std: likewise, above 0; with a basis, along its columns.
        basis: ``[N, N]``, orthonormal columns, ``N = C * H * W``; ``from_covariance`` makes it.
    """

    def __init__(self, mean: Tensor, std: Tensor, basis: Tensor | None = None):
        self.mean, self.std, self.basis = mean, std, basis

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Gaussian images with correlated pixels.

        Args:
            mean: ``[C, H, W]``.
            covariance: ``[N, N]``, positive definite, ``N = C * H * W``.

        Raises:
            PlanError: if the covariance is not positive definite.
        """
        std, basis = _principal(covariance)
        return cls(mean, std.view_as(mean), basis)

    def _along(self, gap: Tensor, factor: Tensor) -> Tensor:
        """Scale ``gap [B, C, H, W]`` by a factor for every principal direction."""
        if self.basis is None:
            return factor * gap
        return ((gap.flatten(1) @ self.basis * factor.flatten()) @ self.basis.T).view_as(gap)

    def variance(self, alpha: float, sigma: float) -> Tensor:
        """Variance of the noised marginal, shaped like ``std``."""
        return (alpha * self.std) ** 2 + sigma**2

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x0 | x_t = x]``. Source: Karras et al. 2022, arXiv:2206.00364, app. B.3, for any alpha."""
        gain = alpha * self.std**2 / self.variance(alpha, sigma)
        return self.mean + self._along(x - alpha * self.mean, gain)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``grad log p_t(x)``: ``x`` and the result are ``[B, C, H, W]``."""
        return self._along(x - alpha * self.mean, -1 / self.variance(alpha, sigma))

    def flow(self, path: Path, x: Tensor, t: float, s: float) -> Tensor:
        """The exact solution at ``s`` of the probability-flow ODE that passes ``x`` at ``t``.

        It maps the marginal at ``t`` to the marginal at ``s`` monotonically: both are Gaussian.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        stretch = (self.variance(alpha_s, sigma_s) / self.variance(alpha_t, sigma_t)).sqrt()
        return alpha_s * self.mean + self._along(x - alpha_t * self.mean, stretch)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` clean images; ``mean`` must have their full shape."""
        normal = torch.randn((count, *self.mean.shape), generator=generator, dtype=self.mean.dtype)
        return self.mean + self._along(normal, self.std)


class Mixture(Data):
    """A mixture of Gaussians over whole images.

    Args:
        means: ``[M, C, H, W]``.
        std: above 0: one number, or a tensor that broadcasts to ``means``; with bases, along their columns.
        weights: ``[M]``, summing to 1.
        bases: ``[M, N, N]``, orthonormal columns each, ``N = C * H * W``; ``from_covariances`` makes them.
    """

    def __init__(self, means: Tensor, std: float | Tensor, weights: Tensor, bases: Tensor | None = None):
        self.means, self.weights, self.bases = means, weights, bases
        self.std = torch.as_tensor(std, dtype=means.dtype).expand_as(means)

    @classmethod
    def from_covariances(cls, means: Tensor, covariances: Tensor, weights: Tensor) -> Mixture:
        """Components with correlated pixels.

        Args:
            means: ``[M, C, H, W]``.
            covariances: ``[M, N, N]``, positive definite, ``N = C * H * W``.
            weights: ``[M]``, summing to 1.

        Raises:
            PlanError: if a covariance is not positive definite.
        """
        std, bases = _principal(covariances)
        return cls(means, std.view_as(means), weights, bases)

    def _turned(self, x: Tensor, back: bool = False) -> Tensor:
        """``x [B, M, N]`` in every component's principal directions, or back from them."""
        if self.bases is None:
            return x
        return torch.einsum("bmn,mkn->bmk" if back else "bmn,mnk->bmk", x, self.bases)

    def _parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gaps to the means in principal directions, their variances, log densities: ``[B,M,N], [M,N], [B,M]``."""
        gaps = self._turned((x[:, None] - alpha * self.means).flatten(2))
        wide = (alpha * self.std.flatten(1)) ** 2 + sigma**2
        logs = self.weights.log() - 0.5 * (gaps.square() / wide + wide.log() + math.log(2 * math.pi)).sum(2)
        return gaps, wide, logs

    def _mean_of(self, parts: Tensor, logs: Tensor, x: Tensor) -> Tensor:
        """The components' values ``[B, M, N]``, each weighted by its responsibility for ``x``."""
        return (logs.softmax(1)[:, :, None] * parts).sum(1).view_as(x)

    def log_density(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``log p_t(x)``, ``[B]``."""
        return self._parts(x, alpha, sigma)[2].logsumexp(1)

    def denoised(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x0 | x_t = x]``: each component's own estimate, weighted by its responsibility for ``x [B, C, H, W]``."""
        gaps, wide, logs = self._parts(x, alpha, sigma)
        estimates = self.means.flatten(1) + self._turned(alpha * self.std.flatten(1) ** 2 / wide * gaps, back=True)
        return self._mean_of(estimates, logs, x)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``grad log p_t(x)``: ``x`` and the result are ``[B, C, H, W]``."""
        gaps, wide, logs = self._parts(x, alpha, sigma)
        return self._mean_of(self._turned(-gaps / wide, back=True), logs, x)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` clean images ``[count, C, H, W]``."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        normal = torch.randn((count, *self.means.shape[1:]), generator=generator, dtype=self.means.dtype)
        away = (self.std[chosen] * normal).flatten(1)
        if self.bases is not None:
            away = torch.einsum("bk,bnk->bn", away, self.bases[chosen])
        return self.means[chosen] + away.view_as(normal)


def _principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations along the principal directions ``[..., N]``, and the directions ``[..., N, N]``."""
    variance, basis = torch.linalg.eigh(covariance)
    if not bool((variance > 0).all()):
        raise PlanError(f"a covariance has the eigenvalue {float(variance.min()):g}; allowed: above 0")
    return variance.sqrt(), basis


def fit_mixture(images: Tensor, components: int, *, full: bool = False, floor: float = 1e-6, seed: int = 0) -> Mixture:
    """Fit a mixture to real images by expectation maximisation (scikit-learn's ``GaussianMixture``).

    Args:
        images: ``[B, C, H, W]``, more of them than components.
        components: number of Gaussians, 1 or more.
        full: give every component a full covariance, of ``(C * H * W)^2`` numbers, instead of one variance a pixel.
        floor: added to every variance; constant pixels (black borders) have none of their own.
        seed: of the initial guess.

    Returns:
        A float64 mixture.

    Raises:
        BackendError: if scikit-learn is not installed.
        ShapeError: if there are fewer images than components, or they are not ``[B, C, H, W]``.
    """
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise BackendError(
            f"fitting a mixture needs scikit-learn, which did not load ({error}): pip install scikit-learn"
        ) from error
    if images.ndim != 4 or not 1 <= components <= images.shape[0]:
        raise ShapeError(
            f"images are {tuple(images.shape)}, components {components}; allowed: [B, C, H, W], B >= components >= 1"
        )
    kind = "full" if full else "diag"
    model = GaussianMixture(components, covariance_type=kind, reg_covar=floor, random_state=seed)
    model.fit(images.double().flatten(1).numpy())
    means = torch.from_numpy(model.means_).view(components, *images.shape[1:])
    weights, covariances = torch.from_numpy(model.weights_), torch.from_numpy(model.covariances_)
    if full:
        return Mixture.from_covariances(means, covariances, weights)
    return Mixture(means, covariances.sqrt().view_as(means), weights)


def exact_output(data: Data, path: Path, prediction: Prediction, x: Tensor, t: float, s: float) -> Tensor:
    """What a perfect network outputs for ``x [B, C, H, W]`` at time ``t`` with target ``s``, before any ``c_in``.

    Raises:
        PlanError: if the prediction has to jump and the data are not ``Gaussian``.
    """
    if prediction.jumps and s != t:
        if not isinstance(data, Gaussian):
            raise PlanError("the flow map is known for Gaussian data only; use a prediction that does not jump")
        r, m = first_order(path, t, s)
        denoised = (data.flow(path, x, t, s) - r * x) / m  # the value whose first-order step is the jump
    else:
        denoised = data.denoised(x, *path.alpha_sigma(t))
    c = prediction.coefficients(path, t, s)
    return (denoised - c.c_skip * x) / c.c_out


class Oracle:
    """A perfect network: it outputs what a trained one would, for any path and prediction.

    Args:
        data: ``Gaussian`` or ``Mixture``.
        path: the forward process.
        prediction: what it is to predict. Jumps need ``Gaussian`` data, whose flow map is known.
        tables: the rows of every place (or of one place, for all): their exact times, which float32 would round.
    """

    def __init__(self, data: Data, path: Path, prediction: Prediction, tables: Sequence[Sequence[Row]]):
        self.data, self.path, self.prediction, self.tables = data, path, prediction, tables

    def output(self, x: Tensor, t: float, s: float) -> Tensor:
        """See ``exact_output``."""
        return exact_output(self.data, self.path, self.prediction, x, t, s)

    def prepare(self, cond: Cond, times: Tensor) -> Prepared:
        """See ``Network.prepare``; nothing is needed beyond what the constructor got."""
        return None

    def __call__(self, x: Tensor, row_index: Tensor, prepared: Prepared) -> Tensor:
        """See ``Network.__call__``. Images that stand at the same place go together."""
        rows = [self.tables[i if len(self.tables) > 1 else 0][index] for i, index in enumerate(row_index.tolist())]
        return _by_time(x, [(row.t, row.s) for row in rows], self._at)

    def _at(self, x: Tensor, t: float, s: float) -> Tensor:
        return self.output(x / self.prediction.coefficients(self.path, t, s).c_in, t, s)


def network(data: Data, path: Path, prediction: Prediction) -> Callable[..., Tensor]:
    """A perfect network as a plain function, for ``fastdiff.sample``, for diffusers' loops, for anybody's.

    k-diffusion's samplers want a denoiser of noise levels instead: ``lambda x, sigma: data.denoised(x, 1.0,
    float(sigma[0]))``.

    Args:
        data: ``Gaussian`` or ``Mixture``.
        path: the forward process.
        prediction: what it is to predict. Jumps need ``Gaussian`` data, whose flow map is known.

    Returns:
        ``fn(x, timestep, target=None, **ignored)``: ``x [B, C, H, W]``, the times a number or ``[B]`` in the units of
        ``path.timestep``; the output has the shape and dtype of ``x``. Timesteps in float32 are exact to 1e-7 only:
        to measure below that, use ``Oracle``.

    Raises:
        PlanError: if the prediction jumps and the data are not ``Gaussian``, or if it tells its network other numbers
            than the path's timesteps.
    """
    if prediction.jumps and not isinstance(data, Gaussian):
        raise PlanError("the flow map is known for Gaussian data only; use a prediction that does not jump")
    middle = path.time(0.0)
    c = prediction.coefficients(path, middle, path.t_end if prediction.jumps else middle)
    if c.c_noise != path.timestep(middle) or prediction.two_time and c.c_noise_to != path.timestep(path.t_end):
        raise PlanError(f"{prediction!r} tells its network other numbers than the path's timesteps: use Oracle")

    def time(timestep: float) -> float:
        # float32 may round a time over the end of the path
        return min(max(path.from_timestep(timestep), path.t_end), path.t_start)

    def at(x: Tensor, t: float, s: float) -> Tensor:
        return exact_output(data, path, prediction, x / prediction.coefficients(path, t, s).c_in, t, s)

    def times(timestep: Tensor | float, count: int) -> list[float]:
        return [time(value) for value in torch.as_tensor(timestep).reshape(-1).expand(count).tolist()]

    def fn(x: Tensor, timestep: Tensor | float, target: Tensor | float | None = None, **ignored: object) -> Tensor:
        told = times(timestep, len(x))
        if target is not None:
            aims = times(target, len(x))
        else:  # one-time networks that jump know one target
            aims = [path.t_end] * len(x) if prediction.jumps else told
        return _by_time(x, list(zip(told, aims, strict=True)), at).to(x.dtype)

    return fn


def _by_time(x: Tensor, places: Sequence[tuple[float, float]], at: Callable[[Tensor, float, float], Tensor]) -> Tensor:
    """Evaluate images that stand at the same times together."""
    if len(set(places)) == 1:
        return at(x, *places[0])
    return torch.cat([at(x[i : i + 1], *place) for i, place in enumerate(places)])
