"""The configuration: what can be set, and the defaults.

Precedence is defaults < file < flags. How it is read, checked and changed is in `dq.settings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dq.core.bounded_yaml import read_yaml
from dq.core.errors import InputError
from dq.settings import Checked, from_dict

Dtype = Literal["float32", "bfloat16", "float16"]
TrainDtype = Literal["float32", "bfloat16"]  # gradients in float16 would need loss scaling
Baseline = Literal["random", "herding", "k-center", "nearest", "patches", "full"]
Tracker = Literal["trackio", "tensorboard", "wandb"]


@dataclass(frozen=True)
class SourceConfig(Checked):
    path: str = ""  # Hub data set id, local folder, or "sklearn:digits"
    name: str | None = None  # configuration name of a Hub data set
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None  # None: test, validation, valid or val, whichever is there
    image_column: str | None = None
    label_column: str | None = None
    # rows are read where they lie, on disk or on the Hub; nothing is copied. For Parquet files and WebDataset tars
    streaming: bool = False
    on_bad_image: Literal["raise", "skip"] = "raise"
    preprocess: Literal["squash", "crop", "pad"] = "crop"  # how an image becomes a square
    image_size: int | None = None  # side in px of distilled and test images; None: codec.resolution


@dataclass(frozen=True)
class CodecConfig(Checked):
    path: str = ""  # model folder or Hub id of an autoencoder, or of a pipeline that has one under vae/
    subfolder: str | None = None
    revision: str | None = None
    resolution: int = 64  # side in px of the images that the codec sees
    posterior: Literal["mean", "sample"] = "mean"
    dtype: Dtype = "float32"
    batch_size: int = 64


@dataclass(frozen=True)
class ClusterConfig(Checked):
    engine: Literal["auto", "faiss", "torch", "clvq", "minibatch", "barycentre"] = "auto"
    # where the images of a class are compared; features: those of the first teacher (see `dq.spaces.embed`)
    space: Literal["latents", "pca", "whitened", "features", "joint"] = "latents"
    # pca, whitened: principal directions of a class; None: 64, or as many as the class allows. Whitened needs far
    # fewer than there are images in a class
    dims: int | None = None
    feature_weight: float = 1.0  # joint: of the features' variance, that of the latents being 1
    init: Literal["race", "k-means++", "random"] = "race"  # race: the best of several k-means++ in a subspace
    n_init: int = 1  # restarts; the lowest distortion wins
    n_iter: int = 100  # Lloyd iterations (barycentre: rounds) at most
    tol: float = 1e-4  # stop when the distortion falls by less than this share; 0: when no label changes
    on_small: Literal["clamp", "raise"] = "clamp"  # a class with fewer distinct images than ipc
    batch_size: int = 256  # clvq: samples per step
    passes: int = 1  # clvq: passes over the class
    expand: int = 1  # minibatch: batch = expand * ipc (D4M: 1 in the scripts, 10 by default)
    drop_tail: bool = False  # minibatch: True loses the incomplete last batch, as D4M's code does
    transport: Literal["exact", "entropic"] = "exact"  # barycentre
    entropy: float = 0.01  # barycentre: entropic regularisation in units of the mean squared distance
    uniform_w2: bool = True  # also solve the transport problem of the uniformly weighted points

    @property
    def uses_features(self) -> bool:
        return self.space in ("features", "joint")


@dataclass(frozen=True)
class GenerateConfig(Checked):
    mode: Literal["decode", "dit", "img2img"] = "decode"
    model: str | None = None  # pipeline folder or Hub id; None: the codec alone
    revision: str | None = None
    # diffusers class name; None: the one that comes with the model. A model that predicts a flow needs FlowMatch...,
    # or DPM-Solver++ or UniPC, whose flow sigmas are then switched on
    scheduler: str | None = None
    num_inference_steps: int = 50
    snr: float | None = 0.1  # start at the grid step whose signal-to-noise ratio is nearest to this ...
    strength: float | None = None  # ... or at this share of the steps, as diffusers counts it
    # random: forward noise; inversion: the ODE backwards from the point, without guidance (Song et al. 2021; D3HR)
    noise: Literal["random", "inversion"] = "random"
    rescale: Literal["none", "norm"] = "none"  # norm: points are as long as the median latent of their class
    guidance_scale: float = 4.0
    guidance_snr: tuple[float, ...] = ()  # least and largest SNR at which there is guidance; none: everywhere
    mode_guidance: float = (
        0.0  # share of the way to the prototype by which the predicted x_0 is moved (after MGD3) ...
    )
    mode_stop: float = 0.5  # ... in this first share of the walked steps
    prompt: str = "{name}"
    negative_prompt: str = "cartoon, anime, painting"
    class_map: dict[str, str] | None = None  # class name of the source -> class name or index of the generator
    images_per_prototype: int = 1
    image_dtype: Literal["uint8", "float32"] = "uint8"
    dtype: Dtype = "float32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        interval = self.guidance_snr
        if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise InputError(f"guidance_snr must be two rising ratios such as [0.05, 5], not {list(interval)}")
        for name in ("mode_guidance", "mode_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share and must lie in [0, 1], not {getattr(self, name)!r}")
        if self.noise == "inversion" and self.images_per_prototype > 1:
            raise InputError(
                f"noise=inversion gives the same image every time: set images_per_prototype=1 (now "
                f"{self.images_per_prototype}), or noise=random"
            )


@dataclass(frozen=True)
class TeacherConfig(Checked):
    net: str = "resnet56"  # a network of `dq.nets`, timm:NAME, torchvision:NAME, "transformers", or "pool"
    # safetensors file, or folder with model.safetensors; with timm: or torchvision: also "pretrained"; with
    # "transformers": model folder or Hub id; with "pool": folder of `dq train-pool`, whose members it stands for
    path: str = ""
    mean: tuple[float, ...] | None = None  # None: what the model comes with, else ImageNet's
    std: tuple[float, ...] | None = None
    classes: tuple[int, ...] | None = None  # output of the network for each class of the data; None: all, in order
    image_size: int | None = None  # side in px at which the network sees the images; None: as they are
    batch_size: int = 256
    check_images: int = 500  # real train images on which the teacher is checked before it labels anything
    weight: float = 1.0  # of its logits in the mean of several teachers


@dataclass(frozen=True)
class ViewConfig(Checked):
    """What a network sees of an image, in this order: patches shuffled, cropped, mirrored, colours changed, mixed with
    another image of the batch."""

    shuffle: int = 1  # the image is cut into shuffle x shuffle patches, which change places (RDED, EDC)
    crop_scale: tuple[float, ...] = ()  # random resized crop: least and largest share of the area; none: no crop
    crop_ratio: tuple[float, ...] = (0.75, 4 / 3)
    flip: float = 0.0  # probability of a mirror image
    jitter: float = 0.0  # brightness, contrast and saturation, each drawn in 1 +- this, in random order
    lighting: float = 0.0  # standard deviation of the noise along the principal colours of ImageNet
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: float = 1.0  # both parameters of the Beta law of the mixing share

    def __post_init__(self) -> None:
        super().__post_init__()
        low_high = self.crop_scale
        if low_high and not (len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= 1):
            raise InputError(f"crop_scale must be two shares such as [0.08, 1], not {list(low_high)}")
        if not (len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]):
            raise InputError(f"crop_ratio must be two numbers such as [0.75, 1.33], not {list(self.crop_ratio)}")
        if self.flip > 1:
            raise InputError(f"flip is a probability and cannot be {self.flip}")


@dataclass(frozen=True)
class DepthConfig(Checked):
    """Which layers' statistics are matched (PAD's second filter on statistics, arXiv 2408.03360). Layers count in the
    order in which the network calls them."""

    drop: float | None = 0.0  # layers up to this share of the depth are left out; None: PAD's rule by ipc
    unit: Literal["layer", "channel", "param"] = "layer"  # share of layers, of their channels, of convolution weights
    keep: Literal["deep", "shallow"] = "deep"  # shallow: a control that matches what "deep" leaves out
    # scale: the sum is multiplied so that it begins as large as that of all layers; count: by layers / kept layers
    renorm: Literal["scale", "count", "none"] = "scale"
    ramp: float = 0.0  # layer l of L weighs ((l + 1) / L)^ramp beside its other weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop is not None and not 0 <= self.drop < 1:
            raise InputError(f"drop is a share of the depth in [0, 1), not {self.drop}")
        if self.keep == "shallow" and self.drop == 0:
            raise InputError("keep=shallow keeps what drop leaves out, which is nothing: set drop above 0")


@dataclass(frozen=True)
class RefineConfig(Checked):
    """What the stages share that change pixels so that teachers see their classes and their statistics."""

    teachers: tuple[TeacherConfig, ...] = ()  # none: those of the run
    judges: tuple[TeacherConfig, ...] = ()  # teachers that only measure the images, before and after
    betas: tuple[float, ...] = (0.5, 0.9)  # of Adam
    r_bn: float = 0.01  # weight of the distance of statistics; right for a ResNet-18
    # None: r_bn as it is. Else r_bn of each teacher becomes this many times ln(classes) / its distance at the start
    bn_share: float | None = None
    first_bn_weight: float = 10.0  # of the first layer; the others have 1
    norm: Literal["l2", "squared"] = "l2"  # of the differences of means and variances
    depth: DepthConfig = DepthConfig()
    class_weight: float = 0.0  # of the distance between a class's mean last feature and that of its real images
    proximity: float = 0.0  # of the mean squared distance to the start, in normalised pixels
    weighted: bool = False  # statistics of a batch count its images by their weights in the set
    crop_scale: tuple[float, ...] = (0.08, 1.0)  # one random resized crop a step for the whole batch; none: no crop
    crop_ratio: tuple[float, ...] = (0.75, 4 / 3)
    flip: float = 0.5  # probability that a step sees the batch mirrored
    dtype: Dtype = "float32"  # of the teachers; statistics and pixels are in float32
    compose: Literal["index", "dealt"] = "index"  # dealt: every batch takes from all classes alike
    min_classes: int = 5  # different classes that a batch must hold (all, if there are fewer)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InputError(f"betas must be two decays in [0, 1), not {list(self.betas)}")
        ViewConfig(crop_scale=self.crop_scale, crop_ratio=self.crop_ratio, flip=self.flip)


@dataclass(frozen=True)
class FADRM(RefineConfig):
    """Data residual matching (arXiv 2506.24125). With several teachers it is FADRM+: one per step, in turn. What is
    None comes from the preset."""

    stage: Literal["fadrm"] = "fadrm"
    # whose released recipe: cifar10, cifar100, tinyimagenet, imagenette, imagewoof, imagenet1k; None: the usual one
    # for the size of the images
    preset: str | None = None
    sizes: tuple[int, ...] | None = None  # side in px in each block, the last that of the images
    steps: tuple[int, ...] | None = None  # of each block
    lr: float | None = None  # one cosine to 0 over all blocks
    jitter: int | None = None  # px of circular shift at most
    batch_size: int | None = None  # images optimised together; several of a class where there are fewer classes
    alpha: float = 0.5  # share of the optimised image in the merge behind each block but the last
    # init: the images that come in; real_patch: the crops of real images that the first teacher knows best; file: a
    # set that `dq.read_set` opens
    anchors: Literal["init", "real_patch", "file"] = "init"
    anchor_path: str | None = None
    anchor_rank: Literal["easy", "medium"] = "easy"  # real_patch: lowest cross-entropy, or nearest to the median
    start: Literal["anchor", "image"] = "anchor"  # what the first block starts from
    # patches, prototypes: every merge takes the nearest of the class's patches of real images, or of its images in the
    # set, in features (after RETA)
    retrieve: Literal["none", "patches", "prototypes"] = "none"
    retrieve_pool: int = 50  # patches: candidates of a class
    retrieve_complexity: float = 0.0  # of an anchor's total variation in the choice, features having unit length

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is a share and must lie in [0, 1], not {self.alpha}")
        for name in ("sizes", "steps"):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 1):
                raise InputError(f"{name} must list whole numbers of at least 1, one per block, not {list(values)}")
        if self.sizes is not None and self.steps is not None and len(self.sizes) != len(self.steps):
            raise InputError(
                f"sizes={list(self.sizes)} has {len(self.sizes)} blocks but steps={list(self.steps)} has "
                f"{len(self.steps)}; give one of each per block"
            )
        if (self.anchors == "file") != (self.anchor_path is not None):
            raise InputError("anchors=file and anchor_path belong together: set both, or neither")


@dataclass(frozen=True)
class Teddy(RefineConfig):
    """Matching against a pool of weak teachers (arXiv 2410.07579). The paper's settings are not known to us: the
    defaults are of SRe2L's kind, for a short refinement of images that look real already."""

    stage: Literal["teddy"] = "teddy"
    steps: int = 300  # 0: labels only
    lr: float = 0.02  # cosine to 0
    jitter: int | None = None  # None: an eighth of the side
    batch_size: int = 100
    proximity: float = 0.1
    ensemble_labels: bool = True  # store the weighted mean logits of all teachers for the images


@dataclass(frozen=True)
class MethodConfig(Checked):
    """One way to make a set: which points, which representative, which weights. `override` changes settings of
    `cluster` or `generate` for this method alone."""

    representative: Literal["centroid", "medoid", "real"] = "centroid"
    weights: Literal["uniform", "mass", "sqrt"] = "sqrt"
    normalize: Literal["none", "class", "sqrt_k"] = "none"
    override: dict[str, Any] = field(default_factory=dict)
    refine: tuple[FADRM | Teddy, ...] | None = None  # stages behind the generator, in this order; None: the run's


@dataclass(frozen=True)
class RelabelConfig(Checked):
    """How teachers label every view of a student with `labels: soft`, and what is kept of it."""

    storage: Literal["shards", "online"] = "shards"  # online: computed when needed, nothing stored, the same bits
    statistics: Literal["running", "batch"] = "running"  # of the teachers' batch norm; batch: BSSL
    average: Literal["logits", "probabilities"] = "logits"  # of several teachers, by their weights
    dropout: bool = False  # with batch statistics: dropout on too, as train mode has it in the released code
    bits: Literal[16, 8] = 16  # of a logit
    top_k: int | None = None  # keep the largest logits, the others become their mean
    epochs: int | None = None  # label epochs; fewer than the student's are used again and again
    views: Literal["stored", "seed"] = "stored"  # seed: crops and mixes are drawn again at replay, and compared
    seed: int = 42  # of order, crops and mixes


@dataclass(frozen=True)
class StudentConfig(Checked):
    """All settings of one training. In a configuration a student is a mapping of these and of `protocol` (a preset,
    see `dq.protocols`) and `dataset` (whose published settings to take); `epochs` may be a mapping by ipc."""

    protocol: str = "custom"  # where the settings come from
    net: str = "convnet3"
    norm: Literal["instance", "batch"] | None = None  # in place of the network's usual one
    labels: Literal["hard", "soft", "fixed"] = "hard"  # soft: a teacher's for every view; fixed: one per image
    epochs: int = 300
    batch_size: int = 256
    accumulate: int = 1  # a batch goes through in so many parts; batch norm sees the parts
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["step", "multistep", "cosine", "cos2", "constant"] = "step"
    zeta: float = 1.0  # cosine: ends at 0 for 1, at half of lr for 2
    views: ViewConfig = ViewConfig()
    augment: Literal["dsa", "crop_flip", "none"] = "dsa"  # after normalisation; not with labels=soft
    whiten: bool = False  # ZCA, fitted on the train split, instead of mean and std
    loss: Literal["kl", "mse_gt"] = "kl"  # soft and fixed labels; mse_gt: between logits, plus a share of the class
    temperature: float = 4.0
    gt_weight: float = 0.025  # of the cross-entropy with the class in mse_gt
    ema: float = 0.0  # decay of the averaged parameters that are tested; 0: the parameters themselves
    relabel: RelabelConfig = RelabelConfig()
    test_scale: float = 1.0  # test images are resized to this many times the side, then the centre is cut out
    select: Literal["validation", "test"] = "validation"  # where the best epoch is chosen; test is what papers print
    tests: int = 1  # looks during a training, the last epoch included; 1: no choice of an epoch
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        v = self.views
        if self.labels == "soft" and (self.augment != "none" or v.jitter or v.lighting):
            raise InputError(
                "labels=soft belong to the view that the teacher saw: set augment=none, views.jitter=0 and "
                "views.lighting=0, or take labels=fixed"
            )
        if self.labels == "fixed" and v.mix != "none":
            raise InputError("labels=fixed describe one image and not a mix: set views.mix=none, or take labels=soft")
        if self.whiten and (v.crop_scale or v.flip or v.shuffle > 1 or v.jitter or v.lighting or v.mix != "none"):
            raise InputError("whiten works on whole images: leave views at its defaults and use augment")
        if self.relabel.top_k and self.loss == "mse_gt":
            raise InputError("relabel.top_k keeps logits up to a constant, which loss=mse_gt needs; set top_k=null")
        if self.dtype == "float16":
            raise InputError(f"student {self.net!r} cannot train in float16, which needs loss scaling; use bfloat16")


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    seeds: int = 3
    full_seeds: int = 1  # of the full-data baseline, which costs more than all the others together
    baselines: tuple[Baseline, ...] = ("random", "nearest", "full")
    # patches: a baseline image is a mosaic of factor x factor crops; None: RDED's, 2 from 128 px and ipc 2, else 1
    patch_factor: int | None = None
    validation_images: int = 1000  # stratified part of train that no baseline uses, if a student chooses its epoch
    # settings of `StudentConfig`, `protocol` and `dataset`; none: `dq run` does not evaluate
    students: tuple[dict[str, Any], ...] = ({"protocol": "classic"},)


@dataclass(frozen=True)
class TrainTeachersConfig(Checked):
    output_dir: str = "runs/teachers"  # one folder per network
    nets: tuple[str, ...] = ("resnet20",)
    seed: int = 0
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    checkpoint_s: float = 60.0  # seconds between checkpoints
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class TrainPoolConfig(Checked):
    """A pool of weak teachers: early checkpoints of one training, or pruned copies of a trained network."""

    generation: Literal["prior", "post"] = "prior"
    output_dir: str = "runs/pool"
    net: str = "resnet20"  # prior: trained by the settings of `train_teachers`; post: that of `base`
    epochs: tuple[int, ...] = (5, 8, 11, 14, 17, 20, 23, 26, 29, 32)  # prior: whose ends give the members
    base: TeacherConfig | None = None  # post: the trained network
    size: int = 8  # post: number of pruned copies
    prune: tuple[float, ...] = (0.2, 0.5)  # post: least and largest share of channels taken out, evenly spaced
    criteria: tuple[Literal["magnitude", "random"], ...] = ("magnitude", "random")  # post: in turn
    recovery_epochs: int = 1  # post: short training afterwards
    recovery_lr: float = 0.01
    statistics_images: int = 10000  # train images over which batch norm statistics are estimated anew
    window: tuple[float, ...] = (0.25, 0.9)  # accuracy of a member by that of the base; others are not used
    keep_base: bool = True  # the fully trained network labels too; it is never matched

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generation == "post" and self.base is None:
            raise InputError("generation=post prunes a trained network; set train_pool.base.net and .path")
        if not self.epochs or min(self.epochs) < 1 or len(set(self.epochs)) < len(self.epochs):
            raise InputError(f"epochs must list different epochs from 1, not {list(self.epochs)}")
        for name in ("prune", "window"):
            pair = getattr(self, name)
            if not (len(pair) == 2 and 0 <= pair[0] <= pair[1]):
                raise InputError(f"{name} must be two rising shares such as {getattr(type(self), name)}, not {pair}")
        if self.prune[1] >= 1 or not self.criteria:
            raise InputError(f"prune must stay below 1 and criteria name at least one, not {list(self.prune)}")


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
    save_dtype: TrainDtype = "float32"  # of the saved weights
    dtype: TrainDtype = "float32"  # autocast

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.block_out_channels or min(self.block_out_channels) < 1:
            raise InputError(f"block_out_channels must list numbers of channels, not {list(self.block_out_channels)}")
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
    steps: int = 3000
    batch_size: int = 128
    accumulate: int = 1  # a batch goes through in so many parts
    lr: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 100
    weight_decay: float = 0.0
    ema: tuple[float, ...] = (0.99, 0.998)  # decays; the average with the least loss on held-out latents is saved
    held_out: int = 512  # latents at most that are not trained on
    dropout: float = 0.1  # share of labels replaced by the null class, for classifier-free guidance
    save_every: int = 500
    save_dtype: TrainDtype = "float32"  # of the saved weights
    compile: bool = False  # torch.compile
    dtype: TrainDtype = "float32"  # autocast

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ema or not all(0 <= e < 1 for e in self.ema):
            raise InputError(f"ema must list decays in [0, 1), not {list(self.ema)}")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.dropout <= 1:
            raise InputError(f"dropout is a share of the labels and cannot be {self.dropout}")
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


@dataclass(frozen=True)
class HubConfig(Checked):
    """Where and how something is pushed to the Hugging Face Hub. A token is no setting: it comes from --token,
    HF_TOKEN or the login, and is written nowhere."""

    repo_id: str | None = None  # "name" in one's own namespace, or "owner/name"
    private: bool | None = None  # of a repository that is made; None: as the owner's default is
    revision: str | None = None  # branch, made if it is not there; None: main
    create_pr: bool = False
    commit_message: str | None = None
    pretty_name: str | None = None  # this and what follows: None keeps what the card says
    license: str | None = None  # of the set or the model: an identifier such as cc-by-4.0, or any text
    source_license: str | None = None  # of the data that a set derives from
    generator_license: str | None = None  # of the weights that drew it


@dataclass(frozen=True)
class RunConfig(Checked):
    output_dir: str = "runs/dq"
    cache_dir: str = "runs/cache"
    seed: int = 0
    source: SourceConfig = SourceConfig()
    codec: CodecConfig = CodecConfig()
    ipc: tuple[int, ...] = (10,)
    cluster: ClusterConfig = ClusterConfig()
    generate: GenerateConfig = GenerateConfig()
    refine: tuple[FADRM | Teddy, ...] = ()  # stages that change the drawn images, in this order
    methods: dict[str, MethodConfig] = field(default_factory=lambda: {"ddoq": MethodConfig()})
    teachers: tuple[TeacherConfig, ...] = ()  # several: the mean of their logits
    train_teachers: TrainTeachersConfig = TrainTeachersConfig()
    train_pool: TrainPoolConfig = TrainPoolConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    prior: PriorConfig = PriorConfig()
    prior_report: PriorReportConfig = PriorReportConfig()
    hub: HubConfig = HubConfig()
    report_to: tuple[Tracker, ...] = ()  # trackers that get settings and numbers; files below output_dir/logs

    @property
    def image_size(self) -> int:
        return self.source.image_size or self.codec.resolution


def load_config(path: str | Path) -> RunConfig:
    """Read a `RunConfig` from a YAML file, or by the name of one that ships with the package (e.g. "demo")."""
    path = Path(path)
    if not path.exists() and path.suffix == "" and path.parent == Path("."):
        path = Path(__file__).parent / "configs" / f"{path.name}.yaml"
    if not path.is_file():
        raise InputError(f"there is no configuration file {path}; give the path of a YAML file with --config")
    try:
        data = read_yaml(path.read_text())
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # impossible dates are ValueErrors
        line = getattr(getattr(e, "problem_mark", None), "line", None)
        at = f" (line {line + 1})" if line is not None else ""
        raise InputError(f"{path} is not valid YAML{at}; correct it or start from a file in configs/") from None
    return from_dict(RunConfig, data or {})
