"""Guidance: how a strong and a weak estimate of the same image become one.

The strong estimate is the conditional one. The weak one comes from the same network told something else (nothing, or
what the image is not to show), or from a weaker network. A rule is chosen on the host and says with which numbers a row
of the step table is guided; the functions at the end are what the loop does with those numbers. The numbers are columns
of the table, so a batch may mix rules and strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.errors import PlanError

PIXELS = (1, 2, 3)  # of [B, C, H, W]: one figure for each image


class Numbers(NamedTuple):
    """How one row of one image is guided: columns of the step table, in this order. The defaults mean "not at all"."""

    scale: float = 1.0  # strength: 0 the weak estimate, 1 the strong one, above 1 beyond it
    weak_noise: float = 0.0  # 1: the register `raw` gets the weak estimate (CFG++)
    rescale: float = 0.0  # share of the mixture that is brought back to the strong output's contrast
    optimal: float = 0.0  # 1: the weak output is scaled to fit the strong one first (CFG-Zero*)
    projected: float = 0.0  # 1: the three numbers below apply (APG)
    momentum: float = 0.0  # how much of the differences before is added to this one
    norm: float = math.inf  # longest difference, in the norm of the whole image
    parallel: float = 1.0  # share that is kept of what points along the strong estimate


UNGUIDED = Numbers()


class Guided(NamedTuple):
    """Which of the formulas any image of a guided row needs."""

    weak_noise: bool
    rescaled: bool
    optimal: bool
    projected: bool
    momentum: bool


def flags(numbers: Numbers) -> Guided:
    """Return the formulas that a row with these numbers needs."""
    return Guided(
        weak_noise=numbers.weak_noise != 0,
        rescaled=numbers.rescale != 0,
        optimal=numbers.optimal != 0,
        projected=numbers.projected != 0,
        momentum=numbers.momentum != 0,
    )


def any_of(wanted: Sequence[Guided]) -> Guided | None:
    """Return the formulas that any of the images needs; None if none is guided."""
    return Guided(*(any(each) for each in zip(*wanted, strict=True))) if wanted else None


class Rule(Protocol):
    """A frozen dataclass that holds options, never state."""

    @property
    def zero_init_steps(self) -> int:
        """How many first steps take the network's output for zero."""

    def numbers(self, scale: float, rescale: float) -> Numbers | None:
        """Return the numbers of one row, or None if such a row needs the strong estimate alone."""


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: ``weak + w * (strong - weak)``. A strength of 1 means none.

    Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6, with w counted so that 1 means no guidance.
    """

    zero_init_steps: ClassVar[int] = 0

    def numbers(self, scale: float, rescale: float) -> Numbers | None:
        """See ``Rule.numbers``."""
        return None if scale == 1 else Numbers(scale, rescale=rescale)


@dataclass(frozen=True)
class CFGPlusPlus:
    """CFG++: D is mixed as in CFG, but the noise direction is that of the weak estimate.

    The published strengths lie between 0 and 1; here 1 is guided too. It needs a solver that writes noise and data
    apart: ``DDIM(keep_noise=True)``.

    Source: Chung et al. 2024, arXiv:2406.08070, algorithm 2.
    """

    zero_init_steps: ClassVar[int] = 0

    def numbers(self, scale: float, rescale: float) -> Numbers:
        """See ``Rule.numbers``."""
        return Numbers(scale, weak_noise=1.0, rescale=rescale)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance: of the difference between the estimates, what oversaturates is taken out.

    ``D = strong + (w - 1) * update``. The update is the difference of the estimates of x0, with a (negative) momentum
    over the evaluations, cut to a largest norm, and without what is parallel to the strong estimate.

    Args:
        momentum: what is added of the sum before, between -1 and 1; 0 keeps no sum.
        norm_threshold: largest norm of the difference over all pixels of an image, or None. It grows with the root of
            the number of pixels; 15 suits latents of 4 x 128 x 128.
        eta: share that is kept of what is parallel to the strong estimate; 1 keeps all of it.

    Raises:
        PlanError: if an option is out of range.

    Source: Sadat et al. 2024, arXiv:2410.02416, sec. 4 and algorithm 1.
    """

    momentum: float = -0.5
    norm_threshold: float | None = 15.0
    eta: float = 0.0
    zero_init_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not -1 < self.momentum < 1:
            raise PlanError(f"momentum is {self.momentum!r}; allowed: above -1 and below 1")
        if self.norm_threshold is not None and not self.norm_threshold > 0:
            raise PlanError(f"norm_threshold is {self.norm_threshold!r}; allowed: above 0, or None")
        if not math.isfinite(self.eta):
            raise PlanError(f"eta is {self.eta!r}; allowed: a finite number")

    def numbers(self, scale: float, rescale: float) -> Numbers | None:
        """See ``Rule.numbers``."""
        if rescale:
            raise PlanError(
                f"guidance_rescale is {rescale}, which acts on the network's output; APG acts on the estimate of x0: "
                "use its norm_threshold, or guidance 'cfg'"
            )
        if scale == 1:
            return None
        norm = math.inf if self.norm_threshold is None else self.norm_threshold
        return Numbers(scale, projected=1.0, momentum=self.momentum, norm=norm, parallel=self.eta)


@dataclass(frozen=True)
class CFGZeroStar:
    """CFG-Zero*: the weak output is first scaled to fit the strong one, and the first steps do not move.

    Args:
        zero_init_steps: steps whose velocity is taken for zero. They cost no evaluation. 0 for networks that predict
            something else than a velocity; the scaling serves them too.

    Raises:
        PlanError: if ``zero_init_steps`` is no whole number, 0 or more.

    Source: Fan et al. 2025, arXiv:2503.18886, algorithm 1.
    """

    zero_init_steps: int = 1

    def __post_init__(self) -> None:
        steps = self.zero_init_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise PlanError(f"zero_init_steps is {steps!r}; allowed: a whole number, 0 or more")

    def numbers(self, scale: float, rescale: float) -> Numbers | None:
        """See ``Rule.numbers``."""
        return None if scale == 1 else Numbers(scale, rescale=rescale, optimal=1.0)


PLAIN = CFG()
GUIDANCES: dict[str, Callable[[], Rule]] = {
    "cfg": CFG,
    "cfg_pp": CFGPlusPlus,
    "apg": APG,
    "cfg_zero_star": CFGZeroStar,
}


def rescaled(mixed: Tensor, strong: Tensor, share: Tensor) -> Tensor:
    """Bring a mixture of outputs back towards the strong output's standard deviation over each image.

    Args:
        mixed: the guided output ``[B, C, H, W]``.
        strong: the conditional output, likewise.
        share: how far, 0 to 1, ``[B, 1, 1, 1]``.

    Source: Lin et al. 2023, arXiv:2305.08891, eq. 14 to 16.
    """
    wide = mixed.std(PIXELS, correction=0, keepdim=True)
    ratio = torch.where(wide == 0, 1, strong.std(PIXELS, correction=0, keepdim=True) / wide)
    return torch.lerp(mixed, mixed * ratio, share)


def optimal_scale(strong: Tensor, weak: Tensor) -> Tensor:
    """Return the factor ``[B, 1, 1, 1]`` of ``weak`` that comes nearest to ``strong``, each ``[B, C, H, W]``.

    Source: Fan et al. 2025, arXiv:2503.18886, eq. 11; the small number is that of the published code.
    """
    return (strong * weak).sum(PIXELS, keepdim=True) / (weak.square().sum(PIXELS, keepdim=True) + 1e-8)


def projected(difference: Tensor, strong: Tensor, norm: Tensor, parallel: Tensor) -> Tensor:
    """Cut a difference of estimates to a largest norm and reduce what is parallel to the strong estimate.

    Args:
        difference: strong less weak estimate, or a running sum of such, ``[B, C, H, W]``.
        strong: the strong estimate, likewise.
        norm: largest norm over the image, ``[B, 1, 1, 1]``.
        parallel: share of the parallel part that is kept, likewise.

    Source: Sadat et al. 2024, arXiv:2410.02416, eq. 9 and sec. 4.
    """
    length = torch.linalg.vector_norm(difference, dim=PIXELS, keepdim=True)
    cut = difference * torch.clamp_max(norm / length, 1)
    along = (cut * strong).sum(PIXELS, keepdim=True)
    # an estimate of exactly zero has no direction, and nothing is parallel to it
    along = along / strong.square().sum(PIXELS, keepdim=True).clamp_min(torch.finfo(strong.dtype).tiny)
    return cut - (1 - parallel) * along * strong


def strength_embedding(scale: Tensor, dim: int) -> Tensor:
    """The guidance strength as an input of the network: ``scale [B]`` -> ``[B, dim]``.

    Source: Meng et al. 2022, arXiv:2210.03142; frequencies as in diffusers' ``get_guidance_scale_embedding``.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=scale.device)
    angles = 1000.0 * scale.float()[:, None] * torch.exp(-steps * (torch.log(torch.tensor(10000.0)) / (half - 1)))[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))
