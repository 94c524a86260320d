"""LoRA adapters as inputs of exported graphs: nothing is merged, and a swap costs no new session."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.backends.ort_session import Runner
from fastdiff.errors import PlanError
from fastdiff.models.lora import Factors, Lora

DOWN, UP = ".lora_down", ".lora_up"


def adapt(runners: Sequence[Runner], adapters: Sequence[tuple[Lora, float]]) -> None:
    """Let graphs that were exported with adapters as inputs compute with these, and no others.

    Args:
        runners: the graphs of one network. Not while one runs.
        adapters: for the UNet, with their strengths; none takes all out.

    Raises:
        PlanError: if the graphs take no adapters, or an adapter changes a layer that they do not; nothing has changed
            then.
    """
    layers = {name.removesuffix(DOWN): runner for runner in runners for name in runner.inputs if name.endswith(DOWN)}
    if not layers and adapters:
        raise PlanError("this exported graph takes no adapters: export it with --adapters, or merge them with --lora")
    flat = {"unet." + name.replace(".", "_"): name for name in layers}
    parts: dict[str, list[tuple[Factors, float]]] = {name: [] for name in layers}
    for lora, strength in adapters:
        for target, factors in lora.targets.items():
            if target not in flat:
                raise PlanError(
                    f"{lora.source}: {factors.source!r} changes a layer that the exported graph takes no adapter for; "
                    "allowed: linear layers of the transformers. Merge it with --lora"
                )
            parts[flat[target]].append((factors, strength))
    rank = max((sum(factors.rank for factors, _ in found) for found in parts.values()), default=0) or 1
    for name, runner in layers.items():
        down, up = _together(parts[name], runner.inputs[name + DOWN].shape[0], runner.inputs[name + UP].shape[1], rank)
        runner.usual |= {name + DOWN: down, name + UP: up}


def _together(found: Sequence[tuple[Factors, float]], inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """Several adapters of one layer as one, filled up with zeros: ``[in, rank]`` and ``[rank, out]``."""
    down, up, at = torch.zeros(inputs, rank), torch.zeros(rank, outputs), 0
    for factors, strength in found:
        down[:, at : at + factors.rank] = factors.down.float().flatten(1).t()
        up[at : at + factors.rank] = factors.up.float().t() * (factors.scale * strength)
        at += factors.rank
    return down, up
