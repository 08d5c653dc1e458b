"""Losses of images by classes or by a teacher's logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dq.config.students import StudentConfig


def image_losses(
    logits: Tensor, y: Tensor, partner_y: Tensor, share: float, teacher: Tensor | None, config: StudentConfig
) -> Tensor:
    """Return the loss of each image of a batch, (B,) float32.

    Args:
        logits: (B, C) of the student.
        y: (B,) classes of the images.
        partner_y: (B,) classes of the images that are mixed in.
        share: share of the image itself, 1 if the batch is not mixed.
        teacher: (B, C) logits, or regression labels for mse; None for hard labels.
        config: loss, temperature and optimizer.
    """
    logits = logits.float()
    if teacher is None:
        return hard_loss(logits, y, partner_y, share)
    if config.loss == "mse":
        return squared_error(logits, teacher)
    if config.loss == "mse_gt":
        return squared_error_and_class(logits, teacher, y, config.gt_weight)
    divergence = kl_divergence(logits, teacher, config.temperature)
    return divergence * config.temperature**2 if config.optimizer == "sgd" else divergence


def hard_loss(logits: Tensor, y: Tensor, partner_y: Tensor, share: float) -> Tensor:
    """Return the cross-entropy with the class.

    In a mix: share CE(class) + (1 - share) CE(class of the partner).
    """
    loss = F.cross_entropy(logits, y, reduction="none")
    if share == 1:
        return loss
    return share * loss + (1 - share) * F.cross_entropy(logits, partner_y, reduction="none")


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(teacher / T) || softmax(logits / T))."""
    student, target = F.log_softmax(logits / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return F.kl_div(student, target, reduction="none", log_target=True).sum(1)


def squared_error(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return half the sum over classes of (logits - teacher)^2 (FRePo)."""
    return 0.5 * (logits - teacher).square().sum(1)


def squared_error_and_class(logits: Tensor, teacher: Tensor, y: Tensor, weight: float) -> Tensor:
    """Return the mean squared error plus `weight` times the cross-entropy (EDC)."""
    return (logits - teacher).square().mean(1) + weight * F.cross_entropy(logits, y, reduction="none")
