"""Settings of the training and the report of a diffusion prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dq.config.reader import Checked
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError

SaveDtype = Literal["float32", "bfloat16"]
TrainDtype = Literal["auto", "float32", "bfloat16"]  # gradients in float16 would need loss scaling


@dataclass(frozen=True)
class TrainCodecConfig(Checked):
    architecture: Literal["kl", "tiny"] = "kl"  # AutoencoderKL or AutoencoderTiny
    init: str | None = None  # folder or Hub id of an autoencoder to fine-tune; its architecture counts then
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (32, 64)  # by level from the pixels down; each further one halves the side
    layers_per_block: int = 1
    attention: bool = True  # kl: in the middle block
    perceptual: TeacherConfig | None = None  # classifier in whose features reconstructions are compared
    perceptual_weight: float = 1.0
    steps: int = 2000  # 0 with init: only normalise its latents by channel
    batch_size: int = 64
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    kl_weight: float = 1e-5
    ema: float = 0.995
    save_every: int = 200
    save_dtype: SaveDtype = "float32"  # of the saved weights
    dtype: TrainDtype = "auto"  # autocast

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.block_out_channels or min(self.block_out_channels) < 1:
            raise InputError(f"block_out_channels must list numbers of channels, not {list(self.block_out_channels)}")
        if not self.steps and self.init is None:
            raise InputError("steps=0 without init would save untrained weights; set init, or steps")
        if not self.ema < 1:
            raise InputError(f"ema must be a decay in [0, 1), not {self.ema}")


@dataclass(frozen=True)
class TrainDenoiserConfig(Checked):
    # a name sets the next three; numbers of parameters are those of diffusers' DiT with ten classes
    size: Literal["3M", "8M", "18M", "S", "B", "L", "XL"] | None = None
    num_layers: int = 6
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    patch_size: int = 2
    init: str | None = None  # folder or Hub id of a DiT pipeline to fine-tune; its architecture counts then
    new_classes: bool = False  # with init: learn the classes anew, so that their number may differ
    objective: Literal["noise", "flow"] = "noise"
    # noise: min_snr (gamma 5); flow: logit_normal draws noise levels around one half more often
    weighting: Literal["uniform", "min_snr", "logit_normal"] = "uniform"
    # channel: latents of mean 0 and deviation 1 in every channel; with init they stay those of its codec
    normalize: Literal["channel", "none"] = "channel"
    # the images and their mirror images at equal shares; not for data with a left and a right, such as digits
    flip: bool = False
    contrastive: float = 0.0  # flow: weight of the distance to another item's target (Stoica et al. 2025, there 0.05)
    # flow: noise levels t become s t / (1 + (s - 1) t), training and sampling; auto: s = sqrt(size of a latent / 4096)
    time_shift: float | Literal["auto"] = 1.0
    intermediate_head: float = 0.0  # weight of the loss of an output layer behind a third of the blocks, e.g. 0.5
    early: float = 0.0  # share of the steps after which an average is kept for autoguidance, e.g. 0.125
    steps: int = 3000
    batch_size: int = 128
    accumulate: int = 1  # a batch goes through in so many parts
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices, with updates as long as AdamW's
    lr: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 100
    weight_decay: float = 0.0
    ema: tuple[float, ...] = (0.99, 0.998)  # decays; the average with the least loss on held-out latents is saved
    held_out: int = 512  # latents at most that are not trained on
    dropout: float = 0.1  # share of labels replaced by the null class, for classifier-free guidance
    save_every: int = 500
    save_dtype: SaveDtype = "float32"  # of the saved weights
    compile: bool = False  # torch.compile
    dtype: TrainDtype = "auto"  # autocast

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ema or not all(0 <= e < 1 for e in self.ema):
            raise InputError(f"ema must list decays in [0, 1), not {list(self.ema)}")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.dropout <= 1:
            raise InputError(f"dropout is a share of the labels and cannot be {self.dropout}")
        if not 0 <= self.contrastive < 1:
            raise InputError(f"contrastive is a weight in [0, 1), not {self.contrastive}")
        if self.time_shift != "auto" and not 0 < self.time_shift < float("inf"):
            raise InputError(f"time_shift must be auto or a positive number, not {self.time_shift}")
        if not 0 <= self.early < 1:
            raise InputError(f"early is a share of the steps in [0, 1), not {self.early}")
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


@dataclass(frozen=True)
class PriorConfig(Checked):
    output_dir: str = "runs/prior"  # becomes a stock pipeline folder: vae/, transformer/, scheduler/
    seed: int = 0
    codec: TrainCodecConfig = TrainCodecConfig()
    denoiser: TrainDenoiserConfig = TrainDenoiserConfig()


@dataclass(frozen=True)
class PriorReportConfig(Checked):
    per_class: int = 100  # samples of a class; fewer where it has fewer test or train images
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)  # guidance scales, each a row of the table
    neighbours: int = 5  # k of density and coverage, and candidates for copies
    num_inference_steps: int = 50
    shown: int = 10  # samples of a class in the grids
    # for the card of the prior's folder, which is written if any of them is given
    data: str = ""  # name of the data, e.g. its Hub id
    licence: str = ""  # of the weights
    command: str = ""  # that made the prior

    def __post_init__(self) -> None:
        super().__post_init__()
        scales = self.guidance
        if not scales or len(set(scales)) < len(scales) or not all(1 <= g < float("inf") for g in scales):
            raise InputError(f"guidance must list different scales of at least 1, not {list(scales)}")
