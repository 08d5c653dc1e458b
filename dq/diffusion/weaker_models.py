"""Guidance by a weaker denoiser: an intermediate head or early average.

Both are saved in folders beside those of the stock pipeline, which ignores them:

    transformer_head/   config.json (depth and sizes)  model.safetensors  training.json
    transformer_early/  config.json  diffusion_pytorch_model.safetensors, a `DiTTransformer2DModel`  training.json

`training.json` has the digest of the training, which must be that of the transformer.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dq.core.devices import tf32_products
from dq.core.errors import InputError
from dq.core.files import write_json
from dq.core.model_files import ModelFiles
from dq.diffusion.loading import cast
from dq.diffusion.sampling import dit_prediction

ClassPredict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, C, h, w), t, classes (B,)) -> (B, C, h, w) float32

HEAD, EARLY = "transformer_head", "transformer_early"


class IntermediateHead(nn.Module):
    """DiT's output layer behind an earlier block (arXiv 2512.24176).

    out = unpatchify(W (norm(h) (1 + scale) + shift) + b) with (shift, scale) = V silu(c) + d for the embedded time and
    class c. W, b, V and d start at zero, as in the DiT.

    Args:
        depth: number of blocks before the head, from 1.
        width: of the hidden states.
        patch: side of a patch.
        channels: of the latents.
    """

    def __init__(self, *, depth: int, width: int, patch: int, channels: int):
        super().__init__()
        self.config = {"depth": depth, "width": width, "patch": patch, "channels": channels}
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(width, 2 * width)  # names of the DiT's own
        self.proj_out_2 = nn.Linear(width, patch * patch * channels)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        """Prediction (b, C, h, w) for hidden states of square latents.

        These are (b, n, width), and the conditioning (b, width).
        """
        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, 1)
        out = self.proj_out_2(self.norm(hidden) * (1 + scale[:, None]) + shift[:, None])
        side, patch = round(hidden.shape[1] ** 0.5), self.config["patch"]
        out = out.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))
        return torch.einsum("nhwpqc->nchpwq", out).flatten(4, 5).flatten(2, 3)


def new_head(model: Any) -> IntermediateHead:
    """A head behind a third of the blocks of a `DiTTransformer2DModel`."""
    c = model.config
    return IntermediateHead(
        depth=max(1, round(c.num_layers / 3)),
        width=c.num_attention_heads * c.attention_head_dim,
        patch=c.patch_size,
        channels=c.in_channels,
    )


class HiddenStates:
    """Hook that stores the output (b, n, width) of a DiT block."""

    def __init__(self, model: Any, depth: int):
        self.value: Tensor | None = None
        self.handle = model.transformer_blocks[depth - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, args: object, output: Tensor) -> None:
        self.value = output

    def take(self) -> Tensor:
        """The hidden states of the last call, once."""
        value, self.value = self.value, None
        assert value is not None, "the DiT was not called"
        return value


def head_output(model: Any, head: IntermediateHead, hidden: Tensor, t: Tensor, classes: Tensor) -> Tensor:
    """Prediction (b, C, h, w) of the head of a DiT.

    For its hidden states (b, n, width), times and classes (b,).
    """
    conditioning = model.transformer_blocks[0].norm1.emb(t, classes, hidden_dtype=hidden.dtype)
    return head(hidden, conditioning)


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """Extrapolation: weak + scale * (strong - weak).

    Exactly `strong` at a scale of 1.
    """
    return strong if scale == 1 else weak + scale * (strong - weak)


def internal_guidance(model: object, head: IntermediateHead, scale: float) -> ClassPredict:
    """Internal guidance (arXiv 2512.24176): D_i + scale * (D_f - D_i).

    A DiT is guided away from its own intermediate head, in one call of the model.
    """
    final = dit_prediction(model)

    def predict(x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        states = HiddenStates(model, head.config["depth"])
        try:
            strong = final(x, t, classes)
        finally:
            states.handle.remove()
        with tf32_products():
            weak = head_output(model, head, states.take(), t.expand(len(x)), classes).float()
        return extrapolate(weak, strong, scale)

    return predict


def autoguidance(strong: ClassPredict, weak: ClassPredict, scale: float) -> ClassPredict:
    """Autoguidance (Karras et al. 2024): D_0 + scale * (D_1 - D_0).

    A denoiser is guided away from a less trained one, in two calls.
    """
    return lambda x, t, classes: extrapolate(weak(x, t, classes), strong(x, t, classes), scale)


class WeakerModels:
    """Weaker versions of a DiT, opened when they are first needed."""

    def __init__(self, files: ModelFiles | None) -> None:
        self.files = files
        self._head: IntermediateHead | None = None
        self._early: Any = None

    def prediction(self, model: object, internal: float, auto: float) -> ClassPredict:
        """Prediction of a DiT with internal guidance and autoguidance; 1 is none.

        Both are affine in predictions, as classifier-free guidance is: each acts on the conditional and on the
        unconditional prediction alike.

        Raises:
            InputError: if the weaker version does not exist.
        """
        strong = dit_prediction(model) if internal == 1 else internal_guidance(model, self._open_head(model), internal)
        return strong if auto == 1 else autoguidance(strong, dit_prediction(self._open_early(model)), auto)

    def _open_head(self, model: Any) -> IntermediateHead:
        if self._head is None:
            config = self.files.json(f"{HEAD}/config.json") if self.files else None
            weights = self.files.file(f"{HEAD}/model.safetensors") if self.files else None
            if config is None or weights is None:
                raise self._missing("internal_guidance", HEAD, "prior.denoiser.intermediate_head=0.5")
            self._check_training(HEAD)
            self._head = IntermediateHead(**config)
            self._head.load_state_dict(load_file(weights))
        return self._head.eval().requires_grad_(False).to(model.device, model.dtype)

    def _open_early(self, model: Any) -> Any:
        from diffusers import DiTTransformer2DModel

        if self._early is None:
            if self.files is None or self.files.file(f"{EARLY}/config.json") is None:
                raise self._missing("autoguidance", EARLY, "prior.denoiser.early=0.125")
            self._check_training(EARLY)
            options = {"subfolder": EARLY, "use_safetensors": True, **self.files.options}
            self._early = DiTTransformer2DModel.from_pretrained(self.files.path, **options)
        return cast(self._early.eval().requires_grad_(False), model.dtype, model.device)

    def _check_training(self, folder: str) -> None:
        assert self.files is not None
        records = [self.files.json(f"{part}/training.json") or {} for part in (folder, "transformer")]
        if records[0].get("digest") != records[1].get("digest"):
            raise InputError(f"{folder}/ of {self.files.path} is of another training than transformer/; delete it")

    def _missing(self, setting: str, folder: str, training: str) -> InputError:
        where = self.files.path if self.files else "the model"
        return InputError(
            f"generate.{setting} needs {folder}/, which {where} lacks; only a whole training makes it: "
            f"train one with {training} in another prior.output_dir"
        )


def save_head(head: IntermediateHead, folder: Path, dtype: torch.dtype, digest: str) -> None:
    """Write a head's folder in a prior's folder atomically.

    `digest` is that of the training.
    """
    with _new_folder(folder / HEAD) as new:
        save_file({k: v.to(dtype).contiguous() for k, v in head.state_dict().items()}, new / "model.safetensors")
        write_json(new / "config.json", head.config, checksum=False)
        write_json(new / "training.json", {"digest": digest})


def save_early(model: Any, folder: Path, dtype: torch.dtype, digest: str) -> None:
    """Write the parameters of a DiT as the early average; see `save_head`."""
    with _new_folder(folder / EARLY) as new:
        cast(copy.deepcopy(model), dtype).save_pretrained(new)
        write_json(new / "training.json", {"digest": digest})


@contextlib.contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that replaces `final` afterwards."""
    new = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    shutil.rmtree(final, ignore_errors=True)
    os.replace(new, final)
