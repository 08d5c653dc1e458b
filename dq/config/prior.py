"""Settings of the training and the report of a diffusion prior."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dq.config.kinds import Count, Many, NonNegative, Off, PathText, Positive, Share, ShareBelowOne, Whole
from dq.config.teachers import TeacherConfig
from dq.config.validation import Checked, settings
from dq.core.errors import InputError

SaveDtype = Literal["float32", "bfloat16"]
TrainDtype = Literal["auto", "float32", "bfloat16"]  # gradients in float16 would need loss scaling


@settings
class TrainCodecConfig(Checked):
    """Training of an autoencoder (`dq train-codec`)."""

    architecture: Annotated[Literal["kl", "tiny"], Field(description="AutoencoderKL or AutoencoderTiny")] = "kl"
    init: Annotated[
        Off[PathText], Field(description="folder or Hub id of an autoencoder to fine-tune, with its architecture")
    ] = None
    latent_channels: Annotated[Count, Field(description="channels of a latent")] = 4
    block_out_channels: Annotated[
        Many[Count], Field(description="channels by level from the pixels down; each further level halves the side")
    ] = (32, 64)
    layers_per_block: Annotated[Count, Field(description="layers of a block")] = 1
    attention: Annotated[bool, Field(description="kl: attention in the middle block")] = True
    perceptual: Annotated[
        Off[TeacherConfig], Field(description="classifier in whose features reconstructions are compared")
    ] = None
    perceptual_weight: Annotated[NonNegative, Field(description="weight of that comparison")] = 1.0
    steps: Annotated[
        Whole, Field(description="training steps; 0 with init: only normalize its latents by channel")
    ] = 2000
    batch_size: Annotated[Count, Field(description="images of a training step")] = 64
    lr: Annotated[NonNegative, Field(description="learning rate of AdamW")] = 1e-3
    schedule: Annotated[Literal["constant", "cosine"], Field(description="schedule of the learning rate")] = "constant"
    warmup_steps: Annotated[Whole, Field(description="steps of linear warm-up")] = 0
    weight_decay: Annotated[NonNegative, Field(description="weight decay")] = 0.0
    kl_weight: Annotated[NonNegative, Field(description="kl: weight of the divergence from the normal law")] = 1e-5
    ema: Annotated[ShareBelowOne, Field(description="decay of the averaged weights that are saved")] = 0.995
    save_every: Annotated[Count, Field(description="steps between checkpoints")] = 200
    save_dtype: Annotated[SaveDtype, Field(description="dtype of the saved weights")] = "float32"
    dtype: Annotated[TrainDtype, Field(description="dtype of autocast; auto: what the device is fast in")] = "auto"

    @model_validator(mode="after")
    def _check_codec(self) -> Self:
        if not self.block_out_channels:
            raise InputError("block_out_channels must list numbers of channels, not []")
        if not self.steps and self.init is None:
            raise InputError("steps=0 without init would save untrained weights; set init, or steps")
        return self


@settings
class TrainDenoiserConfig(Checked):
    """Training of a class-conditional DiT (`dq train-denoiser`)."""

    # numbers of parameters are those of diffusers' DiT with ten classes
    size: Annotated[
        Off[Literal["3M", "8M", "18M", "S", "B", "L", "XL"]],
        Field(description="size by name, in place of num_layers, num_attention_heads and attention_head_dim"),
    ] = None
    num_layers: Annotated[Count, Field(description="blocks")] = 6
    num_attention_heads: Annotated[Count, Field(description="attention heads of a block")] = 4
    attention_head_dim: Annotated[Count, Field(description="channels of an attention head")] = 32
    patch_size: Annotated[Count, Field(description="side of a patch of the latent")] = 2
    init: Annotated[
        Off[PathText], Field(description="folder or Hub id of a DiT pipeline to fine-tune, with its architecture")
    ] = None
    new_classes: Annotated[
        bool, Field(description="with init: learn the classes again, so that their number may differ")
    ] = False
    objective: Annotated[Literal["noise", "flow"], Field(description="what is predicted: noise, or a flow")] = "noise"
    weighting: Annotated[
        Literal["uniform", "min_snr", "logit_normal"],
        Field(description="noise: uniform or min_snr (gamma 5); flow: uniform or logit_normal noise levels"),
    ] = "uniform"
    # with init latents stay those of its codec
    normalize: Annotated[
        Literal["channel", "none"], Field(description="channel: latents of mean 0 and deviation 1 in every channel")
    ] = "channel"
    # not for data with a left and a right, such as digits
    flip: Annotated[bool, Field(description="images and their mirror images at equal shares")] = False
    contrastive: Annotated[
        ShareBelowOne,
        Field(description="flow: weight of the distance to another item's target (Stoica et al. 2025: 0.05)"),
    ] = 0.0
    # t becomes s t / (1 + (s - 1) t), in training and sampling; auto: s = sqrt(size of a latent / 4096)
    time_shift: Annotated[
        Positive | Literal["auto"],
        Field(description="flow: shift s of the noise levels; auto: by the size of a latent; 1: none"),
    ] = 1.0
    intermediate_head: Annotated[
        NonNegative, Field(description="weight of the loss of an output layer after a third of the blocks, e.g. 0.5")
    ] = 0.0
    early: Annotated[
        ShareBelowOne, Field(description="share of the steps after which an average is kept for autoguidance")
    ] = 0.0
    steps: Annotated[Count, Field(description="training steps")] = 3000
    batch_size: Annotated[Count, Field(description="latents of a training step")] = 128
    accumulate: Annotated[Count, Field(description="parts in which a batch passes through the network")] = 1
    optimizer: Annotated[
        Literal["adamw", "muon"], Field(description="muon: for hidden matrices, with updates as long as AdamW's")
    ] = "adamw"
    lr: Annotated[NonNegative, Field(description="learning rate")] = 5e-4
    schedule: Annotated[Literal["constant", "cosine"], Field(description="schedule of the learning rate")] = "constant"
    warmup_steps: Annotated[Whole, Field(description="steps of linear warm-up")] = 100
    weight_decay: Annotated[NonNegative, Field(description="weight decay")] = 0.0
    ema: Annotated[
        Many[ShareBelowOne],
        Field(description="decays of averaged weights; that of the least loss on held-out latents is saved"),
    ] = (0.99, 0.998)
    held_out: Annotated[Whole, Field(description="latents at most that are not trained on")] = 512
    dropout: Annotated[
        Share, Field(description="share of labels replaced by the null class, for classifier-free guidance")
    ] = 0.1
    save_every: Annotated[Count, Field(description="steps between checkpoints")] = 500
    save_dtype: Annotated[SaveDtype, Field(description="dtype of the saved weights")] = "float32"
    compile: Annotated[bool, Field(description="use torch.compile")] = False
    dtype: Annotated[TrainDtype, Field(description="dtype of autocast; auto: what the device is fast in")] = "auto"

    @model_validator(mode="after")
    def _check_denoiser(self) -> Self:
        if not self.ema:
            raise InputError("ema must list decays in [0, 1), not []")
        for name, off in (("contrastive", 0), ("time_shift", 1)):
            value = getattr(self, name)
            if self.objective != "flow" and value != off:
                raise InputError(f"{name}={value} belongs to flow matching; set objective=flow, or {name}={off}")
        if self.contrastive and self.batch_size < 2:
            raise InputError("contrastive compares items of a batch; set batch_size to at least 2")
        # with a size or init these say how many blocks there are
        if self.intermediate_head and self.num_layers < 2 and self.size is None and self.init is None:
            raise InputError("intermediate_head lies before the last block: set num_layers to at least 2, or it to 0")
        fits = {"noise": ("uniform", "min_snr"), "flow": ("uniform", "logit_normal")}[self.objective]
        if self.weighting not in fits:
            raise InputError(
                f"weighting={self.weighting} does not belong to objective={self.objective}; use {fits[0]} or {fits[1]}"
            )
        return self


@settings
class PriorConfig(Checked):
    """A diffusion prior: codec and denoiser."""

    output_dir: Annotated[
        PathText, Field(description="folder of the prior, a stock pipeline: vae/, transformer/, scheduler/")
    ] = "runs/prior"
    seed: Annotated[int, Field(description="seed of weights, batches and noise")] = 0
    codec: Annotated[TrainCodecConfig, Field(description="training of the autoencoder")] = TrainCodecConfig()
    denoiser: Annotated[TrainDenoiserConfig, Field(description="training of the DiT")] = TrainDenoiserConfig()


@settings
class PriorReportConfig(Checked):
    """The report of a prior (`dq prior-report`).

    A card is written if `data`, `license` or `command` is set.
    """

    per_class: Annotated[
        Count, Field(description="samples of a class; fewer where it has fewer test or train images")
    ] = 100
    guidance: Annotated[
        Many[Annotated[float, Field(ge=1)]], Field(description="guidance scales, each a row of the table")
    ] = (1.0, 1.5, 2.0, 3.0)
    neighbors: Annotated[
        Count, Field(description="neighbors (k) of density and coverage, and candidates for copies")
    ] = 5
    num_inference_steps: Annotated[Count, Field(description="sampling steps")] = 50
    shown: Annotated[Count, Field(description="samples of a class in the grids")] = 10
    data: Annotated[str, Field(description="card: name of the data, e.g. its Hub id")] = ""
    license: Annotated[str, Field(description="card: license of the weights")] = ""
    command: Annotated[str, Field(description="card: command that made the prior")] = ""

    @model_validator(mode="after")
    def _check_guidance(self) -> Self:
        if not self.guidance or len(set(self.guidance)) < len(self.guidance):
            raise InputError(f"guidance must list different scales of at least 1, not {list(self.guidance)}")
        return self
