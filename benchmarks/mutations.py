"""Ways to spoil a model folder: one changed file at a time, drawn from a seed, so that every case can be made again."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = tuple[str, str, bytes]  # what was done, to which file, its new bytes

NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    4096,
    65536,
    10**6,
    10**9,
    2**31,
    2**63,
    2**64,
    10**400,
    0.5,
    1.0,
    1e-5,
)
ODD: tuple[Any, ...] = (
    float("nan"), float("inf"), -float("inf"), 1e308, True, False, None, "", "8", "fp16", "../x", "a\nb", "\x00",
    "\ud800", "x" * 5000, [], [[]], [1, [2]], [-1, 0], [8, 8, 8], ["a", "b"], ["DownBlock2D"] * 17, {}, {"a": 1},
    {"channels": 2},
)  # fmt: skip
TEXTS = (b"", b"null", b"[]", b"3", b"{}", b"{", b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50,
         b'{"a":' * 900 + b"1" + b"}" * 900, b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"x":' + b"9" * 5000 + b"}",
         b"\x80abc", b"{" + b" " * (4 * 2**20) + b"}", b'{"x":[' + b"[]," * 10**6 + b"[]]}")  # fmt: skip
SHARDS = ("../outside.safetensors", "/etc/passwd", "", ".", "..", "a/b.safetensors", "..\\x.safetensors",
          "no.safetensors", "config.json", "x" * 300 + ".safetensors", "a\nb.safetensors", "\x00.safetensors",
          "link.safetensors", "folder.safetensors", "out.bin", "weights.pt", 3, None, ["a"])  # fmt: skip
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "X",
    "",
    3,
)
NAMES = ("", "conv_in.weight", "__metadata__", "x" * 3000, "a\nb", "\ud800", "target_embedding.linear_1.weight")


def mutate(folder: Path, draw: random.Random) -> Change:
    """Choose one file of a valid model folder and spoil it."""
    name = draw.choice(sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".json", ".safetensors")
                              and entry.is_file() and not entry.is_symlink()))  # fmt: skip
    ways = _TENSOR_WAYS if name.endswith(".safetensors") else _JSON_WAYS
    way = draw.choice(ways + ((_shard_map,) * 16 if ".index." in name else ()))
    return way.__name__.strip("_"), name, way((folder / name).read_bytes(), draw)


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed, most = bytearray(data), draw.choice((16, 400, len(data)))
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(min(most, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((0, 1, 7, 8, 9, draw.randrange(len(data)), len(data) - 1))]


def _pad(data: bytes, draw: random.Random) -> bytes:
    extra = bytes(draw.choice((1, 8, 4096)))
    return draw.choice((data + extra, extra + data, data + data))


def _foreign(data: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        (b"", b"PK\x03\x04" + data, b"\x80\x02}q\x00.", b"\x89PNG\r\n\x1a\n" + data, draw.randbytes(64), b"\n" * 99)
    )


def _text(data: bytes, draw: random.Random) -> bytes:
    return draw.choice(TEXTS)


def _length(data: bytes, draw: random.Random) -> bytes:
    right = int.from_bytes(data[:8], "little")
    wrong = (
        0,
        1,
        2,
        right - 1,
        right + 1,
        right - 8,
        right + 8,
        len(data),
        len(data) - 8,
        2**31,
        2**62,
        2**63,
        2**64 - 1,
    )
    return struct.pack("<Q", draw.choice(wrong) % 2**64) + data[8:]


def _with_header(data: bytes, edit: Callable[[dict[str, Any]], str | None]) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    new = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


def _header(data: bytes, draw: random.Random) -> bytes:
    """Edit one entry of the header: its type, shape, place, or a value of another kind."""

    def edit(header: dict[str, Any]) -> None:
        entry = header[draw.choice([name for name in header if name != "__metadata__"])]
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        kind = draw.choice(("dtype", "shape", "data_offsets", "lost", "more", "odd"))
        if kind == "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        elif kind == "shape":
            huge = ([2**40] * 2, [2**62, 4], [2**63], [2**64], [0], [0] + shape, [-1] + shape, [1] * 5000 + shape)
            moved = (shape[::-1], [1] + shape, shape + [1], [], shape[:-1], [float(n) for n in shape], [str(shape)])
            entry["shape"] = draw.choice(huge + moved)
        elif kind == "data_offsets":
            entry["data_offsets"] = draw.choice((
                [begin, end + 4], [begin + 4, end + 4], [begin - 4, end], [0, end - begin], [end, begin], [-4, end],
                [begin], [begin, end, end], [begin, 2**63], [2**64 - 4, 2**64 - 4 + end - begin], [begin, 2**70], [],
                None, [0.5, 4.5],
            ))  # fmt: skip
        elif kind == "lost":
            del entry[draw.choice(sorted(entry))]
        elif kind == "more":
            entry["more"] = 1
        else:
            entry[draw.choice(sorted(entry))] = draw.choice(ODD + NUMBERS)

    return _with_header(data, edit)


def _table(data: bytes, draw: random.Random) -> bytes:
    """Edit the header as a whole: names lost, added, swapped, moved, listed twice; metadata of other kinds."""

    def edit(header: dict[str, Any]) -> str | None:
        names = [name for name in header if name != "__metadata__"]
        one, two = draw.choice(names), draw.choice(names)
        kind = draw.choice(
            ("lose", "rename", "swap", "overlap", "metadata", "twice", "retyped twice", "nested", "many")
        )
        if kind == "lose":
            del header[one]
        elif kind == "rename":
            header[draw.choice((*NAMES, one + "x"))] = header.pop(one)
        elif kind == "swap":
            header[one], header[two] = header[two], header[one]
        elif kind == "overlap":
            header[one] = header[two]
        elif kind == "metadata":
            header["__metadata__"] = draw.choice((*ODD, *NUMBERS, {"a": "b"}, header[one]))
        elif kind == "nested":
            header[one] = json.loads("[" * 60 + "]" * 60)
        elif kind == "many":
            header |= {f"extra{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        else:
            again = (
                header[one] if kind == "twice" else header[one] | {"dtype": draw.choice(("BF16", "F16", "F32", "I32"))}
            )
            return json.dumps(header)[:-1] + ", " + json.dumps({one: again})[1:]
        return None

    return _with_header(data, edit)


def _field(data: bytes, draw: random.Random) -> bytes:
    """Change one or two values of a JSON file, anywhere in it."""
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2))):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw.choice(keys) if keys else None
            if key is None or not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.4:
                break
            place = place[key]
        if key is not None:
            place[key] = draw.choice(ODD + NUMBERS)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _key(data: bytes, draw: random.Random) -> bytes:
    """Lose, rename, add or repeat one key of a JSON object."""
    value = json.loads(data)
    key = draw.choice(sorted(value))
    kind = draw.choice(("lose", "rename", "add", "repeat", "repeat otherwise"))
    if kind == "lose":
        del value[key]
    elif kind == "rename":
        value[key.upper()] = value.pop(key)
    elif kind == "add":
        value[draw.choice((*NAMES, "_more", "layers_per_block", "num_class_embeds"))] = draw.choice(ODD + NUMBERS)
    else:
        again = value[key] if kind == "repeat" else draw.choice(ODD[10:] + NUMBERS)
        return (json.dumps(value)[:-1] + ", " + json.dumps({key: again})[1:]).encode("utf-8", "surrogatepass")
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _sizes(data: bytes, draw: random.Random) -> bytes:
    """Ask for a network of absurd but consistent sizes."""
    value = json.loads(data)
    count, layers = draw.choice(((16, 64), (16, 16), (2, 64), (16, 1), (3, 8)))
    sizes = {
        "block_out_channels": [draw.choice((8, 32, 4096, 65536))] * count,
        "down_block_types": [value.get("down_block_types", ["DownBlock2D"])[0]] * count,
        "up_block_types": [value.get("up_block_types", ["UpBlock2D"])[-1]] * count,
        "layers_per_block": layers,
        "transformer_layers_per_block": draw.choice((1, 64)),
        "num_class_embeds": draw.choice((None, 10**6)),
        "time_embedding_dim": draw.choice((None, 10**6)),
    }
    kept = {name: size for name, size in sizes.items() if name in value or draw.random() < 0.3}
    return json.dumps({**value, **kept}).encode()


def _shard_map(data: bytes, draw: random.Random) -> bytes:
    """Send tensors of an index to other files, or to none."""
    value = json.loads(data)
    table = value["weight_map"]
    name, shards = draw.choice(sorted(table)), sorted(set(table.values()))
    kind = draw.choice(("elsewhere", "all elsewhere", "other shard", "lose", "lose shard", "more", "whole", "renamed"))
    if kind == "elsewhere":
        table[name] = draw.choice(SHARDS)
    elif kind == "all elsewhere":
        place = draw.choice(SHARDS)
        value["weight_map"] = {key: place for key in table}
    elif kind == "other shard":
        table[name] = next(shard for shard in shards if shard != table[name])
    elif kind == "lose":
        del table[name]
    elif kind == "lose shard":
        value["weight_map"] = {key: shard for key, shard in table.items() if shard != shards[0]}
    elif kind == "more":
        table[draw.choice(NAMES)] = draw.choice((*shards, *SHARDS))
    elif kind == "whole":
        value["weight_map"] = draw.choice(ODD + NUMBERS)
    else:
        table[name + "x"] = table.pop(name)
    return json.dumps(value).encode("utf-8", "surrogatepass")


_Way = Callable[[bytes, random.Random], bytes]
_TENSOR_WAYS: tuple[_Way, ...] = (
    _flip,
    _flip,
    _cut,
    _pad,
    _foreign,
    _length,
    _header,
    _header,
    _header,
    _table,
    _table,
)
_JSON_WAYS: tuple[_Way, ...] = (_flip, _cut, _pad, _foreign, _text, _field, _field, _field, _field, _key, _key, _sizes)
