"""Teachers from local files, transformers, timm, torchvision, and pools."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dq.config.reader import to_dict
from dq.config.students import is_library_net
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import read_json, suggest_folder
from dq.core.model_files import open_model
from dq.core.plain import PlainDict
from dq.core.progress import library_bars
from dq.core.seeds import digest_of, digest_of_file, digest_of_tensors, seeded
from dq.core.version import __version__
from dq.data.source import ImageSource
from dq.networks.external import library_net, library_of, published_outputs
from dq.networks.teacher import IMAGENET, TEACHER_FACTS, Normalization, Teacher, head_of
from dq.networks.teacher_check import check_classes, checked_accuracy
from dq.networks.teacher_weights import WRAPPERS, common_prefix, named_as, read_weights, weights_file
from dq.networks.zoo import make_net, move_net, net_of_weights

log = logging.getLogger("dq")
POOL = "pool"  # as teacher.net: the teachers of the pool in teacher.path
TIMM_FACTS = "config.json"  # beside weights that timm saved: `pretrained_cfg`
PRETRAINED = "pretrained"  # as teacher.path: the weights that timm or torchvision publishes


def load_teacher(
    config: TeacherConfig, num_classes: int, image_size: int, device: torch.device | str = "cpu"
) -> Teacher:
    """Load a teacher, in evaluation mode.

    `config` names a network and a local safetensors file; or "transformers" and what `AutoModelForImageClassification`
    opens; or a network of timm or torchvision and "pretrained". `image_size` is the side of the data's images in px.

    Raises:
        InputError: if weights are missing, unreadable or those of another network, or if the outputs of the network
            (after `config.classes`) are not `num_classes`, or it cannot see images of this side.
    """
    if config.net == POOL:
        raise InputError("a pool stands for several networks, and here one is needed; name a single one first")
    side = config.image_size or image_size
    name, identity = config.net, None
    file = teacher_file(config)
    if config.net == "transformers":
        net, identity = _from_transformers(config)
        name = Path(config.path).name if Path(config.path).is_dir() else config.path
    elif file is None:
        with seeded(0):
            net = library_net(config.net, None, side, pretrained=True)
    else:
        net = _from_file(config, file, num_classes, side)
    net = net.eval().requires_grad_(False)
    move_net(net, device)
    mean, std = _normalization(config)
    check_classes(config, _count_outputs(config, net, side), num_classes)
    parts: list[object] = [
        config.net,
        identity,
        digest_of_tensors(net.state_dict()),
        mean,
        std,
        config.classes,
        config.image_size,
    ]
    if config.weight != 1:
        parts.append(config.weight)
    facts = (config.batch_size, digest_of(parts), name, config.classes, config.image_size, config.weight)
    return Teacher(net, mean, std, *facts)


def load_teachers(
    configs: Sequence[TeacherConfig],
    source: ImageSource,
    image_size: int,
    device: torch.device,
    *,
    cache_dir: str | Path | None = None,
) -> tuple[Teacher, ...]:
    """Load teachers and check each on real images.

    A pool stands for all its teachers, of which the most accurate is checked: others may be weak on purpose. With
    `cache_dir`, a check that an earlier command did is not repeated.
    """
    loaded: list[Teacher] = []
    for config in configs:
        if config.net == POOL:
            members = _load_pool(config, source, image_size, device)
            best = max(members, key=lambda t: t.weight)
            checked_accuracy(best, source, config, image_size, cache_dir=cache_dir)
            log.debug("pool of %d teachers, of which %s is the best", len(members), best.name)
            loaded += members
            continue
        teacher = load_teacher(config, len(source.class_names), image_size, device)
        checked_accuracy(teacher, source, config, image_size, cache_dir=cache_dir)
        loaded.append(teacher)
    return tuple(loaded)


def _load_pool(config: TeacherConfig, source: ImageSource, image_size: int, device: torch.device) -> list[Teacher]:
    from dq.networks.pool import TeacherPool

    pool = TeacherPool.load(config.path, batch_size=config.batch_size, device=device)
    made_for = (tuple(pool.facts["classes"]), pool.facts["image_size"])
    if made_for != (source.class_names, image_size):
        raise InputError(
            f"the pool {config.path} was made for {len(made_for[0])} classes and images of {made_for[1]} px, not for "
            f"the {len(source.class_names)} of {source.origin} at {image_size} px, in this order; make another"
        )
    if config.weight == 1:
        return list(pool.teachers)
    return [
        dataclasses.replace(t, weight=t.weight * config.weight, digest=digest_of([t.digest, config.weight]))
        for t in pool.teachers
    ]


def teacher_file(config: TeacherConfig) -> Path | None:
    """Return the local file of a teacher's weights; None if a library fetches them.

    Raises:
        InputError: if the file does not exist, or the network has no published weights.
    """
    if config.net == "transformers":
        if not config.path:
            raise InputError("a transformers teacher has no path; set teachers.N.path to a model folder or a Hub id")
        return None
    if config.path == PRETRAINED:
        if not is_library_net(config.net):
            raise InputError(
                f"network {config.net!r} has no published weights; set teachers.N.path to a safetensors file, "
                "or teachers.N.net to timm:NAME or torchvision:NAME"
            )
        return None
    path = Path(config.path)
    if config.net == POOL:
        if not (path / "pool.json").is_file():
            raise InputError(
                f"there is no pool in {path}{suggest_folder(path)}; make one with `dq train-pool`, or correct "
                "teachers.N.path"
            )
        return path / "pool.json"
    if not config.path:
        raise InputError(
            f"the teacher {config.net!r} has no path; set teachers.N.path to a safetensors file or its folder"
        )
    return weights_file(path)


def files_digest(config: TeacherConfig) -> str | None:
    """Return a digest of what a teacher is loaded from, without loading it; None if a library may fetch some of it.

    Raises:
        InputError: see `teacher_file`.
    """
    file, path = teacher_file(config), Path(config.path)
    if config.net == POOL or (config.net == "transformers" and path.is_dir()):
        files = [f for f in sorted(path.rglob("*")) if f.suffix in (".json", ".safetensors")]
    elif file is not None:
        folder = path if path.is_dir() else path.parent
        files = [f for f in (file, folder / TEACHER_FACTS, folder / TIMM_FACTS) if f.is_file()]
    else:
        return None
    contents = [[f.name, digest_of_file(f)] for f in files]
    library = config.net.partition(":")[0] if config.net == "transformers" or is_library_net(config.net) else ""
    return digest_of([to_dict(config), contents, library and version(library), __version__])


def check_fetched(config: TeacherConfig, num_classes: int) -> None:
    """Check a teacher whose weights a library fetches, without fetching them.

    Raises:
        InputError: if the library or the network does not exist, its weights are not published, or they are for other
            classes.
    """
    if config.net == "transformers":
        _need_transformers(config)
        return
    outputs = published_outputs(config.net)
    if outputs is not None:
        check_classes(config, outputs, num_classes)


def _need_transformers(config: TeacherConfig) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise InputError(
            f"the teacher {config.path} needs transformers, which is not installed; pip install 'dq-distill[vision]'"
        )


def _from_file(config: TeacherConfig, file: Path, num_classes: int, side: int) -> nn.Module:
    state = read_weights(file)
    facts = _read_facts(file.parent / TEACHER_FACTS)
    trained_as = facts.get("net", config.net)
    if trained_as != config.net:
        raise InputError(f"{file} was trained as a {trained_as}; set teachers.N.net to that")
    net = make_net(config.net, num_classes, side, seed=0)
    state = named_as(net, state, file)
    head = f"{head_of(net)[0]}.weight"
    outputs = state[head].shape[0] if head in state else num_classes
    if outputs != num_classes:
        check_classes(config, outputs, num_classes)
    if any(k in state and state[k].shape != v.shape for k, v in net.state_dict().items()):
        net = net_of_weights(config.net, outputs, side, state)
    # files without the counters of batch norm are common, and nothing in evaluation mode reads them
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counters | state)  # copies into float32, whatever the file's type
    except RuntimeError as e:
        if (facts.get("net"), facts.get("image_size")) == (config.net, side):
            raise InputError(
                f"{file} holds a {config.net} for {side} px images as an earlier version of dq built it "
                f"({_first_difference(e)}); train it again with `dq train-teachers`"
            ) from e
        prefix = common_prefix(state)
        way = f"save them without the prefix {prefix!r} of their names, if it is a wrapper's, or " if prefix else ""
        saved_by_timm = _read_facts(file.parent / TIMM_FACTS).get("architecture")
        net_of_file = f"timm:{saved_by_timm}, as timm saved it," if saved_by_timm else "the right network"
        raise InputError(
            f"the weights in {file} are not a {config.net} for {outputs} classes and {side} px images "
            f"({_first_difference(e)}); {way}set teachers.N.net to {net_of_file} or "
            "teachers.N.image_size to the side it was trained at"
        ) from e
    return net


def _first_difference(error: RuntimeError) -> str:
    return str(error).splitlines()[1].strip()[:150]


class _Logits(nn.Module):
    """A model of transformers whose output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def _from_transformers(config: TeacherConfig) -> tuple[nn.Module, PlainDict]:
    """The network and its configuration, which has what its weights do not (activations, epsilons)."""
    _need_transformers(config)
    from transformers import AutoModelForImageClassification

    try:
        options = open_model(config.path).options  # one look-up, where transformers would try for a minute
        with seeded(0), library_bars():
            model, info = AutoModelForImageClassification.from_pretrained(
                config.path,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as e:
        message = " ".join(str(e).split())[:200]
        raise InputError(
            f"transformers cannot open the teacher {config.path} ({message}); "
            "set teachers.N.path to the folder or Hub id of an image classifier with safetensors weights"
        ) from e
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("num_batches_tracked"))
    if missing:
        # transformers draws such weights at random and only warns
        others = sorted(info["unexpected_keys"])
        wrapped = next((p for p in WRAPPERS if others and all(p in k.split(".") for k in others)), None)
        raise InputError(
            f"the teacher {config.path} lacks the weights {', '.join(missing[:3])}; "
            + (
                f"its names have the prefix {wrapped!r} of a wrapped network, so save the network inside"
                if wrapped
                else "set teachers.N.path to a model that was trained as a classifier"
            )
        )
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return _Logits(model), {k: v for k, v in model.config.to_diff_dict().items() if k not in ignored}


def _normalization(config: TeacherConfig) -> Normalization:
    """Mean and std as configured, else those of the model, else ImageNet's."""
    mean, std = config.mean, config.std
    if mean is None or std is None:
        if config.net == "transformers":
            default = _processor_file_normalization(config.path)
        else:
            default = _trained_normalization(config) or (
                _library_normalization(config.net) if is_library_net(config.net) else IMAGENET
            )
        mean, std = default[0] if mean is None else mean, default[1] if std is None else std
    fitting = len(mean) in (1, 3) and len(std) in (1, 3) and all(map(math.isfinite, (*mean, *std)))
    if not fitting or min(std) <= 0:
        raise InputError(
            f"teachers.N.mean={list(mean)} and teachers.N.std={list(std)} do not normalize RGB images; "
            "give three numbers each, those of std above 0"
        )
    return mean, std


def _trained_normalization(config: TeacherConfig) -> Normalization | None:
    """Normalization from `teacher.json` or timm's `config.json` beside the weights.

    timm's interpolation and crop are those of its test images. Here a teacher gets the views that a student gets,
    which are not cut again.
    """
    if config.path == PRETRAINED:
        return None
    path = Path(config.path)
    folder = path if path.is_dir() else path.parent
    for file in (folder / TEACHER_FACTS, folder / TIMM_FACTS):
        record: Any = _read_facts(file)
        if file.name == TIMM_FACTS:
            record = record.get("pretrained_cfg")
            if not isinstance(record, dict) or not {"mean", "std"} <= record.keys():
                continue  # of another library, or without normalization
        if not record:
            continue
        try:
            return tuple(map(float, record["mean"])), tuple(map(float, record["std"]))
        except (LookupError, TypeError, ValueError, OverflowError) as e:
            raise InputError(
                f"{file} does not say how its teacher normalizes images; set teachers.N.mean and teachers.N.std"
            ) from e
    return None


def _read_facts(file: Path) -> PlainDict:
    """A mapping in a JSON file; empty if there is none."""
    if not file.is_file():
        return {}
    record = read_json(file)
    if not isinstance(record, dict):
        raise InputError(f"{file} holds no mapping of facts about its teacher; mend or remove it")
    return record


def _library_normalization(name: str) -> Normalization:
    library, inner = library_of(name)
    if name.startswith("timm:"):
        described = library.get_pretrained_cfg(inner)
    else:
        described = library.get_model_weights(inner).DEFAULT.transforms()
    return tuple(described.mean), tuple(described.std)


def _processor_file_normalization(path: str) -> Normalization:
    """Normalization of a model's image processor, ImageNet's if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in ("processor_config.json", "preprocessor_config.json"):
        file = Path(path) / name
        try:
            if not Path(path).is_dir():
                file = Path(hf_hub_download(path, name))
            data = json.loads(file.read_text())
            # a processor of several parts nests the one for images
            if name == "preprocessor_config.json" or "image_processor" in data:
                return _processor_normalization(data.get("image_processor", data))
        except LocalEntryNotFoundError as e:  # no connection: the file may exist
            raise InputError(
                f"{name} of the teacher {path} cannot be had; set teachers.N.mean and teachers.N.std"
            ) from e
        except (EntryNotFoundError, FileNotFoundError):
            continue
        # the file may have any content
        except (OSError, ValueError, RecursionError, AttributeError, TypeError, ArithmeticError) as e:
            raise InputError(
                f"{name} of the teacher {path} cannot be read ({e}); get it again or set teachers.N.mean "
                "and teachers.N.std"
            ) from e
    return IMAGENET


def _processor_normalization(processor: PlainDict) -> Normalization:
    """Normalization of [0, 1] pixels that equals an image processor's of pixels of 0 to 255."""
    if not processor:
        return IMAGENET
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    normalizes = processor.get("do_normalize", True)
    mean = processor.get("image_mean") or IMAGENET[0] if normalizes else (0.0,)
    std = processor.get("image_std") or IMAGENET[1] if normalizes else (1.0,)
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def _count_outputs(config: TeacherConfig, net: nn.Module, side: int) -> int:
    """Outputs of the network for one gray image of this side."""
    try:
        with torch.no_grad():
            return net(torch.zeros(1, 3, side, side, device=next(net.parameters()).device)).shape[1]
    except (AssertionError, RuntimeError, ValueError) as e:  # timm asserts, transformers raises ValueError
        message = " ".join(str(e).split())[:150]
        raise InputError(
            f"the teacher {config.net} {config.path} cannot see images of {side} px ({message}); "
            "set teachers.N.image_size to the side it was trained at"
        ) from e
