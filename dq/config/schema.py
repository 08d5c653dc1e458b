"""The configuration: what can be set, and the defaults.

Precedence is defaults < file < flags. How it is read, checked and changed is in `dq.config.reader`.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

import dq.config.condensation  # noqa: F401  (its stages are known by then)
from dq.config.kinds import (
    Auto,
    Count,
    Many,
    ManySettings,
    Named,
    NameOrIndex,
    NonNegative,
    Off,
    PathText,
    Positive,
    Share,
    ShareBelowOne,
)
from dq.config.prior import PriorConfig, PriorReportConfig
from dq.config.pruning import PruneConfig
from dq.config.reader import from_dict
from dq.config.refinement import RefineConfig
from dq.config.students import Dtype, EvaluateConfig
from dq.config.teachers import TeacherConfig, TrainPoolConfig, TrainTeachersConfig
from dq.config.trajectories import TrainExpertsConfig
from dq.config.validation import Checked, settings
from dq.core.bounded_yaml import read_yaml
from dq.core.errors import InputError
from dq.core.text import nearest_name

PRESETS_FOLDER = Path(__file__).parent / "presets"  # configurations that come with the package
Tracker = Literal["trackio", "tensorboard", "wandb"]


@settings
class SourceConfig(Checked):
    """The image set."""

    path: Annotated[PathText, Field(description="Hub data set id, local folder, or sklearn:digits")] = ""
    name: Annotated[str | None, Field(description="configuration name of a Hub data set; null: its default")] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit on the Hub; null: main")] = None
    train_split: Annotated[str, Field(description="name of the train split")] = "train"
    # auto: in any case
    test_split: Annotated[
        Auto[str],
        Field(description="name of the test split, or none; auto: the first of test, testing, validation, val, eval"),
    ] = None
    test_share: Annotated[
        ShareBelowOne, Field(description="share of every class of train that is the test split where there is none")
    ] = 0.0
    image_column: Annotated[Auto[str], Field(description="column of the images; auto: the only one")] = None
    label_column: Annotated[Auto[str], Field(description="column of the labels; auto: the only one")] = None
    # for Parquet files and WebDataset tars
    streaming: Annotated[
        bool, Field(description="read rows where they lie, on disk or on the Hub, and copy nothing")
    ] = False
    on_bad_image: Annotated[
        Literal["raise", "skip"], Field(description="what to do with an image that cannot be read")
    ] = "raise"
    nested: Annotated[
        Literal["raise", "join"],
        Field(description="class folders that all hold the same folders: an error, or join the images of each"),
    ] = "raise"
    preprocess: Annotated[Literal["squash", "crop", "pad"], Field(description="how an image becomes a square")] = (
        "crop"
    )
    image_size: Annotated[
        Auto[Count], Field(description="side in px of distilled and test images; auto: codec.resolution")
    ] = None


@settings
class CodecConfig(Checked):
    """The autoencoder."""

    path: Annotated[
        PathText, Field(description="model folder or Hub id of an autoencoder, or of a pipeline that has one in vae/")
    ] = ""
    subfolder: Annotated[Auto[str], Field(description="folder of the autoencoder; auto: top, else vae")] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit on the Hub; null: main")] = None
    resolution: Annotated[Count, Field(description="side in px of the images that the codec sees")] = 64
    posterior: Annotated[Literal["mean", "sample"], Field(description="mean of the posterior, or a sample of it")] = (
        "mean"
    )
    dtype: Annotated[Dtype, Field(description="dtype of the codec; auto: what the device is fast in")] = "auto"
    batch_size: Annotated[Count, Field(description="images encoded at once")] = 64
    compile: Annotated[
        Off[Literal["auto"]],
        Field(description="auto: torch.compile on CUDA where a trial gives an equal result in less time"),
    ] = None


@settings
class ClusterConfig(Checked):
    """How the images of a class become prototypes."""

    engine: Annotated[
        Literal["auto", "faiss", "torch", "clvq", "minibatch", "barycenter"],
        Field(description="k-means: faiss, torch; online: clvq, minibatch; barycenter: balanced cells"),
    ] = "auto"
    # features: those of the first teacher (see `dq.cluster.spaces.embed`)
    space: Annotated[
        Literal["latents", "pca", "whitened", "features", "joint"],
        Field(description="space in which the images of a class are compared; joint: latents and features"),
    ] = "latents"
    # whitened needs far fewer than there are images in a class
    dims: Annotated[
        Auto[Count],
        Field(description="pca, whitened: principal directions of a class; auto: 64, or as many as it allows"),
    ] = None
    feature_weight: Annotated[
        NonNegative, Field(description="joint: weight of the features' variance, that of the latents being 1")
    ] = 1.0
    init: Annotated[
        Literal["pca-multistart", "k-means++", "random"],
        Field(description="first prototypes; pca-multistart: the best of several k-means++ in a subspace"),
    ] = "pca-multistart"
    n_init: Annotated[Count, Field(description="restarts; the lowest distortion wins")] = 1
    n_iter: Annotated[Count, Field(description="Lloyd iterations (barycenter: rounds) at most")] = 100
    tol: Annotated[
        NonNegative,
        Field(description="stop when the distortion falls by less than this share; 0: when no label changes"),
    ] = 1e-4
    # a class has ipc images in any case
    prototypes_per_class: Annotated[
        Auto[Count], Field(description="prototypes of a class, which have several images each, by mass; auto: ipc")
    ] = None
    on_small: Annotated[
        Literal["clamp", "raise"], Field(description="a class with fewer distinct images than ipc: take all, or stop")
    ] = "clamp"
    batch_size: Annotated[Count, Field(description="clvq: samples of a step")] = 256
    passes: Annotated[Count, Field(description="clvq: passes over the class")] = 1
    expand: Annotated[
        Count, Field(description="minibatch: batch = expand * ipc (D4M: 1 in the scripts, 10 by default)")
    ] = 1
    drop_tail: Annotated[bool, Field(description="minibatch: lose the incomplete last batch, as D4M's code does")] = (
        False
    )
    transport: Annotated[Literal["exact", "entropic"], Field(description="barycenter: transport problem")] = "exact"
    entropy: Annotated[
        Positive, Field(description="barycenter: entropic regularization in units of the mean squared distance")
    ] = 0.01
    uniform_w2: Annotated[
        bool, Field(description="also solve the transport problem of the uniformly weighted points")
    ] = True

    def prototypes(self, ipc: int) -> int:
        """Clusters of a class at `ipc` images per class."""
        return self.prototypes_per_class or ipc

    @property
    def uses_features(self) -> bool:
        return self.space in ("features", "joint")


MOST_CANDIDATES = 1000  # of an image; a larger number is a typing error
# kinds of guidance besides that by classes, and the scale at which each is off
GUIDANCE = {"internal_guidance": 1.0, "autoguidance": 1.0}
GUIDANCE |= dict.fromkeys(("prototype_guidance", "measure_guidance", "repulsion"), 0.0)


@settings
class GenerateConfig(Checked):
    mode: Annotated[
        Literal["decode", "dit", "img2img"],
        Field(description="codec alone, class-conditional DiT, or Stable Diffusion from images and prompts"),
    ] = "decode"
    model: Annotated[Off[PathText], Field(description="pipeline folder or Hub id; off: the codec alone")] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit on the Hub; null: main")] = None
    # a model that predicts a flow needs FlowMatch..., or DPM-Solver++ or UniPC, whose flow sigmas are then switched on
    scheduler: Annotated[
        Auto[str], Field(description="class name of a diffusers scheduler; auto: the model's own")
    ] = None
    num_inference_steps: Annotated[Count, Field(description="steps of the whole grid of the scheduler")] = 50
    snr: Annotated[
        Off[Positive], Field(description="start at the grid step whose signal-to-noise ratio is nearest to this")
    ] = 0.1
    strength: Annotated[
        Off[Positive], Field(description="start at this share of the steps, in place of snr, as diffusers counts it")
    ] = None
    # without guidance (Song et al. 2021; D3HR)
    noise: Annotated[
        Literal["random", "inversion"], Field(description="forward noise, or the ODE backwards from the prototype")
    ] = "random"
    rescale: Annotated[
        Literal["none", "norm"],
        Field(description="norm: prototypes become as long as the median latent of their class"),
    ] = "none"
    guidance_scale: Annotated[
        float, Field(ge=1, description="scale of classifier-free guidance by classes or prompts; 1: none")
    ] = 4.0
    guidance_interval: Annotated[
        Many[Annotated[float, Field(ge=0, allow_inf_nan=True)]],
        Field(description="least and largest SNR at which there is guidance; empty: everywhere"),
    ] = ()
    internal_guidance: Annotated[
        float, Field(ge=1, description="scale of guidance away from the model's intermediate head; 1: none")
    ] = 1.0
    autoguidance: Annotated[
        float, Field(ge=1, description="scale of guidance away from the model's early average; 1: none")
    ] = 1.0
    # after MGD3
    prototype_guidance: Annotated[
        Share, Field(description="share of the way to the prototype by which the predicted x_0 is moved")
    ] = 0.0
    prototype_guidance_stop: Annotated[
        Share, Field(description="share of the steps, the first, with prototype_guidance")
    ] = 0.5
    # by entropic transport (after DMGD)
    measure_guidance: Annotated[
        Share, Field(description="share of the way to all prototypes of the class with their masses")
    ] = 0.0
    measure_interval: Annotated[
        Many[Share], Field(description="shares of the steps between which there is measure_guidance")
    ] = (0.1, 0.4)
    measure_entropy: Annotated[
        Positive, Field(description="entropic regularization of that transport in units of the mean cost")
    ] = 0.1
    measure_iterations: Annotated[Count, Field(description="Sinkhorn iterations of that transport")] = 5
    measure_weights: Annotated[
        Literal["uniform", "mass"], Field(description="weights of the images; mass: those of their own prototypes")
    ] = "uniform"
    # log-determinant of their cosines
    repulsion: Annotated[NonNegative, Field(description="rate at which images of a class are kept apart")] = 0.0
    repulsion_interval: Annotated[
        Many[Share], Field(description="shares of the steps between which there is repulsion")
    ] = (0.0, 0.5)
    repulsion_ridge: Annotated[Positive, Field(description="ridge of the matrix of cosines")] = 0.1
    prompt: Annotated[str, Field(description="img2img: prompt; {name} is the name of the class")] = "{name}"
    negative_prompt: Annotated[str, Field(description="img2img: negative prompt")] = "cartoon, anime, painting"
    class_map: Annotated[
        Auto[Named[NameOrIndex]],
        Field(description="class name of the source: class name or index of the generator; auto: by equal names"),
    ] = None
    images_per_prototype: Annotated[Count, Field(description="images of a prototype")] = 1
    candidates: Annotated[
        int, Field(ge=1, le=MOST_CANDIDATES, description="draws for every image, of which select keeps one")
    ] = 1
    real_candidates: Annotated[
        int,
        Field(ge=0, le=MOST_CANDIDATES, description="nearest real images of every cell that are candidates too"),
    ] = 0
    # correct: the first that `select_teacher` classifies rightly; confident: the one of highest p(y); facility: those
    # whose features cover the class's real images best; transport: those that are together nearest to them
    select: Annotated[
        Literal["none", "correct", "confident", "facility", "transport"],
        Field(description="which candidate is kept, by select_teacher's prediction or features"),
    ] = "none"
    select_teacher: Annotated[
        Off[TeacherConfig], Field(description="teacher that selects; should differ from those that label")
    ] = None
    one_per_prototype: Annotated[
        bool, Field(description="facility: one image of each prototype; false: some have several, others none")
    ] = True
    image_dtype: Annotated[Literal["uint8", "float32"], Field(description="dtype of stored images")] = "uint8"
    dtype: Annotated[Dtype, Field(description="dtype of the generator; auto: what the device is fast in")] = "auto"
    batch_size: Annotated[Count, Field(description="images drawn at once")] = 32
    compile: Annotated[
        Off[Literal["auto"]],
        Field(description="auto: torch.compile of the DiT on CUDA where a trial gives an equal result in less time"),
    ] = None

    @model_validator(mode="after")
    def _check_generate(self) -> Self:
        interval = self.guidance_interval
        if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise InputError(f"guidance_interval must be two rising ratios such as [0.05, 5], not {list(interval)}")
        for name in ("measure_interval", "repulsion_interval"):
            shares = getattr(self, name)
            if not (len(shares) == 2 and shares[0] < shares[1]):
                raise InputError(f"{name} must be two rising shares such as [0.1, 0.4], not {list(shares)}")
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
        return self

    @property
    def guidance(self) -> dict[str, float]:
        """Kinds of guidance that are on, besides that by classes, and their scales."""
        return {name: getattr(self, name) for name, off in GUIDANCE.items() if getattr(self, name) != off}

    @property
    def together(self) -> bool:
        """Whether the images of a class are denoised together, since each depends on the others."""
        return self.mode != "decode" and (self.measure_guidance > 0 or self.repulsion > 0)


@settings
class MethodConfig(Checked):
    """One way to make a set: points, representative and weights.

    `override` changes settings of `prune`, `cluster` or `generate` for this method alone.
    """

    representative: Annotated[
        Literal["centroid", "medoid", "real"],
        Field(description="point of a cluster; real: the image nearest to the centroid"),
    ] = "centroid"
    weights: Annotated[
        Literal["uniform", "mass", "sqrt"], Field(description="weight of an image by the images of its cluster")
    ] = "sqrt"
    normalize: Annotated[
        Literal["none", "class", "sqrt_k"],
        Field(description="sum of the weights of the K images of a class: as it is, K, or sqrt(K)"),
    ] = "none"
    override: Annotated[
        Named[Any],
        Field(description="settings of prune, cluster or generate for this method alone, by dotted names"),
    ] = field(default_factory=dict)
    refine: Annotated[
        Auto[ManySettings[RefineConfig]],
        Field(description="stages of refinement of this method; auto: those of the run"),
    ] = None


@settings
class HubConfig(Checked):
    """Pushes to the Hugging Face Hub.

    A token is no setting: it comes from --token, HF_TOKEN or the login, and is never written.
    """

    repo_id: Annotated[str | None, Field(description="repository: name in your own namespace, or owner/name")] = None
    private: Annotated[
        Auto[bool], Field(description="whether a new repository is private; auto: as the owner's default is")
    ] = None
    revision: Annotated[str | None, Field(description="branch, made if it does not exist; null: main")] = None
    create_pr: Annotated[bool, Field(description="open a pull request")] = False
    commit_message: Annotated[str | None, Field(description="first line of the commit; null: a usual one")] = None
    pretty_name: Annotated[str | None, Field(description="title of the card; null: what it has")] = None
    license: Annotated[
        str | None,
        Field(description="license of the set or the model, e.g. cc-by-4.0, or any text; null: what the card has"),
    ] = None
    source_license: Annotated[
        str | None, Field(description="license of the data that a set derives from; null: what the card has")
    ] = None
    generator_license: Annotated[
        str | None, Field(description="license of the weights that drew it; null: what the card has")
    ] = None
    view_labels: Annotated[
        bool,
        Field(description="push the stored labels of views of the sets of a run, too; their size is logged first"),
    ] = False


@settings
class RunConfig(Checked):
    """All settings of a run."""

    output_dir: Annotated[PathText, Field(description="the run folder")] = "runs/dq"
    cache_dir: Annotated[
        PathText, Field(description="folder of latents, features, scores and full-data baselines of all runs")
    ] = "runs/cache"
    seed: Annotated[int, Field(description="seed of the run")] = 0
    source: Annotated[SourceConfig, Field(description="the image set")] = SourceConfig()
    codec: Annotated[CodecConfig, Field(description="the autoencoder")] = CodecConfig()
    ipc: Annotated[Many[Count], Field(description="images per class, one set for each")] = (10,)
    prune: Annotated[PruneConfig, Field(description="images of a class that are left out")] = PruneConfig()
    cluster: Annotated[ClusterConfig, Field(description="prototypes of a class")] = ClusterConfig()
    generate: Annotated[GenerateConfig, Field(description="images of the prototypes")] = GenerateConfig()
    refine: Annotated[
        ManySettings[RefineConfig], Field(description="stages that change the drawn images, in this order")
    ] = ()
    methods: Annotated[Named[MethodConfig], Field(description="ways to make a set, by name")] = field(
        default_factory=lambda: {"ddoq": MethodConfig()}
    )
    teachers: Annotated[
        ManySettings[TeacherConfig],
        Field(description="networks that label views; of several, the mean of their logits"),
    ] = ()
    train_teachers: Annotated[TrainTeachersConfig, Field(description="training of teachers")] = TrainTeachersConfig()
    train_pool: Annotated[TrainPoolConfig, Field(description="pool of weak teachers")] = TrainPoolConfig()
    train_experts: Annotated[TrainExpertsConfig, Field(description="training of experts for trajectories")] = (
        TrainExpertsConfig()
    )
    evaluate: Annotated[EvaluateConfig, Field(description="evaluation")] = EvaluateConfig()
    prior: Annotated[PriorConfig, Field(description="training of a prior")] = PriorConfig()
    prior_report: Annotated[PriorReportConfig, Field(description="report of a prior")] = PriorReportConfig()
    hub: Annotated[HubConfig, Field(description="pushing to the Hub")] = HubConfig()
    report_to: Annotated[
        Many[Tracker], Field(description="trackers of settings and numbers, in files below output_dir/logs")
    ] = ()

    @property
    def image_size(self) -> int:
        return self.source.image_size or self.codec.resolution


def load_config(path: str | Path) -> RunConfig:
    """Read a `RunConfig` from a YAML file, or by a name such as "demo"."""
    path = Path(path)
    if not path.exists() and path.suffix == "" and path.parent == Path("."):
        names = [p.stem for p in sorted(PRESETS_FOLDER.glob("*.yaml"))]
        if path.name not in names:
            if (PRESETS_FOLDER / "protocols" / f"{path.name}.yaml").is_file():
                raise InputError(
                    f"{path.name!r} is a protocol and no configuration; name it in evaluate.students, such as "
                    f"[{{protocol: {path.name}}}], or with `dq evaluate --protocol {path.name}`"
                )
            close = nearest_name(path.name, names)
            hint = f"did you mean {close!r}?" if close else "`dq ls` lists those that come with the package"
            raise InputError(f"there is no configuration file {path}; {hint}")
        path = PRESETS_FOLDER / f"{path.name}.yaml"
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the YAML file of a configuration, or a name of `dq ls`")
    if not path.is_file():
        raise InputError(f"there is no configuration file {path}; give the path of a YAML file, or a name of `dq ls`")
    try:
        data = read_yaml(path.read_text())
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # impossible dates are ValueErrors
        line = getattr(getattr(e, "problem_mark", None), "line", None)
        position = f" (line {line + 1})" if line is not None else f" ({e})" if isinstance(e, ValueError) else ""
        raise InputError(f"{path} is not valid YAML{position}; correct it, or start from one of `dq ls`") from None
    return from_dict(RunConfig, {} if data is None else data)
