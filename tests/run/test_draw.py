"""Images as units of work: what a unit is, and that dividing, interrupting and damaging them changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from models import tiny_dit, tiny_kl

from dq.config.reader import from_dict
from dq.config.schema import RunConfig
from dq.run.distill import DistillPipeline
from dq.run.folder import Run, class_file, open_run
from dq.run.stages import generate as draw
from dq.run.stages.cluster import cluster, prototype_folder
from dq.run.stages.encode import cache_of, encode
from dq.run.stages.generate import Draw, generate


@pytest.fixture(scope="module")
def pipe() -> DistillPipeline:
    return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(clip_sample=False))


def clustered(out: Path, source: Any, accelerator: Any, pipe: DistillPipeline, copies: int = 30) -> Run:
    data = {
        "output_dir": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "codec": {"resolution": 8},
        "generate": {"mode": "dit", "num_inference_steps": 3, "batch_size": 16, "images_per_prototype": copies},
        "ipc": [2],
    }
    run = open_run(from_dict(RunConfig, data), source, accelerator)
    cluster(run, encode(run, pipe.vae))
    return run


def drawing(run: Run, folder: Path) -> Draw:
    resolved = run.resolved("ddoq")
    return Draw(run, folder, prototype_folder(run, cache_of(run), 2, resolved), resolved.method, resolved.generate, [])


def files(out: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in out.glob("run/images/*/*.safetensors")}


def test_units_are_stretches_of_a_class_and_cover_every_image_once(
    tmp_path: Path, toy_source, accelerator, pipe
) -> None:
    run = clustered(tmp_path, toy_source, accelerator, pipe)
    units = drawing(run, tmp_path).units
    assert sorted((label, i) for label, piece, _ in units for i in piece) == [
        (c, i) for c in range(3) for i in range(60)
    ]
    assert max(len(piece) for _, piece, _ in units) == 3  # 180 images in about 64 units
    assert not any(whole for _, _, whole in units)
    assert len({drawing(run, tmp_path).file(u) for u in units}) == len(units)
    few = clustered(tmp_path / "few", toy_source, accelerator, pipe, copies=1)
    assert [len(piece) for _, piece, _ in drawing(few, tmp_path).units] == [1] * 6


def test_how_images_are_divided_does_not_change_them(
    tmp_path: Path, toy_source, accelerator, pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = clustered(tmp_path / "one", toy_source, accelerator, pipe)
    generate(one, pipe, cache_of(one))
    assert sorted(files(tmp_path / "one")) == [f"class-0000{c}.safetensors" for c in range(3)]  # no stretch is left
    monkeypatch.setattr(draw, "cut", lambda n, smallest, largest: [range(n)])
    two = clustered(tmp_path / "two", toy_source, accelerator, pipe)
    assert all(whole for _, _, whole in drawing(two, tmp_path).units)
    generate(two, pipe, cache_of(two))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_class_goes_on_behind_its_last_stretch(
    tmp_path: Path, toy_source, accelerator, pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = clustered(tmp_path / "whole", toy_source, accelerator, pipe)
    generate(whole, pipe, cache_of(whole))
    run = clustered(tmp_path / "run", toy_source, accelerator, pipe)
    write, written = draw.write_tensors, []

    def stop(path: Path, *rest: Any) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(draw, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(run, pipe, cache_of(run))
    assert len(files(tmp_path / "run")) == 7
    drawn: list[int] = []
    real = DistillPipeline.synthesize
    monkeypatch.setattr(draw, "write_tensors", write)
    monkeypatch.setattr(
        DistillPipeline, "synthesize", lambda self, z, *a, **k: drawn.append(len(z)) or real(self, z, *a, **k)
    )
    generate(run, pipe, cache_of(run))
    assert sum(drawn) == 180 - 7 * 3
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_damaged_class_is_drawn_again_and_no_other(
    tmp_path: Path, toy_source, accelerator, pipe, caplog: pytest.LogCaptureFixture
) -> None:
    run = clustered(tmp_path, toy_source, accelerator, pipe)
    generate(run, pipe, cache_of(run))
    before = files(tmp_path)
    paths = sorted(tmp_path.glob("run/images/*/class-*"))
    stamps = [f.stat().st_mtime_ns for f in paths]
    data = bytearray(before["class-00001.safetensors"])
    data[-1] ^= 8  # a pixel
    paths[1].write_bytes(data)
    generate(run, pipe, cache_of(run))
    assert files(tmp_path) == before
    assert [f.stat().st_mtime_ns == s for f, s in zip(paths, stamps, strict=True)] == [True, False, True]
    assert f"{class_file(paths[1].parent, 1)} is damaged" in caplog.text


def test_methods_and_sizes_of_equal_settings_share_batches(
    tmp_path: Path, toy_source, accelerator, pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their images are those that each has alone, and another guidance has batches of its own."""
    data = {
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "codec": {"resolution": 8},
        "generate": {"mode": "dit", "num_inference_steps": 3, "batch_size": 16},
        "ipc": [1, 2],
        "methods": {
            "ddoq": {},
            "medoids": {"representative": "medoid"},
            "norm": {"override": {"generate.rescale": "norm"}},
            "stronger": {"override": {"generate.guidance_scale": 7.0}},
            "real": {"representative": "real"},
        },
    }
    sizes: list[int] = []
    synthesize = DistillPipeline.synthesize

    def counted(self, latents, *args, **kwargs):
        sizes.append(len(latents))
        return synthesize(self, latents, *args, **kwargs)

    monkeypatch.setattr(DistillPipeline, "synthesize", counted)
    together = open_run(from_dict(RunConfig, data), toy_source, accelerator)
    cluster(together, encode(together, pipe.vae))
    generate(together, pipe, cache_of(together))
    assert sizes == [16, 11, 9]  # three methods of 3 and 6 images, and one of its own
    for method in data["methods"]:
        alone = {**data, "output_dir": str(tmp_path / method / "run"), "methods": {method: data["methods"][method]}}
        run = open_run(from_dict(RunConfig, alone), toy_source, accelerator)
        cluster(run, encode(run, pipe.vae))
        generate(run, pipe, cache_of(run))
        assert files(tmp_path / method)
    for folder in draw.drawn_folders(together, cache_of(together)).values():
        for c in range(3):
            own = next(tmp_path.glob(f"*/run/images/{folder.name}/{class_file(folder, c).name}"))
            assert own.read_bytes() == class_file(folder, c).read_bytes()
