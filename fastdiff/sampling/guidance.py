"""Guidance: steering the denoised estimate away from what an unconditional network would say."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.sampling.denoiser import Network, Prepared, column, estimate
from fastdiff.sampling.table import C_IN, GUIDANCE, RowPlan


class ClassifierFree:
    """Classifier-free guidance, ``D_uncond + w * (D_cond - D_uncond)``, with a strength for each image and row.

    ``prepared`` holds the conditional places of the batch first, then the unconditional ones. Rows at which no image is
    guided run the conditional half alone. D is affine in the network's output with coefficients that both halves share,
    so the outputs are mixed and D is formed once.

    Source: Ho and Salimans 2022, arXiv:2207.12598, eq. 6, with w counted so that 1 means no guidance.
    """

    def __init__(self, network: Network):
        self.network = network

    def __call__(
        self, x: Tensor, rows: Tensor, row_index: Tensor, plan: RowPlan, prepared: Prepared
    ) -> tuple[Tensor, Tensor]:
        """See ``Denoiser``."""
        scaled = column(rows, C_IN) * x
        if not plan.guided:
            return estimate(x, self.network(scaled, row_index, prepared), rows, plan)
        both = self.network(torch.cat([scaled, scaled]), torch.cat([row_index, row_index]), prepared)
        batch = x.shape[0]
        conditional, unconditional = both[:batch], both[batch:]  # chunk(2) would fix the batch of an exported graph
        mixed = torch.lerp(unconditional, conditional, column(rows, GUIDANCE))
        return estimate(x, mixed, rows, plan)
