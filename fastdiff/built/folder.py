"""What lies in a built folder, and whether it is what was put there.

``built.json`` describes the model, every preset (a way to draw images) and every file with its size and SHA-256.
"""

from __future__ import annotations

import hmac
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.errors import ArtifactError, PlanError
from fastdiff.models.files import file_size, inside, read_json, sha256, shown

BUILT, FORMAT = "built.json", 1
TABLES = "tables.safetensors"
STEPS, FUSED = "steps", "fused"


@dataclass(frozen=True)
class Preset:
    """One way to draw images.

    Args:
        kind: ``"steps"``: a graph of one evaluation, walked on the host by a table; ``"fused"``: one graph, noise in,
            images out.
        graph: ONNX file.
        sampler, num_inference_steps, guidance_scale: what was built, for people.
        scale: deviation of the starting state; a fused graph is given noise of deviation 1 and scales it by itself.
        table: structure of the table; its numbers lie in ``tables.safetensors`` under the preset's name.
        plans: engines of the graph, by GPU architecture.
    """

    kind: str
    graph: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    scale: float
    table: dict[str, Any] | None
    plans: dict[str, str]


@dataclass(frozen=True)
class Words:
    """How prompts become what the network reads: a tokenizer of the library ``tokenizers``, and an encoder's graph."""

    tokenizer: str
    graph: str


@dataclass(frozen=True)
class Text:
    """What a folder of a text-to-image model has besides.

    Args:
        encoders: one, or SDXL's two, whose tokens lie side by side.
        decoder: graph that makes images of what is drawn.
        grow: pixels of an image for one of what is drawn, in height and width.
        sized: does the network read the image's size (SDXL)?
        zero_empty_prompt: is it guided away from zeros where there is no negative prompt?
        strength_width: of the guidance strength as the network reads it (LCM); None: it does not.
    """

    encoders: tuple[Words, ...]
    decoder: str
    grow: int
    sized: bool
    zero_empty_prompt: bool
    strength_width: int | None


@dataclass(frozen=True)
class Folder:
    """A built folder, read and checked. ``trusted`` says whether the caller named the hash of its description."""

    root: Path
    model_sha256: str
    shape: tuple[int, int, int]  # channels, height, width of what is drawn, before the crop
    crop: int
    classes: tuple[str, ...]
    null_label: int | None
    labelled: bool
    two_time: bool
    presets: dict[str, Preset]
    default: str
    files: dict[str, dict[str, Any]]  # name -> {"sha256", "bytes"}
    trusted: bool
    text: Text | None = None  # of a text-to-image model

    def file(self, name: str) -> Path:
        """Return a file of the folder, its content checked.

        Raises:
            ArtifactError: if it is not listed, missing or altered.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.root / BUILT}: {shown(name)} is not among its files")
        path = inside(self.root, name)
        if file_size(path) != self.files[name]["bytes"] or sha256(path) != self.files[name]["sha256"]:
            raise ArtifactError(f"{path}: its bytes are not those {BUILT} describes; build the folder again")
        return path

    def preset(self, name: str | None) -> str:
        """Return the name of a preset, the default for None.

        Raises:
            PlanError: listing those there are.
        """
        if name is not None and name not in self.presets:
            raise PlanError(f"preset is {name!r}; this folder was built with: {', '.join(self.presets)}")
        return name or self.default


def is_built(folder: Path) -> bool:
    """Did ``fastdiff build`` make this folder?"""
    return (folder / BUILT).is_file()


def read_folder(root: Path, trust: str | None = None) -> Folder:
    """Read the description of a built folder.

    Args:
        root: the folder.
        trust: SHA-256 of ``built.json`` as its maker told it; engines that were made elsewhere are then taken.

    Raises:
        ArtifactError: if it is missing, damaged, or not the one that is trusted.
    """
    place = inside(root, BUILT)
    file_size(place)
    if trust is not None and not hmac.compare_digest(sha256(place), trust if trust.isascii() else ""):
        raise ArtifactError(f"{place}: its SHA-256 is {sha256(place)}, not the {trust} that is trusted")
    values = read_json(place)
    if values.pop("format", None) != FORMAT:
        raise ArtifactError(f"{place}: not format {FORMAT}")
    try:
        presets = {str(name): Preset(**preset) for name, preset in values.pop("presets").items()}
        values.pop("versions")
        text = _text(values.pop("text", None))
        folder = Folder(root=root, presets=presets, trusted=trust is not None, text=text, **values)
        _check(folder)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{place}: {type(error).__name__}: {shown(str(error))}") from error
    return Folder(**{**vars(folder), "shape": tuple(folder.shape), "classes": tuple(folder.classes)})


def _text(values: Any) -> Text | None:
    """A TypeError or ValueError says what cannot be."""
    if values is None:
        return None
    text = Text(**(values | {"encoders": tuple(Words(**words) for words in values["encoders"])}))
    names = [name for words in text.encoders for name in (words.tokenizer, words.graph)]
    if not names or not all(isinstance(name, str) for name in (*names, text.decoder)):
        raise ValueError(f"text is {values!r}")
    if type(text.grow) is not int or not 1 <= text.grow <= 64:
        raise ValueError(f"text.grow is {text.grow!r}")
    width = text.strength_width
    if width is not None and not (type(width) is int and 4 <= width <= 1 << 16):
        raise ValueError(f"text.strength_width is {width!r}")
    if not all(type(flag) is bool for flag in (text.sized, text.zero_empty_prompt)):
        raise ValueError(f"text is {values!r}")
    return text


def _check(folder: Folder) -> None:
    """A ValueError names the first value that cannot be."""

    def need(good: bool, name: str, value: Any) -> None:
        if not good:
            raise ValueError(f"{name} is {value!r}")

    def whole(value: Any, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    need(len(folder.shape) == 3 and all(whole(n, 1, 1 << 16) for n in folder.shape), "shape", folder.shape)
    need(whole(folder.crop, 0, (min(folder.shape[1:]) - 1) // 2), "crop", folder.crop)
    need(all(isinstance(name, str) for name in folder.classes), "classes", folder.classes)
    need(folder.null_label is None or whole(folder.null_label, 0, 1 << 31), "null_label", folder.null_label)
    need(type(folder.labelled) is bool and type(folder.two_time) is bool, "labelled", folder.labelled)
    need(isinstance(folder.model_sha256, str), "model_sha256", folder.model_sha256)
    need(bool(folder.presets) and folder.default in folder.presets, "default", folder.default)
    for name, entry in folder.files.items():
        fits = entry.keys() == {"sha256", "bytes"} and isinstance(entry["sha256"], str) and type(entry["bytes"]) is int
        need(fits, f"files.{name}", entry)
    for name, preset in folder.presets.items():
        need(preset.kind in (STEPS, FUSED), f"{name}.kind", preset.kind)
        need(isinstance(preset.sampler, str) and isinstance(preset.graph, str), f"{name}.sampler", preset.sampler)
        need((preset.table is None) == (preset.kind == FUSED), f"{name}.table", preset.kind)
        need(type(preset.scale) is float and math.isfinite(preset.scale), f"{name}.scale", preset.scale)
        need(all(isinstance(plan, str) for plan in preset.plans.values()), f"{name}.plans", preset.plans)
