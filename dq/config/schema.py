"""The configuration: what can be set, and the defaults.

Precedence is defaults < file < flags. How it is read, checked and changed is in `dq.config.reader`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

import dq.config.condensation  # noqa: F401  (its stages are known by then)
from dq.config.prior import PriorConfig, PriorReportConfig
from dq.config.pruning import PruneConfig
from dq.config.reader import Checked, from_dict
from dq.config.refinement import RefineConfig
from dq.config.students import Dtype, EvaluateConfig
from dq.config.teachers import TeacherConfig, TrainPoolConfig, TrainTeachersConfig
from dq.config.trajectories import TrainExpertsConfig
from dq.core.bounded_yaml import read_yaml
from dq.core.errors import InputError

Tracker = Literal["trackio", "tensorboard", "wandb"]


@dataclass(frozen=True)
class SourceConfig(Checked):
    path: str = ""  # Hub data set id, local folder, or "sklearn:digits"
    name: str | None = None  # configuration name of a Hub data set
    revision: str | None = None
    train_split: str = "train"
    # None: the first that is there, in any case, of test, testing, validation, valid, val, eval, evaluation, dev;
    # "none": there is no test split
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    # rows are read where they lie, on disk or on the Hub; nothing is copied. For Parquet files and WebDataset tars
    streaming: bool = False
    on_bad_image: Literal["raise", "skip"] = "raise"
    # class folders that all hold the same folders: raise, or join the images of each (class/front, class/back)
    nested: Literal["raise", "join"] = "raise"
    preprocess: Literal["squash", "crop", "pad"] = "crop"  # how an image becomes a square
    image_size: int | None = None  # side in px of distilled and test images; None: codec.resolution


@dataclass(frozen=True)
class CodecConfig(Checked):
    path: str = ""  # model folder or Hub id of an autoencoder, or of a pipeline that has one under vae/
    subfolder: str | None = None
    revision: str | None = None
    resolution: int = 64  # side in px of the images that the codec sees
    posterior: Literal["mean", "sample"] = "mean"
    dtype: Dtype = "auto"
    batch_size: int = 64


@dataclass(frozen=True)
class ClusterConfig(Checked):
    engine: Literal["auto", "faiss", "torch", "clvq", "minibatch", "barycentre"] = "auto"
    # where the images of a class are compared; features: those of the first teacher (see `dq.cluster.spaces.embed`)
    space: Literal["latents", "pca", "whitened", "features", "joint"] = "latents"
    # pca, whitened: principal directions of a class; None: 64, or as many as the class allows. Whitened needs far
    # fewer than there are images in a class
    dims: int | None = None
    feature_weight: float = 1.0  # joint: of the features' variance, that of the latents being 1
    init: Literal["race", "k-means++", "random"] = "race"  # race: the best of several k-means++ in a subspace
    n_init: int = 1  # restarts; the lowest distortion wins
    n_iter: int = 100  # Lloyd iterations (barycentre: rounds) at most
    tol: float = 1e-4  # stop when the distortion falls by less than this share; 0: when no label changes
    # prototypes of a class; None: ipc. Fewer have several images each, by mass: a class has ipc images in any case
    prototypes_per_class: int | None = None
    on_small: Literal["clamp", "raise"] = "clamp"  # a class with fewer distinct images than ipc
    batch_size: int = 256  # clvq: samples per step
    passes: int = 1  # clvq: passes over the class
    expand: int = 1  # minibatch: batch = expand * ipc (D4M: 1 in the scripts, 10 by default)
    drop_tail: bool = False  # minibatch: True loses the incomplete last batch, as D4M's code does
    transport: Literal["exact", "entropic"] = "exact"  # barycentre
    entropy: float = 0.01  # barycentre: entropic regularisation in units of the mean squared distance
    uniform_w2: bool = True  # also solve the transport problem of the uniformly weighted points

    def prototypes(self, ipc: int) -> int:
        """Clusters of a class at `ipc` images per class."""
        return self.prototypes_per_class or ipc

    @property
    def uses_features(self) -> bool:
        return self.space in ("features", "joint")


MOST_CANDIDATES = 1000  # of an image; a larger number is a typing error
# kinds of guidance besides that by classes, and the scale at which each is off
GUIDANCE = {"internal_guidance": 1.0, "autoguidance": 1.0}
GUIDANCE |= dict.fromkeys(("mode_guidance", "measure_guidance", "repulsion"), 0.0)


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
    # scales of guidance away from the model's intermediate head and from its early average; 1: none
    internal_guidance: float = 1.0
    autoguidance: float = 1.0
    mode_guidance: float = (
        0.0  # share of the way to the prototype by which the predicted x_0 is moved (after MGD3) ...
    )
    mode_stop: float = 0.5  # ... in this first share of the walked steps
    # share of the way to all prototypes of the class with their masses, by entropic transport (after DMGD) ...
    measure_guidance: float = 0.0
    measure_interval: tuple[float, ...] = (0.1, 0.4)  # ... between these shares of the walked steps
    measure_entropy: float = 0.1  # in units of the mean cost
    measure_iterations: int = 5
    measure_weights: Literal["uniform", "mass"] = "uniform"  # of the images; mass: that of each one's own prototype
    repulsion: float = 0.0  # rate at which images of a class are kept apart (log-determinant of their cosines) ...
    repulsion_interval: tuple[float, ...] = (0.0, 0.5)  # ... between these shares of the walked steps
    repulsion_ridge: float = 0.1
    prompt: str = "{name}"
    negative_prompt: str = "cartoon, anime, painting"
    class_map: dict[str, str] | None = None  # class name of the source -> class name or index of the generator
    images_per_prototype: int = 1
    candidates: int = 1  # draws for every image that is kept, of which `select` keeps one
    # correct: the first that `select_teacher` classifies rightly; confident: the one of highest p(y); facility: those
    # whose features cover the class's real images best; transport: those that are together nearest to them
    select: Literal["none", "correct", "confident", "facility", "transport"] = "none"
    select_teacher: TeacherConfig | None = None  # should differ from those that label
    one_per_prototype: bool = True  # facility: False lets prototypes have several images, and others none
    image_dtype: Literal["uint8", "float32"] = "uint8"
    dtype: Dtype = "auto"
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        interval = self.guidance_snr
        if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise InputError(f"guidance_snr must be two rising ratios such as [0.05, 5], not {list(interval)}")
        for name in ("measure_interval", "repulsion_interval"):
            shares = getattr(self, name)
            if not (len(shares) == 2 and 0 <= shares[0] < shares[1] <= 1):
                raise InputError(f"{name} must be two rising shares such as [0.1, 0.4], not {list(shares)}")
        for name in ("mode_guidance", "mode_stop", "measure_guidance"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share and must lie in [0, 1], not {getattr(self, name)!r}")
        for name in ("internal_guidance", "autoguidance"):
            if getattr(self, name) != 1 and self.mode == "img2img":
                raise InputError(f"{name} is of a DiT's own weaker versions; set mode=dit, or {name}=1")
        if self.noise == "inversion" and self.images_per_prototype > 1:
            raise InputError(
                f"noise=inversion gives the same image every time: set images_per_prototype=1 (now "
                f"{self.images_per_prototype}), or noise=random"
            )
        if self.candidates > 1 and (self.noise == "inversion" or self.mode == "decode"):
            why = "noise=inversion" if self.noise == "inversion" else "mode=decode"
            raise InputError(f"{why} gives the same image every time: set candidates=1 (now {self.candidates})")
        if self.candidates > MOST_CANDIDATES:
            raise InputError(f"candidates must be at most {MOST_CANDIDATES}, not {self.candidates}")

    @property
    def guidance(self) -> dict[str, float]:
        """Kinds of guidance that are on, besides that by classes, and their scales."""
        return {name: getattr(self, name) for name, off in GUIDANCE.items() if getattr(self, name) != off}

    @property
    def together(self) -> bool:
        """Whether the images of a class are walked together, since each depends on the others."""
        return self.mode != "decode" and (self.measure_guidance > 0 or self.repulsion > 0)


@dataclass(frozen=True)
class MethodConfig(Checked):
    """One way to make a set: which points, which representative, which weights. `override` changes settings of
    `prune`, `cluster` or `generate` for this method alone."""

    representative: Literal["centroid", "medoid", "real"] = "centroid"
    weights: Literal["uniform", "mass", "sqrt"] = "sqrt"
    normalize: Literal["none", "class", "sqrt_k"] = "none"
    override: dict[str, Any] = field(default_factory=dict)
    refine: tuple[RefineConfig, ...] | None = None  # stages behind the generator, in this order; None: the run's


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
    prune: PruneConfig = PruneConfig()
    cluster: ClusterConfig = ClusterConfig()
    generate: GenerateConfig = GenerateConfig()
    refine: tuple[RefineConfig, ...] = ()  # stages that change the drawn images, in this order
    methods: dict[str, MethodConfig] = field(default_factory=lambda: {"ddoq": MethodConfig()})
    teachers: tuple[TeacherConfig, ...] = ()  # several: the mean of their logits
    train_teachers: TrainTeachersConfig = TrainTeachersConfig()
    train_pool: TrainPoolConfig = TrainPoolConfig()
    train_experts: TrainExpertsConfig = TrainExpertsConfig()
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
        path = Path(__file__).parent / "presets" / f"{path.name}.yaml"
    if not path.is_file():
        raise InputError(f"there is no configuration file {path}; give the path of a YAML file with --config")
    try:
        data = read_yaml(path.read_text())
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # impossible dates are ValueErrors
        line = getattr(getattr(e, "problem_mark", None), "line", None)
        at = f" (line {line + 1})" if line is not None else f" ({e})" if isinstance(e, ValueError) else ""
        raise InputError(f"{path} is not valid YAML{at}; correct it or start from a file in configs/") from None
    return from_dict(RunConfig, data or {})
