from __future__ import annotations

import ctypes
import resource
import sys

import pytest
import torch
from forking import Forked
from models import tiny_kl

from dq.core import memory
from dq.core.memory import keep_freed_memory, run_with_batch_backoff
from dq.diffusion.codec import encode_latents, to_signed


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(memory, "_fitted", {})


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
    result = run_with_batch_backoff("encode", 11, limited(encode, 3, sizes))
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    assert torch.allclose(result, encode(slice(0, 11)), atol=1e-5)
    assert "a batch of 11 does not fit in memory; going on with 5" in caplog.text
    # what has fitted is remembered, for this kind of work only
    sizes.clear()
    run_with_batch_backoff("encode", 4, limited(encode, 3, sizes))
    assert sizes == [2, 2]
    sizes.clear()
    run_with_batch_backoff("generate", 3, limited(encode, 3, sizes))
    assert sizes == [3]


def test_a_row_that_does_not_fit_and_other_errors_are_passed_on() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run_with_batch_backoff("x", 4, limited(lambda s: torch.zeros(1), 0, []))

    def broken(s: slice) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_with_batch_backoff("x", 4, broken)


def test_a_short_last_piece_that_fails_does_not_shorten_later_batches() -> None:
    sizes: list[int] = []
    failing = 0

    def call(s: slice) -> torch.Tensor:
        sizes.append(s.stop - s.start)
        if sizes[-1] == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.arange(s.start, s.stop)

    run_with_batch_backoff("x", 8, call)
    failing = 3
    assert run_with_batch_backoff("x", 3, call).tolist() == [0, 1, 2]
    run_with_batch_backoff("x", 8, call)
    assert sizes == [8, 3, 1, 1, 1, 8]


def test_a_full_piece_that_once_fitted_is_shortened_for_good() -> None:
    sizes: list[int] = []
    run_with_batch_backoff("x", 8, limited(lambda s: torch.zeros(s.stop - s.start), 8, []))
    for _ in range(2):
        run_with_batch_backoff("x", 8, limited(lambda s: torch.zeros(s.stop - s.start), 4, sizes))
    assert sizes == [8, 4, 4, 4, 4]


def test_what_fits_is_remembered_by_network_and_size() -> None:
    """A large network that needs small batches does not slow a small one down."""
    sizes: list[int] = []

    def look(at_most: int, like: tuple[object, ...]) -> None:
        run_with_batch_backoff(
            "teacher", 8, limited(lambda s: torch.zeros(s.stop - s.start), at_most, sizes), like=like
        )

    look(2, ("large", 3, 224, 224))
    sizes.clear()
    look(8, ("large", 3, 32, 32))
    look(8, ("small", 3, 224, 224))
    look(2, ("large", 3, 224, 224))
    assert sizes == [8, 8, 2, 2, 2, 2]


def test_teachers_of_other_weights_and_sizes_have_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_teachers import TinyNet, drawn, teacher_of

    from dq.networks import teacher as module

    kinds = []
    real = module.run_with_batch_backoff
    monkeypatch.setattr(
        module, "run_with_batch_backoff", lambda *a, like, **k: kinds.append(like) or real(*a, like=like, **k)
    )
    for name, side in (("a", 8), ("a", 8), ("a", 16), ("b", 8)):
        teacher_of(drawn(TinyNet()), name).logits(torch.zeros(2, 3, side, side))
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3


@pytest.mark.parametrize("status", ["CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"])
def test_libraries_without_memory_are_out_of_memory(status: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from dq.cli import main as module

    error = RuntimeError(f"CUDA error: {status} when calling `cublasCreate(handle)`")
    failures = iter([error])

    def call(s: slice) -> torch.Tensor:
        for e in failures:
            raise e
        return torch.zeros(s.stop - s.start)

    assert run_with_batch_backoff("x", 4, call).shape == (4,)

    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(module, "execute", fail)
    assert module.main(["run", "--config", "demo"]) == 1
    assert "out of memory" in capsys.readouterr().err


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


def pages_asked_for() -> int:
    """Pages that the kernel hands out while a block of 32 MB is allocated, filled and freed thirty times."""
    torch.zeros(8 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.zeros(8 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_are_kept_unless_the_environment_sets_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)

    def kept() -> int:
        libc = ctypes.CDLL(None)
        assert libc.mallopt(-3, 2**17) == libc.mallopt(-1, 2**17) == 1  # glibc's defaults, whatever this process had
        before = pages_asked_for()
        return 0 if keep_freed_memory() and pages_asked_for() < before / 10 else 1

    def left_alone() -> int:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
        return int(keep_freed_memory())

    for work in (kept, left_alone):
        process = Forked(work)
        _, errors = process.communicate(60)
        assert process.returncode == 0, errors


class Short:
    """Raises out of memory for more than `most` images, like a device that is too small."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []

    def __call__(self, module: object, args: tuple[torch.Tensor, ...]) -> None:
        self.sizes.append(len(args[0]))
        if len(args[0]) > self.most:
            raise torch.OutOfMemoryError("injected")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@torch.no_grad()
def test_images_are_decoded_in_pieces_when_memory_is_short(dtype: torch.dtype) -> None:
    from dq.diffusion.codec import decode_images, decode_latents, to_unit

    codec, z = tiny_kl(), torch.randn(7, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = decode_images(codec, z, 9, dtype=dtype)
    unit = to_unit(decode_latents(codec, z), 9)
    assert torch.equal(whole, unit if dtype == torch.float32 else (unit * 255).round().to(torch.uint8))
    short = Short(3)
    codec.decoder.register_forward_pre_hook(short)
    assert torch.allclose(decode_images(codec, z, 9, dtype=dtype).float(), whole.float(), atol=1e-5)
    assert short.sizes == [7, 3, 3, 1]


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_classes_are_sampled_alike_when_memory_is_short(name: str) -> None:
    """A step that failed late has drawn noise from the generators of its images, which is drawn again."""
    import diffusers
    from models import tiny_dit

    from dq.diffusion.class_sampling import ClassModel, sample_in_pieces, sample_latents

    model = ClassModel(tiny_dit(), getattr(diffusers, name)())
    options = {"guidance_scale": 2.0, "num_inference_steps": 3}

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(5)]

    whole = sample_latents(model, [0, 1, 2, 0, 1], generators(), **options)
    calls = 0

    def short(module: object, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # the last step of the whole batch
            raise torch.OutOfMemoryError("injected")

    model.transformer.register_forward_pre_hook(short)
    pieces = sample_in_pieces(model, [0, 1, 2, 0, 1], generators(), **options)
    assert calls > 3
    assert (whole - pieces).abs().max() < 1e-5 * whole.abs().max()
