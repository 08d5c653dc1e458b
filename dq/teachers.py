"""Teachers: trained classifiers that label images, and the check that they know this data's classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dq.config import SourceConfig, TeacherConfig
from dq.data import ImageSource, read_images
from dq.dist import digest_of, digest_of_tensors, generator
from dq.errors import InputError
from dq.nets import make_net


@dataclass(frozen=True)
class Teacher:
    """A classifier in evaluation mode with the input normalisation it was trained on."""

    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    digest: str  # of network, weights and normalisation

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, C) float32 on the CPU of images (N, 3, H, W), uint8 or float in [0, 1]."""
        device = next(self.net.parameters()).device
        mean = torch.tensor(self.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=device).view(1, -1, 1, 1)
        parts = []
        for batch in images.split(self.batch_size):
            x = batch.to(device).float() / (255 if batch.dtype == torch.uint8 else 1)
            parts.append(self.net((x - mean) / std).float().cpu())
        return torch.cat(parts)


def load_teacher(
    config: TeacherConfig, num_classes: int, image_size: int, device: torch.device | str = "cpu"
) -> Teacher:
    """Load a teacher's weights from safetensors into a network known by name.

    Raises:
        InputError: if the file is missing or unreadable, or its tensors are not those of `config.net` with
            `num_classes` outputs.
    """
    path = Path(config.path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no teacher at {file}; set teacher.path to a safetensors file or its folder")
    try:
        state = load_file(file)
    except SafetensorError as e:
        raise InputError(f"the teacher {file} is not a readable safetensors file ({e}); get it again") from e
    net = make_net(config.net, num_classes, image_size, seed=0)
    try:
        net.load_state_dict(state)
    except RuntimeError as e:
        raise InputError(
            f"the weights in {file} are not a {config.net} for {num_classes} classes "
            f"({str(e).splitlines()[1].strip()[:150]}); set teacher.net to the right network"
        ) from e
    net = net.eval().requires_grad_(False).to(device)
    digest = digest_of([config.net, config.mean, config.std, digest_of_tensors(state)])
    return Teacher(net, config.mean, config.std, config.batch_size, digest)


def check_teacher(
    teacher: Teacher, source: ImageSource, config: TeacherConfig, source_config: SourceConfig, image_size: int
) -> float:
    """Accuracy of the teacher on real test images; stops near chance, where the class order is the usual cause.

    Raises:
        InputError: if the accuracy is less than a tenth of the way from chance to 1, or within three standard errors.
    """
    test = source.test
    g = generator("teacher check")
    rows = torch.randperm(len(test), generator=g)[: config.check_images].tolist()
    images, rows, _ = read_images(test, rows, image_size, source_config.preprocess, on_bad=source_config.on_bad_image)
    labels = torch.from_numpy(test.labels[rows])
    accuracy = float((teacher.logits(images).argmax(1) == labels).double().mean())
    chance = 1 / len(source.class_names)
    floor = max(chance + 0.1 * (1 - chance), chance + 3 * (chance * (1 - chance) / len(rows)) ** 0.5)
    if accuracy < floor:
        raise InputError(
            f"the teacher {config.path} gets {accuracy:.1%} of {len(rows)} real test images right, near the chance of "
            f"{chance:.1%}: its class order or input normalisation is probably not that of {source.origin}"
        )
    return accuracy
