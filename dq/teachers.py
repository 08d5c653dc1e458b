"""Teachers: trained classifiers that label images, and the check that they know this data's classes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dq.config.schema import SourceConfig
from dq.config.students import is_library_net
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import read_json
from dq.core.memory import in_pieces
from dq.core.seeds import digest_of, digest_of_tensors, generator, seeded
from dq.data.images import read_images
from dq.data.source import ImageSource
from dq.nets import fast_layout, library_net, library_of, make_net

log = logging.getLogger("dq")

TEACHER_FACTS = "teacher.json"  # beside the weights: network and normalisation, as `dq train-teachers` writes it
POOL = "pool"  # as teacher.net: the teachers of the pool in teacher.path
PRETRAINED = "pretrained"  # as teacher.path: the weights that timm or torchvision publishes
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std by channel, of pixels in [0, 1]
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Teacher:
    """A trained classifier with the way in which it wants its images."""

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    digest: str  # of network, weights, normalisation, classes and side
    name: str  # for tables
    classes: tuple[int, ...] | None = None  # output of the network for each class; None: all, in order
    image_size: int | None = None  # side in px at which the network sees the images; None: as they are
    weight: float = 1.0  # of its logits in the mean of several teachers
    matched: bool = True  # False: it labels, and refinement does not match it

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """`differentiable` without recording gradients."""
        return self.differentiable(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """Logits (B, C) float32 of float pixels (B, 3, S, S) in [0, 1], both on the teacher's device.

        The network is left in the mode it is in, training or evaluation; gradients reach x and no weight.
        """
        if self.image_size is not None and x.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        x = (x - x.new_tensor(self.mean).view(1, -1, 1, 1)) / x.new_tensor(self.std).view(1, -1, 1, 1)
        logits = self.net(x).float()
        return logits if self.classes is None else logits[:, torch.tensor(self.classes, device=logits.device)]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, C) float32 on the CPU of images (N, 3, H, W), uint8 or float in [0, 1], in evaluation mode."""
        with evaluation_mode(self.net):
            return self._look(images, lambda x: self(x).cpu())

    def features(self, images: Tensor) -> Tensor:
        """What the last linear layer sees of images (N, 3, H, W), in evaluation mode: (N, D) float32 on the CPU. For
        a network without a linear layer, what its last convolution sees."""
        with evaluation_mode(self.net), head_inputs(self.net) as seen:

            def look(x: Tensor) -> Tensor:
                seen.clear()
                self(x)
                return seen[-1].flatten(1).float().cpu()

            return self._look(images, look)

    def _look(self, images: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """What `look` gives for all images, in batches that fit."""

        def one(x: Tensor) -> Tensor:
            return in_pieces("teacher", len(x), lambda s: look(x[s]))

        return torch.cat([one(x) for x in self._batches(images)])

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        device = next(self.net.parameters()).device
        for batch in images.split(self.batch_size):
            yield batch.to(device).float() / (255 if batch.dtype == torch.uint8 else 1)


def pooled_logits(teachers: Sequence[Teacher], images: Tensor) -> Tensor:
    """`average_logits` of `Teacher.logits`: (N, C) float32 on the CPU."""
    return average_logits([t.logits(images) for t in teachers], [t.weight for t in teachers])


def average_logits(logits: Sequence[Tensor], weights: Sequence[float], *, probabilities: bool = False) -> Tensor:
    """Weighted mean of several teachers' logits (N, C), as EDC and CV-DD average; or the log of the weighted mean of
    their probabilities."""
    if len(logits) == 1:
        return logits[0]
    shares = [w / sum(weights) for w in weights]
    if probabilities:
        logs = [F.log_softmax(x, 1) + math.log(s) for x, s in zip(logits, shares)]
        return torch.logsumexp(torch.stack(logs), 0)
    total = logits[0] * shares[0]
    for x, share in zip(logits[1:], shares[1:]):
        total = total + x * share
    return total


@contextlib.contextmanager
def head_inputs(net: nn.Module, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list to which every forward pass within the block adds what the last linear layer sees; stays empty if it is
    not `wanted`."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    hook = _head(net)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and every module back in its own mode after it."""
    training = [m for m in net.modules() if m.training]
    net.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _head(net: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the last linear layer, or of the last convolution if there is none."""
    for kind in (nn.Linear, nn.Conv2d):
        found = [(name, m) for name, m in net.named_modules() if isinstance(m, kind)]
        if found:
            return found[-1]
    raise InputError(f"{type(net).__name__} has neither a linear layer nor a convolution; choose another network")


def load_teacher(
    config: TeacherConfig, num_classes: int, image_size: int, device: torch.device | str = "cpu"
) -> Teacher:
    """Load a teacher, in evaluation mode.

    Args:
        config: names a network and a local safetensors file; or "transformers" and what
            `AutoModelForImageClassification` opens; or a network of timm or torchvision and "pretrained".
        num_classes: of the data.
        image_size: side of the data's images in px.

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
    net.to(device, memory_format=fast_layout(net))  # type: ignore[call-overload]  # a keyword the stubs lack
    mean, std = _normalization(config)
    _check_classes(config, _count_outputs(config, net, side), num_classes)
    parts: list[Any] = [
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
    source_config: SourceConfig,
    image_size: int,
    device: torch.device,
) -> tuple[Teacher, ...]:
    """Load teachers and check each on real images. A pool stands for all its teachers, of which the most accurate is
    checked: some of its members may be weak on purpose."""
    loaded: list[Teacher] = []
    for config in configs:
        if config.net == POOL:
            members = _load_pool(config, source, image_size, device)
            best = max(members, key=lambda t: t.weight)
            found = check_teacher(best, source, config, source_config, image_size)
            log.info(
                "pool of %d teachers: %.1f %% of %d real images at best",
                len(members),
                100 * found,
                config.check_images,
            )
            loaded += members
            continue
        teacher = load_teacher(config, len(source.class_names), image_size, device)
        found = check_teacher(teacher, source, config, source_config, image_size)
        log.info("teacher %s: %.1f %% of %d real images", teacher.name, 100 * found, config.check_images)
        loaded.append(teacher)
    return tuple(loaded)


def _load_pool(config: TeacherConfig, source: ImageSource, image_size: int, device: torch.device) -> list[Teacher]:
    from dq.pool import TeacherPool  # which is made of teachers

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
    """The local file of a teacher's weights; None if a library finds them.

    Raises:
        InputError: if the file is not there, or nobody publishes weights of the network.
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
            raise InputError(f"there is no pool in {path}; make one with `dq train-pool`, or correct teachers.N.path")
        return path / "pool.json"
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no teacher at {file}; set teachers.N.path to a safetensors file or its folder")
    return file


def _from_file(config: TeacherConfig, file: Path, num_classes: int, side: int) -> nn.Module:
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as e:
        raise InputError(f"the teacher {file} is not a readable safetensors file ({e}); get it again") from e
    facts = file.parent / TEACHER_FACTS
    if facts.is_file() and read_json(facts)["net"] != config.net:
        raise InputError(f"{file} was trained as a {read_json(facts)['net']}; set teachers.N.net to that")
    net = make_net(config.net, num_classes, side, seed=0)
    head = f"{_head(net)[0]}.weight"
    outputs = state[head].shape[0] if head in state else num_classes
    if outputs != num_classes:
        _check_classes(config, outputs, num_classes)
        net = make_net(config.net, outputs, side, seed=0)
    # files without the counters of batch norm are common, and nothing in evaluation mode reads them
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        net.load_state_dict(counters | state)  # copies into float32, whatever the file's type
    except RuntimeError as e:
        raise InputError(
            f"the weights in {file} are not a {config.net} for {outputs} classes and {side} px images "
            f"({str(e).splitlines()[1].strip()[:150]}); set teachers.N.net to the right network or "
            "teachers.N.image_size to the side it was trained at"
        ) from e
    return net


class _Logits(nn.Module):
    """A model of transformers whose output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def _from_transformers(config: TeacherConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The network and its configuration, which says what its weights do not (activations, epsilons)."""
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as e:
        raise InputError(
            f"the teacher {config.path} needs transformers, which is not installed; pip install 'dq-distill[vision]'"
        ) from e
    try:
        with seeded(0):
            model, info = AutoModelForImageClassification.from_pretrained(
                config.path,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as e:
        said = " ".join(str(e).split())[:200]
        raise InputError(
            f"transformers cannot open the teacher {config.path} ({said}); "
            "set teachers.N.path to the folder or Hub id of an image classifier with safetensors weights"
        ) from e
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("num_batches_tracked"))
    if missing:
        # transformers draws such weights at random and only warns
        raise InputError(
            f"the teacher {config.path} lacks the weights {', '.join(missing[:3])}; "
            "set teachers.N.path to a model that was trained as a classifier"
        )
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return _Logits(model), {k: v for k, v in model.config.to_diff_dict().items() if k not in ignored}


def _normalization(config: TeacherConfig) -> Normalization:
    """Mean and std as configured, else those of the model, else ImageNet's."""
    mean, std = config.mean, config.std
    if mean is None or std is None:
        if config.net == "transformers":
            own = _described_normalization(config.path)
        elif is_library_net(config.net):
            own = _library_normalization(config.net)
        else:
            path = Path(config.path)
            own = _trained_normalization((path if path.is_dir() else path.parent) / TEACHER_FACTS)
        mean, std = own[0] if mean is None else mean, own[1] if std is None else std
    fitting = len(mean) in (1, 3) and len(std) in (1, 3) and all(map(math.isfinite, (*mean, *std)))
    if not fitting or min(std) <= 0:
        raise InputError(
            f"teachers.N.mean={list(mean)} and teachers.N.std={list(std)} do not normalise RGB images; "
            "give three numbers each, those of std above 0"
        )
    return mean, std


def _trained_normalization(facts: Path) -> Normalization:
    if not facts.is_file():
        return IMAGENET
    record = read_json(facts)
    try:
        return tuple(map(float, record["mean"])), tuple(map(float, record["std"]))
    except (LookupError, TypeError, ValueError, OverflowError) as e:
        raise InputError(
            f"{facts} does not say how its teacher normalises images; set teachers.N.mean and teachers.N.std"
        ) from e


def _library_normalization(name: str) -> Normalization:
    library, inner = library_of(name)
    if name.startswith("timm:"):
        described = library.get_pretrained_cfg(inner)
    else:
        described = library.get_model_weights(inner).DEFAULT.transforms()
    return tuple(described.mean), tuple(described.std)


def _described_normalization(path: str) -> Normalization:
    """What the image processor of a model folder or Hub repository does, ImageNet's if there is none."""
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
        except LocalEntryNotFoundError as e:  # no connection: nobody knows whether the file exists
            raise InputError(
                f"{name} of the teacher {path} cannot be had; set teachers.N.mean and teachers.N.std"
            ) from e
        except (EntryNotFoundError, FileNotFoundError):
            continue
        # it may say anything
        except (OSError, ValueError, RecursionError, AttributeError, TypeError, ArithmeticError) as e:
            raise InputError(
                f"{name} of the teacher {path} cannot be read ({e}); get it again or set teachers.N.mean "
                "and teachers.N.std"
            ) from e
    return IMAGENET


def _processor_normalization(processor: dict[str, Any]) -> Normalization:
    """The `Normalization` in units of [0, 1] pixels that an image processor does with pixels of 0 to 255."""
    if not processor:
        return IMAGENET
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    normalizes = processor.get("do_normalize", True)
    mean = processor.get("image_mean") or IMAGENET[0] if normalizes else (0.0,)
    std = processor.get("image_std") or IMAGENET[1] if normalizes else (1.0,)
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)


def _count_outputs(config: TeacherConfig, net: nn.Module, side: int) -> int:
    """Outputs of the network for one grey image, which also shows that it can see images of this side."""
    try:
        with torch.no_grad():
            return net(torch.zeros(1, 3, side, side, device=next(net.parameters()).device)).shape[1]
    except (AssertionError, RuntimeError, ValueError) as e:  # timm asserts, transformers raises ValueError
        said = " ".join(str(e).split())[:150]
        raise InputError(
            f"the teacher {config.net} {config.path} cannot see images of {side} px ({said}); "
            "set teachers.N.image_size to the side it was trained at"
        ) from e


def _check_classes(config: TeacherConfig, outputs: int, num_classes: int) -> None:
    chosen = config.classes
    if chosen is None:
        if outputs != num_classes:
            raise InputError(
                f"the teacher {config.path} has {outputs} outputs but the data has {num_classes} classes; "
                "set teachers.N.classes to the outputs that are these classes, in order"
            )
        return
    if len(chosen) != num_classes or len(set(chosen)) != num_classes:
        raise InputError(
            f"teachers.N.classes lists {len(set(chosen))} different outputs in {len(chosen)} entries but the data has "
            f"{num_classes} classes; list one output for each class, in order"
        )
    strange = next((c for c in chosen if not 0 <= c < outputs), None)
    if strange is not None:
        raise InputError(
            f"teachers.N.classes lists output {strange} but those of {config.path} are 0 to {outputs - 1}; "
            "list one of them for each class, in order"
        )


def check_teacher(
    teacher: Teacher, source: ImageSource, config: TeacherConfig, source_config: SourceConfig, image_size: int
) -> float:
    """Accuracy of the teacher on real train images; stops near chance, where the class order is the usual cause.

    A teacher has usually seen them, so this says nothing of its quality; but it shows that classes and normalisation
    fit, and leaves the test images alone.

    Raises:
        InputError: if the accuracy is less than a tenth of the way from chance to 1, or within three standard errors.
            If another order of its outputs would explain the images, the message says which.
    """
    train = source.train
    g = generator("teacher check")
    rows = torch.randperm(len(train), generator=g)[: config.check_images].tolist()
    images, rows, _ = read_images(train, rows, image_size, source_config.preprocess, on_bad=source_config.on_bad_image)
    if not rows:
        raise InputError(f"none of the train images of {source.origin} that were tried can be read; replace them")
    labels = torch.from_numpy(train.labels[rows])
    predicted = teacher.logits(images).argmax(1)
    accuracy = float((predicted == labels).double().mean())
    num_classes = len(source.class_names)
    chance = 1 / num_classes
    floor = max(chance + 0.1 * (1 - chance), chance + 3 * (chance * (1 - chance) / len(rows)) ** 0.5)
    if accuracy >= floor:
        return accuracy
    said = (
        f"the teacher {config.path} gets {accuracy:.1%} of {len(rows)} real train images right, near the chance of "
        f"{chance:.1%}: its class order or input normalisation is probably not that of {source.origin}"
    )
    reordered = reordered_accuracy(predicted, labels, num_classes)
    if reordered >= max(0.5, 3 * accuracy):
        order = class_order(predicted, labels, num_classes)
        classes = [teacher.classes[c] if teacher.classes else c for c in order]
        said += (
            f"; its outputs look permuted: with class order {classes} it would get {reordered:.1%}; "
            f"set teachers.N.classes={classes}"
        )
    raise InputError(said)


def class_order(predicted: Tensor, labels: Tensor, num_classes: int) -> list[int]:
    """The output for each class, all different, that makes the most of the predictions (n,) right."""
    from scipy.optimize import linear_sum_assignment

    # rows: classes, columns: outputs
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    return linear_sum_assignment(confusion.numpy(), maximize=True)[1].tolist()


def reordered_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Accuracy under `class_order`, each half of the predictions judged by the order of the other half: with few
    images of many classes, an order made from the same images would make any guesses look right."""
    hits = 0
    for fit, judge in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        order = torch.tensor(class_order(predicted[fit], labels[fit], num_classes))
        hits += int((order[labels[judge]] == predicted[judge]).sum())
    return hits / len(labels)
