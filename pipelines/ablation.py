"""Which ingredient of DDOQ is worth what: each factor around one default, with floors and rivals.

    torchrun --nproc_per_node 2 pipelines/ablation.py --config configs/cifar10_ablation.yaml --data DIR \
        --set codec.path=checkpoints/cifar10/vae generate.model=checkpoints/cifar10 teachers.0.path=FILE
    python pipelines/ablation.py ... --collect results/cifar10_ablation

The configuration holds the default (`methods.default`), the students and the ipc. Arms that a configuration's
`methods` cannot express (posterior samples, which are other latents) get a run folder of their own. `--only` takes
factors or arms, for a short run at one ipc. Everything continues where it was killed. `--collect` writes
`ablation.csv` (accuracy, and the paired difference to the default with its 95 % interval) and copies every training.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from collect_results import without_places

from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import CodecConfig, MethodConfig, RunConfig, load_config
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, write_json
from dq.core.locks import locked
from dq.core.model_files import open_model
from dq.core.processes import make_accelerator
from dq.data.load import load_source
from dq.diffusion.generator import LatentGenerator
from dq.diffusion.loading import codec_folder
from dq.evaluation.statistics import mean_std, paired_difference
from dq.run.folder import open_run
from dq.run.stages.assemble import assemble
from dq.run.stages.cluster import cluster
from dq.run.stages.encode import encode
from dq.run.stages.evaluate import evaluate_run
from dq.run.stages.generate import generate

# factor -> level -> what differs from the default: fields of a method, and settings of cluster and generate
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "points": {
        "one-pass mini-batch": {"cluster.engine": "minibatch"},
        "CLVQ": {"cluster.engine": "clvq"},
        "balanced barycenter": {"cluster.engine": "barycenter"},
    },
    "weights": {"uniform": {"weights": "uniform"}, "mass": {"weights": "mass"}},
    "representative": {"medoid": {"representative": "medoid"}},
    "space": {
        "whitened 64": {"cluster.space": "whitened"},
        "features": {"cluster.space": "features"},
        "joint": {"cluster.space": "joint"},
    },
    "start SNR": {f"{s:g}": {"generate.snr": s} for s in (0.03, 0.3, 1.0)},
    "guidance": {f"{s:g}": {"generate.guidance_scale": s} for s in (1.0, 3.0)},
    "guidance interval": {"SNR 0.1 to 10": {"generate.guidance_interval": [0.1, 10.0]}},
    "norm": {"rescaled": {"generate.rescale": "norm"}},
    "noise": {"inversion": {"generate.noise": "inversion"}},
    "mode guidance": {"0.1": {"generate.prototype_guidance": 0.1}},
    "several": {
        "guidance 3, SNR 0.03": {"generate.guidance_scale": 3.0, "generate.snr": 0.03},
        "guidance 3, SNR 0.03, rescaled": {
            "generate.guidance_scale": 3.0,
            "generate.snr": 0.03,
            "generate.rescale": "norm",
        },
    },
    "rivals": {
        "D4M (one-pass, uniform)": {"weights": "uniform", "cluster.engine": "minibatch"},
        "prior samples": {"weights": "uniform", "generate.snr": None, "generate.strength": 1.0},
        "prior samples, guidance 3": {
            "weights": "uniform",
            "generate.snr": None,
            "generate.strength": 1.0,
            "generate.guidance_scale": 3.0,
        },
        "nearest real": {"representative": "real"},
        "nearest real, features": {"representative": "real", "cluster.space": "features"},
        "decoded, no prior": {"generate.mode": "decode"},
    },
}
POSTERIOR = ("posterior", "sample")


def arms(config: RunConfig, only: list[str] | None = None) -> dict[str, MethodConfig]:
    """The methods of all arms by name `factor: level`, and `default`."""
    if "default" not in config.methods:
        raise InputError("the configuration has no methods.default, around which arms are made; name one")
    default = config.methods["default"]
    fields = {f.name for f in dataclasses.fields(MethodConfig)} - {"override"}
    methods = {"default": default}
    for factor, levels in ARMS.items():
        for level, change in levels.items():
            if only and not {factor, slug(factor, level)} & set(only):
                continue
            changed = {k: v for k, v in change.items() if k in fields}
            override = {**default.override, **{k: v for k, v in change.items() if k not in fields}}
            methods[slug(factor, level)] = dataclasses.replace(default, **changed, override=override)
    return methods


def slug(factor: str, level: str) -> str:
    """A name that can be a folder: `start-SNR_0.03`."""
    clean = "".join(c if c.isalnum() or c in "._" else "-" for c in f"{factor}_{level}")
    return "-".join(part for part in clean.split("-") if part)


def has_posterior(codec: CodecConfig) -> bool:
    """Whether latents can be drawn: TAESD and DC-AE have no posterior."""
    files = open_model(codec.path, revision=codec.revision)
    folder = codec.subfolder or codec_folder(files)
    settings = files.json(f"{folder}/config.json" if folder else "config.json")
    return settings is not None and settings.get("_class_name") == "AutoencoderKL"


def folders(config: RunConfig, only: list[str] | None) -> list[RunConfig]:
    """One configuration per run folder."""
    base = Path(config.output_dir)
    runs = [dataclasses.replace(config, output_dir=str(base / "main"), methods=arms(config, only))]
    if (not only or POSTERIOR[0] in only) and has_posterior(config.codec):
        drawn = {slug(*POSTERIOR): config.methods["default"]}
        one = dataclasses.replace(config, output_dir=str(base / "posterior"), methods=drawn)
        one = apply_settings(one, {"codec.posterior": POSTERIOR[1], "evaluate.baselines": []})
        runs.append(one)
    return runs


def collect(config: RunConfig, out: Path, only: list[str] | None, test_images: int) -> None:
    """Write one row per arm, student and ipc, with the paired difference to the default."""
    arms_by_name = {slug(f, level): (f, level) for f, levels in ARMS.items() for level in levels}
    arms_by_name |= {slug(*POSTERIOR): POSTERIOR, "default": ("default", ""), "random": ("rivals", "random real")}
    trainings: list[dict[str, Any]] = []
    seen: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in folders(config, only):
        file = Path(run.output_dir) / "eval" / "trainings.jsonl"
        if not file.is_file():
            raise InputError(f"there is no {file} to collect; give the same command without --collect first")
        text = file.read_text().replace(run.output_dir, Path(run.output_dir).name)
        for line in text.splitlines():
            record = json.loads(line)
            trainings.append(without_places(record))
            key = (record["student"], record["labels"], str(record["ipc"]), record["set"])
            seen.setdefault(key, []).append(record)
    rows = []
    for (student, labels, ipc, name), records in seen.items():
        if name not in arms_by_name:
            continue
        by_seed = {r["seed"]: r for r in records}
        default = {r["seed"]: r for r in seen.get((student, labels, ipc, "default"), [])}
        values = [r["last"] for r in by_seed.values()]
        mean, std = mean_std(values)
        factor, level = arms_by_name[name]
        row = {"factor": factor, "level": level, "ipc": ipc, "student": student, "labels": labels,
               "seeds": len(values), "mean": round(mean, 5), "std": None if std is None else round(std, 5),
               "difference": "", "low": "", "high": ""}  # fmt: skip
        if name != "default" and by_seed.keys() == default.keys():
            seeds = sorted(by_seed)
            pairs = [by_seed[s]["last"] for s in seeds], [default[s]["last"] for s in seeds]
            d = paired_difference(*pairs, test_images=test_images)
            row |= {"difference": round(d.mean, 5), "low": round(d.low, 5), "high": round(d.high, 5)}
        rows.append(row)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "ablation.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (out / "trainings.jsonl").write_text("".join(json.dumps(t) + "\n" for t in trainings))
    plain = without_places(to_dict(config))
    (out / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))
    chosen = f" --only {' '.join(only)}" if only else ""
    provenance = read_json(Path(folders(config, only)[0].output_dir) / "provenance.json")
    command = (
        f"torchrun --nproc_per_node {provenance['processes']} pipelines/ablation.py --config config.yaml --data DIR"
    )
    write_json(out / "run.json", {"command": command + chosen, **without_places(provenance)}, checksum=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--data")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    names = [*ARMS, *(slug(f, level) for f, levels in ARMS.items() for level in levels), POSTERIOR[0]]
    parser.add_argument("--only", nargs="+", choices=names, metavar="FACTOR_OR_ARM", help=", ".join(names))
    parser.add_argument("--collect", type=Path, metavar="DIR")
    args = parser.parse_args()
    config = apply_settings(
        load_config(args.config), [*args.set, *([f"source.path={args.data}"] if args.data else [])]
    )
    source = load_source(config.source)
    if args.collect:
        collect(config, args.collect, args.only, len(source.test))
        print(args.collect)
        return
    accelerator = make_accelerator()
    for one in folders(config, args.only):
        with locked(one.output_dir, accelerator):
            run = open_run(one, source, accelerator)
            pipe = LatentGenerator.from_settings(one.codec, one.generate)
            cache = encode(run, pipe.vae)
            cluster(run, cache)
            generate(run, pipe, cache)
            assemble(run)
            evaluate_run(run)
        accelerator.print(run.folder / "eval" / "summary.csv")


if __name__ == "__main__":
    try:
        main()
    except (InputError, RunError) as e:
        sys.exit(f"ablation: {e}")
