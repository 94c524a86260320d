"""The exported graph of a diffusers UNet, in place of our trunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import ArtifactError, FastdiffError
from fastdiff.integrations.binding import Binding, build

CLOSE = 0.01  # relative; a float16 graph of these weights is nearer, one of other weights is not near at all


def exported_trunk(file: Path, theirs: Any) -> Callable[..., Tensor]:
    """Open the graph that runs at every step, and check that it computes what the network does.

    Args:
        file: of ``fastdiff export``, in two graphs.
        theirs: a diffusers UNet that ours can run.

    Raises:
        ArtifactError: if the file is of another kind, damaged, or made from other weights.
        BackendError: if onnxruntime cannot run it here.
    """
    from fastdiff.backends.ort import SplitNetwork, network_from

    place = next(theirs.parameters()).device
    network = network_from(file, place, None)
    if not isinstance(network, SplitNetwork):
        raise ArtifactError(f"{file}: holds a whole evaluation; needed: fastdiff export --split")
    ours = Binding(theirs, build(theirs)).ours
    draw, dtype = torch.Generator().manual_seed(0), ours.conv_in.weight.dtype
    side = 2 ** (len(ours.config.block_out_channels) + 1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(place, dtype)

    pairs = [
        (drawn(1, a.heads, 3, a.to_k.out_features // a.heads), drawn(1, a.heads, 3, a.to_k.out_features // a.heads))
        for a in ours.crossing()
    ]
    given = drawn(1, ours.config.in_channels, side, side), drawn(1, ours.row_width()), pairs
    try:
        with torch.no_grad():
            wanted, got = ours.trunk(*given).float(), network.trunk(*given)
        off = float((got - wanted).abs().max() / wanted.abs().max()) if got.shape == wanted.shape else float("nan")
    except (FastdiffError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{file}: was not made from this network ({error})") from error
    if not off <= CLOSE:
        raise ArtifactError(f"{file}: was made from other weights: its result is off by {off:.2g}")

    def trunk(*values: Any) -> Tensor:
        return network.trunk(*values).to(dtype)

    return trunk
