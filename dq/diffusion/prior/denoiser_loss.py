"""Losses, noise levels and schedulers of a denoiser."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dq.diffusion.weaker_models import HiddenStates, IntermediateHead, head_output

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

BETAS = (1e-4, 2e-2)  # linear, of DiT
TIMESTEPS = 1000
MIN_SNR = 5.0  # gamma
REFERENCE_DIMENSION = 4096  # of the latents for which an unshifted time was tuned


def time_shift(setting: float | Literal["auto"], shape: tuple[int, int, int]) -> float:
    """Shift s of a flow's time by the dimension of latents.

    The setting, or for "auto" and `shape` (C, h, w)

        s = sqrt(C h w / 4096),

    because many values of one image average the noise away, so that more of them need more noise (Esser et al. 2024,
    equation 23, by the number of pixels; Zheng et al. 2025 by the dimension).
    """
    return math.sqrt(math.prod(shape) / REFERENCE_DIMENSION) if setting == "auto" else setting


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Shift the time of a flow.

    t' = s t / (1 + (s - 1) t) for t in [0, 1] of any shape; 0 and 1 stay, s below 1 means less noise. diffusers'
    schedulers do the same to their sigmas under the names `flow_shift` and `shift`.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def contrastive_error(out: Tensor, target: Tensor, other: Tensor, weight: float) -> Tensor:
    """Error (b,) of contrastive flow matching (Stoica et al. 2025).

    mean (v - u)^2 - weight * mean (v - u')^2 for v = `out`, u = `target` and u' = `other`, all (b, C, h, w). u' is the
    target of another item of the batch. The smallest error is at v = (E[u | x] - weight E[u']) / (1 - weight):
    velocities are pushed away from the mean of all of them, and are longer by 1 / (1 - weight), as in the paper.
    """
    attraction, repulsion = ((out - u).square().mean((1, 2, 3)) for u in (target, other))
    return attraction - weight * repulsion


class DenoiserLoss(nn.Module):
    """Squared error per latent of noise prediction or flow matching.

    noise: DiT's linear betas (Peebles & Xie 2023), x = sqrt(a_t) z + sqrt(1 - a_t) noise, target noise, weights 1 or
    min(SNR, 5) / SNR (Hang et al. 2023).
    flow: straight paths (Liu et al. 2023; Esser et al. 2024), x = (1 - s) z + s noise, target noise - z; time handed
    to the model is 1000 s, as diffusers does it.

    `contrastive` is the weight of `contrastive_error`; only for a flow, and only where `other` is given. `head`
    predicts the same from the hidden states of an earlier block; `head_weight` times its loss is added to that of the
    model.
    """

    alphas: Tensor  # (1000,) float64, share of the signal

    def __init__(
        self,
        model: DiTTransformer2DModel,
        objective: str = "noise",
        weighting: str = "uniform",
        *,
        contrastive: float = 0.0,
        head: IntermediateHead | None = None,
        head_weight: float = 0.5,
    ):
        super().__init__()
        self.model = model
        self.objective = objective
        self.weighting = weighting
        self.contrastive = contrastive
        self.head = head
        self.head_weight = head_weight
        self.states = HiddenStates(model, head.config["depth"]) if head is not None else None
        alphas = torch.cumprod(1 - torch.linspace(BETAS[0], BETAS[1], TIMESTEPS, dtype=torch.float64), 0)
        self.register_buffer("alphas", alphas, persistent=False)  # goes to the device with the model

    def forward(
        self, latents: Tensor, noise: Tensor, level: Tensor, labels: Tensor, other: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss terms (b,) of a batch.

        For latents and noise (b, C, h, w), noise levels (b,) in [0, 1), class ids (b,) and targets of other items (b,
        C, h, w); `error` is the squared error without weights and without those.
        """
        z, view = latents.float(), (-1, 1, 1, 1)
        weight: Tensor | float = 1.0
        if self.objective == "flow":
            t = level * TIMESTEPS
            noisy = torch.lerp(z, noise, level.view(view))
            target = noise - z
        else:
            t = (level * TIMESTEPS).long()
            a = self.alphas[t]
            noisy = a.sqrt().float().view(view) * z + (1 - a).sqrt().float().view(view) * noise
            target = noise
            if self.weighting == "min_snr":
                weight = (MIN_SNR * (1 - a) / a).clamp(max=1.0).float()
        out = self.model(noisy, timestep=t, class_labels=labels).sample.float()
        # a learned variance, if the checkpoint has one, follows and is left as it is
        loss, error = self._loss(out[:, : z.shape[1]], target, other, weight)
        if self.head is None or self.states is None:
            return {"loss": loss, "error": error}
        weak = head_output(self.model, self.head, self.states.take(), t, labels).float()
        head_loss, head_error = self._loss(weak, target, other, weight)
        return {"loss": loss + self.head_weight * head_loss, "error": error, "head_error": head_error}

    def _loss(
        self, prediction: Tensor, target: Tensor, other: Tensor | None, weight: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Loss and squared error (b,) of a prediction (b, C, h, w)."""
        error = (prediction - target).square().mean((1, 2, 3))
        if other is None:
            return weight * error, error
        return contrastive_error(prediction, target, other, self.contrastive), error


def new_scheduler(objective: str, shift: float = 1.0) -> Any:
    """The sampler that a prior is saved with.

    `shift` of its time grid is for a flow.
    """
    import diffusers

    if objective == "flow":
        # and not FlowMatchEulerDiscreteScheduler, with which the stock DiTPipeline cannot sample
        return diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    return diffusers.DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="linear",
        clip_sample=False,
    )
