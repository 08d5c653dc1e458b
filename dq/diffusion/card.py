"""Cards of pipelines and of priors."""

from __future__ import annotations

import math
import re
from pathlib import Path

from safetensors import safe_open

from dq.core.cards import ANY_REPO, LICENSE, joined_lists, license_head, merge_card, own_text, split_card, template
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, readable, write_text
from dq.core.plain import PlainDict
from dq.core.text import markdown_table
from dq.diffusion.codec import downscale_of


def pipeline_card(folder: Path, *, repo_id: str = ANY_REPO, old: str = "", license: str | None = None) -> str:
    """The README of a pipeline's folder.

    The text that `dq prior-report` wrote there, else one made from the files.
    """
    from huggingface_hub import ModelCardData

    old_head, _ = split_card(old)
    local = folder / "README.md"
    text = own_text(local)
    if MARKER in text:
        head, body = split_card(text)
    elif (folder / "transformer" / "config.json").is_file():
        head, body = split_card(card_text(folder, license=license or str(old_head.get("license", ""))))
    else:
        head = ModelCardData(library_name="diffusers", tags=["diffusers", "dataset-distillation"]).to_dict()
        body = template("dq.diffusion", "pipeline_card.md").render(parts=model_parts(folder))
    body = body.replace(MARKER, "").replace(ANY_REPO, repo_id)
    stated = old_head if "license" in old_head else head
    head = {k: v for k, v in head.items() if k not in LICENSE} | license_head(license, stated)
    head["tags"] = joined_lists(old_head.get("tags"), head.get("tags", []))
    return merge_card(old, head, body)


MARKER = "<!-- written by dq prior-report -->"
QUALITY = "quality.json"  # beside the card: the records of the table
SHOWN_CLASSES = 20


def quality_table(records: list[PlainDict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of text of the records of `measure_prior`."""
    columns = (
        ("accuracy %", "accuracy", lambda v: f"{100 * v:.1f}"),
        ("Fréchet", "frechet", lambda v: f"{v:.3g}"),
        ("kernel x 1000", "kernel", lambda v: f"{1000 * v:.3g}"),
        ("± of subsets", "kernel_std", lambda v: f"{1000 * v:.2g}"),
        ("density", "density", lambda v: f"{v:.3f}"),
        ("coverage", "coverage", lambda v: f"{v:.3f}"),
        ("near train %", "near_share", lambda v: f"{100 * v:.1f}"),
        ("distance ratio", "median_ratio", lambda v: f"{v:.3f}"),
        ("least pixel RMSE", "pixel_rmse", lambda v: f"{v:.1f}"),
    )
    head = ["images", "number", *(title for title, _, _ in columns)]
    rows = [
        [r["row"], str(r["images"]), *("" if r[key] is None else text(r[key]) for _, key, text in columns)]
        for r in records
    ]
    return head, rows


def protocol_text(records: list[PlainDict]) -> str:
    """How the numbers of the table were measured, in a few sentences."""
    r = records[0]
    names = {"internal_guidance": "internal guidance", "autoguidance": "autoguidance"}
    weaker = "".join(f" with {text} {r[name]:g}" for name, text in names.items() if name in r)
    return (
        f"{r['images']} images a row, at most {r['per_class']} of each of {r['classes']} classes, at "
        f"{r['image_size']} px; samples from pure noise by {r['scheduler']} in {r['steps']} steps{weaker}, "
        f"seed {r['seed']}. "
        f"Fréchet (squared) and kernel distance, density and coverage (k = {r['neighbors']}) are against real test "
        f"images, in {r['features']} features of the teacher {r['teacher']}: not comparable with numbers in Inception "
        "features, and the Fréchet distance falls with the number of images, so read it beside that of real train "
        "images. Accuracy is what the teachers say, which may have been trained on the train images; `codec` is test "
        "images encoded and decoded, and its distances are between pairs. "
        f"Near train: share of images nearer to one of all {r['train_images']} train images than 1 % of the test "
        "images are, so about 1 % is what new images have; distance ratio: median distance to the nearest train image "
        "over that of test images. Pixel RMSE is in gray levels, to the most similar of the nearest train images; 0 "
        f"is a copy. dq {r['dq']}, torch {r['torch']}, diffusers {r['diffusers']}."
    )


def check_card(folder: str | Path) -> None:
    """Check that a card may be written into a folder.

    Raises:
        InputError: if it is not the local folder of a DiT pipeline.
        RunError: if the folder has a README.md that is not this module's.
    """
    folder = Path(folder)
    if not (folder / "transformer" / "config.json").is_file():
        raise InputError(
            f"{folder} is not the local folder of a DiT, so it gets no card; leave prior_report.data, .license and "
            ".command empty, or set generate.model to a folder"
        )
    card = folder / "README.md"
    if card.is_file() and MARKER not in card.read_text():
        raise RunError(f"{card} was not written by dq and is kept; move it away, or leave prior_report.data empty")


def write_card(
    folder: str | Path,
    *,
    data_name: str = "",
    license: str = "",
    command: str = "",
    records: list[PlainDict] | None = None,
) -> Path:
    """Write `README.md` of a prior's folder from its files.

    These are the models, `training.json` of each, and `quality.json`. `data_name`, which the prior was trained on,
    goes to the YAML head if it could be a Hub id. `license` is an identifier such as "cc-by-4.0", or any text.
    `records` are those of `measure_prior`; None: those of `quality.json`, if it exists.

    Raises:
        InputError: see `check_card`.
        RunError: see `check_card`.
    """
    check_card(folder)
    path = Path(folder) / "README.md"
    write_text(path, card_text(folder, data_name=data_name, license=license, command=command, records=records))
    return path


def card_text(
    folder: str | Path,
    *,
    data_name: str = "",
    license: str = "",
    command: str = "",
    records: list[PlainDict] | None = None,
) -> str:
    """The text of `write_card`."""
    from huggingface_hub import ModelCardData

    folder = Path(folder)
    if records is None and (folder / QUALITY).is_file():
        records = read_json(folder / QUALITY)["records"]
    denoiser, codec = model_part(folder / "transformer"), model_part(folder / "vae")
    names = _class_names(folder)
    head = ModelCardData(
        **(license_head(license, {}) if license else {}),
        library_name="diffusers",
        tags=["diffusers", "dit", "class-conditional", "dataset-distillation"],
        datasets=[data_name] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data_name) else None,
    )
    return template("dq.diffusion", "prior_card.md").render(
        marker=MARKER,
        license=license,
        head=head.to_yaml(),
        data=data_name,
        command=command,
        denoiser=denoiser,
        codec=codec,
        classes=names,
        shown=SHOWN_CLASSES,
        image_size=denoiser["side"] * downscale_of(codec["config"]),
        training=_training([denoiser["training"], codec["training"]]),
        table=markdown_table(*quality_table(records)) if records else "",
        protocol=protocol_text(records) if records else "",
    )


def model_parts(folder: Path) -> list[PlainDict]:
    """Facts of the parts of a pipeline's folder that have weights."""
    root = [folder] if (folder / "config.json").is_file() else []
    folders = [*root, *sorted(p for p in folder.iterdir() if p.is_dir())]
    return [model_part(p) for p in folders if (p / "config.json").is_file() and any(p.glob("*.safetensors"))]


def model_part(folder: Path) -> PlainDict:
    """Facts of a model folder: name, sizes, parameters and training."""
    config = read_json(folder / "config.json")
    record = folder / "training.json"
    size, parameters = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        size += file.stat().st_size
        with readable(file), safe_open(file, framework="pt") as f:
            parameters += sum(math.prod(f.get_slice(k).get_shape()) for k in f.keys())  # noqa: SIM118  (not a dict)
    return {
        "folder": folder.name,
        "name": config.get("_class_name") or (config.get("architectures") or [""])[0],
        "config": config,
        "side": config.get("sample_size"),
        "channels": config.get("in_channels"),
        "classes": config.get("num_embeds_ada_norm"),
        "parameters": parameters,
        "megabytes": size / 1e6,
        "training": read_json(record) if record.is_file() else {},
    }


def _class_names(folder: Path) -> list[str]:
    index = folder / "model_index.json"
    names = read_json(index).get("id2label") if index.is_file() else None
    return [names[i] for i in sorted(names, key=int)] if names else []


def _training(records: list[PlainDict]) -> list[tuple[str, list[str]]]:
    """Lines of the table of trainings: a name and its values."""

    def line(name: str, values: list[object]) -> tuple[str, list[str]]:
        return name, ["not recorded" if v in (None, "", {}) else str(v) for v in values]

    settings = [r.get("settings", {}) for r in records]
    lines = [line(k.replace("_", " "), [s.get(k) for s in settings]) for k in ("steps", "batch_size", "lr", "dtype")]
    lines.append(line("time", [_duration(r["seconds"]) if "seconds" in r else None for r in records]))
    lines.append(line("hardware", [_plain(r.get("hardware")) for r in records]))
    return [*lines, line("versions", [_plain(r.get("versions")) for r in records])]


def _plain(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value or "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
