"""Files of others run no code, and cannot ask for more than a machine has."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_dit, tiny_kl
from PIL import Image
from sets import make

from dq.config.overrides import apply_settings
from dq.config.schema import CodecConfig, RunConfig, load_config
from dq.config.teachers import TeacherConfig
from dq.core import bounded_yaml
from dq.core.cards import merge_card, split_card
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, write_json
from dq.data.images import FORMATS, MAX_PIXELS, read_image
from dq.data.load import load_source
from dq.data.source import Split
from dq.diffusion.codec import load_codec
from dq.distilled.card import dataset_card
from dq.distilled.external import load_set
from dq.distilled.set import DistilledSet
from dq.networks.external import tensors_only
from dq.networks.teacher_loading import load_teacher
from dq.run.distill import DistillPipeline


class Trace:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def split_of(data: object) -> Split:
    return Split(np.zeros(1, np.int64), lambda row: data, "train")


def refused(data: object, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=message):
            read_image(split_of(data), 0, 4, "crop")


# --- images -------------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9))))
    parts = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(10_000, 10_001), (9_500, 9_500 * 3), (1 << 30, 1 << 30)])
def test_image_bombs_are_refused_before_decoding(size: tuple[int, int], tmp_path: Path) -> None:
    refused(bomb(*size), r"row 0 of split 'train' cannot be read .*(pixels).*")
    (tmp_path / "b.png").write_bytes(bomb(*size))
    refused(tmp_path / "b.png", r"b\.png cannot be read .*pixels")


def test_the_largest_image_is_between_the_limits_of_pillow() -> None:
    """Of 90 to 100 million pixels Pillow warns, and reads them."""
    assert Image.MAX_IMAGE_PIXELS < 9_999 * 10_000 < MAX_PIXELS
    buffer = io.BytesIO()
    Image.new("1", (9_999, 10_000)).save(buffer, format="PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(split_of(buffer.getvalue()), 0, 2, "crop").shape == (3, 2, 2)


def test_only_usual_formats_are_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    refused(eps, "it is none of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM")
    for form in (*FORMATS, "PCX", "TGA", "ICO", "SGI"):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (9, 9, 9)).save(buffer, format=form)
        if form in FORMATS:
            assert read_image(split_of(buffer.getvalue()), 0, 4, "crop").max() < 20
        else:
            refused(buffer.getvalue(), "it is none of")


# --- models -------------------------------------------------------------------------------------------------------


def test_a_codec_of_pickles_is_refused(tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert not list((tmp_path / "vae").glob("*.safetensors"))
    for file in (tmp_path / "vae").glob("*.bin"):
        torch.save(Trace(tmp_path / "trace"), file)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_codec(tmp_path / "vae")
    assert not (tmp_path / "trace").exists()


def test_a_teacher_of_pickles_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "hidden_sizes": [8]}
    config |= {"depths": [1], "embedding_size": 8, "num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(Trace(tmp_path / "trace"), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="transformers cannot open the teacher"):
        load_teacher(TeacherConfig(net="transformers", path=str(tmp_path)), 2, 8)
    assert not (tmp_path / "trace").exists()


def pipeline_folder(folder: Path) -> Path:
    from diffusers import DDIMScheduler

    DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def test_a_pipeline_of_pickles_is_refused(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "model")
    DistillPipeline.from_pretrained(folder)
    for file in list(folder.rglob("*.safetensors")):
        torch.save(Trace(tmp_path / "trace"), file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(InputError, match=r"the pipeline .* cannot be loaded .*safetensors"):
        DistillPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="use_safetensors=False would unpickle weights"):
        DistillPipeline.from_pretrained(folder, use_safetensors=False)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("place", ["working folder", "component folder", "pipeline class"])
def test_no_code_of_a_repository_runs(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline_folder(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    room = {"working folder": tmp_path, "component folder": folder / "transformer", "pipeline class": folder}[place]
    (room / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Evil: pass\n")
    if place == "pipeline class":
        index["_class_name"] = ["evil", "Evil"]
    else:
        index["transformer"] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"no code of a repository|names no pipeline of diffusers"):
        DistillPipeline.from_pretrained(folder)
    for option in ({"trust_remote_code": True}, {"custom_pipeline": str(folder / "evil.py")}):
        with pytest.raises(InputError, match="would run code of a repository"):
            DistillPipeline.from_pretrained(folder, **option)
    assert not (tmp_path / "trace").exists()


def test_libraries_unpickle_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision asks torch.load for everything."""
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pth")
    torch.save({"w": Trace(tmp_path / "trace")}, tmp_path / "evil.pth")
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with tensors_only():
            assert torch.load(tmp_path / "good.pth", weights_only=False)["w"].tolist() == [1, 1]
            with pytest.raises(Exception, match=r"[Ww]eights"):
                torch.load(tmp_path / "evil.pth", weights_only=False)
        assert os.environ.get(name) == before
    assert not (tmp_path / "trace").exists()


# --- names and numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b--c", "../x", "/x", "a/b/c", "a..b", "-a"])
def test_names_that_are_no_hub_ids_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        load_source(name)
    with pytest.raises(InputError):
        load_codec(name)


def test_arrays_that_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "s.npz", images=np.zeros((2, 3, 99, 99), np.uint8), labels=np.arange(2))
    assert len(load_set(tmp_path / "s.npz", ("a", "b"))) == 2
    monkeypatch.setattr("dq.distilled.tensor_files.MAX_BYTES", 50_000)
    with pytest.raises(InputError, match=r"would unpack to 59,\d+ bytes"):
        load_set(tmp_path / "s.npz", ("a", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1], np.uint16)}, None),
        ({"labels": np.zeros((), np.int64)}, r"labels of .* must be whole numbers"),
        ({"labels": np.array([0, 1], np.complex64)}, "must be whole numbers|cannot be read"),
        ({"images": np.zeros((2, 3, 0, 0), np.float32)}, r"have no pixels: they are \(2, 3, 0, 0\)"),
        ({"images": np.zeros((), np.uint8)}, "has no images but 2 labels"),
        (
            {"mean": np.zeros(7, np.float32), "std": np.ones(3, np.float32)},
            r"not \(7,\) and \(3,\) beside \(2, 3, 4, 4\)",
        ),
    ],
)
def test_odd_numbers_are_refused(changes: dict, message: str | None, tmp_path: Path) -> None:
    arrays = {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.arange(2)} | changes
    np.savez(tmp_path / "s.npz", **arrays)
    if message is None:
        assert load_set(tmp_path / "s.npz", ("a", "b")).labels.tolist() == [0, 1]
        return
    with pytest.raises(InputError, match=message):
        load_set(tmp_path / "s.npz", ("a", "b"))


LAUGH = "[&a [x, x, x, x], " + ", ".join(
    f"&{b} [*{a}, *{a}, *{a}, *{a}]" for a, b in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)
)


MERGES = "[&a0 {x: 1}" + "".join(f", &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)) + "]"
UNREADABLE = {
    "open": "[" * 3000,
    "deep": "[" * 200 + "]" * 200,
    "date": "2001-02-30",
    "aliases": f"{LAUGH}]",
    "itself": "&a [*a]",
    "merges": MERGES,
    "bool": "!!bool x",
    "int": "!!int ''",
    "timestamp": "!!timestamp x",
    "digits": "9" * 5000,
    "hexadecimal": "0x" + "f" * 6000,
    "sexagesimal": ":".join(["1"] * 300) + ".0",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_yaml_that_its_reader_would_not_refuse_or_end_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"methods: {{a: {{override: {{x: {text}}}}}}}\n")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(InputError, match=r"the value of 'seed' is not readable: .{0,200}$"):
        apply_settings(RunConfig(), [f"seed={text}"])


def test_an_alias_that_nothing_repeats_is_read() -> None:
    assert apply_settings(CodecConfig(), ["batch_size=&a 7"]).batch_size == 7


def test_merged_mappings_and_whole_numbers_of_usual_length_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cluster: &c {n_iter: 7}\nmethods: {a: {override: {x: {<<: *c, y: 1}}}}\n")
    c = load_config(tmp_path / "c.yaml")
    assert (c.cluster.n_iter, c.methods["a"].override) == (7, {"x": {"n_iter": 7, "y": 1}})
    assert apply_settings(RunConfig(), [f"seed={2**62}"]).seed == 2**62


def test_numbers_and_stages_that_fit_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"cluster\.tol must be a number"):
        apply_settings(RunConfig(), {"cluster.tol": 10**400})
    with pytest.raises(InputError, match=r"refine\.0 must be a mapping whose stage is one of"):
        apply_settings(RunConfig(), ["refine=[{stage: {a: 1}}]"])


def test_values_in_messages_are_short() -> None:
    with pytest.raises(InputError) as e:
        apply_settings(RunConfig(), [f"seed={list(range(9999))}"])
    assert len(str(e.value)) < 200


def test_deep_json_is_one_sentence(tmp_path: Path) -> None:
    for text in ("[" * 100_000, '{"a": "\\ud800"}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(RunError, match=r"x\.json cannot be read"):
            read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\ude00"}')  # a whole pair
    assert read_json(tmp_path / "x.json") == {"a": "😀"}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_card_that_is_no_yaml_is_one_sentence(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"x")
    for card in ("configs: [a: b: c", "configs:\n- config_name: x\n  data_files:\n  - split: 3", "\x00"):
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
        with pytest.raises(InputError, match=r"cannot be opened as a folder|is damaged"):
            load_source(tmp_path, streaming=streaming)


def test_cards_and_cells_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "private.png")
    folder = tmp_path / "set"
    folder.mkdir()
    schema = Features({"image": ImageFeature(), "label": ClassLabel(names=["a"])}).arrow_schema
    cells = [{"bytes": None, "path": str(tmp_path / "private.png")}]
    table = pa.Table.from_arrays([pa.array(cells, schema.field(0).type), pa.array([0])], schema=schema)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"the cell names .*private.png, outside the data set"):
        read_image(load_source(folder).train, 0, 4, "crop")
    with pytest.raises(InputError, match="holds no encoded image"):
        read_image(load_source(folder, streaming=True).train, 0, 4, "crop")
    (tmp_path / "other").mkdir()
    (folder / "train-00000-of-00001.parquet").rename(tmp_path / "other" / "x.parquet")
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/other/x.parquet\n---\n"
    (folder / "README.md").write_text(card)
    (folder / "empty.parquet").write_bytes(b"")
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"the card of .* names .*other/x.parquet, outside it"):
            load_source(folder, streaming=streaming)


# --- cards of others ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "head",
    [
        f"x: {MERGES}",
        "x: " + "[" * 3000,
        "x: " + "[" * 300 + "]" * 300,
        "x: 2001-02-30",
        "configs: [{a: 1}, {config_name: [x]}]",
    ],
)
def test_a_head_of_a_card_that_says_absurd_things_counts_as_little(head: str, tmp_path: Path) -> None:
    make().save(tmp_path, "default")
    record = read_json(tmp_path / "default" / "provenance.json")
    metadata, body = split_card(dataset_card([record], {}, old=f"---\n{head}\n---\nmine\n"))
    assert [c["config_name"] for c in metadata["configs"]] == ["default"]
    assert "mine" in body


def test_a_head_with_a_digest_keeps_what_others_wrote() -> None:
    theirs = {"license": "mit", "configs": [{"config_name": "theirs", "data_files": "x.csv"}], "sha": 16**64 - 1}
    head = "license: mit\nconfigs: [{config_name: theirs, data_files: x.csv}]\nsha: 0x" + "f" * 64
    assert split_card(merge_card(f"---\n{head}\n---\n", {}, "x"))[0] == theirs


def test_a_card_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"README\.md is no text in UTF-8"):
        make().save(tmp_path, "default")
    assert len(DistilledSet.load(tmp_path).labels) == 6


def test_a_large_head_without_aliases_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_yaml, "MAX_VALUES", 1000)
    names = {str(i): f"class {i}" for i in range(600)}  # 1200 values
    assert split_card(merge_card("", {"names": names}, "x"))[0]["names"] == names


def test_odd_values_of_a_record_and_of_results_are_left_out_of_a_card(tmp_path: Path) -> None:
    make().save(tmp_path, "default")
    record = read_json(tmp_path / "default" / "provenance.json")
    result = {"set": "ddoq", "ipc": "2", "student": "convnet3", "labels": "hard", "protocol": "hard", "settings": "x"}
    result |= {"selected_on": "test", "images": 6, "seeds": 1, "last_mean": 0.5, "best_mean": 0.625}
    odd = {"last_mean": 10**400, "images": 7}
    card = dataset_card([record], {"default": {"content": record["content"], "rows": [{**result, **odd}, result, 3]}})
    assert "| ddoq | 2 | 6 | convnet3 | hard | hard | 1 | 50.0 | 62.5 (test) |" in card
    assert "| 7 |" not in card
    for rows in (7, [7], {"a": 1}):
        assert "Not measured" in dataset_card([record], {"default": {"content": record["content"], "rows": rows}})
    assert "Not measured" in dataset_card([record], {"default": [result]})
    strange = {**record, "method": {"weights": [1], "normalize": {"a": 1}}, "labels": {"teachers": 5}, "source": None}
    assert "- `default`: as they came." in dataset_card([strange], {})


def test_a_table_that_says_absurd_things_of_its_columns_is_one_sentence(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = make(soft=True).save(tmp_path, "default")
    record = tmp_path / "default" / "provenance.json"
    write_json(record, {k: v for k, v in read_json(record).items() if k != "files"})
    table = pq.read_table(file)
    for name, change in (
        ("soft_label", {"length": float("inf")}),
        ("soft_label", {"length": 2**70}),
        ("label", {"names": ["ant", 1.5, "bee"]}),
    ):
        facts = json.loads(table.schema.metadata[b"huggingface"])
        facts["info"]["features"][name].update(change)
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(facts)}), file)
        with pytest.raises(RunError, match="cannot be read"):
            DistilledSet.load(tmp_path)
