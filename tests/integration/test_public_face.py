"""What a user meets first: public names, types that are nearly right, sets of any origin, results as tables."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from models import tiny_dit, tiny_kl

import dq
from dq import (
    FADRM,
    DistilledSet,
    DistillPipeline,
    GenerateConfig,
    InputError,
    MethodConfig,
    evaluate,
    list_protocols,
    load_set,
    load_source,
)
from dq.core.files import read_json, write_json
from dq.distilled.external import LabelVectors, set_from_tensors

NAMES = ("red", "green", "blue")


@pytest.fixture
def pipe() -> DistillPipeline:
    names = {str(i): n for i, n in enumerate(NAMES)}
    scheduler = DDIMScheduler(clip_sample=False)
    return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=scheduler, id2label=names)


def small(n: int = 2, soft: torch.Tensor | None = None, kind: str | None = None) -> DistilledSet:
    g = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (3 * n, 3, 8, 8), dtype=torch.uint8, generator=g)
    labels = torch.arange(3).repeat_interleave(n)
    vectors = None if soft is None else LabelVectors(soft, kind)  # type: ignore[arg-type]
    return set_from_tensors(images, labels, NAMES, label_vectors=vectors)


def test_no_module_shares_its_name_with_a_public_name() -> None:
    """A module `dq.protocols` once hid the function of that name."""
    modules = {m.name.rpartition(".")[2] for m in pkgutil.iter_modules(dq.__path__)}
    assert not modules & set(dq.__all__)
    for name in dq.__all__:
        assert getattr(dq, name) is getattr(dq, name)
        assert name in dir(dq)
    # importing every module leaves every public name what it was
    before = {name: getattr(dq, name) for name in dq.__all__}
    for module in pkgutil.walk_packages(dq.__path__, "dq."):
        if module.name != "dq.cli.__main__":
            importlib.import_module(module.name)
    assert {name: getattr(dq, name) for name in dq.__all__} == before


def test_protocols_are_listed_twice() -> None:
    first, second = list_protocols(), list_protocols()
    assert first == second
    assert {"classic", "hard", "fadrm", "sre2l", "rded", "edc"} <= set(first)
    assert all(isinstance(about, str) and about for about in first.values())


def test_a_call_generates_images_of_classes(pipe: DistillPipeline) -> None:
    options = {"guidance_scale": 2.0, "num_inference_steps": 3}
    images = pipe(class_labels=[0, 2, 2], generator=torch.manual_seed(0), **options).images
    assert [i.size for i in images] == [(8, 8)] * 3
    tensors = pipe(["red", "blue", "blue"], generator=torch.manual_seed(0), output_type="pt", **options).images
    assert tensors.shape == (3, 3, 8, 8)
    for image, tensor in zip(images, tensors, strict=True):
        array = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        assert (array.float() / 255 - tensor).abs().max() < 1 / 255
    assert not torch.equal(tensors[1], tensors[2])  # noise of their own
    # an image does not depend on the others of the call, and numpy integers are taken
    own = [torch.Generator().manual_seed(i) for i in range(2)]
    both = pipe(np.array([1, 0]), generator=own, output_type="pt", **options).images
    alone = pipe(np.int64(0), generator=[torch.Generator().manual_seed(1)], output_type="pt", **options).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    mixed = pipe(["green", 0], generator=own, output_type="pt", **options).images
    assert mixed.shape == both.shape
    assert pipe([0], output_type="np", return_dict=False, **options)[0].shape == (1, 8, 8, 3)
    assert pipe([0], image_size=4, output_type="pt", **options).images.shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [9]}, "this model has no class 9; its classes are 0 to 2"),
        ({"class_labels": ["cat"]}, "lacks class 'cat'"),
        ({"class_labels": [0.5]}, "a class label is a whole number or a class name, not 0.5"),
        ({"class_labels": [0], "output_type": "jpg"}, "output_type must be 'pil', 'np' or 'pt', not 'jpg'"),
        (
            {"class_labels": [0], "num_inference_steps": 0},
            "num_inference_steps is a whole number of at least 1, not 0",
        ),
        ({"class_labels": [0], "guidance_scale": None}, "guidance_scale is a finite number, not None"),
        ({"class_labels": [0], "generator": 3}, "generator is a torch.Generator or a list of them, not int"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "there are 1 generators for 2 images"),
    ],
)
def test_a_call_that_is_none_ends_in_a_sentence(pipe: DistillPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe(**{"num_inference_steps": 2, **arguments})


def test_a_codec_alone_generates_no_classes() -> None:
    with pytest.raises(InputError, match="needs a transformer"):
        DistillPipeline(vae=tiny_kl())([0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"generate": {"snr": 0.1}},
            r"generate must be a GenerateConfig, not dict",
        ),
        ({"method": "ddoq"}, "method must be a MethodConfig, not str"),
        ({"refine": ["fadrm"]}, r"refine must list stages such as FADRM\(...\), not str"),
        ({"refine": FADRM}, r"refine must list stages such as FADRM\(...\), not FADRM"),
        ({"teachers": "resnet18"}, r"teachers must list TeacherConfig\(...\), not str"),
        ({"ipc": 1.5}, "ipc is a whole number of at least 1, not 1.5"),
    ],
)
def test_settings_of_another_type_are_refused(tmp_path: Path, toy_source, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillPipeline(vae=tiny_kl()).distill(toy_source, output_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_distill_takes_arrays_numpy_integers_and_typed_settings(tmp_path: Path, toy_images, accelerator) -> None:
    arrays = {k: (x.numpy(), y.numpy()) for k, (x, y) in toy_images.items()}
    s = DistillPipeline(vae=tiny_kl()).distill(
        arrays,
        ipc=np.int64(2),
        output_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        resolution=8,
        generate=GenerateConfig(mode="decode", batch_size=4),
        method=MethodConfig(weights="mass"),
        accelerator=accelerator,
    )
    assert len(s) == 6
    assert s.provenance["method"]["weights"] == "mass"
    # the run folder, the folder of sets and the set's own are one set
    opened = [load_set(tmp_path / "run"), load_set(tmp_path / "run" / "dataset")]
    opened += [load_set(str(tmp_path / "run" / "dataset" / "ipc2-ddoq"))]
    assert all(torch.equal(o.images, s.images) for o in opened)


def test_types_of_the_pipeline_in_text(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path / "vae")
    assert DistillPipeline.from_pretrained(tmp_path / "vae", dtype="bfloat16").vae.dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"dtype is one of float32, bfloat16, float16, .* not 'half'"):
        DistillPipeline.from_pretrained(tmp_path / "vae", dtype="half")


def test_sources_that_are_nearly_right(toy_images) -> None:
    from datasets import Dataset, DatasetDict

    x, y = toy_images["train"]
    assert load_source([x, y]).class_counts().tolist() == [9, 8, 7]
    padded = load_source((x, y), preprocess="pad", on_bad_image="skip")
    assert (padded.preprocess, padded.on_bad_image) == ("pad", "skip")
    assert load_source(padded, preprocess="squash").preprocess == "squash"
    for given, message in (
        (DatasetDict({"train": Dataset.from_dict({"a": [1]})}), "a DatasetDict of `datasets` in memory is not read"),
        ({"train": x}, "split 'train' of tensors is a pair"),
        (3, r"a source is a path, a Hub id, a pair \(images, labels\) or a SourceConfig, not int"),
    ):
        with pytest.raises(InputError, match=message):
            load_source(given)
    with pytest.raises(InputError, match="preprocess must be one of 'squash', 'crop', 'pad', not 'stretch'"):
        load_source((x, y), preprocess="stretch")


def test_a_set_is_a_sequence_a_dataset_and_tensors() -> None:
    soft = torch.eye(3).repeat_interleave(2, 0) * 4
    s = small(soft=soft, kind="logits")
    row = s[3]
    assert torch.equal(row["image"], s.images[3])
    assert (row["label"], row["weight"]) == (1, 1.0)
    assert row["soft_label"].tolist() == [0, 4, 0]
    assert len(list(s)) == 6
    with pytest.raises(IndexError):
        s[6]
    table = s.to_dataset()
    assert table.features["label"].names == list(NAMES)
    assert table["label"][:] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(np.asarray(table[4]["image"]).transpose(2, 0, 1), s.images[4].numpy())
    assert table["soft_label"][2] == [0, 4, 0]
    tensors = s.to_torch()
    x, y, w, t = tensors[5]
    assert torch.equal((x * 255).round().to(torch.uint8), s.images[5])
    assert (int(y), float(w), t.tolist()) == (2, 1.0, [0, 0, 4])
    assert len(small().to_torch()[0]) == 3


def test_results_are_a_table(toy_source) -> None:
    results = evaluate(small(), toy_source, protocol="custom", students="convnet3w32", n_seeds=np.int64(1), epochs=1)
    table = results.to_pandas()
    assert table["set"].tolist() == ["set", "random"]
    assert table["seeds"].tolist() == [1, 1]
    assert {"last_mean", "last_std", "protocol", "settings"} <= set(table.columns)
    with pytest.raises(InputError, match=r"DistilledSet .*not list"):
        evaluate([1], toy_source)
    with pytest.raises(InputError, match=r"n_seeds .*at least 1, not 1\.5"):
        evaluate(small(), toy_source, n_seeds=1.5)
    with pytest.raises(InputError, match=r"student .*StudentConfig .*not int"):
        evaluate(small(), toy_source, students=[3])


def test_what_label_vectors_are_is_stated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logits, probabilities and regression targets survive saving; a set of before is logits, and that is logged."""
    soft = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), 1)
    with pytest.raises(InputError, match="could be probabilities"):
        small(soft=soft)
    for kind in ("logits", "probabilities", "regression"):
        small(soft=soft, kind=kind).save(tmp_path / kind, "x")
        assert load_set(tmp_path / kind).label_kind == kind
        assert load_set(tmp_path / kind, label_kind="logits").label_kind == "logits"
    assert not caplog.records
    path = tmp_path / "logits" / "x" / "provenance.json"
    record = {k: v for k, v in read_json(path).items() if k != "label_kind"}
    write_json(path, record)
    assert load_set(tmp_path / "logits").label_kind == "logits"
    assert "does not say what its label vectors are" in caplog.text
    assert "`load_set` and `save` write it again" in caplog.text
    write_json(path, {**record, "label_kind": "odds"})
    with pytest.raises(dq.RunError, match=r"label_kind='odds'.*logits, probabilities, regression"):
        load_set(tmp_path / "logits")
    with pytest.raises(InputError, match=r"label_kind .*logits, probabilities, regression"):
        dataclasses.replace(small(), label_kind="odds")
    # the Parquet files alone say it too
    alone = tmp_path / "alone"
    alone.mkdir()
    file = next((tmp_path / "regression" / "x").glob("*.parquet"))
    (alone / "train-00000-of-00001.parquet").write_bytes(file.read_bytes())
    assert load_set(alone, NAMES).label_kind == "regression"


def test_probabilities_teach_what_their_logarithms_teach() -> None:
    from dq.evaluation.student import training_data

    soft = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), 1)
    logits = training_data(small(soft=soft, kind="probabilities"), 8).soft_labels
    torch.testing.assert_close(torch.softmax(logits, 1), soft, atol=1e-3, rtol=1e-2)


def test_label_vectors_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be finite and fit float16"):
        small(soft=torch.full((6, 3), 1e6), kind="logits")
    with pytest.raises(InputError, match="are called probabilities but some are negative"):
        small(soft=-torch.ones(6, 3), kind="probabilities")
    np.savez(tmp_path / "far.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, 10**9]))
    with pytest.raises(InputError, match=r"up to 1000000000.*class_names"):
        load_set(tmp_path / "far.npz")
    np.savez(tmp_path / "short.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, 1], np.uint16))
    assert load_set(tmp_path / "short.npz").labels.tolist() == [0, 1]


def test_paths_that_hold_no_set(tmp_path: Path) -> None:
    (tmp_path / "set.pt").write_bytes(b"x")
    for path, message in (
        (tmp_path / "set.pt", "files of torch.save can run code"),
        (tmp_path / "nothing" / "there" / "x", "give a folder of images by class, .* or a Hub id"),
    ):
        with pytest.raises(InputError, match=message):
            load_set(path)
