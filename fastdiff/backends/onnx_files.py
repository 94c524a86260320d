"""ONNX files from anywhere, looked over before a runtime opens them: where do they say that their weights lie?

A graph names the files of its weights, and runtimes have followed such names out of the folder. Here only a plain file
that lies beside the graph is let through. The format is read as far as that needs; nothing is loaded.

Source of the field numbers: ``onnx.proto`` of ONNX 1.18, unchanged since 1.0 where they exist.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fastdiff.errors import ArtifactError
from fastdiff.models.files import file_size, shown

DEPTH = 64  # of graphs inside graphs
# message -> which of its fields lead to a tensor, and what they hold
_WAYS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_EXTERNAL_DATA, _KEY, _VALUE = 13, 1, 2


def check_external_data(file: Path) -> list[Path]:
    """Return the files in which a graph keeps its weights, each a plain file beside it.

    Raises:
        ArtifactError: if the graph is damaged, or names a place that is absolute, outside its folder, a link, missing
            or too short for what it is to hold.
    """
    size = file_size(file)
    if size == 0:
        raise ArtifactError(f"{file}: is empty; an ONNX file is needed")
    found: dict[str, int] = {}
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for entry in _entries(data, "model", 0, size, 0):
                location = entry.get("location", "")
                _check_name(file, location)
                end = _number(entry, "offset") + _number(entry, "length")
                found[location] = max(found.get(location, 0), end)
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{file}: not a whole ONNX file ({error})") from error
    return [_check_file(file, location, end) for location, end in found.items()]


def _check_name(file: Path, location: str) -> None:
    plain = location not in ("", ".", "..") and not set(location) & set("/\\\0:") and location.isprintable()
    if not plain:
        raise ArtifactError(f"{file}: keeps weights in {shown(location)}; allowed: a file beside it, by its name alone")


def _check_file(file: Path, location: str, end: int) -> Path:
    path = file.with_name(location)
    try:
        status = os.lstat(path)
    except OSError as error:
        raise ArtifactError(f"{path}: no such file, though {file.name} keeps weights there") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
        raise ArtifactError(f"{path}: is {kind}; {file.name} may keep its weights in a plain file alone")
    if status.st_size < end:
        raise ArtifactError(f"{path}: {status.st_size} bytes; {file.name} keeps weights there up to byte {end}")
    return path


def _number(entry: dict[str, str], key: str) -> int:
    text = entry.get(key, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{key} of external data is {shown(text, 40)}")
    return int(text)


def _entries(data: mmap.mmap, message: str, start: int, end: int, depth: int) -> Iterator[dict[str, str]]:
    """The description of the external data of every tensor inside a message."""
    if depth > DEPTH:
        raise ValueError(f"graphs nested deeper than {DEPTH}")
    if message == "tensor":
        entry: dict[str, str] = {}
        for field, first, last in _fields(data, start, end):
            if field == _EXTERNAL_DATA:
                parts = {part: data[a:b].decode() for part, a, b in _fields(data, first, last)}
                if parts.get(_KEY, "") in entry:
                    raise ValueError("external data is described twice")
                entry[parts.get(_KEY, "")] = parts.get(_VALUE, "")
        if entry:
            yield entry
        return
    ways = _WAYS[message]
    for field, first, last in _fields(data, start, end):
        if field in ways:
            yield from _entries(data, ways[field], first, last, depth + 1)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The length-delimited fields of a message: number, begin and end."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at, end)
        elif kind == 2:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise ValueError("a field is longer than what holds it")
            yield key >> 3, at, at + length
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
    if at != end:
        raise ValueError("a field is longer than what holds it")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("a number is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")
