"""Spoiled model files: 10,000 of them, each loaded whole and right, or refused with one typed line.

``python -m fastdiff.benchmarks.fuzz_files --count 10000 --seed 0`` prints the result as JSON; exit 1 if any load ends
otherwise. Loads run in child processes, so that a crash is counted, and each child spoils one file of a folder, loads
the folder with ``load_model``, and puts the file back. Times are CPU time of the child, memory is the rise of the
child's peak resident set (``VmHWM``, reset before each load) less the bytes of the spoiled file.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.benchmarks.mutations import mutate
from fastdiff.errors import FastdiffError
from fastdiff.models.config import UNetConfig
from fastdiff.models.files import write_tensors
from fastdiff.models.unet import TargetConfig, UNet
from fastdiff.models.weights import CONFIG, MANIFEST, STEM, Model, ModelInfo, load_model, save_model

LIMIT_S, LIMIT_BYTES = 2.0, 200 * 10**6
PER_CHILD, PER_LOAD_S = 2000, 10.0  # PER_LOAD_S of wall time is a hang, on however busy a machine
VARIANTS = {"plain": None, "shards": "fp16", "text": None}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
_SIZES: dict[str, Any] = {"in_channels": 1, "out_channels": 1, "block_out_channels": [4, 8], "norm_num_groups": 2,
                          "layers_per_block": 1, "attention_head_dim": 4}  # fmt: skip
_PLAIN = {**_SIZES, "sample_size": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "num_class_embeds": 4,
          "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
_TEXT = {**_SIZES, "_class_name": "UNet2DConditionModel", "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
         "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 6}  # fmt: skip


def make_folders(root: Path) -> None:
    """Write the valid folders: a flow map, the same in shards under a variant's names, and a network with text."""
    torch.manual_seed(0)
    config, target = UNetConfig.from_dict(_PLAIN), TargetConfig(channels=8)
    info = ModelInfo(prediction="mean_velocity", target=target, classes=("a", "b"), null_label=3, crop=1)
    for name in ("plain", "shards"):
        save_model(Model(UNet(config, target), info), root / name, torch.float32)
    save_model(Model(UNet(UNetConfig.from_dict(_TEXT)), ModelInfo()), root / "text", torch.float32)
    whole = root / "shards" / f"{STEM}.safetensors"
    tensors = {name: value.half() for name, value in read_plainly(whole).items()}
    whole.unlink()
    table: dict[str, str] = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        shard = f"{STEM}.fp16-0000{i}-of-00002.safetensors"
        write_tensors(root / "shards" / shard, {name: tensors[name] for name in names}, {"format": "pt"})
        table |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (root / "shards" / f"{STEM}.safetensors.index.fp16.json").write_text(json.dumps(index))
    (root / "shards" / "link.safetensors").symlink_to(root / "plain" / f"{STEM}.safetensors")
    (root / "shards" / "folder.safetensors").mkdir()


def read_plainly(file: Path) -> dict[str, Tensor]:
    """A second reader of safetensors, for files that were accepted: the bytes as they lie, without any check."""
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=torch.uint8)
            found[name] = raw.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def difference(model: Model, folder: Path, variant: str | None) -> str | None:
    """Name the first thing in which a loaded model is not what its files say, or fails when it is used."""
    said = json.loads((folder / CONFIG).read_text())
    for key, value in asdict(model.network.config).items():
        if key in said and (value != (tuple(said[key]) if isinstance(said[key], list) else said[key])):
            return f"config: {key}"
    said = json.loads((folder / MANIFEST).read_text())
    for key, value in json.loads(json.dumps(asdict(model.info))).items():
        if key in said and value != ({**value, **said[key]} if isinstance(value, dict) else said[key]):
            return f"manifest: {key}"
    files = [folder / f"{STEM}.safetensors", *([folder / "target_embedding.safetensors"] if model.info.target else ())]
    if variant:
        table = json.loads((folder / f"{STEM}.safetensors.index.{variant}.json").read_text())["weight_map"]
        files[:1] = [folder / shard for shard in set(table.values())]
    expected = {name: value for file in files for name, value in read_plainly(file).items()}
    loaded = model.network.state_dict()
    if loaded.keys() != expected.keys():
        return "names of tensors"
    for name, value in expected.items():
        if not torch.equal(loaded[name].nan_to_num(nan=12345.0), value.float().nan_to_num(nan=12345.0)):
            return f"tensor {name}"
    return use(model)


@torch.no_grad()
def use(model: Model) -> str | None:
    """Run the network once, on eight by eight pixels."""
    config, options = model.network.config, {}
    if config.conditional:
        options["encoder_hidden_states"] = torch.zeros(1, 3, config._each("cross_attention_dim", 0))
    labels = torch.zeros(1, dtype=torch.int64) if config.num_class_embeds else None
    x = torch.zeros(1, config.in_channels, 8, 8)
    try:
        shape = model.network(x, torch.ones(1), labels, **options).shape
    except Exception as error:  # whatever it is, it came too late
        return f"used: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None if shape == (1, config.out_channels, 8, 8) else f"used: shape {list(shape)}"


def _memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def one(number: int, seed: int, root: Path) -> dict[str, Any]:
    """Spoil one file, load its folder, put the file back; return what happened."""
    draw = random.Random(f"{seed}/{number}")
    kind = draw.choice(sorted(VARIANTS))
    folder = root / kind
    way, name, data = mutate(folder, draw)
    right = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    record: dict[str, Any] = {"number": number, "way": way, "file": f"{kind}/{name}", "problem": None}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _memory("VmRSS"), time.process_time()
    model = None
    try:
        model = load_model(folder, variant=VARIANTS[kind])
        record["outcome"] = "loaded"
    except FastdiffError as error:
        record["outcome"] = type(error).__name__
        record["characters"] = len(str(error))
        if "\n" in str(error):
            record["problem"] = f"more than one line: {str(error)[:300]!r}"
    except BaseException as error:  # a panic of a native library is none of Exception's
        record["outcome"], record["problem"] = "other", f"{type(error).__name__}: {str(error)[:300]!r}"
    record["seconds"] = time.process_time() - start
    record["bytes_over"] = max(0, _memory("VmHWM") - before - len(data))
    if model is not None:
        record["problem"] = difference(model, folder, VARIANTS[kind])
    (folder / name).write_bytes(right)
    return record


def _child(begin: int, end: int, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        make_folders(Path(place))
        for kind, variant in VARIANTS.items():  # the first load costs what it imports
            problem = difference(load_model(Path(place) / kind, variant=variant), Path(place) / kind, variant)
            assert problem is None, f"{kind}: {problem}"
        for number in range(begin, end):
            print(json.dumps(one(number, seed, Path(place))), flush=True)


def _records(count: int, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Run children until every file has a record; one that a child died of gets its own."""
    done = 0
    while done < count:
        end = min(count, done + PER_CHILD)
        words = ["--child", str(done), str(end), "--seed", str(seed), "--folder", str(folder)]
        command = [sys.executable, "-m", "fastdiff.benchmarks.fuzz_files", *words]
        with (folder / "errors.txt").open("w+") as errors:
            try:
                limit = 120 + PER_LOAD_S * (end - done)
                ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=limit)
                output, how = ran.stdout, f"exit code {ran.returncode}"
            except subprocess.TimeoutExpired as expired:
                output, how = (expired.stdout or b"").decode(), "a hang"
            errors.seek(0)
            said = errors.read()[-300:]
        lines = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
        if not lines and done == 0:
            raise RuntimeError(f"the loads cannot start ({how}): {said}")
        yield from lines
        done += len(lines)
        if done < end:
            yield {"number": done, "way": "?", "file": "?", "outcome": "crash", "problem": f"{how}: {said}",
                   "seconds": 0.0, "bytes_over": 0}  # fmt: skip
            done += 1


def fuzz(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Spoil and load ``count`` files.

    Args:
        count: how many.
        seed: of the spoiling; equal seeds make equal files.
        folder: a place for temporary files.

    Returns:
        ``outcomes`` (counts), ``ways`` (counts), ``failures`` (every load that was neither right nor refused in one
        typed line, within ``LIMIT_S`` and ``LIMIT_BYTES``), ``crashes``, and the records ``slowest``, ``largest`` and
        ``longest_message``.
    """
    records = list(_records(count, seed, folder))
    for record in records:
        over = record["seconds"] > LIMIT_S or record["bytes_over"] > LIMIT_BYTES
        record["problem"] = record["problem"] or ("over the limits" if over else None)
    return {
        "count": len(records),
        "seed": seed,
        "outcomes": dict(Counter(record["outcome"] for record in records)),
        "ways": dict(Counter(record["way"] for record in records)),
        "crashes": sum(record["outcome"] == "crash" for record in records),
        "failures": [record for record in records if record["problem"]],
        "slowest": max(records, key=lambda record: record["seconds"]),
        "largest": max(records, key=lambda record: record["bytes_over"]),
        "longest_message": max(records, key=lambda record: record.get("characters", 0)),
        "cpu_seconds_of_loads": round(sum(record["seconds"] for record in records), 1),
    }


def main() -> int:
    """Spoil, load, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child, options.seed, options.folder)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        found = fuzz(options.count, options.seed, Path(place))
    print(json.dumps(found, indent=2))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
