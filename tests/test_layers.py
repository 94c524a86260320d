"""Imports point one way, and ``import fastdiff`` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
FOLDERS = {"fastdiff": "fastdiff", "fastdiff.kernels": "kernels", "fastdiff.export": "export",
           "fastdiff.benchmarks": "benchmarks"}  # fmt: skip
SERVING = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client"}
HEAVY = {"triton", "onnxruntime", "onnx", "onnxscript", "diffusers", "transformers", "matplotlib", "tensorrt",
         "tensorrt_rtx", "ray", "pyarrow"} | SERVING  # fmt: skip
# From the bottom up: a part imports from itself and from the parts named here, nothing else.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "kernels": {"errors"},
    "sampling": {"errors", "kernels"},
    "models": {"errors", "kernels"},
    "artifact": {"errors", "models"},  # of models only the file helpers, see below
    "graph": set(),
    "backends": {"errors", "kernels", "sampling", "models", "artifact", "graph"},
    "export": {"calibration", "errors", "kernels", "sampling", "models", "artifact", "backends", "built"},
    "training": {"errors", "kernels", "sampling", "models"},
    "integrations": {"errors", "kernels", "sampling", "models", "backends"},
    "arguments": {"errors"},
    "images": {"errors"},
    "labels": {"errors"},
    # of models, built and calibration take the file helpers alone
    "built": {"errors", "sampling", "models", "artifact", "backends", "images", "labels", "arguments"},
    "calibration": {"errors", "models", "sampling"},
    "text_to_image": {
        "calibration",
        "errors",
        "kernels",
        "sampling",
        "models",
        "backends",
        "integrations",
        "images",
        "arguments",
    },
    "pipeline": {
        "arguments",
        "calibration",
        "errors",
        "kernels",
        "sampling",
        "models",
        "backends",
        "integrations",
        "images",
        "labels",
        "built",
        "text_to_image",
    },
    "engine": {"errors", "kernels", "sampling", "backends", "pipeline", "text_to_image"},
    "serve": {
        "backends",
        "calibration",
        "errors",
        "sampling",
        "images",
        "models",
        "pipeline",
        "text_to_image",
        "engine",
    },
    "": {"calibration", "errors", "engine", "sampling", "pipeline", "training", "integrations"},  # public names
}
ALLOWED["benchmarks"] = set(ALLOWED) | {"cli"}
ALLOWED["cli"] = set(ALLOWED)
LAZY_ONLY = {
    "export",
    "benchmarks",
}  # build-time parts: named inside functions of fastdiff.cli and fastdiff.cli.build alone


class Arrow(NamedTuple):
    module: str  # dotted name of the importing module
    target: str  # dotted name of what it imports
    lazy: bool  # inside a function
    line: int


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def part(name: str) -> str:
    """``fastdiff.sampling.path`` -> ``sampling``; ``fastdiff`` itself -> the empty string."""
    return (name.split(".") + [""])[1]


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, lazy
        yield from walk(child, inside)


def arrows(module: str, file: Path) -> Iterator[Arrow]:
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node, lazy in walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Arrow(module, alias.name, lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield Arrow(module, whole if whole in MODULES else base, lazy, node.lineno)


ARROWS = [arrow for module, file in MODULES.items() for arrow in arrows(module, file)]
OWN = [arrow for arrow in ARROWS if arrow.target.split(".")[0] == "fastdiff"]


def test_the_walk_sees_the_project():
    assert len(OWN) > 80 and {part(arrow.module) for arrow in OWN} > {"sampling", "kernels", "export", "cli"}
    assert Arrow("fastdiff.cli.export", "fastdiff.export.onnx", True, 0)[:3] in {arrow[:3] for arrow in OWN}
    assert ("fastdiff.kernels", "fastdiff.kernels.reference") in {arrow[:2] for arrow in OWN}  # a relative import


def test_every_part_has_its_place():
    assert {part(module) for module in MODULES} <= set(ALLOWED)


def test_no_arrow_points_up():
    wrong = [a for a in OWN if part(a.target) not in ALLOWED[part(a.module)] | {part(a.module)}]
    assert not wrong, "\n".join(f"{a.module}:{a.line} imports {a.target}" for a in wrong)


def test_build_time_parts_are_imported_inside_functions_of_cli_alone():
    users = [a for a in OWN if part(a.target) in LAZY_ONLY and part(a.module) not in LAZY_ONLY]
    assert {part(a.module) for a in users} <= {"cli"}
    assert all(a.lazy for a in users)


@pytest.mark.parametrize("name", ["artifact", "built", "calibration"])
def test_what_runs_without_a_model_takes_only_file_helpers_from_models(name):
    targets = {a.target for a in OWN if part(a.module) == name and part(a.target) == "models"}
    assert targets == {"fastdiff.models.files"}


def test_solvers_and_samplers_know_no_networks_and_no_files():
    for arrow in ARROWS:
        if part(arrow.module) == "sampling":
            assert arrow.target.split(".")[0] not in {"safetensors", "json", "os", "pathlib", "PIL"}, arrow


def test_the_folders_are_never_imported_by_their_own_names():
    """At the root of the repository ``import kernels`` works too, and gives a second module."""
    for arrow in ARROWS:
        assert arrow.target.split(".")[0] not in {"kernels", "export", "benchmarks"}, arrow


def test_optional_libraries_are_imported_only_where_they_are_the_subject():
    home = {"serve": SERVING, "kernels": {"triton"}, "export": {"onnx"}, "benchmarks": HEAVY}
    for arrow in ARROWS:
        library = arrow.target.split(".")[0]
        if library in HEAVY and not arrow.lazy:
            assert library in home.get(part(arrow.module), set()), arrow


def test_importing_loads_no_optional_library():
    statement = "import fastdiff, fastdiff.cli, fastdiff.artifact, fastdiff.backends.ort, fastdiff.backends.eager"
    # torch may look for triton itself; what counts is what comes on top of torch
    program = (
        f"import sys, torch, torch.nn.functional; before = set(sys.modules); {statement}; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "fastdiff" in loaded and not loaded & HEAVY, loaded & HEAVY
