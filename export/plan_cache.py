"""Engines that were built once: found again by what went into them, whole or absent, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdiff.artifact import load_manifest as load_graph_manifest
from fastdiff.artifact import manifest_path
from fastdiff.backends.onnx_files import check_external_data
from fastdiff.backends.plan_files import PlanManifest, joined, read_plan, read_sealed, save_manifest, write_sealed
from fastdiff.backends.trt import architecture_of
from fastdiff.backends.trt_library import Library
from fastdiff.errors import ArtifactError
from fastdiff.export import progress, tensorrt
from fastdiff.export.tensorrt import Built, Recipe, build_plan, check
from fastdiff.models.files import sha256

PLAN, TIMINGS = "model.plan", "timings"
Builder = Callable[..., Built]


class PlanCache:
    """A folder of plans. Every entry is a folder named by its key; it is renamed into place when it is whole.

    A file lock for each key lets one process build while the others wait for its result; the system drops the lock of
    a process that dies, and what it had half written lies under a temporary name that the next owner removes.

    Args:
        folder: made if missing.
        library: who builds.
        builder: ``build_plan``, or what stands in for it.
    """

    def __init__(self, folder: Path, library: Library, builder: Builder = build_plan):
        self.folder, self.library, self.builder = folder, library, builder
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, graph: Path, recipe: Recipe) -> str:
        """Hash everything that decides what a build gives: graph and weights, recipe, code, versions, GPU."""
        return _digest(self._facts(graph, recipe))

    def get(self, graph: Path, recipe: Recipe, **how: Any) -> Path:
        """Return the plan for a graph, built if there is none that is whole.

        Args:
            graph: an ONNX file.
            recipe: how to build.
            how: ``bars`` and ``cancelled`` of ``build_plan``.

        Raises:
            ArtifactError, BackendError, PlanError, BuildCancelled: as ``build_plan``; the cache is as it was.
        """
        check(recipe, self.library)
        facts = self._facts(graph, recipe)
        entry = self.folder / _digest(facts)
        with _locked(entry.with_suffix(".lock")):
            for half in self.folder.glob(f".{entry.name}.*.part"):
                shutil.rmtree(half)
            if not self._is_whole(entry):
                shutil.rmtree(entry, ignore_errors=True)
                timings = read_sealed(self._timing_file(facts))
                built = self.builder(self.library, graph, recipe, timings=timings, **how)
                self._store(entry, graph, recipe, facts, built)
                if built.timings is not None and built.timings != timings:
                    write_sealed(self._timing_file(facts), built.timings)
        return entry / PLAN

    def entries(self) -> list[Path]:
        """Every plan that can be seen here."""
        return sorted(path / PLAN for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))

    def read(self, plan: Path) -> tuple[bytes, PlanManifest]:
        """Read a plan, checked; see ``read_plan``."""
        return read_plan(plan, library=self.library.name, version=self.library.version)

    def _is_whole(self, entry: Path) -> bool:
        try:
            return self.read(entry / PLAN)[1].key == entry.name
        except ArtifactError:
            return False

    def _facts(self, graph: Path, recipe: Recipe) -> dict[str, Any]:
        """What the key is made of."""
        code = [sha256(Path(str(module.__file__))) for module in (tensorrt, progress)]
        return {
            "graph": graph_sha256(graph),
            "recipe": json.loads(json.dumps(recipe._asdict())),
            "code": code,
            "library": [self.library.name, self.library.version],
            "gpu": list(recipe.architectures) if self.library.rtx else [architecture_of(torch.device("cuda"))],
        }

    def _store(self, entry: Path, graph: Path, recipe: Recipe, facts: dict[str, Any], built: Built) -> None:
        half = entry.with_name(f".{entry.name}.{os.getpid()}.part")
        half.mkdir()
        try:
            save_plan(half / PLAN, graph, recipe, self.library, built, entry.name, tuple(facts["gpu"]))
            half.rename(entry)
            _sync(self.folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)

    def _timing_file(self, facts: dict[str, Any]) -> Path:
        return self.folder / f"{TIMINGS}-{_digest([facts['library'], facts['gpu']])[:16]}"


def save_plan(
    file: Path, graph: Path, recipe: Recipe, library: Library, built: Built, key: str, architectures: tuple[str, ...]
) -> PlanManifest:
    """Write a plan and its sealed manifest into a folder that nobody reads yet."""
    with file.open("wb") as out:
        out.write(built.plan)
        out.flush()
        os.fsync(out.fileno())
    manifest = PlanManifest(
        sha256=hashlib.sha256(built.plan).hexdigest(),
        bytes=len(built.plan),
        key=key,
        library=library.name,
        version=library.version,
        architectures=architectures,
        graph_sha256=graph_sha256(graph),
        graph=asdict(load_graph_manifest(graph)) if manifest_path(graph).exists() else {},
        inputs=built.inputs,
        outputs=built.outputs,
        profiles=tuple({name: [list(s) for s in shapes] for name, shapes in each.items()} for each in built.profiles),
        layers=built.layers,
        refit=recipe.refit,
    )
    save_manifest(file, manifest)
    return manifest


def graph_sha256(graph: Path) -> str:
    """Return one hash of an ONNX file and the files its weights lie in.

    Raises:
        ArtifactError: if a file is missing, or lies elsewhere than beside the graph.
    """
    return joined([sha256(file) for file in (graph, *check_external_data(graph))])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file; the system lets go of it when the process ends, however it does."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Make a rename in the folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
