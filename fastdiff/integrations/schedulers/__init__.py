"""``from_diffusers_scheduler``: the sampler that a diffusers scheduler stands for, without diffusers."""

from __future__ import annotations

from fastdiff.integrations.schedulers.sampler import Sampler, from_diffusers_scheduler
from fastdiff.sampling.run import Plan

__all__ = ["Plan", "Sampler", "from_diffusers_scheduler"]
