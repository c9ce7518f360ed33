"""Ways to damage a file: as bytes, and in the terms of its format."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Random = np.random.Generator
NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, np.nan, np.inf,
    "", "x", "\ud800", "7", "a" * 10000, "../../x", "/etc/passwd", [], [1], ["x", None], {}, {"x": 1}, [[[[[]]]]],
]  # fmt: skip
BYTES = [*["flip"] * 3, "cut", "overwrite", "zero", "delete", "insert", "head", "empty", "html", "twice"]


def pick(rng: Random, values: list[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def damage_bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    data, n = bytearray(content), len(content)
    a = int(rng.integers(max(n, 1)))
    b = min(n, a + int(rng.integers(1, 64)))
    how = pick(rng, BYTES)
    if how == "flip" and n:
        data[a] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del data[a:]
    elif how == "overwrite":
        data[a:b] = rng.bytes(b - a)
    elif how == "zero":
        data[a:b] = bytes(b - a)
    elif how == "delete":
        del data[a:b]
    elif how == "insert":
        data[a:a] = rng.bytes(int(rng.integers(1, 64)))
    elif how == "head":  # sizes and types are at the beginning
        a = int(rng.integers(max(1, min(n, 400))))
        data[a : a + 8] = pick(rng, [b"\xff" * 8, bytes(8), struct.pack("<Q", 2**40), struct.pack("<Q", 2**24)])
    elif how == "empty":
        data.clear()
    elif how == "html":
        data[:] = b"<html>Not found</html>"
    elif how == "twice":
        data += content
    return bytes(data), f"{how} at {a} of {n}"


def change(value: Any, rng: Random, nasty: Callable[[Any], Any]) -> str:
    """Change one item somewhere in nested dicts and lists; returns which."""
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    inner = [key for key in places if isinstance(value[key], dict | list) and value[key]]
    if inner and rng.random() < 0.7:
        key = pick(rng, inner)
        return f"{key!r:.40}/{change(value[key], rng, nasty)}"
    key = pick(rng, places) if places else None
    how = rng.random()
    if key is None or how < 0.1:
        if isinstance(value, dict):
            value["unknown"] = pick(rng, NASTY)
        else:
            value.append(pick(rng, NASTY))
        return "an item more"
    if how < 0.2:
        del value[key]
        return f"without {key!r:.40}"
    value[key] = nasty(value[key])
    return f"{key!r:.40} set to {value[key]!r:.60}"


def damage_json(content: bytes, rng: Random) -> tuple[bytes, str]:
    if rng.random() < 0.05:
        return b"[" * 100_000, "deep"
    value = json.loads(content)
    how = change(value, rng, lambda _: pick(rng, NASTY))
    return json.dumps(value).encode(), how


def nasty_tensor(old: Any, rng: Random) -> Any:
    if not isinstance(old, torch.Tensor) or rng.random() < 0.2:
        return pick(rng, NASTY)
    return pick(rng, [
        lambda: old + 1, lambda: torch.full(old.shape, torch.nan), lambda: torch.full(old.shape, torch.inf),
        lambda: old.to(torch.int8), lambda: old.bool(), lambda: old[:1] if old.dim() else old[None], lambda: old[None],
        lambda: torch.zeros(0), lambda: torch.zeros(1).expand(10**6, 10**6), lambda: old.to("meta"),
        lambda: old.to_sparse(), lambda: old.to(torch.complex64), lambda: old.double(), lambda: old.half(),
        lambda: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8), lambda: old.to(torch.float8_e4m3fn),
        lambda: torch.zeros_like(old), lambda: torch.zeros(1).expand(old.shape),
    ])()  # fmt: skip


def damage_torch(content: bytes, rng: Random) -> tuple[bytes, str]:
    kind, file = rng.random(), io.BytesIO()
    if kind < 0.15:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            bomb = pick(rng, [name for name in old.namelist() if "data" in name])
            for name in old.namelist():
                new.writestr(name, bytes(10**8) if name == bomb and kind < 0.05 else old.read(name))
        return file.getvalue(), "deflated"
    value = torch.load(io.BytesIO(content), weights_only=True)
    value = json_like(value)
    how = change(value, rng, lambda old: nasty_tensor(old, rng))
    torch.save(value, file)
    return file.getvalue(), how


def json_like(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, which can be changed."""
    if isinstance(value, dict):
        return {name: json_like(item) for name, item in value.items()}
    return [json_like(item) for item in value] if isinstance(value, list | tuple) else value


def damage_array(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Of a prepared folder's raw numbers."""
    array = np.frombuffer(content, np.int32).copy()
    how = pick(rng, ["value", "value", "float", "more", "fewer", "none"])
    if how == "value" and array.size:
        array[int(rng.integers(array.size))] = pick(rng, [-1, 0, 1, 2**31 - 1, -(2**31), 12345])
    new = {"float": array.astype(float), "more": np.append(array, array), "fewer": array[:-1], "none": array[:0]}
    return new.get(how, array).tobytes(), how


def damage_safetensors(content: bytes, rng: Random) -> tuple[bytes, str]:
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n])
    how = change(header, rng, lambda _: pick(rng, NASTY))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + n :], how


def damage_lines(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Of CSV, or of a tiktoken file: one cell."""
    lines = content.split(b"\n")
    i = int(rng.integers(len(lines)))
    separator = b"," if b"," in content else b" "
    cells = lines[i].split(separator)
    cells[int(rng.integers(len(cells)))] = ascii(pick(rng, NASTY)).encode()
    lines[i] = separator.join(cells)
    return b"\n".join(lines), f"line {i}"


FORMATS = {
    ".json": damage_json, ".pth": damage_torch, ".bin": damage_array, ".csv": damage_lines,
    ".safetensors": damage_safetensors, ".tiktoken": damage_lines,
}  # fmt: skip


def mutate(path: Path, number: int) -> str:
    """Damage a file in the way that the number of the trial says; returns what was done."""
    rng = np.random.default_rng(number)
    content = path.read_bytes()
    damage = FORMATS.get(path.suffix, damage_bytes) if rng.random() < 0.6 else damage_bytes
    content, how = damage(content, rng)
    path.write_bytes(content)
    return f"{path.name}, {how}"
