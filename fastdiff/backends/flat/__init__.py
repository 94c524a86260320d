"""The UNet as a flat sequence of calls over joined channels-last buffers, on a GPU captured in a CUDA graph."""

from fastdiff.backends.flat.loop import LoopNetwork
from fastdiff.backends.flat.trunk import FlatNetwork, FlatTrunk

__all__ = ["FlatNetwork", "FlatTrunk", "LoopNetwork"]
