"""Damaged and hostile inputs: every one is taken, or refused by a documented error, and nothing else.

    python tests/robustness/fuzz.py --inputs 20000 --out results/fuzz.csv

Seeds are made in code and mutated from a fixed random seed: bits, stretches, lengths, and for text also tokens. The
targets called "odd ..." get inputs that are well made and say absurd things (`malformed.py`). Inputs go in batches to
forked processes, so that a crash or a hang costs one input and is counted. `--only TARGET --number N` does a single
one again and lets it fail.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import io
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

BATCH = 50
LIMIT_S = 20.0  # of one input
MORE_BYTES = 4 << 30  # of address space beyond what the harness has
NAMES = ("zebra", "ant", "bee")
NUMBERS = ("0", "-1", "1", "2147483648", "-9223372036854775809", "1e400", ".nan", "1e-320", "0x7f", "true", "null")
ODD = ("\ud7ff", "\u0000", "é", "\u202e", "💥", "\t", "{", "[", "&a [*a]", "!!python/object/apply:os.abort []", "*x")


@dataclass(frozen=True)
class Target:
    name: str
    share: int  # of all inputs, in units
    seeds: list[bytes]
    run: Callable[[bytes, Path], Any]  # an input, and a folder to lay it in
    text: bool = False
    make: Callable[[random.Random], bytes] | None = None  # in place of seeds that are mutated
    refuses: bool = True  # some inputs; else whatever cannot be used is left aside


# --- mutation -----------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random, *, text: bool) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = (_token if text and rng.random() < 0.7 else _raw)(data, rng)
    return data


def _raw(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return bytes([rng.randrange(256)])
    b = bytearray(data)
    i = rng.randrange(len(b))
    # headers are short and decide most
    i = i if rng.random() < 0.5 else min(i, rng.randrange(1, 200)) % len(b)
    j = min(len(b), i + rng.choice((1, 2, 4, 8, 32, 200)))
    kind = rng.randrange(7)
    if kind == 0:
        b[i] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del b[i : len(b) if rng.random() < 0.3 else j]
    elif kind == 2:
        b[i:i] = b[i:j] * rng.choice((1, 2, 50))
    elif kind == 3:
        b[i:j] = rng.randbytes(j - i)
    elif kind == 4:
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, -1, 2 ** (8 * width - 1) - 1, 256 ** (width - 1)))
        b[i : i + width] = (value % 256**width).to_bytes(width, rng.choice(("big", "little")))
    elif kind == 5:
        k = rng.randrange(len(b))
        b[i:j] = b[k : k + (j - i)]
    else:
        b[i:j] = b"\xff" * (j - i)
    return bytes(b)


def _token(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode(errors="replace").splitlines(keepends=True) or [""]
    i = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        key, sep, _ = lines[i].partition(":")
        lines[i] = f"{key}{sep or ':'} {rng.choice((*NUMBERS, *ODD))}\n"
    elif kind == 1:
        lines.insert(i, rng.choice(lines))
    elif kind == 2:
        del lines[i]
    elif kind == 3:
        lines[i] = " " * rng.randrange(8) + lines[i]
    elif kind == 4:
        at = rng.randrange(len(lines[i]) + 1)
        lines[i] = lines[i][:at] + rng.choice((*ODD, *NUMBERS)) + lines[i][at:]
    else:
        lines[i] = lines[i].rstrip("\n") + rng.choice(("[" * 300, "x" * 5000, "- " * 50, "{a: " * 40)) + "\n"
    return "".join(lines).encode(errors="replace")


# --- targets ------------------------------------------------------------------------------------------------------


def targets(root: Path) -> list[Target]:
    """What is fuzzed. `root` holds what several inputs share."""
    import malformed
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    import yaml
    from PIL import Image
    from sets import make
    from toy_world import every_stage

    from dq.config.overrides import apply_settings
    from dq.config.reader import dump_config, to_dict
    from dq.config.schema import RunConfig, load_config
    from dq.core.cards import split_card
    from dq.core.files import read_json, read_tensors, write_json, write_tensors
    from dq.data.images import read_image, read_images
    from dq.data.load import load_source
    from dq.data.source import Split
    from dq.distilled.card import dataset_card
    from dq.distilled.external import load_set
    from dq.distilled.hub import check_record
    from dq.distilled.set import DistilledSet

    def file(name: str, use: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
        def run(data: bytes, folder: Path) -> Any:
            (folder / name).write_bytes(data)
            return use(folder / name)

        return run

    texts = [p.read_bytes() for p in sorted(ROOT.glob("configs/*.yaml"))]
    texts += [(ROOT / "dq" / "config" / "presets" / "demo.yaml").read_bytes(), every_stage(root, root).read_bytes()]
    settings = [
        b"cluster.engine=torch", b"ipc=[1, 10]", b"methods.x.override={cluster: {space: pca}}", b"seed=3",
        b"refine=[{stage: fadrm, sizes: [32, 32], steps: [3, 3]}]", b"teachers.0.net=resnet18",
        b"evaluate.students=[{protocol: classic, epochs: {1: 5, default: 3}}]", b"generate.guidance_interval=[0.1, 5]",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (n, n + 3, 3), dtype=np.uint8)) for n in (5, 32)]
    formats = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

    def encoded(kind: str) -> list[bytes]:
        actual = []
        for picture in (*pictures, pictures[1].convert("L"), pictures[0].convert("P")):
            buffer = io.BytesIO()
            (picture.convert("RGB") if kind in ("JPEG", "WEBP", "PPM") else picture).save(buffer, kind)
            actual.append(buffer.getvalue())
        return actual

    def look(data: bytes, folder: Path) -> Any:
        return read_image(Split(np.zeros(1, np.int64), lambda row: data, "train"), 0, 8, "crop")

    s = make(soft=True)
    s.save(root / "set", "default")
    record = read_json(root / "set" / "default" / "provenance.json")
    parquet = next((root / "set" / "default").glob("*.parquet"))
    write_tensors(root / "x.safetensors", {"a": torch.arange(9.0), "b": torch.zeros(2, 3)}, {"note": "x"})
    write_tensors(root / "foreign.safetensors", {"images": s.images, "labels": s.labels, "weights": s.weights})
    np.savez(root / "foreign.npz", images=s.images.numpy(), labels=s.labels.numpy())
    without = {k: v for k, v in record.items() if k != "files"}  # else the digest of the file would be in the way

    def read_parquet_set(data: bytes, folder: Path) -> Any:
        (folder / "default").mkdir(exist_ok=True)
        write_json(folder / "default" / "provenance.json", without)
        (folder / "default" / parquet.name).write_bytes(data)
        return DistilledSet.load(folder).images_uint8()

    def read_record(data: bytes, folder: Path) -> Any:
        (folder / "default").mkdir(exist_ok=True)
        shutil.copyfile(parquet, folder / "default" / parquet.name)
        (folder / "default" / "provenance.json").write_bytes(data)
        return DistilledSet.load(folder).images_uint8()

    full = {
        **record,
        "labels": {"teachers": ["resnet56", "a"], "by": "x", "temperature": 1.0},
        "refine": [{"stage": "fadrm", "steps": [1, 2], "teachers": ["a"]}],
        "licenses": {"source": "mit", "generator": "cc-by-4.0"},
        "codec": {"path": "me/vae"},
        "dq": "0.1",
    }
    result = {"set": "ddoq", "ipc": "2", "student": "convnet3", "labels": "hard", "protocol": "hard", "settings": "x"}
    result |= {"selected_on": "test", "images": 6, "seeds": 3, "last_mean": 0.5, "last_std": 0.1, "best_mean": 0.6}
    evaluation = {"content": record["content"], "rows": [{**result, "best_std": None}, result]}
    card = dataset_card([record], {"default": evaluation})
    head = {**split_card(card)[0], "x": [1, {"y": 2}]}

    def pulled(data: bytes, folder: Path) -> Any:
        (folder / "x.json").write_bytes(data)
        return dataset_card([check_record(read_json(folder / "x.json"), "default", "me/set")], {}).encode()

    def evaluated(data: bytes, folder: Path) -> Any:
        (folder / "x.json").write_bytes(data)
        return dataset_card([record], {"default": read_json(folder / "x.json")}).encode()

    def card_over(data: bytes, folder: Path) -> Any:
        return dataset_card([record], {}, old=data.decode(errors="replace")).encode()

    def source(name: str, streaming: bool) -> Callable[[bytes, Path], Any]:
        def run(data: bytes, folder: Path) -> Any:
            (folder / name).write_bytes(data)
            actual = load_source(folder, streaming=streaming)
            return read_images(actual.train, range(min(4, len(actual.train))), 8, "crop")

        return run

    def change(data: bytes, folder: Path) -> Any:
        return dump_config(apply_settings(RunConfig(), [data.decode(errors="surrogateescape")]))

    def foreign_folder(data: bytes, folder: Path) -> Any:
        (folder / "train-00000-of-00001.parquet").write_bytes(data)
        return load_set(folder, NAMES).images_uint8()

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        for i, png in enumerate(encoded("PNG")):
            for name, content in ((f"{i}.png", png), (f"{i}.cls", str(i % 3).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    blob = parquet.read_bytes()
    table, pngs = pq.read_table(parquet), encoded("PNG")
    trees = [yaml.safe_load(text) for text in texts]
    shape = to_dict(RunConfig())
    keys = ["ipc", "seed", "methods.ddoq", "teachers.0.net", "refine.0", "evaluate.students.0.lr", "x.y"]
    keys += [f"{name}.{key}" for name, part in shape.items() if isinstance(part, dict) for key in part]

    one, tars = "train-00000-of-00001.parquet", source("train-0000.tar", True)
    read_yaml = file("c.yaml", lambda path: dump_config(load_config(path)))
    tensors = file("x.safetensors", lambda path: load_set(path, NAMES).images_uint8())
    arrays = file("x.npz", lambda path: load_set(path, NAMES).images_uint8())
    damaged = [
        Target("configuration", 40, texts, read_yaml, text=True),
        Target("--set", 30, settings, change, text=True),
        *(Target(f"image {f}", 8, encoded(f), look) for f in formats),
        Target("file of tensors", 15, [(root / "x.safetensors").read_bytes()], file("x.safetensors", read_tensors)),
        Target("set of tensors", 8, [(root / "foreign.safetensors").read_bytes()], tensors),
        Target("set of arrays", 8, [(root / "foreign.npz").read_bytes()], arrays),
        Target("record", 15, [json.dumps(record, indent=2).encode()], file("x.json", read_json), text=True),
        Target("record of a set", 10, [json.dumps(without, indent=2).encode()], read_record, text=True),
        Target("card from the Hub", 5, [card.encode()], card_over, text=True, refuses=False),
        Target("Parquet of a set", 12, [blob], read_parquet_set),
        Target("Parquet as external set", 1, [blob], foreign_folder),
        Target("Parquet source", 1, [blob], source(one, False)),
        Target("Parquet stream", 5, [blob], source(one, True)),
        Target("tar stream", 8, [tar.getvalue()], tars),
    ]

    def tables(rng: random.Random) -> bytes:
        return malformed.parquet(table, pngs, rng)

    made: list[tuple[str, int, Callable[[random.Random], bytes], Callable[[bytes, Path], Any]]] = [
        ("configuration", 20, lambda rng: malformed.configuration(trees, rng), read_yaml),
        ("--set", 20, lambda rng: malformed.setting(keys, rng), change),
        ("image PNG", 20, lambda rng: malformed.png(pngs, rng), look),
        ("set of tensors", 20, malformed.safetensors, tensors),
        ("set of arrays", 20, malformed.npz, arrays),
        ("record of a set", 10, lambda rng: malformed.record(without, rng), read_record),
        ("record from the Hub", 20, lambda rng: malformed.record(full, rng), pulled),
        ("evaluation from the Hub", 10, lambda rng: malformed.record(evaluation, rng), evaluated),
        (
            "card from the Hub",
            10,
            lambda rng: b"---\n" + malformed.configuration([head], rng) + b"\n---\nx",
            card_over,
        ),
        ("Parquet of a set", 12, tables, read_parquet_set),
        ("Parquet as external set", 2, tables, foreign_folder),
        ("Parquet source", 2, tables, source(one, False)),
        ("Parquet stream", 5, tables, source(one, True)),
        ("tar stream", 5, lambda rng: malformed.tar(pngs, rng), tars),
    ]
    lenient = (card_over, evaluated, read_record)
    return damaged + [
        Target(f"odd {name}", share, [], run, make=make, refuses=run not in lenient) for name, share, make, run in made
    ]


# --- running ------------------------------------------------------------------------------------------------------


def make_input(target: Target, seed: int, number: int) -> bytes:
    rng = random.Random(f"{target.name} {seed} {number}")
    if target.make:
        return target.make(rng)
    return mutate(rng.choice(target.seeds), rng, text=target.text)


def once(target: Target, data: bytes) -> str:
    """What became of an input: "accepted", "refused", or what was raised instead."""
    from dq.core.errors import InputError, RunError

    with tempfile.TemporaryDirectory() as folder:
        try:
            target.run(data, Path(folder))
        except (InputError, RunError):
            return "refused"
        except Exception as e:
            return f"{type(e).__name__}: {str(e)[:150]}".replace("\n", " ")
    return "accepted"


def child(target: Target, seed: int, numbers: range, pipe: int) -> None:
    """Do inputs, and tell of each in a line."""
    import datasets

    faulthandler.enable()
    with open("/proc/self/statm") as f:
        space = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + MORE_BYTES,) * 2)
    with tempfile.TemporaryDirectory() as cache, open(os.devnull, "w") as null:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        sys.stderr = sys.stdout = null
        for number in numbers:
            os.write(pipe, f"{once(target, make_input(target, seed, number))}\n".encode(errors="replace"))


def batch(target: Target, seed: int, numbers: range) -> list[str]:
    """Outcomes of inputs; what follows a crash or a hang is left to another call."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            child(target, seed, numbers, writing)
        finally:
            os._exit(0)
    os.close(writing)
    output = b""
    while select.select([reading], [], [], LIMIT_S)[0]:
        more = os.read(reading, 1 << 16)
        if not more:
            break
        output += more
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    outcomes = output.decode(errors="replace").splitlines()
    if len(outcomes) < len(numbers):
        outcomes.append("hang" if status == -signal.SIGKILL else f"crash ({status})")
    return outcomes


def fuzz(target: Target, seed: int, inputs: int) -> tuple[Counter, list[str]]:
    """Outcomes by kind, and a line for every input that ended as none should."""
    count: Counter = Counter()
    findings = []
    number = 0
    while number < inputs:
        for outcome in batch(target, seed, range(number, min(number + BATCH, inputs))):
            kind = outcome if outcome in ("accepted", "refused") else outcome.split(" ")[0]
            kind = {"hang": "hangs", "crash": "crashes"}.get(kind, kind)
            count[kind if kind in ("accepted", "refused", "hangs", "crashes") else "undocumented"] += 1
            if outcome not in ("accepted", "refused"):
                findings.append(f"--only {target.name!r} --seed {seed} --number {number}: {outcome}")
            number += 1
    return count, findings


def main() -> None:
    import PIL
    import pyarrow
    import safetensors

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TARGET")
    parser.add_argument("--number", type=int, help="do this input again, here, and let it fail")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    versions = {"python": platform.python_version(), "pillow": PIL.__version__, "pyarrow": pyarrow.__version__}
    versions["safetensors"] = safetensors.__version__
    with tempfile.TemporaryDirectory() as root:
        chosen = [t for t in targets(Path(root)) if args.only in (None, t.name)]
        if args.number is not None:
            with tempfile.TemporaryDirectory() as folder:
                chosen[0].run(make_input(chosen[0], args.seed, args.number), Path(folder))
            return
        total = sum(t.share for t in chosen)
        rows, findings = [], []
        for t in chosen:
            began = time.perf_counter()
            inputs = max(1, -(-args.inputs * t.share // total))
            count, failures = fuzz(t, args.seed, inputs)
            findings += failures
            row = {"target": t.name, "inputs": inputs}
            row |= {k: count[k] for k in ("accepted", "refused", "undocumented", "crashes", "hangs")}
            rows.append(row | {"seconds": round(time.perf_counter() - began, 1), "seed": args.seed, **versions})
            print(f"{t.name}: {dict(count)}, {rows[-1]['seconds']} s", file=sys.stderr)
    sums = {k: sum(r[k] for r in rows) for k in rows[0] if isinstance(rows[0][k], int | float) and k != "seed"}
    rows.append({**rows[-1], "target": "all", **sums})
    print(json.dumps({k: rows[-1][k] for k in ("inputs", "accepted", "refused", "undocumented", "crashes", "hangs")}))
    if args.out:
        with open(args.out, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if findings:
        sys.exit("\n".join(findings[:30]))


if __name__ == "__main__":
    main()
