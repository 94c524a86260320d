"""How far is an exported file from the torch original? Measured, never assumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends.ort import open_session
from fastdiff.errors import ArtifactError

FACTOR = 2.0  # of torch's own float32 error against float64, plus one unit in the last place
BATCHES = (1, 2, 3)


def measure(module: nn.Module, file: Path, arguments: dict[str, Tensor]) -> dict[str, Any]:
    """Run an exported file beside the original at several batch sizes, both against float64.

    Returns:
        For each batch size the relative errors of the file and of torch in float32.

    Raises:
        ArtifactError: if the file is worse than the one rule of the project allows, or refuses a batch size.
    """
    session = open_session(file, torch.device("cpu"))
    precise = copy.deepcopy(module).double()
    report: dict[str, Any] = {}
    for batch in BATCHES:
        inputs = {name: _resize(value, batch) for name, value in arguments.items()}
        with torch.no_grad():
            plain = module(**inputs)
            truth = precise(**{n: v.double() if v.is_floating_point() else v for n, v in inputs.items()})
        try:
            (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        except Exception as error:  # onnxruntime's own kinds, none of them public
            line = " ".join(str(error).split())
            raise ArtifactError(f"the exported graph does not run at batch {batch}: {line[:300]}") from error
        top = float(truth.abs().max())
        theirs, ours = (float((value.double() - truth).abs().max()) for value in (torch.from_numpy(got), plain))
        report[str(batch)] = {"exported": theirs / top, "torch": ours / top}
        if not theirs <= FACTOR * ours + torch.finfo(torch.float32).eps * top:
            raise ArtifactError(
                f"the exported graph is off by {theirs / top:.2e} at batch {batch}; torch in float32 by "
                f"{ours / top:.2e}, allowed is {FACTOR:g} times that"
            )
    return report


def _resize(value: Tensor, batch: int) -> Tensor:
    """Repeat or cut an example input along its batch, with fresh numbers where it holds noise."""
    if value.dim() == 4:
        return torch.randn((batch, *value.shape[1:]), generator=torch.Generator().manual_seed(batch))
    return value.repeat((batch + len(value) - 1) // len(value))[:batch]
