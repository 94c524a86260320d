"""How large do numbers get on the way? Measured over real inputs, to decide what a float16 graph keeps in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MARGIN = 4.0  # other inputs than those that were measured may reach so much further
MOST = torch.finfo(torch.float16).max / MARGIN
LOGITS = "logits"  # of an attention: how the layer's name ends

Ranges = dict[str, float]  # layer -> the largest number it gave


class _Ranging(TorchFunctionMode):
    """Notes the largest result of every layer that has weights, and the bound of every attention's logits."""

    def __init__(self, owners: Mapping[int, str], scope: list[str]):
        super().__init__()
        self.owners, self.scope, self.found = owners, scope, Ranges()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            q, k = args[0], args[1]
            # by Cauchy and Schwarz: the logits themselves are as many as tokens times tokens
            lengths = float(q.norm(dim=-1).max()) * float(k.norm(dim=-1).max())
            self._note(f"{self.scope[-1]}.{LOGITS}", lengths / q.shape[-1] ** 0.5)
        elif isinstance(result, Tensor) and func in (F.conv2d, F.linear) and len(args) > 1:
            weight = args[1] if isinstance(args[1], nn.Parameter) else getattr(args[1], "_base", args[1])
            if id(weight) in self.owners:
                self._note(self.owners[id(weight)], float(result.abs().max()))
        return result

    def _note(self, name: str, largest: float) -> None:
        self.found[name] = max(self.found.get(name, 0.0), largest)


def ranges(network: nn.Module, call: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor]) -> Ranges:
    """Run a float32 network once and return the largest number that each layer gave."""
    owners = {id(parameter): name.rpartition(".")[0] for name, parameter in network.named_parameters()}
    scope: list[str] = [""]
    with _scoped(network, scope), torch.no_grad(), _Ranging(owners, scope) as mode:
        call(inputs)
    return mode.found


@contextmanager
def _scoped(network: nn.Module, scope: list[str]) -> Iterator[None]:
    """Keep the name of the module that runs at the end of ``scope``."""
    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: scope.append(name)))
        handles.append(module.register_forward_hook(lambda *_: [scope.pop(), None][1]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def too_large(found: Ranges) -> Ranges:
    """The layers that a float16 graph keeps in float32; NaN and infinity count as too large."""
    return {name: largest for name, largest in found.items() if not largest <= MOST}


def report(found: Ranges, most: int = 10) -> dict[str, Any]:
    """What was kept and why, and the largest of the rest."""
    kept = too_large(found)
    rest = sorted((name for name in found if name not in kept), key=lambda name: -found[name])[:most]
    return {
        "limit": MOST,
        "kept_in_float32": {name: f"{largest:.4g}" for name, largest in kept.items()},
        "largest_of_the_rest": {name: f"{found[name]:.4g}" for name in rest},
    }
