"""Refinement as stages of a run: files, order, resume, kills, processes, anchors, pools, and what users get wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forking import Forked
from page_check import checked_page
from refining import SHORT, TEDDY, refining
from runs import config, launch

from dq.cli.main import main
from dq.config.reader import from_dict
from dq.config.refinement import FADRM, Teddy
from dq.config.schema import RunConfig
from dq.config.teachers import TeacherConfig
from dq.core.errors import InputError
from dq.core.files import read_json, read_metadata, read_tensors, write_tensors
from dq.distilled.set import DistilledSet
from dq.run.refinement import planned, read_trace
from dq.run.stages import refine as refine_stage


def run(file: Path, verb: str = "run", *more: str) -> int:
    return main([verb, "--config", str(file), "--cpu", *more])


def refined(out: Path) -> dict[str, Path]:
    """Folders of refined images by their stage's name."""
    folders = [p.parent for p in out.glob("run/images/*/summary.json")]
    return {p.name.split("-")[1]: p for p in folders}


def results(out: Path) -> dict[str, bytes]:
    files = [*out.glob("run/images/*/*.safetensors"), *out.glob("run/images/*/manifest.json")]
    files += [*out.glob("run/labels/*.safetensors"), *out.glob("run/dataset/*/*.parquet")]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def finished(world, teachers, tmp_path_factory) -> Path:
    """A run with two stages, not interrupted."""
    out = tmp_path_factory.mktemp("finished")
    judged = {**SHORT, "validation_teachers": teachers[1:], "teachers": teachers}
    assert run(refining(world, out, teachers, [judged, TEDDY])) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(world, teachers, tmp_path_factory) -> Path:
    """A run with one stage, not interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(refining(world, out, teachers, [SHORT])) == 0
    return out


def test_stages_follow_one_another_and_are_recorded(finished, teachers):
    s = DistilledSet.load(finished / "run" / "dataset")
    assert s.images.dtype == torch.uint8
    first, second = s.provenance["refine"]
    assert (first["summary"]["method"], second["summary"]["method"]) == ("fadrm", "teddy")
    assert first["resolved"]["lr"] == 0.05
    assert len(first["teachers"]) == 2
    assert len(second["teachers"]) == 1  # that of the run
    folders = refined(finished)
    assert read_json(folders["teddy"] / "summary.json")["from"] == folders["fadrm"].name
    drawn = finished / "run" / "images" / first["summary"]["from"]
    for c in range(3):
        images = [read_tensors(f / f"class-{c:05d}.safetensors")[0]["images"] for f in (drawn, *folders.values())]
        assert len({x.shape for x in images}) == 1
        assert all(not torch.equal(images[0], x) for x in images[1:])
    own = [read_tensors(folders["teddy"] / f"class-{c:05d}.safetensors")[0] for c in range(3)]
    assert torch.equal(s.images, torch.cat([t["images"] for t in own]))
    # Teddy labeled them
    assert torch.equal(s.soft_labels, torch.cat([t["soft_labels"] for t in own]))
    assert s.provenance["labels"]["by"].startswith("the teachers of the last stage")


def test_measures_and_metrics_stand_before_and_after(finished):
    summary = read_json(refined(finished)["fadrm"] / "summary.json")
    assert summary["images"] == 9
    assert summary["batches"] == 3
    assert len(summary["after"]["teachers"]) == 2
    assert len(summary["after"]["validation_teachers"]) == 1
    assert summary["before"]["anchor_distance"] == 0
    assert summary["after"]["anchor_distance"] > 1
    assert summary["before"]["variation"] != summary["after"]["variation"]
    events = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["method"] for e in events if e["stage"] == "refinement"] == ["fadrm", "teddy"]
    tensors, meta = read_tensors(next(iter(sorted(refined(finished)["fadrm"].glob("batch-*.safetensors")))))
    assert tensors["trace"].shape == (9, 4)
    assert tensors["strip"].shape == (4, 3, 3, 8, 8)
    assert meta["precision"] == "float32"


def test_the_report_shows_losses_and_blocks(finished):
    page = (finished / "run" / "report.html").read_text()
    assert (2, "Refinement") in checked_page(page).headings
    for name in ("blue", "green", "red"):
        assert f'alt="class {name}, image 1 before refinement"' in page
        assert f'alt="class {name}, image 3 after refinement"' in page
    for name, folder in refined(finished).items():
        assert f"ddoq, IPC 3: stage {1 if name == 'fadrm' else 2}, {name}" in page
        assert (finished / "run" / "figures" / f"{folder.name}-losses.png").is_file()
        assert (finished / "run" / "figures" / f"{folder.name}-blocks.png").is_file()
        trace = read_trace(folder)
        last = trace.losses[round(len(trace.losses) * 4 / 5) :].mean(0)
        assert "".join(f"<td>{v:.4g}</td>" for v in last.tolist()) in page


def test_a_finished_refinement_is_not_done_again(finished, world, teachers):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("run/images/*/*.safetensors")}
    judged = {**SHORT, "validation_teachers": teachers[1:], "teachers": teachers}
    assert run(refining(world, finished, teachers, [judged, TEDDY])) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.glob("run/images/*/*.safetensors")} == before


def test_the_order_of_stages_is_the_users(finished, world, teachers, tmp_path):
    assert run(refining(world, tmp_path, teachers, [TEDDY, {**SHORT, "teachers": teachers}])) == 0
    s = DistilledSet.load(tmp_path / "run" / "dataset")
    assert [r["summary"]["method"] for r in s.provenance["refine"]] == ["teddy", "fadrm"]
    assert not torch.equal(s.images, DistilledSet.load(finished / "run" / "dataset").images)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_give_the_same_bytes(finished, world, teachers, tmp_path):
    judged = {**SHORT, "validation_teachers": teachers[1:], "teachers": teachers}
    process = launch(refining(world, tmp_path, teachers, [judged, TEDDY]), "run", processes=2)
    _, output = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert read_json(tmp_path / "run" / "provenance.json")["processes"] == 2
    assert results(tmp_path) == results(finished)


@pytest.mark.multi_process
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_refinement_goes_on_behind_its_last_block(uninterrupted, world, teachers, tmp_path, sent):
    file = refining(world, tmp_path, teachers, [SHORT])
    assert run(file, "encode") == run(file, "cluster") == 0

    def killed() -> int:
        """The verb in a process that gets the signal behind the second block of its second batch."""
        write, saved = refine_stage.write_tensors, []

        def write_and_die(path: Path, *content: object) -> None:
            write(path, *content)
            saved.append(path)
            if saved.count(path) == 2 and path.name == "batch-00001.partial.safetensors":
                os.kill(os.getpid(), sent)

        refine_stage.write_tensors = write_and_die
        return run(file, "generate")

    process = Forked(killed)
    process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    (partial,) = tmp_path.glob("run/images/*fadrm*/*.partial.safetensors")
    assert read_metadata(partial)["steps"] == 6  # of nine
    assert run(file) == 0
    assert not partial.exists()
    assert results(tmp_path) == results(uninterrupted)


def test_what_was_refined_otherwise_is_not_taken(finished, world, teachers, tmp_path, capsys):
    file = refining(world, tmp_path, teachers, [{**SHORT, "alpha": 0.5}])
    assert run(file) == 0
    other = refining(world, tmp_path, teachers, [{**SHORT, "alpha": 0.4}])
    capsys.readouterr()
    assert run(other, "label") == 2
    assert "run `dq refine` first" in capsys.readouterr().err
    assert run(other, "refine") == 0  # beside the first
    assert len(list(tmp_path.glob("run/images/*fadrm*"))) == 2
    assert run(file) == 0  # which is still there
    assert len(list(tmp_path.glob("run/images/*fadrm*"))) == 2


def test_other_files_and_weights_are_noticed(world, teachers, tmp_path, capsys):
    """What the images were refined by: teachers' weights, anchors, weights of the set where they count."""
    anchor_file = tmp_path / "mine.safetensors"
    shutil.copyfile(teachers[0]["path"], anchor_file)
    own = [{**teachers[0], "path": str(anchor_file)}]
    anchors = tmp_path / "anchors.npz"
    labels = np.repeat(np.arange(3), 3)
    images = np.random.default_rng(0).integers(0, 255, (9, 3, 8, 8)).astype(np.uint8)
    np.savez(anchors, images=images, labels=labels)
    stage = {**SHORT, "teachers": own, "anchors": "file", "anchor_path": str(anchors), "weighted": True}
    file = refining(world, tmp_path, teachers, [stage])
    assert run(file) == 0
    folders = {p.name for p in tmp_path.glob("run/images/*fadrm*")}

    def refused(message: str, given: Path = file) -> None:
        capsys.readouterr()
        assert run(given, "label") == 2
        assert message in capsys.readouterr().err
        assert run(given, "refine") == 0
        now = {p.name for p in tmp_path.glob("run/images/*fadrm*")}
        assert len(now) == len(folders) + 1
        folders.update(now)
        assert run(given, "report") == 0

    shutil.copyfile(teachers[1]["path"], anchor_file)
    refused("refined with other files than")
    np.savez(anchors, images=255 - images, labels=labels)
    refused("refined with other files than")
    data = yaml.safe_load(file.read_text())
    data["methods"]["ddoq"]["weights"] = "mass"
    file.write_text(yaml.safe_dump(data))
    capsys.readouterr()
    assert run(file, "label") == 2
    assert "run `dq refine` first" in capsys.readouterr().err
    assert run(file, "refine") == 0
    assert len(list(tmp_path.glob("run/images/*fadrm*"))) == len(folders) + 1


def test_what_nothing_reads_changes_no_folder(uninterrupted, world, teachers, tmp_path):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    unread = {**SHORT, "anchor_rank": "medium", "retrieve_pool": 7, "retrieve_complexity": 1.0, "start": "image"}
    assert run(refining(world, tmp_path, teachers, [unread])) == 0
    assert len(list(tmp_path.glob("run/images/*fadrm*"))) == 1


@pytest.mark.slow
def test_settings_reach_the_stage(world, teachers, tmp_path, capsys):
    """Composition, complexity, rank of anchors, and each image's own weight."""
    still = {**SHORT, "lr": 0.0, "batch_size": 2}
    assert run(refining(world, tmp_path / "few", teachers, [still])) == 2
    assert "would hold 1 class, fewer than 3" in capsys.readouterr().err
    assert run(refining(world, tmp_path / "few", teachers, [{**still, "min_classes": 1}])) == 0
    assert read_json(refined(tmp_path / "few")["fadrm"] / "manifest.json")["batches"] == 5
    for compose, first in (("index", 4), ("dealt", 5)):
        stage = {**still, "batch_size": 5, "compose": compose}
        assert run(refining(world, tmp_path / compose, teachers, [stage])) == 0
        assert read_metadata(refined(tmp_path / compose)["fadrm"] / "batch-00000.safetensors")["images"] == first

    def images(name: str, **settings) -> torch.Tensor:
        stage = {**SHORT, "lr": 0.0, "alpha": 0.0, "batch_size": 9, **settings}
        assert run(refining(world, tmp_path / name, teachers, [stage])) == 0
        return DistilledSet.load(tmp_path / name / "run" / "dataset").images

    easy = images("easy", anchors="real_patch")
    assert not torch.equal(easy, images("medium", anchors="real_patch", anchor_rank="medium"))
    near = images("near", retrieve="patches", retrieve_pool=6)
    calm = images("calm", retrieve="patches", retrieve_pool=6, retrieve_complexity=1e6)
    assert not torch.equal(near, calm)
    assert len(torch.unique(calm[:3].flatten(1), dim=0)) == 1  # the calmest patch of a class, for all of its images


def test_each_image_has_its_own_weight_in_the_statistics(world, teachers, tmp_path):
    from dq.networks.teacher_loading import load_teacher
    from dq.refine import fadrm
    from dq.refine.method import Batch

    stage = {**SHORT, "lr": 0.0, "batch_size": 9, "weighted": True}
    assert run(refining(world, tmp_path, teachers, [stage])) == 0
    s = DistilledSet.load(tmp_path / "run" / "dataset")
    assert len(set(s.weights.tolist())) > 1
    trace = read_tensors(refined(tmp_path)["fadrm"] / "batch-00000.safetensors")[0]["trace"]
    teacher = load_teacher(from_dict(TeacherConfig, teachers[0]), 3, 8)
    order = torch.tensor([c * 3 + r for r in range(3) for c in range(3)])
    config = from_dict(FADRM, {**stage, "steps": [1, 1, 1], "crop_scale": [], "flip": 0.0, "jitter": 0})

    def alone(weights: torch.Tensor) -> float:
        x = s.images[order].float() / 255
        return fadrm.refine(Batch(x, s.labels[order], weights), config, [teacher]).trace[0, 1].item()

    file = refining(world, tmp_path / "seen", teachers, [{**stage, "crop_scale": [], "flip": 0.0, "jitter": 0}])
    assert run(file) == 0
    seen = read_tensors(refined(tmp_path / "seen")["fadrm"] / "batch-00000.safetensors")[0]["trace"][0, 1].item()
    assert seen == pytest.approx(alone(s.weights[order]), rel=1e-4)
    assert seen != pytest.approx(alone(torch.ones(9)), rel=1e-4)
    assert len(trace) == 9


def test_labels_of_teddy_serve_students_and_are_missed_when_lost(world, teachers, tmp_path, caplog):
    fixed = [{"net": "convnet3", "labels": "fixed", "epochs": 1, "optimizer": "adamw", "lr": 1e-3, "tests": 1}]
    file = config(
        world,
        tmp_path / "fixed",
        ipc=[3],
        methods={"ddoq": {}},
        teachers=[],
        refine=[{**TEDDY, "teachers": teachers}],
        evaluate__students=fixed,
        evaluate__baselines=[],
        evaluate__seeds=1,
    )
    assert run(file) == 0
    assert (tmp_path / "fixed" / "run" / "eval" / "summary.csv").is_file()
    assert run(refining(world, tmp_path / "lost", teachers, [TEDDY, SHORT]), "run", "--dry-run") == 0
    assert "labels of stage 1, teddy, are lost" in caplog.text


def test_a_method_may_have_stages_of_its_own(world, teachers, tmp_path):
    file = config(
        world,
        tmp_path,
        ipc=[2],
        methods={"plain": {"refine": []}, "own": {"refine": [{**SHORT, "alpha": 0.2}]}, "both": {}},
        teachers=teachers[:1],
        refine=[SHORT],
        evaluate__students=[],
    )
    assert run(file) == 0
    sets = {m: DistilledSet.load(tmp_path / "run" / "dataset", f"ipc2-{m}") for m in ("plain", "own", "both")}
    assert sets["plain"].provenance["refine"] == []
    assert [r["settings"]["alpha"] for r in sets["own"].provenance["refine"]] == [0.2]
    assert [r["settings"]["alpha"] for r in sets["both"].provenance["refine"]] == [0.5]
    assert len({s.images.numpy().tobytes() for s in sets.values()}) == 3
    # drawn once, and told apart by their stages alone
    assert len([p for p in tmp_path.glob("run/images/*") if p.is_dir()]) == 3


def strip_of(out: Path) -> torch.Tensor:
    return read_tensors(refined(out)["fadrm"] / "batch-00000.safetensors")[0]["strip"]


def test_real_patches_and_files_are_anchors(world, teachers, tmp_path):
    still = {**SHORT, "lr": 0.0, "batch_size": 9}
    patches = {**still, "anchors": "real_patch", "anchor_rank": "medium"}
    assert run(refining(world, tmp_path / "patches", teachers, [patches])) == 0
    s = DistilledSet.load(tmp_path / "patches" / "run" / "dataset")
    anchors = [read_tensors(p)[0]["images"] for p in sorted(tmp_path.glob("patches/run/images/*fadrm*/anchors/*"))]
    assert torch.equal(s.images, torch.cat(anchors))  # nothing moved them
    summary = read_json(refined(tmp_path / "patches")["fadrm"] / "summary.json")
    assert summary["before"]["anchor_distance"] > 1
    assert summary["after"]["anchor_distance"] == 0
    # the same set again, from its file, merged half into what was drawn
    path = str(tmp_path / "patches" / "run" / "dataset" / "ipc3-ddoq")
    from_file = {**still, "anchors": "file", "anchor_path": path, "start": "image"}
    assert run(refining(world, tmp_path / "file", teachers, [from_file])) == 0
    drawn, after = strip_of(tmp_path / "file")[[0, 3]].float()
    anchor = strip_of(tmp_path / "patches")[0].float()
    assert (after - (0.25 * drawn + 0.75 * anchor)).abs().max() <= 1


@pytest.mark.parametrize("retrieve", ["patches", "prototypes"])
def test_anchors_are_retrieved_at_every_merge(world, teachers, tmp_path, retrieve):
    stage = {**SHORT, "lr": 0.0, "alpha": 0.0, "batch_size": 9, "retrieve": retrieve, "retrieve_pool": 4}
    assert run(refining(world, tmp_path, teachers, [stage])) == 0
    strip = strip_of(tmp_path)
    if retrieve == "prototypes":
        assert torch.equal(strip[3], strip[0])  # the nearest image to an image of the set is itself
    else:
        candidates = [read_tensors(p)[0]["images"] for p in sorted(tmp_path.glob("run/images/*fadrm*/candidates/*"))]
        assert [len(x) for x in candidates] == [4, 4, 4]
        for i, image in enumerate(strip[3]):
            assert any(torch.equal(image, x) for x in candidates[i % 3])


def test_calibration_class_means_weights_and_pads_rule_run_through(world, teachers, tmp_path):
    stage = {**SHORT, "bn_share": 0.7, "class_weight": 0.5, "weighted": True, "depth": {"drop": None}, "batch_size": 9}
    assert run(refining(world, tmp_path, teachers, [{**stage, "teachers": teachers}])) == 0
    manifest = read_json(refined(tmp_path)["fadrm"] / "manifest.json")
    rates = [t["r_bn"] for t in manifest["teachers"]]
    assert len(set(rates)) == 2
    assert 0.01 not in rates
    # a quarter of three layers is none of them, by PAD's rule for three of nine images a half: one
    assert [a["weight"] for a in manifest["teachers"][0]["layers"]] == [0, 1, 1]
    trace = read_tensors(refined(tmp_path)["fadrm"] / "batch-00000.safetensors")[0]["trace"]
    assert (trace[:, 2] > 0).all()


def test_the_python_face(toy_source, teachers, tmp_path, accelerator):
    from models import tiny_kl

    from dq.run.distill import DistillPipeline

    # tensors have their own class order: red, green, blue
    own = from_dict(TeacherConfig, {**teachers[0], "classes": [2, 1, 0]})
    stage = dataclasses.replace(from_dict(FADRM, SHORT), teachers=(own,))
    pipe = DistillPipeline(vae=tiny_kl())
    options = {"ipc": 2, "resolution": 8, "cache_dir": tmp_path / "cache", "accelerator": accelerator}
    plain = pipe.distill(toy_source, output_dir=tmp_path / "plain", **options)
    small = pipe.distill(toy_source, output_dir=tmp_path / "run", refine=[stage], **options)
    assert small.images.shape == plain.images.shape
    assert not torch.equal(small.images, plain.images)
    again = pipe.distill(toy_source, output_dir=tmp_path / "run", refine=stage, **options)
    assert torch.equal(small.images, again.images)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"stage": "fadrm", "steps": [1]}, r"the stage 'fadrm' needs a teacher; set teachers, or refine.0.teachers"),
        ({**TEDDY, "teachers": [{"net": "pool", "path": "nowhere"}]}, "there is no pool in nowhere"),
        ({**TEDDY, "teachers": [{"net": "resnet20", "path": "nowhere"}]}, "there is no teacher at nowhere"),
        ({"stage": "fadrn"}, "must be a mapping whose stage is one of 'fadrm', 'teddy'"),
        ({**SHORT, "alfa": 1}, "unknown setting 'refine.0.alfa'; did you mean 'refine.0.alpha'"),
        ({**SHORT, "alpha": 2}, r"refine.0.alpha must be a number in \[0, 1\], not 2"),
        ({**SHORT, "batch_size": 1}, r"would hold 1 class, fewer than 3"),
        (
            {**SHORT, "anchors": "file", "anchor_path": "nowhere"},
            r"refine.0.anchor_path.* nowhere does not exist",
        ),
        ({**SHORT, "sizes": [8, 8]}, r"refine.0.sizes=\[8, 8\] has 2 blocks but steps=\[3, 3, 3\] has 3"),
        ({**SHORT, "sizes": [8, 8, 12]}, r"the last of sizes=\[8, 8, 12\] must be the side of the images, 8 px"),
    ],
)
def test_bad_settings_stop_before_anything_is_encoded(world, teachers, tmp_path, stage, message, capsys):
    file = refining(world, tmp_path, [] if "needs a teacher" in message else teachers, [])
    data = yaml.safe_load(file.read_text())
    data["refine"] = [stage]
    file.write_text(yaml.safe_dump(data))
    assert run(file) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "cache").exists()


def test_a_batch_of_too_few_classes_and_a_teacher_without_norm_are_said(world, teachers, tmp_path, capsys):
    few = {**SHORT, "batch_size": 1}
    assert run(refining(world, tmp_path / "few", teachers, [few])) == 2
    assert "would hold 1 class, fewer than 3" in capsys.readouterr().err
    plain = {"net": "convnet3", "path": str(world / "teacher.safetensors"), "mean": [0.5] * 3, "std": [0.5] * 3}
    assert run(refining(world, tmp_path / "norm", [plain], [SHORT])) == 2
    assert "no teacher has batch norm (convnet3)" in capsys.readouterr().err
    strange = {**SHORT, "sizes": [6, 8, 8]}
    assert run(refining(world, tmp_path / "side", teachers, [strange])) == 2
    assert "cannot see images of 6 px" in capsys.readouterr().err


def test_a_dry_run_counts_batches_and_steps(world, teachers, tmp_path, capsys):
    assert run(refining(world, tmp_path, teachers, [SHORT, TEDDY]), "run", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "ddoq ipc 3: fadrm, 9 images in 3 batches, 9 steps, 81 image steps" in output
    assert "ddoq ipc 3: teddy, 9 images in 1 batch, 4 steps, 36 image steps" in output


def test_a_run_without_stages_is_as_before(world, tmp_path):
    assert run(refining(world, tmp_path, [], [])) == 0
    assert not (tmp_path / "run" / "images" / "refined.json").exists()
    assert planned(RunConfig(), "ddoq") == []
    assert (2, "Refinement") not in checked_page((tmp_path / "run" / "report.html").read_text()).headings


def test_float_images_stay_float(world, teachers, tmp_path):
    assert run(refining(world, tmp_path, teachers, [SHORT], generate__image_dtype="float32")) == 0
    s = DistilledSet.load(tmp_path / "run" / "dataset")
    assert s.images.dtype == torch.float32
    assert not torch.equal(s.images, (s.images * 255).round() / 255)


def test_damaged_batches_and_classes_are_refined_anew(uninterrupted, world, teachers, tmp_path, capsys, caplog):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    file = refining(world, tmp_path, teachers, [SHORT])
    folder = refined(tmp_path)["fadrm"]
    whole = {f: f.read_bytes() for f in folder.glob("*.safetensors")}
    stamps = {f: f.stat().st_mtime_ns for f in whole}
    batch, image = folder / "batch-00001.safetensors", folder / "class-00002.safetensors"
    batch.write_bytes(whole[batch][:100])
    image.write_bytes(whole[image][:-1] + bytes([whole[image][-1] ^ 1]))
    # the last stage says so and does not use them
    assert run(file, "label") == 1
    assert f"{image} cannot be read" in capsys.readouterr().err
    assert run(file) == 0
    assert f"{batch} is damaged" in caplog.text
    assert f"{image} is damaged" in caplog.text
    assert {f: f.read_bytes() for f in whole} == whole
    assert {f for f in whole if f.stat().st_mtime_ns != stamps[f]} == {batch, image}


def test_configs_round_trip_and_refuse_what_no_code_could_use():
    for stage in (FADRM(), Teddy(), FADRM(teachers=(TeacherConfig(path="x"),), sizes=(8,), steps=(1,))):
        whole = RunConfig(refine=(stage,))
        from dq.config.reader import to_dict

        assert from_dict(RunConfig, to_dict(whole)) == whole
    with pytest.raises(InputError, match="norm must be one of 'l2', 'squared'"):
        FADRM(norm="l1")  # type: ignore[arg-type]


def test_label_vectors_of_a_version_before_are_read(finished, tmp_path):
    """They were called logits, in files that did not say what they are."""
    shutil.copytree(finished / "run", tmp_path / "run")
    folder = refined(tmp_path)["teddy"]
    for path in folder.glob("batch-*.safetensors"):
        tensors, meta = read_tensors(path)
        tensors["logits"] = tensors.pop("soft_labels")
        write_tensors(path, tensors, {k: v for k, v in meta.items() if k not in ("label_kind", "terms")})
    for path in folder.glob("class-*.safetensors"):
        path.unlink()
    shutil.rmtree(tmp_path / "run" / "dataset")
    file, out = finished / "config.yaml", ["--output_dir", str(tmp_path / "run")]
    assert run(file, "refine", *out) == 0
    before, after = (DistilledSet.load(f / "run" / "dataset") for f in (finished, tmp_path))
    assert torch.equal(before.soft_labels, after.soft_labels)
    assert torch.equal(before.images, after.images)
    assert after.label_kind == "logits"
    assert run(file, "report", *out) == 0
