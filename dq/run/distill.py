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

log = logging.getLogger("dq")
V = TypeVar("V")

HUB_SETTINGS = tuple(f.name for f in dataclasses.fields(HubConfig) if f.name != "repo_id")


def _listed(value: Any, kind: type[V], message: str) -> tuple[V, ...]:
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


class DistillPipeline(LatentGenerator):
    """A `LatentGenerator` that distills a labelled image set.

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
            output_dir: the run folder; the same call again continues or returns at once.
            cache_dir: where latents are kept for all runs; None: that of `config`.
            resolution: side in px at which the codec sees the images; None: what the denoiser was made for, else that
                of `config`.
            image_size: side in px of the distilled images; None: `resolution`.
            prune: which images of a class are quantized, by their difficulty; None: that of `config`.
            cluster: how a class is quantized; None: that of `config`.
            generate: how points become images; None: that of `config`, whose default is the mode of this model.
            method: representative and weights of the prototypes; None: the first of `config`.
            refine: stages that change the drawn images, in this order, e.g. `[FADRM(teachers=(TeacherConfig(...),))]`;
                None: those of `config`.
            teachers: who labels, and what stages without teachers of their own match; None: those of `config`.
            config: a full `RunConfig` to start from.

        Returns:
            The distilled set, also saved in `output_dir`/dataset.

        Raises:
            InputError: if the settings do not fit the model or the data.
            RunError: if a stage fails.
        """
        for name, value, kind in (
            ("prune", prune, PruneConfig),
            ("cluster", cluster, ClusterConfig),
            ("generate", generate, GenerateConfig),
            ("method", method, MethodConfig),
            ("config", config, RunConfig),
        ):
            if value is not None and not isinstance(value, kind):
                hint = f"{kind.__name__}(**{{...}})" if isinstance(value, dict) else kind.__name__
                raise InputError(f"{name} must be a {kind.__name__}, not {type(value).__name__}; give {hint}")
        ipc, seed = whole_number(ipc, "ipc"), whole_number(seed, "seed", least=None)
        sizes = {"resolution": resolution, "image_size": image_size}
        resolution, image_size = (v if v is None else whole_number(v, k) for k, v in sizes.items())
        for name, folder in (("output_dir", output_dir), ("cache_dir", cache_dir)):
            if not (isinstance(folder, (str, Path)) and str(folder)) and (name, folder) != ("cache_dir", None):
                raise InputError(f"{name} is the path of a folder such as 'runs/mine', not {folder!r}")
        data = load_source(source)
        base = config or RunConfig(generate=GenerateConfig(mode=self.default_mode))
        name = next(iter(base.methods))
        chosen = method or base.methods[name]
        if refine is not None:
            stages = _listed(refine, RefineConfig, "refine must list stages such as FADRM(...)")
            chosen = dataclasses.replace(chosen, refine=stages)
        if teachers is not None:
            teachers = _listed(teachers, TeacherConfig, "teachers must list TeacherConfig(...)")
        drawing = generate or base.generate
        if drawing.mode != self.default_mode:
            log.info("note: generate.mode=%s, though this model can %s", drawing.mode, self.default_mode)
        side = resolution or self._native_resolution() or base.codec.resolution
        settings = dataclasses.replace(
            base,
            source=dataclasses.replace(
                base.source,
                image_size=image_size or base.source.image_size,
                preprocess=data.preprocess,
                on_bad_image=data.on_bad_image,
            ),
            codec=dataclasses.replace(base.codec, resolution=side),
            prune=prune or base.prune,
            cluster=cluster or base.cluster,
            generate=drawing,
            teachers=base.teachers if teachers is None else teachers,
            ipc=(ipc,),
            seed=seed,
            methods={name: chosen},
            output_dir=str(output_dir),
            cache_dir=str(cache_dir or base.cache_dir),
        )
        accelerator = accelerator or make_accelerator()
        drawer = self.transformer or self.unet or self.vae
        models = {"codec": self.vae, "generate": drawer}
        loaded = {k: str(next(m.parameters()).dtype).removeprefix("torch.") for k, m in models.items()}
        check_settings(settle_dtypes(settings, data, accelerator, loaded)[0], data, "generate")
        check_generation(settings, data, self)
        with locked(settings.output_dir, accelerator, settings.cache_dir):
            run = open_run(settings, data, accelerator, loaded)
            cache = encode(run, self.vae)
            if run.resolved(name).prune.active:
                prune_images(run)
            cluster_classes(run, cache)
            generate_images(run, self, cache)
            refine_images(run, self.vae)
            label(run)
            assemble(run)
            return load_set_of_run(run, ipc, name)

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
            push_to_hub: also push it; the arguments of `push_to_hub` may stand beside.
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
        **settings: Any,
    ) -> Any:
        """Push as a stock folder with a model card to the repository "name" or "owner/name" of the Hugging Face Hub.

        Args:
            safe_serialization: True; weights are not pickled.
            variant: as for diffusers; the weights of other variants stay in the repository.
            subfolder: refused, since diffusers opens a pipeline from the root of a repository alone.
            **settings: `revision`, `license` and others of `HubConfig`.

        Returns:
            The commit (huggingface_hub's `CommitInfo`), which is also its URL as text.

        Raises:
            InputError: for an argument that cannot be honoured.
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
