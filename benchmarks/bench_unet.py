"""One network call of the bundled model, by backend and batch, with its error to float64.

Run ``make bench``, or this file alone:
``python -m pytest benchmarks/bench_unet.py -o python_files='bench_*.py' --benchmark-only``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastdiff.benchmarks.calls import MODEL, exact_call, exact_unet, make_loop, one_call
from fastdiff.benchmarks.environment import environment, relative_error, timed_ms
from fastdiff.errors import BackendError
from fastdiff.models.weights import load_model
from fastdiff.pipeline import Pipeline, resolve

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path | str:
    """The exported file, or why there is none."""
    file = tmp_path_factory.mktemp("export") / "unet.onnx"
    try:
        from fastdiff.export.onnx import export_unet

        export_unet(load_model(resolve(MODEL)), file)
    except (ImportError, BackendError) as error:  # a library is missing; any other failure is one
        return str(error)
    return file


@pytest.mark.benchmark(group="one network call")
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("backend", ["eager", "native", "onnxruntime"])
def test_one_call(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, device: torch.device, backend: str, batch: int
) -> None:
    """Time one evaluation in float32, preparation left out as in the loop."""
    artifact = None
    if backend == "onnxruntime":
        artifact = request.getfixturevalue("exported")
        if isinstance(artifact, str):
            pytest.skip(f"the model could not be exported: {artifact}")
    try:
        pipe = Pipeline.from_pretrained(MODEL, device=device, backend=backend, artifact=artifact)
    except BackendError as error:
        if backend == "eager":  # which needs nothing that could be missing
            raise
        pytest.skip(f"{backend} cannot run here: {error}")
    loop = make_loop(pipe, "flow_map", 4, batch)
    call = one_call(pipe.network, loop, batch)
    labels = torch.arange(batch, device=device) % len(pipe.model.info.classes)
    unet = load_model(resolve(MODEL)).network.to(device)  # as stored, whatever the backend made of its own copy
    found = relative_error(call(), exact_call(exact_unet(unet), loop, labels))
    benchmark.pedantic(lambda: timed_ms(call, device), rounds=30, warmup_rounds=3)
    benchmark.extra_info.update(environment(device), error=found)
