"""`DistillPipeline`: a diffusers pipeline that turns an image set into a distilled set."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dq.config.pruning import PruneConfig
from dq.config.refinement import RefineConfig
from dq.config.schema import ClusterConfig, GenerateConfig, HubConfig, MethodConfig, RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.locks import locked
from dq.core.numbers import whole_number
from dq.core.processes import make_accelerator
from dq.data.load import Loadable, load_source
from dq.data.source import ImageSource
from dq.diffusion.generator import LatentGenerator
from dq.distilled.set import DistilledSet
from dq.run.checks import check_generation, check_settings
from dq.run.folder import open_run, settle_dtypes
from dq.run.share import push_model
from dq.run.stages.assemble import assemble, load_set_of_run
from dq.run.stages.cluster import cluster as cluster_classes
from dq.run.stages.encode import encode
from dq.run.stages.generate import generate as generate_images
from dq.run.stages.label import label
from dq.run.stages.prune import prune as prune_images
from dq.run.stages.refine import refine as refine_images

if TYPE_CHECKING:
    from accelerate import Accelerator
    from huggingface_hub import CommitInfo

log = logging.getLogger("dq")
V = TypeVar("V")

KINDS: dict[str, type] = {
    **{"prune": PruneConfig, "cluster": ClusterConfig, "generate": GenerateConfig},
    **{"method": MethodConfig, "config": RunConfig},
}
HUB_SETTINGS = tuple(f.name for f in dataclasses.fields(HubConfig) if f.name != "repo_id")


def _as_tuple(value: object, kind: type[V], message: str) -> tuple[V, ...]:
    """One value or several of a kind as a tuple.

    Raises:
        InputError: that begins with `message`, if one is of another type.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    wrong = next((v for v in values if not isinstance(v, kind)), None)
    if wrong is not None or not all(isinstance(v, kind) for v in values):
        name = wrong.__name__ if isinstance(wrong, type) else type(wrong).__name__
        raise InputError(f"{message}, not {name}")
    return values


def _check_types(**values: object) -> None:
    """Refuse settings of another class than their name asks for."""
    for name, value in values.items():
        kind = KINDS[name]
        if value is not None and not isinstance(value, kind):
            hint = f"{kind.__name__}(**{{...}})" if isinstance(value, dict) else kind.__name__
            raise InputError(f"{name} must be a {kind.__name__}, not {type(value).__name__}; give {hint}")


def _check_folders(output_dir: object, cache_dir: object) -> None:
    for name, folder in (("output_dir", output_dir), ("cache_dir", cache_dir)):
        if not (isinstance(folder, (str, Path)) and str(folder)) and (name, folder) != ("cache_dir", None):
            raise InputError(f"{name} is the path of a folder such as 'runs/mine', not {folder!r}")


def _with_sections(base: RunConfig, *, teachers: Any, **sections: Any) -> RunConfig:
    """Settings with the sections that are not None in place of those of `base`."""
    changes = {name: section for name, section in sections.items() if section is not None}
    if teachers is not None:
        changes["teachers"] = _as_tuple(teachers, TeacherConfig, "teachers must list TeacherConfig(...)")
    return dataclasses.replace(base, **changes)


def _with_method(base: RunConfig, method: MethodConfig | None, refine: object) -> RunConfig:
    """Settings with one method, under the first name of `base`."""
    name = next(iter(base.methods))
    method = method or base.methods[name]
    if refine is not None:
        stages = _as_tuple(refine, RefineConfig, "refine must list stages such as FADRM(...)")
        method = dataclasses.replace(method, refine=stages)
    return dataclasses.replace(base, methods={name: method})


class DistillPipeline(LatentGenerator):
    """A `LatentGenerator` that distills a labeled image set.

    `pipe(class_labels=...)` generates images of classes; `pipe.distill(source, ...)` quantizes a data set in the
    latent space, draws the quantizers as images, refines and labels them.

    Example:
        pipe = DistillPipeline.from_pretrained("facebook/DiT-XL-2-256")
        distilled = pipe.distill("my/images", ipc=10, output_dir="runs/mine")
    """

    def distill(
        self,
        source: Loadable,
        *,
        ipc: int = 10,
        output_dir: str | Path = "runs/dq",
        cache_dir: str | Path | None = None,
        seed: int = 0,
        resolution: int | None = None,
        image_size: int | None = None,
        prune: PruneConfig | None = None,
        cluster: ClusterConfig | None = None,
        generate: GenerateConfig | None = None,
        method: MethodConfig | None = None,
        refine: RefineConfig | Sequence[RefineConfig] | None = None,
        teachers: TeacherConfig | Sequence[TeacherConfig] | None = None,
        config: RunConfig | None = None,
        accelerator: Accelerator | None = None,
    ) -> DistilledSet:
        """Distill `source` to `ipc` images per class: encode, prune, cluster, generate, refine, label, assemble.

        Args:
            source: anything that `load_source` takes.
            ipc: images per class.
            output_dir: the run folder; the same call again continues or returns at once.
            cache_dir: where latents are kept for all runs; None: that of `config`.
            seed: seed of the run.
            resolution: side in px for the codec; None: that of the denoiser, else that of `config`.
            image_size: side in px of the distilled images; None: `resolution`.
            prune: which images of a class are quantized; this and the following None: that of `config`.
            cluster: how a class is quantized.
            generate: how points become images; the default of its mode is that of this model.
            method: representative and weights of the prototypes; None: the first of `config`.
            refine: stages that change the drawn images, e.g. `[FADRM(teachers=(TeacherConfig(...),))]`.
            teachers: who labels, and what stages without teachers of their own match.
            config: a full `RunConfig` to start from.
            accelerator: processes and device; None: those of the launcher.

        Returns:
            The distilled set, also saved in `output_dir`/dataset.

        Raises:
            InputError: if the settings do not fit the model or the data.
            RunError: if a stage fails.
        """
        _check_types(prune=prune, cluster=cluster, generate=generate, method=method, config=config)
        _check_folders(output_dir, cache_dir)
        data = load_source(source)
        base = config or RunConfig(generate=GenerateConfig(mode=self.default_mode))
        base = _with_sections(base, prune=prune, cluster=cluster, generate=generate, teachers=teachers)
        base = self._with_sizes(_with_method(base, method, refine), data, resolution, image_size)
        settings = dataclasses.replace(
            base,
            ipc=(whole_number(ipc, "ipc"),),
            seed=whole_number(seed, "seed", minimum=None),
            output_dir=str(output_dir),
            cache_dir=str(cache_dir or base.cache_dir),
        )
        return self._run(settings, data, accelerator or make_accelerator())

    def _with_sizes(
        self, base: RunConfig, data: ImageSource, resolution: int | None, image_size: int | None
    ) -> RunConfig:
        """Settings with the sides of images, and with the reading of images that `data` has."""
        side = self._native_resolution() or base.codec.resolution
        if resolution is not None:
            side = whole_number(resolution, "resolution")
        source = dataclasses.replace(base.source, preprocess=data.preprocess, on_bad_image=data.on_bad_image)
        if image_size is not None:
            source = dataclasses.replace(source, image_size=whole_number(image_size, "image_size"))
        return dataclasses.replace(base, source=source, codec=dataclasses.replace(base.codec, resolution=side))

    def _run(self, settings: RunConfig, data: ImageSource, accelerator: Accelerator) -> DistilledSet:
        """Check and do the stages of a run of one method and one ipc."""
        if settings.generate.mode != self.default_mode:
            log.info("note: generate.mode=%s, though this model can %s", settings.generate.mode, self.default_mode)
        models = {"codec": self.vae, "generate": self.transformer or self.unet or self.vae}
        loaded = {k: str(next(m.parameters()).dtype).removeprefix("torch.") for k, m in models.items()}
        check_settings(settle_dtypes(settings, data, accelerator, loaded)[0], data, "generate")
        check_generation(settings, data, self)
        method = next(iter(settings.methods))
        with locked(settings.output_dir, accelerator, settings.cache_dir):
            run = open_run(settings, data, accelerator, loaded)
            cache = encode(run, self.vae)
            if run.resolved(method).prune.active:
                prune_images(run)
            cluster_classes(run, cache)
            generate_images(run, self, cache)
            refine_images(run, self.vae)
            label(run)
            assemble(run)
            return load_set_of_run(run, settings.ipc[0], method)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as a stock folder; see `LatentGenerator.save_pretrained`.

        Args:
            save_directory: the folder to write.
            safe_serialization: True; weights are not pickled.
            variant: of the names of weights, as for diffusers.
            max_shard_size: as for diffusers.
            push_to_hub: also push it; the arguments of `push_to_hub` may stand beside.
            **kwargs: fields of `HubConfig` and `repo_id`, with `push_to_hub`.
        """
        hub = {k: kwargs.pop(k) for k in ("repo_id", "token", *HUB_SETTINGS) if k in kwargs}
        if hub and not push_to_hub:
            raise InputError(f"{next(iter(hub))} is for a push; add push_to_hub=True")
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        if push_to_hub:
            push_model(save_directory, hub.pop("repo_id", Path(save_directory).name), variant=variant, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        **settings: object,
    ) -> CommitInfo:
        """Push as a stock folder with a model card to the Hugging Face Hub.

        Args:
            repo_id: "name" or "owner/name" of the repository.
            commit_message: first line of the commit; None: a usual one.
            private: whether a new repository is private; None: the owner's default.
            token: None takes HF_TOKEN or the login.
            create_pr: open a pull request.
            safe_serialization: True; weights are not pickled.
            variant: as for diffusers; the weights of other variants stay in the repository.
            subfolder: refused, since diffusers opens a pipeline from the root of a repository alone.
            **settings: `revision`, `license` and others of `HubConfig`.

        Returns:
            The commit (huggingface_hub's `CommitInfo`), which is also its URL as text.

        Raises:
            InputError: for an argument that cannot be honored.
        """
        if subfolder:
            raise InputError(
                f"a pipeline in the subfolder {subfolder!r} of a repository cannot be opened by diffusers; push it to "
                "a repository of its own, or to a branch with revision="
            )
        options = {"commit_message": commit_message, "private": private, "create_pr": create_pr, **settings}
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(scratch, safe_serialization, variant)
            return push_model(scratch, repo_id, token=token, variant=variant, **options)
