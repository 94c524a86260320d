"""Plan files: serialised engines on disk, read only if nobody changed them and this user's cache sealed them.

A plan is code: whoever writes one decides what the GPU, and the library that reads it, will do. So a plan carries a
manifest with its hash, sealed (HMAC-SHA256) with a key that only this user can read. ``read_plan`` checks seal, age and
hash of the very bytes it returns, before any of them reaches TensorRT.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastdiff.errors import ArtifactError, BackendError
from fastdiff.kernels.native import Unavailable, cache_folder
from fastdiff.models.files import file_size, one_line, read_json, sha256, write_text

KEY_FILE, KEY_BYTES = "plans.key", 32
SEAL_BYTES = 64  # of a seal in hexadecimal
FORMAT = 1


@dataclass(frozen=True)
class PlanManifest:
    """Facts about one plan, written as ``<file>.json`` beside it."""

    sha256: str  # of the plan
    bytes: int
    key: str  # of the cache entry: a hash of everything below and of the builder's code
    library: str  # "tensorrt" or "tensorrt_rtx"
    version: str
    architectures: tuple[str, ...]  # "sm86", ...
    graph_sha256: str  # of the ONNX file and its external data, weights included
    graph: dict[str, Any] = field(default_factory=dict)  # what the graph's own manifest says
    inputs: dict[str, Any] = field(default_factory=dict)  # name -> [dtype, shape]; -1 is dynamic
    outputs: dict[str, Any] = field(default_factory=dict)
    profiles: tuple[dict[str, Any], ...] = ()  # of each: input -> [smallest, usual, largest shape]
    layers: dict[str, int] = field(default_factory=dict)  # "CONVOLUTION HALF" -> how many
    refit: bool = False
    seal: str = ""


def manifest_of(file: Path) -> Path:
    """Where the manifest of a plan lies."""
    return file.with_name(file.name + ".json")


def sealed(manifest: PlanManifest) -> PlanManifest:
    """Return the manifest with the seal of this user."""
    return replace(manifest, seal=seal_of(_text(manifest).encode()))


def seal_of(content: bytes) -> str:
    """Return the HMAC-SHA256 of ``content`` under this user's key, in hexadecimal."""
    return hmac.new(_secret(), content, hashlib.sha256).hexdigest()


def is_sealed(content: bytes, seal: str) -> bool:
    """Did ``seal_of`` give this seal to this content?"""
    return _same(seal_of(content), seal)


def read_sealed(file: Path) -> bytes | None:
    """Return what ``write_sealed`` wrote; None if it is missing or somebody changed it: it can be made again."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    held, seal = content[SEAL_BYTES:], content[:SEAL_BYTES].decode("ascii", "replace")
    return held if is_sealed(held, seal) else None


def write_sealed(file: Path, content: bytes) -> None:
    """Write bytes behind their seal, whole or not at all."""
    half = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        half.write_bytes(seal_of(content).encode() + content)
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)


def save_manifest(file: Path, manifest: PlanManifest) -> None:
    """Seal the manifest and write it beside its plan, whole or not at all."""
    write_text(manifest_of(file), json.dumps({"format": FORMAT, **asdict(sealed(manifest))}, indent=2) + "\n")


def load_manifest(file: Path) -> PlanManifest:
    """Read the manifest of a plan; what it says is checked by ``read_plan``.

    Raises:
        ArtifactError: if there is none, or it is not one.
    """
    path = manifest_of(file)
    if not os.path.lexists(path):
        raise ArtifactError(f"{file}: has no manifest ({path.name}), so nobody knows who made it; refused")
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise ArtifactError(f"{path}: not format {FORMAT}")
    kinds = {"str": str, "int": int, "bool": bool, "dict": dict, "tuple": list}
    for each in fields(PlanManifest):
        kind = kinds[str(each.type).split("[")[0]]
        if type(values.get(each.name)) is not kind:
            raise ArtifactError(f"{path}: {each.name} is missing or no {kind.__name__}")
    if len(values) != len(fields(PlanManifest)):
        unknown = sorted(values.keys() - {each.name for each in fields(PlanManifest)})
        raise ArtifactError(f"{path}: unknown entry {unknown[0]!r}")
    made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return PlanManifest(**made)


def read_plan(file: Path, *, library: str, version: str, trusted: Collection[str] = ()) -> tuple[bytes, PlanManifest]:
    """Read a plan that is safe to hand to TensorRT.

    Args:
        file: the plan; its manifest lies beside it.
        library: what is to run it.
        version: of that library: plans of another are stale.
        trusted: SHA-256 of manifests of plans made elsewhere, as their maker told them: those are taken without this
            user's seal.

    Returns:
        The bytes that were checked (the file is read once) and the manifest.

    Raises:
        ArtifactError: if the plan has no manifest, was sealed by nobody here, is stale, or differs by one bit.
    """
    size, manifest = file_size(file), load_manifest(file)
    if not (_is_ours(manifest) or sha256(manifest_of(file)) in trusted):
        raise ArtifactError(
            f"{file}: its manifest was not sealed by this user's cache, nor is it one that is trusted; refused, as a "
            "plan is code. Build it here, or trust it: by the SHA-256 of its manifest, from whoever made it"
        )
    if (manifest.library, manifest.version) != (library, version):
        raise ArtifactError(
            f"{file}: was built by {manifest.library} {manifest.version}; here is {library} {version}: build it again"
        )
    if size != manifest.bytes:
        raise ArtifactError(f"{file}: {size} bytes; its manifest says {manifest.bytes}: build it again")
    try:
        content = file.read_bytes()
    except (OSError, MemoryError) as error:
        raise ArtifactError(f"{file}: cannot be read ({one_line(error)})") from error
    if not _same(hashlib.sha256(content).hexdigest(), manifest.sha256):
        raise ArtifactError(f"{file}: its bytes are not those its manifest describes: build it again")
    return content, manifest


def _same(ours: str, given: str) -> bool:
    """Compare digests without telling by the time it takes where they differ."""
    return hmac.compare_digest(ours.encode(), given.encode())


def joined(hashes: Sequence[str]) -> str:
    """Return one hash for several files that belong together; that of the file, where there is one alone."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _is_ours(manifest: PlanManifest) -> bool:
    return is_sealed(_text(manifest).encode(), manifest.seal)


def _text(manifest: PlanManifest) -> str:
    """The manifest without its seal, always the same way."""
    return json.dumps(asdict(replace(manifest, seal="")), sort_keys=True)


def _secret() -> bytes:
    """Read this user's key, made where there is none; many processes may ask at once.

    Raises:
        BackendError: if it cannot be kept where nobody else reads or writes it.
    """
    try:
        file = cache_folder() / KEY_FILE
        if not file.exists():
            scratch = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
            try:
                with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                    out.write(secrets.token_bytes(KEY_BYTES))
                    out.flush()
                    os.fsync(out.fileno())
                with contextlib.suppress(FileExistsError):
                    os.link(scratch, file)  # fails where another process was first: its key is the one
            finally:
                scratch.unlink(missing_ok=True)
        status, key = file.stat(), file.read_bytes()
    except (Unavailable, OSError) as error:
        raise BackendError(f"the key that seals plans cannot be kept: {one_line(error)}") from error
    if len(key) != KEY_BYTES or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise BackendError(f"{file}: needs to be {KEY_BYTES} bytes that only you can read; remove it, then build again")
    return key
