"""Networks that live in the host's memory and are on the device only while they run: for small cards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Offload:
    """Brings networks to a device for one stage of a call and drops them there afterwards.

    The host's tensors stay what they are: going back costs no copy, and a LoRA that is merged between calls is merged
    into them. Stages take turns, so that networks of two stages are never on the device together.

    Args:
        device: where networks run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._lock = threading.RLock()

    @contextmanager
    def __call__(self, *networks: nn.Module) -> Iterator[None]:
        """Within this context the networks are on the device; all else of them (identity, hooks) stays."""
        with self._lock:
            homes = []
            try:
                for network in networks:
                    for tensor in (*network.parameters(), *network.buffers()):
                        homes.append((tensor, tensor.data))
                        tensor.data = tensor.data.to(self.device, copy=True)
                yield
            finally:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # nothing may read what is dropped now
                for tensor, home in homes:
                    tensor.data = home
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
