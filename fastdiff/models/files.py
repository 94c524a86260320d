"""Files of model folders: found, checked and read without trusting them; written whole or not at all.

Nothing is unpickled unless the caller asks for it by name, no name or link leads out of the folder, and what a file may
cost in time and memory is bounded before it is read: safetensors are memory-mapped, their headers limited and checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.errors import ArtifactError
from fastdiff.models.pickles import PICKLES, read_pickle

SAFETENSORS = ".safetensors"
MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_DEPTH, MAX_JSON_LISTS = 32, 200_000  # an empty list costs 2 bytes in a file and a hundred in memory
MAX_HEADER_BYTES, MAX_TENSORS, MAX_RANK = 8 * 2**20, 50_000, 8  # more tensors than that take seconds to list
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


def shown(value: object, most: int = 120) -> str:
    """Return ``repr(value)`` for one line of a message, cut to ``most`` characters."""
    text = repr(value[: most + 1] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: object, most: int = 160) -> str:
    """Return somebody else's error message as one short line."""
    return " ".join(str(error).split())[:most]


def inside(root: Path, name: str) -> Path:
    """Return ``root / name`` if that is a place inside ``root``, links followed.

    The hub's cache keeps ``models--*/snapshots/<revision>/<file>`` as a link to ``models--*/blobs/<hash>``: a link from
    such a snapshot into the ``blobs`` of the same model is allowed, no other link that leaves the folder is.

    Raises:
        ArtifactError: if the name is absolute, climbs (``..``), or is a link that leaves the folder or goes in circles.
    """
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or not name.isprintable():
        raise ArtifactError(f"{root}: file name {shown(name)}; allowed are names inside the folder")
    try:
        home, target = root.resolve(), (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{root / name}: cannot be followed ({one_line(error)})") from error
    if not target.is_relative_to(home) and target.parent != _blobs(home):
        raise ArtifactError(f"{root / name}: is a link that leaves the model folder; refused")
    return root / name


def _blobs(home: Path) -> Path | None:
    """Where the hub's cache keeps the contents of the snapshot that ``home`` lies in, if it lies in one."""
    for revision in (home, *home.parents):
        cache = revision.parent.parent
        if revision.parent.name == "snapshots" and cache.name.startswith("models--"):
            return cache / "blobs"
    return None


def file_size(path: Path) -> int:
    """Return the bytes of a plain file.

    Raises:
        ArtifactError: if it is missing, cannot be reached, or is a folder, pipe or device.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({one_line(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path}: {'is a folder' if path.is_dir() else 'is not a plain file'}; a file is needed")
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a model folder.

    Raises:
        ArtifactError: if it is missing, not a plain file, too large or deep, names a key twice, or is not an object.
    """
    if file_size(path) > MAX_JSON_BYTES:
        raise ArtifactError(f"{path}: {file_size(path)} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        return _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({type(error).__name__}: {one_line(error, 120)})") from error


def _parse(text: bytes) -> dict[str, Any]:
    """Parse one JSON object; a ValueError says what is wrong with it."""
    lists = text.count(b"[") + text.count(b"{")
    if lists > MAX_JSON_LISTS:
        raise ValueError(f"{lists} lists and objects; at most {MAX_JSON_LISTS} are read")
    value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}; allowed is one JSON object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = [held.values() if isinstance(held, dict) else held for held in level]
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object that names a key twice means two things; readers differ in which they take."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {shown(name, 60)} is there twice")
        found[name] = value
    return found


def find_weights(
    folder: str | os.PathLike[str], stem: str, variant: str | None = None, allow_pickle: bool = False
) -> list[Path]:
    """Find the files that hold a network's weights, under the names diffusers and transformers give them.

    Args:
        folder: where to look.
        stem: ``"diffusion_pytorch_model"`` or ``"model"``.
        variant: such as ``"fp16"``, for ``<stem>.fp16.safetensors``; no other variant is taken instead.
        allow_pickle: also take a pickle where there are no safetensors.

    Returns:
        One file, or the index of sharded weights followed by its shards. ``read_tensors`` takes the first.

    Raises:
        ArtifactError: saying what was looked for and what is there, if nothing or more than one thing fits.
    """
    root, base = Path(folder), f"{stem}.{variant}" if variant else stem
    looked: list[str] = []
    for ending in (SAFETENSORS, *(PICKLES if allow_pickle else ())):
        names = [base + ending, f"{base}{ending}.index.json"]
        names += [f"{stem}{ending}.index.{variant}.json"] if variant else []
        looked += names
        found = [inside(root, name) for name in names if os.path.lexists(root / name)]
        if len(found) > 1:
            raise ArtifactError(f"{root}: holds both {found[0].name} and {found[1].name}; remove one")
        if found:
            return [found[0], *(_shards(found[0]) if _is_index(found[0]) else ())]
    try:
        there = sorted(entry.name for entry in root.iterdir())
    except OSError as error:
        raise ArtifactError(f"{root}: cannot be read ({one_line(error)})") from error
    pickled = next((base + ending for ending in PICKLES if base + ending in there), None)
    if pickled and not allow_pickle:
        raise ArtifactError(f"{root / pickled}: a pickle, and no {looked[0]}; allow_pickle=True reads it all the same")
    kinds = [name for name in there if SAFETENSORS in name or name.endswith(PICKLES)]
    others, has = " or ".join(looked[1:]), ", ".join(kinds) if kinds else "no weights file"
    raise ArtifactError(f"{root / looked[0]}: no such file, nor {others}; there is {shown(has, 300)}")


def _is_index(path: Path) -> bool:
    return ".index." in path.name and path.suffix == ".json"


def _shards(index: Path) -> dict[Path, set[str]]:
    """Read an index: each shard, and the names of the tensors it is to hold."""
    table = read_json(index).get("weight_map")
    ending = "." + index.name.split(".index.")[0].rpartition(".")[2]
    if not isinstance(table, dict) or not table:
        raise ArtifactError(f"{index}: weight_map is {shown(table)}; needed: tensor names and their files")
    shards: dict[Path, set[str]] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard) or not shard.endswith(ending):
            raise ArtifactError(f"{index}: {shown(name)} lies in {shown(shard)}; allowed: a {ending} file beside it")
        shards.setdefault(index.parent / shard, set()).add(name)
    for path in shards:
        file_size(inside(index.parent, path.name))
    return shards


def read_tensors(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a weights file, or all shards of an index, onto the CPU; safetensors are mapped, not copied.

    Args:
        path: a safetensors file, ``*.safetensors.index.json``, or a pickle (``.bin``, ``.ckpt``, ``.pt``, ``.pth``).
        allow_pickle: read pickles, with torch's weights-only reader.

    Raises:
        ArtifactError: if it is missing, a folder, truncated, of another format, or shards and index disagree.
    """
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise ArtifactError(f"{path}: a pickle; allow_pickle=True reads it all the same")
        return read_pickle(path, file_size(path))
    if not _is_index(path):
        return _read_safetensors(path)
    tensors: dict[str, Tensor] = {}
    for shard, names in _shards(path).items():
        held = read_tensors(shard, allow_pickle)
        for wrong in sorted(names ^ held.keys()):
            problem = "is missing from" if wrong in names else "is also in" if wrong in tensors else "is not listed for"
            raise ArtifactError(f"{path}: tensor {shown(wrong)} {problem} {shard.name}")
        tensors |= held
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({one_line(error)})") from error


def _header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file within limits; whether it fits the data is for ``safe_open`` to say."""
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in {size}; at most {MAX_HEADER_BYTES}")
            header = _parse(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({one_line(error)})") from error
    if len(header) > MAX_TENSORS:
        raise ArtifactError(f"{path}: {len(header)} tensors; at most {MAX_TENSORS} are read")
    for name, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > MAX_RANK:
            raise ArtifactError(f"{path}: tensor {shown(name)} has {len(shape)} dimensions; at most {MAX_RANK}")
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text facts of a safetensors file that ``read_tensors`` has accepted."""
    return dict(_header(path).get("__metadata__") or {})


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name in the same folder, then rename it."""
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name in the same folder, then rename it."""
    temporary = _temporary(path)
    try:
        save_file(dict(tensors), temporary, dict(metadata))
        temporary.chmod(0o644)  # safetensors writes files that nobody else may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
