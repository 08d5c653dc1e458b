"""`save_pretrained` and `push_to_hub` with the arguments of diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DDIMScheduler, DiffusionPipeline
from diffusers.utils import PushToHubMixin
from models import tiny_dit, tiny_kl

from dq.core.errors import InputError
from dq.run.distill import DistillPipeline


def dit_pipe(seed: int = 0) -> DistillPipeline:
    return DistillPipeline(vae=tiny_kl(seed=seed), transformer=tiny_dit(seed=seed), scheduler=DDIMScheduler())


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("ours", "theirs", "left_out"),
    [
        (DistillPipeline.save_pretrained, DiffusionPipeline.save_pretrained, {"use_flashpack"}),
        (DistillPipeline.push_to_hub, PushToHubMixin.push_to_hub, set()),
    ],
)
def test_arguments_stand_in_the_order_of_diffusers(ours, theirs, left_out: set[str]) -> None:
    def names(f) -> list[str]:
        parameters = inspect.signature(f).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in left_out]

    assert names(ours) == names(theirs)


@pytest.mark.parametrize("pipe", [dit_pipe, lambda: DistillPipeline(vae=tiny_kl())])
def test_a_variant_and_shards_are_honoured(pipe, tmp_path: Path) -> None:
    saved = pipe()
    saved.save_pretrained(tmp_path, True, "fp16", "40KB")
    names = [f.name for f in tmp_path.rglob("*.safetensors")]
    assert len(names) > 1
    assert all(".fp16" in name for name in names)
    assert same_weights(DistillPipeline.from_pretrained(tmp_path, variant="fp16").vae, saved.vae)


def test_what_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    pipe = dit_pipe()
    for call, message in (
        (lambda: pipe.save_pretrained(tmp_path / "a", False), "would pickle weights"),
        (lambda: pipe.save_pretrained(tmp_path / "a", safe_serialisation=True), "no argument 'safe_serialisation'"),
        (lambda: pipe.save_pretrained(tmp_path / "a", repo_id="me/x"), "repo_id is for a push; add push_to_hub=True"),
        (lambda: pipe.push_to_hub("me/x", safe_serialization=False), "would pickle weights"),
        (lambda: pipe.push_to_hub("me/x", subfolder="a"), "subfolder 'a' of a repository cannot be opened"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file"):
        pipe.save_pretrained(tmp_path / "file")


def test_an_autoencoder_alone_opens_in_stock_diffusers_and_back(tmp_path: Path) -> None:
    pipe = DistillPipeline(vae=tiny_kl())
    pipe.save_pretrained(tmp_path)
    for opened in (AutoencoderKL.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert same_weights(opened, pipe.vae)
    again = DistillPipeline.from_pretrained(tmp_path)
    assert again.digest("decode") == pipe.digest("decode")


def test_components_beside_an_autoencoder_are_kept(tmp_path: Path) -> None:
    DistillPipeline(vae=tiny_kl(), scheduler=DDIMScheduler(), id2label={"0": "fig"}).save_pretrained(tmp_path)
    again = DistillPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, DDIMScheduler)
    assert again.config.id2label == {"0": "fig"}
