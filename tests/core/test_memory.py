from __future__ import annotations

import pytest
import torch
from models import tiny_kl

from dq.core import memory
from dq.core.memory import in_pieces
from dq.diffusion.codec import encode_latents, to_signed


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_fitting", {})


def limited(call, at_most: int, sizes: list[int]):
    """`call`, on a device whose memory takes `at_most` rows."""

    def run(s: slice):
        sizes.append(s.stop - s.start)
        if s.stop - s.start > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return call(s)

    return run


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randint(0, 256, (11, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codec = tiny_kl()

    def encode(s: slice) -> torch.Tensor:
        with torch.inference_mode():
            return encode_latents(codec, to_signed(x[s]))

    sizes: list[int] = []
    found = in_pieces("encode", 11, limited(encode, 3, sizes))
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    assert torch.allclose(found, encode(slice(0, 11)), atol=1e-5)
    assert "encode: a batch of 11 does not fit in memory; going on with 5" in caplog.text
    # what has fitted is remembered, for this kind of work only
    sizes.clear()
    in_pieces("encode", 4, limited(encode, 3, sizes))
    assert sizes == [2, 2]
    sizes.clear()
    in_pieces("generate", 3, limited(encode, 3, sizes))
    assert sizes == [3]


def test_a_row_that_does_not_fit_and_other_errors_are_passed_on() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        in_pieces("x", 4, limited(lambda s: torch.zeros(1), 0, []))

    def broken(s: slice) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_pieces("x", 4, broken)


def test_images_are_drawn_alike_when_memory_is_short(toy_source, tmp_path, monkeypatch) -> None:
    """The generators of a failed batch are not used again."""
    from diffusers import DDIMScheduler
    from models import tiny_dit

    from dq.config.schema import GenerateConfig
    from dq.run.distill import DistillPipeline

    def make() -> DistillPipeline:
        return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(clip_sample=False))

    cfg = GenerateConfig(mode="dit", num_inference_steps=4)
    whole = make().distill(
        toy_source,
        ipc=3,
        output_dir=tmp_path / "a",
        cache_dir=tmp_path / "c",
        config=None,
        generate=cfg,
    )
    real = DistillPipeline.synthesize
    sizes = []

    def short(self, latents, labels, generators, *args, **kwargs):
        sizes.append(len(latents))
        for g in generators:
            torch.randn(3, generator=g)  # what a failure late in the walk would leave
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        for g in generators:
            g.manual_seed(g.initial_seed())
        return real(self, latents, labels, generators, *args, **kwargs)

    monkeypatch.setattr(DistillPipeline, "synthesize", short)
    pieces = make().distill(
        toy_source,
        ipc=3,
        output_dir=tmp_path / "b",
        cache_dir=tmp_path / "c",
        config=None,
        generate=cfg,
    )
    assert sizes == [9, 4, 4, 1]
    assert torch.equal(whole.images, pieces.images)
