"""Inputs that are well made and say absurd things. Damage to bytes does not come so far: lengths, checksums and
compression catch it at the door. Every maker draws from its random generator alone."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# --- words and trees ----------------------------------------------------------------------------------------------

TOKENS = (
    "&a ", "*a", "&a [*a]", "&a {b: *a}", "<<: *a", "!!python/object/apply:os.system [ls]", "!!int x", "!!int ''",
    "!!float x", "!!bool x", "!!timestamp x", "!!binary '*'", "!!set {a, b}", "!!omap [a]", "!!pairs [a: b]", "!<x> y",
    "2020-13-45", "2020-01-01", "12:61:61", "0x" + "f" * 6000, "9" * 5000, "0b", "0o9", ".nan", ".inf", "-.inf",
    "1e999", "[" * 3000, "{" * 3000, "- " * 3000, "? [a]\n: b", "? {a: b}\n: c", "\t", "\x00", "\ufeff", "---\n",
    "...\n", "%YAML 9.9\n", "'", '"', "|\n", ">", "#", ": ", "{a: 1, a: 2}", "x" * 100_000, "\\u0000", "\ud800",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**4200, 1e308, -1e308, 5e-324, float("nan"), float("inf"),
    -float("inf"), "", " ", "x" * 100_000, "\u202e\u0000\ufeff", "\ud800", "日本", "1e999", "nan", "../../etc", "~",
    [], {}, [[]], [None], {"": None}, [1, "a", None, {}], {"a": {"b": []}},
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    deep: Any = "x"
    for _ in range(rng.choice((3, 60, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return copy.deepcopy(rng.choice((*VALUES, deep)))  # a tree may be changed again


def odd_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of plain data with values replaced, removed, renamed or put elsewhere."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 5))):
        spots: list[tuple[Any, Any]] = []
        stack = [tree]
        while stack:
            node = stack.pop()
            pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, value in pairs:
                spots.append((node, key))
                stack.append(value)
        if not spots:
            return odd_value(rng)
        node, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind <= 2:
            node[key] = odd_value(rng)
        elif kind == 3:
            other, name = rng.choice(spots)
            node[key] = json.loads(json.dumps(other[name]))
        elif kind == 4:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(("", "x" * 5000, "a.b", "0", "\u202e", str(key)[:-1], str(key).upper()))] = node.pop(key)
    return tree


def as_json(tree: Any) -> str:
    try:
        return json.dumps(tree)
    except RecursionError:  # odd values within odd values
        return "[" * 3000


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def laughs(mark: str, levels: int) -> str:
    """Aliases of aliases: nine to the power of `levels` values, or merged mappings."""
    lines = [f"a0: &a0 {'{x: 1}' if mark == '<<' else '[x, x]'}"]
    for i in range(1, levels):
        nine = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{nine}], k{i}: 1}}" if mark == "<<" else f"a{i}: &a{i} [{nine}]")
    return "\n".join(lines)


def configuration(trees: list[Any], rng: random.Random) -> bytes:
    """YAML with odd values, or with aliases that would grow without end."""
    if rng.random() < 0.05:
        key = rng.choice(("source", "ipc", "methods"))
        return encoded(f"{laughs(rng.choice(('', '<<')), 12)}\n{key}: *a11\n")
    return record(rng.choice(trees), rng)  # JSON is YAML


def setting(keys: list[str], rng: random.Random) -> bytes:
    value = rng.choice(TOKENS) if rng.random() < 0.5 else as_json(odd_value(rng))
    return encoded(f"{rng.choice(keys)}={value}")


def record(tree: Any, rng: random.Random) -> bytes:
    return encoded(as_json(odd_tree(tree, rng)))


# --- images -------------------------------------------------------------------------------------------------------


def png(seeds: list[bytes], rng: random.Random) -> bytes:
    """A PNG with an odd chunk in it, whose checksum is right."""
    data = rng.choice(seeds)
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    if kind == b"IHDR" and rng.random() < 0.7:
        width, height = (rng.choice((0, 1, 5, 2**15, 2**31 - 1, 2**32 - 1)) for _ in range(2))
        depth, color = rng.choice((0, 1, 2, 4, 8, 16, 255)), rng.choice((0, 2, 3, 4, 6, 7))
        body = struct.pack(">IIBBBBB", width, height, depth, color, *(rng.choice((0, 0, 1, 9)) for _ in range(3)))
    elif kind == b"IDAT" and rng.random() < 0.7:
        body = zlib.compress(bytes(rng.choice((0, 1, 100, 10**7))))
    elif body:
        changed = bytearray(body)
        for _ in range(rng.choice((1, 4))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        body = bytes(changed)
    name = rng.choice((kind, kind, kind, b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"tRNS", b"PLTE", b"fcTL", b"fdAT"))
    chunks[i] = name, body
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks) + 1), rng.choice(chunks))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return data[:8] + b"".join(parts)


# --- tensors ------------------------------------------------------------------------------------------------------


def odd_array(like: np.ndarray, rng: random.Random) -> np.ndarray:
    kind = rng.randrange(7)
    if kind == 0:
        return like.astype(rng.choice((bool, np.int8, np.int32, np.uint16, np.float16, np.float64)))
    if kind == 1:
        shapes = [(), (0,), (6,), (6, 1), (6, 3, 0, 0), (6, 1, 4, 4), (6, 4, 4, 3), (0, 3, 4, 4), (6, 3, 4, 400)]
        return np.zeros(rng.choice([*shapes, (5, 3)]), like.dtype)
    if kind == 2:
        return like[: rng.randrange(len(like) + 1)] if like.ndim else like
    if kind == 3:
        return np.full(like.shape, rng.choice((-1, 0, 2**31 - 1, -(2**63), 2**62)), np.int64)
    if kind == 4:
        return np.full(like.shape, rng.choice((np.nan, np.inf, -np.inf, 1e38, 1e-45, -1)), np.float32)
    return like.T if kind == 5 else np.concatenate([like, like]) if like.ndim else like


def odd_arrays(rng: random.Random) -> dict[str, np.ndarray]:
    """The arrays of a set of six images of three classes, some of them odd or missing."""
    g = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "images": g.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8),
        "labels": np.array([0, 0, 1, 1, 2, 2]),
    }
    if rng.random() < 0.3:
        arrays["images"] = (arrays["images"] / 255).astype(np.float32)
    if rng.random() < 0.4:
        arrays |= {"weights": np.ones(6, np.float32), "soft_labels": g.random((6, 3)).astype(np.float32)}
    if rng.random() < 0.3:
        arrays |= {"mean": np.full(3, 0.5, np.float32), "std": np.full(3, 0.2, np.float32)}
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(arrays))
        arrays[name] = odd_array(arrays[name], rng)
    if rng.random() < 0.1:
        arrays.pop(rng.choice(list(arrays)))
    return arrays


def safetensors(rng: random.Random) -> bytes:
    """Odd arrays; half of the files also say odd things of them in a header whose length is right."""
    from safetensors.numpy import save

    data = save({k: np.ascontiguousarray(v) for k, v in odd_arrays(rng).items()})
    if rng.random() < 0.5:
        return data
    (length,) = struct.unpack("<Q", data[:8])
    header = record(json.loads(data[8 : 8 + length]), rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def npz(rng: random.Random) -> bytes:
    """Odd arrays, also of text and of objects; some headers of members are damaged below the archive's checksums."""
    members = {}
    for name, array in odd_arrays(rng).items():
        if rng.random() < 0.1:
            strange = ("text", "2020-01-01", [{"a": 1}], b"bytes")
            array = np.array(rng.choice(strange), dtype=rng.choice((None, object, "U9", "S9")))
        buffer = io.BytesIO()
        np.save(buffer, array)
        members[name] = bytearray(buffer.getvalue())
    if rng.random() < 0.4:
        member = members[rng.choice(list(members))]
        for _ in range(rng.choice((1, 4))):
            member[rng.randrange(min(128, len(member)))] = rng.randrange(256)
    buffer = io.BytesIO()
    way = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w") as f:
        for name, content in members.items():
            # without a date it would be the present one
            f.writestr(zipfile.ZipInfo(f"{name}.npy" if rng.random() < 0.97 else name), bytes(content), way)
    return buffer.getvalue()


# --- tables and tars ----------------------------------------------------------------------------------------------


def odd_column(n: int, images: list[bytes], rng: random.Random) -> pa.Array:
    def some(values: list, kind: pa.DataType | None = None) -> pa.Array:
        return pa.array([values[i % len(values)] for i in range(n)], kind)

    columns = (
        some([-1, 0, 1, 2, 3, 2**40], pa.int64()),
        some([0, 0, 1, 1, 2, None], pa.int32()),
        some([2**64 - 1], pa.uint64()),
        some([0.0, float("nan"), 1.5, 2.0, 1e300, -1.0]),
        some(["zebra", "ant", "", "日本", "x" * 9999, "\x00"]),
        some(["a", "b", None]),
        some([True, False]),
        pa.nulls(n),
        some([b"", b"\x89PNG", *images]),
        some([[1, 2], [], None]),
        some([["a"], ["b"], ["c"]]),
        some([{"bytes": b"x", "path": "a"}]),
        some([{"bytes": None, "path": "../../x.png"}]),
        some([{"bytes": None, "path": None}]),
        some([{"path": 3}]),
        some([{"bytes": "text", "path": "x"}]),
        some([0], pa.timestamp("us")),
        some([0], pa.date32()),
        some([0], pa.duration("s")),
        some(["a", "b", "c"]).dictionary_encode(),
        some([1, 2, 3], pa.decimal128(20, 2)),
    )
    return rng.choice(columns)


def parquet(table: pa.Table, images: list[bytes], rng: random.Random) -> bytes:
    """A table with columns of other types, without some, or with odd words about it in its metadata."""
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(6)
        i = rng.randrange(table.num_columns)
        name = table.column_names[i]
        if kind <= 2:
            table = table.set_column(i, name, odd_column(len(table), images, rng))
            if rng.random() < 0.7:
                table = table.replace_schema_metadata({})
        elif kind == 3 and table.num_columns > 1:
            table = table.remove_column(i) if rng.random() < 0.5 else table.slice(0, rng.randrange(6))
        elif kind == 4:
            facts = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            table = table.replace_schema_metadata({"huggingface": record(facts, rng)})
        else:
            name = rng.choice((name, "image", "label", "", "x"))
            table = table.append_column(name, odd_column(len(table), images, rng))
    buffer = io.BytesIO()
    compression = rng.choice(("none", "snappy", "gzip", "zstd"))
    with contextlib.suppress(pa.ArrowException):  # not every odd table can be written: what there is then is no file
        pq.write_table(table, buffer, row_group_size=rng.choice((2, 100)), compression=compression)
    return buffer.getvalue()


def tar(images: list[bytes], rng: random.Random) -> bytes:
    """Pairs of images and labels with odd names, labels and headers, whose checksums are right."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as f:
        for i, image in enumerate(images):
            kind = rng.random()
            key = rng.choice(("x" * 300, "é", "../x", "/x")) if rng.random() < 0.02 else f"{i:04d}"
            label, end = str(i % 3).encode(), "cls"
            if kind < 0.1:
                label = rng.choice((b"", b"-1", b"9" * 5000, b"\xff\xfe", b"zebra", b"--1", "²".encode(), b"1\n2"))
            elif kind > 0.9:
                end = "json"
                odd = as_json(odd_tree({"label": i % 3, "x": [1]}, rng))
                label = encoded(rng.choice((odd, odd[:-1], "[" * 100_000)))
            for name, content in ((f"{key}.png", image), (f"{key}.{end}", label)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                f.addfile(info, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    if rng.random() < 0.5:
        at = rng.choice(headers)
        for _ in range(rng.choice((1, 4))):
            data[at + rng.randrange(500)] = rng.randrange(256)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)
