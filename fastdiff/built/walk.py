"""What pipelines of built folders share: tables from disk, starting states, and the walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdiff.built.folder import TABLES, Folder
from fastdiff.built.tables import from_json
from fastdiff.errors import ArtifactError
from fastdiff.models.files import read_tensors
from fastdiff.sampling.denoiser import Cond, Network
from fastdiff.sampling.inpaint import check_image
from fastdiff.sampling.loop import sample
from fastdiff.sampling.noise import INITIAL, Noise
from fastdiff.sampling.parts import make_noise, plan
from fastdiff.sampling.table import StepTable

OUTPUTS = ("pil", "pt", "np")


def read_numbers(folder: Folder) -> Mapping[str, Tensor]:
    """The numbers of all tables of a folder, by preset."""
    return read_tensors(folder.file(TABLES)) if TABLES in folder.files else {}


def read_table(folder: Folder, name: str, numbers: Mapping[str, Tensor], device: torch.device) -> StepTable:
    """The step table of a preset.

    Raises:
        ArtifactError: if it is missing or damaged.
    """
    if name not in numbers:
        raise ArtifactError(f"{folder.root / TABLES}: holds no table {name!r}")
    table = from_json(folder.presets[name].table or {}, numbers[name], f"preset {name!r}")
    return StepTable(table.values.to(device), table.index.to(device), table.structure)


def starting(
    shape: tuple[int, ...], draws: int, scale: float, seed: int | Sequence[int] | None, latents: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Noise]:  # fmt: skip
    """The starting state ``[B, C, H, W]`` float32, ``latents`` or ``scale`` times the initial draw, and the noise.

    Raises:
        ShapeError: on seeds or latents that do not fit.
    """
    noise = make_noise(shape, draws, seed, None, device, initial=latents is None)
    if latents is None:
        number = torch.full((shape[0],), INITIAL, dtype=torch.int64, device=device)
        return scale * noise.draw(number, torch.empty(shape, device=device)), noise
    check_image("latents", latents, shape)
    return latents.to(device, torch.float32), noise


def guided(table: StepTable) -> bool:
    """Is any row of a table guided?"""
    return any(row.guided for row in table.structure.rows)


@torch.no_grad()
def walk(network: Network, table: StepTable, x: Tensor, cond: Cond, uncond: Cond | None, noise: Noise) -> Tensor:
    """Walk a table from a starting state to samples ``[B, C, H, W]``."""
    denoiser, prepared = plan(network, cond, uncond if guided(table) else None, table)
    return sample(denoiser, x, table, noise, prepared)
