"""What is declared is what there is: packages, extras, pins, package data."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from safetensors import safe_open

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
BUNDLED = ROOT / "fastdiff" / "bundled"
MAX_BUNDLED_BYTES = 8 * 10**6


def test_the_package_list_is_the_folders():
    """A subpackage missing from the list works in an editable install and is absent from the wheel."""
    mapping = SETUPTOOLS["package-dir"]
    assert mapping == {"fastdiff": "fastdiff", "fastdiff.kernels": "kernels", "fastdiff.export": "export",
                       "fastdiff.kernels.native": "kernels/native", "fastdiff.benchmarks": "benchmarks"}  # fmt: skip
    found = set()
    for package, folder in mapping.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_folder_of_code_is_a_package():
    for folder in SETUPTOOLS["package-dir"].values():
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_the_extras_exist_and_name_each_other_rightly():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"gpu", "tensorrt", "tensorrt-rtx", "openvino", "serve", "ray", "test", "dev"} <= set(extras)
    for lines in extras.values():
        for line in lines:
            inner = re.match(r"fastdiff\[([^\]]*)\]", line)
            if inner:
                assert set(inner[1].split(",")) <= set(extras), line


def test_the_command_is_declared_and_exists():
    assert PROJECT["project"]["scripts"] == {"fastdiff": "fastdiff.cli:main"}
    from fastdiff.cli import main

    assert callable(main)


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].partition(";")[0].strip() for line in text.splitlines()]
    found = {}
    for line in lines:
        if line and not line.startswith("-"):
            name, _, version = line.partition("==")
            found[name.strip().lower()] = version.strip()
    return found


def test_the_constraints_pin_exactly():
    found = pins()
    assert found["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.+!]*", version) for version in found.values()), found


def test_what_the_project_needs_is_pinned():
    for line in PROJECT["project"]["dependencies"]:
        name = re.match(r"[A-Za-z0-9_-]+", line)
        assert name and name[0].lower() in pins(), line


def test_the_installed_version_is_the_declared_one():
    import fastdiff

    assert fastdiff.__version__ == PROJECT["project"]["version"]


def test_type_information_and_weights_are_package_data():
    patterns = SETUPTOOLS["package-data"]["fastdiff"]
    assert "py.typed" in patterns and (ROOT / "fastdiff" / "py.typed").exists()
    for file in BUNDLED.rglob("*"):
        if file.is_file():
            name = file.relative_to(ROOT / "fastdiff").as_posix()
            assert any(fnmatch(name, pattern) for pattern in patterns), name
    for file in (ROOT / "benchmarks").glob("*"):
        if file.suffix in (".safetensors", ".json"):
            assert any(fnmatch(file.name, pattern) for pattern in SETUPTOOLS["package-data"]["fastdiff.benchmarks"])


def test_the_bundled_weights_are_small_and_half_precision():
    files = sorted(BUNDLED.rglob("*.safetensors"))
    assert files and sum(file.stat().st_size for file in files) <= MAX_BUNDLED_BYTES
    for path in files:
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
        assert kinds == {"F16"}, path


def test_nothing_pickled_is_shipped():
    for folder in SETUPTOOLS["package-dir"].values():
        for file in (ROOT / folder).rglob("*"):
            assert file.suffix not in {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".npz"}, file
