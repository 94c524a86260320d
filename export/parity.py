"""How far is an exported file from the torch original? Measured, never assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn

from fastdiff.backends.ort_session import open_session
from fastdiff.errors import ArtifactError
from fastdiff.export.computing import Computing
from fastdiff.export.trace import watched
from fastdiff.models.files import one_line

FACTOR = 2.0  # of torch's own error in the same type against float64, plus one unit in the last place
MOST = 1e-4  # and in float32 never more than that, relative to the largest number
LEAN = 1_000_000_000  # bytes of files from which no copy of the weights in another layout is kept
Inputs = dict[str, Tensor]


class Original(NamedTuple):
    """What was exported, in torch."""

    network: nn.Module  # float32; its modules are the layers
    call: Callable[[Inputs], dict[str, Tensor]]  # the results by the names of the graph's outputs
    halved: Sequence[str] = ()  # inputs that are of the graph's type, where that is not float32


class Exported(NamedTuple):
    """Files that together compute the same: what the first ones give, the last one takes."""

    files: Sequence[Path]
    layers: Mapping[str, tuple[int, str]]  # module -> which file holds its result, and under which name


def compare(
    original: Original, exported: Exported, cases: Mapping[str, Inputs], dtype: torch.dtype, per_layer: bool = False
) -> dict[str, Any]:
    """Run exported files beside the original, both against float64.

    Args:
        original: in torch.
        exported: in onnxruntime, on the CPU.
        cases: inputs by name, such as ``batch 2, 64x32``.
        dtype: in which the graphs compute.
        per_layer: also report every layer, for the first case.

    Returns:
        For each case the relative errors of the files and of torch in ``dtype``; under ``layers`` those of each layer.

    Raises:
        ArtifactError: if the files are worse than the one rule of the project allows, naming the first layer that is,
            or refuse a size.
    """
    report: dict[str, Any] = {}
    with _sessions(exported.files, ()) as run:
        for name, inputs in cases.items():
            truth, plain = _torch(original, inputs, torch.float64), _torch(original, inputs, dtype)
            got = _run(run, inputs, name)
            coarse = None
            if not all(bool(value.isfinite().all()) for value in plain.values()):
                coarse = _torch(original, inputs, torch.bfloat16)
            errors = {
                output: _errors(got[output], plain[output], truth[output], coarse and coarse[output])
                for output in truth
            }
            report[name] = max(errors.values(), key=lambda error: _nan_last(error["exported"]))
            if len(errors) > 1:
                report[name] = {**report[name], "outputs": errors}
    # over all cases together: the largest of few numbers is a poor measure of either
    worst = {who: max((error[who] for error in report.values()), key=_nan_last) for who in ("exported", "torch")}
    if not _holds(worst, dtype):
        name = next(name for name, error in report.items() if str(error["exported"]) == str(worst["exported"]))
        layers = by_layer(original, exported, cases[name], dtype)
        first = next((layer for layer, error in layers.items() if not _holds(error, dtype)), "the output")
        raise ArtifactError(
            f"the exported graph is off by {worst['exported']:.2e} at {name}; torch in {_name(dtype)} by "
            f"{worst['torch']:.2e}, allowed is {FACTOR:g} times that; the first layer that leaves the bound: {first}"
        )
    if per_layer:
        report["layers"] = by_layer(original, exported, next(iter(cases.values())), dtype)
    return report


def by_layer(original: Original, exported: Exported, inputs: Inputs, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """The relative errors of every layer's result, in the order in which they run."""
    seen: dict[torch.dtype, dict[str, Tensor]] = {}
    for kind in (torch.float64, dtype):
        with watched(original.network, seen.setdefault(kind, {})):
            _torch(original, inputs, kind)
    layers = {name: place for name, place in exported.layers.items() if name in seen[dtype]}
    with _sessions(exported.files, list(layers.values())) as run:
        found = _run(run, inputs, "the layers")
    return {
        name: _errors(found[value], seen[dtype][name], seen[torch.float64][name]) for name, (_, value) in layers.items()
    }


def _torch(original: Original, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    precise = dtype == torch.float64
    given = {
        name: value.to(dtype) if value.is_floating_point() and (precise or name in original.halved) else value
        for name, value in inputs.items()
    }
    with torch.no_grad(), Computing(dtype):
        return original.call(given)


def _errors(got: Tensor, plain: Tensor, truth: Tensor, coarse: Tensor | None = None) -> dict[str, float]:
    """Relative to the largest number of the truth.

    Where torch itself overflows in float16 it measures nothing; then ``coarse`` does, torch in bfloat16, whose unit is
    eight times as large and whose range is that of float32.
    """
    top = float(truth.abs().max()) or 1.0
    if coarse is not None:
        finer = torch.finfo(torch.float16).eps / torch.finfo(torch.bfloat16).eps
        plain = truth + (coarse.double() - truth) * finer
    theirs, ours = (float((value.double() - truth.double()).abs().max()) / top for value in (got, plain))
    return {"exported": theirs, "torch": ours}


def _holds(error: Mapping[str, float], dtype: torch.dtype) -> bool:
    """Written so that NaN fails."""
    allowed = FACTOR * error["torch"] + torch.finfo(dtype).eps
    return error["exported"] <= (min(allowed, MOST) if dtype == torch.float32 else allowed)


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Run = Callable[[Inputs], dict[str, Tensor]]


@contextmanager
def _sessions(files: Sequence[Path], layers: Sequence[tuple[int, str]]) -> Iterator[Run]:
    """Run the files one after the other, each with what the earlier ones gave; returns all that they give."""
    watching = [_with_outputs(file, [name for at, name in layers if at == i]) for i, file in enumerate(files)]
    try:
        lean = sum(path.stat().st_size for file in files for path in file.parent.glob(f"{file.name}*")) > LEAN
        sessions = [open_session(file, torch.device("cpu"), lean=lean) for file in watching]
    finally:
        for file, given in zip(watching, files, strict=True):
            if file != given:
                file.unlink(missing_ok=True)

    def run(inputs: Inputs) -> dict[str, Tensor]:
        values = {name: value.numpy() for name, value in inputs.items()}
        results: dict[str, Any] = {}
        for session in sessions:
            names = [entry.name for entry in session.get_outputs()]
            feed = {
                entry.name: values[entry.name].astype("float16") if "float16" in entry.type else values[entry.name]
                for entry in session.get_inputs()
            }
            results |= dict(zip(names, session.run(None, feed), strict=True))
            values |= results
        return {name: torch.from_numpy(value) for name, value in results.items()}

    yield run


def _with_outputs(file: Path, names: Sequence[str]) -> Path:
    """The same graph with more outputs, in a file beside it, where it finds its weights."""
    if not names:
        return file
    model = onnx.load(file, load_external_data=False)
    known = {info.name: info for info in model.graph.value_info}
    there = {info.name for info in model.graph.output}
    model.graph.output.extend(known[name] for name in dict.fromkeys(names) if name not in there)
    watching = file.with_name(f".{file.name}.layers")
    watching.write_bytes(model.SerializeToString(deterministic=True))
    return watching


def _run(run: Run, inputs: Inputs, name: str) -> dict[str, Tensor]:
    try:
        return run(inputs)
    except Exception as error:  # onnxruntime's own kinds, none of them public
        raise ArtifactError(f"the exported graph does not run at {name}: {one_line(error, 300)}") from error


def table(report: Mapping[str, Any]) -> str:
    """A report as text to read."""
    rows = [(name, error) for name, error in report.items() if name != "layers"]
    rows += [(f"  {name}", error) for name, error in report.get("layers", {}).items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'relative error against float64':<{width}}  {'exported':>9}  {'torch':>9}"]
    return "\n".join(lines + [f"{n:<{width}}  {e['exported']:9.2e}  {e['torch']:9.2e}" for n, e in rows]) + "\n"
