"""Candidates in the generate stage: identities of draws, dividing, interrupting, records, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from models import tiny_dit, tiny_kl
from page_check import checked_page
from refining import bn_teacher
from runs import full, launch

from dq.cli.main import main
from dq.cluster.prototypes import Prototypes
from dq.cluster.transport import squared_cost
from dq.config.methods import check_guidance, check_methods
from dq.config.overrides import apply_settings
from dq.config.pruning import PruneConfig
from dq.config.reader import from_dict, to_dict
from dq.config.schema import GenerateConfig, RunConfig
from dq.core.errors import InputError
from dq.core.files import read_metadata, read_tensors
from dq.core.seeds import digest_of
from dq.data.images import read_images
from dq.run.checks import check_plan, check_settings
from dq.run.distill import DistillPipeline
from dq.run.folder import Run, deciding, open_run
from dq.run.planning.costs import stage_plans
from dq.run.planning.plan import like_source, plan
from dq.run.stages import generate as draw
from dq.run.stages.assemble import assemble, load_set_of_run
from dq.run.stages.cluster import ClassImages, class_images, cluster
from dq.run.stages.encode import cache_of, encode
from dq.run.stages.generate import ADDED, generate
from dq.run.stages.prune import Pruning
from dq.run.stages.select import Selector, _cell_features


@pytest.fixture(scope="module")
def pipe() -> DistillPipeline:
    return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def selecting(toy_images, tmp_path_factory) -> dict[str, Any]:
    return bn_teacher(*toy_images["train"], tmp_path_factory.mktemp("selecting"), "teacher", 0)


def drawn(out: Path, source: Any, accelerator: Any, pipe: DistillPipeline, *, draw: bool = True, **settings) -> Run:
    data = {
        "output_dir": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "codec": {"resolution": 8},
        "generate": {"mode": "dit", "num_inference_steps": 3, "batch_size": 16, **settings},
        "ipc": [3],
    }
    run = open_run(from_dict(RunConfig, data), source, accelerator)
    cluster(run, encode(run, pipe.vae))
    if draw:
        generate(run, pipe, cache_of(run))
    return run


def classes(out: Path) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    return [read_tensors(f) for f in sorted(out.glob("run/images/*/class-*.safetensors"))]


def same_sets(out: Path, other: Path) -> bool:
    """Whether two runs keep the same candidates; other batches may move a float, and a pixel by a gray level."""
    pairs = list(zip(classes(out), classes(other), strict=True))
    assert not list(out.glob("run/images/*/part-*"))

    def alike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        floats = {"images": 1.0, "pool_probability": 1e-3}
        exact = all(torch.equal(a[name], b[name]) for name in a if name not in floats)
        return exact and all((a[n].float() - b[n].float()).abs().max() <= d for n, d in floats.items() if n in a)

    return all(alike(a, b) for (a, _), (b, _) in pairs)


def test_settings_that_came_later_leave_old_folders_their_names() -> None:
    old = {k: v for k, v in deciding(to_dict(GenerateConfig())).items() if k != "revision" and k not in ADDED}
    assert draw._deciding(GenerateConfig()) == old
    assert "images_per_prototype" in old
    assert draw._deciding(GenerateConfig(mode="dit", candidates=2))["candidates"] == 2


def test_where_a_teacher_lies_decides_nothing(selecting) -> None:
    def digest(**changes: Any) -> str:
        settings = {"mode": "dit", "candidates": 2, "select": "correct", "select_teacher": {**selecting, **changes}}
        return digest_of(draw._deciding(from_dict(GenerateConfig, settings)))

    assert digest() == digest(path="elsewhere", batch_size=3, check_images=7)
    assert digest() != digest(mean=[0.4] * 3)


@pytest.mark.parametrize("rule", ["correct", "confident", "facility", "transport"])
def test_more_candidates_extend_fewer_and_the_first_draw_is_that_without(
    rule: str, tmp_path: Path, toy_source, accelerator, pipe, selecting
) -> None:
    drawn(tmp_path / "all", toy_source, accelerator, pipe, images_per_prototype=4)
    settings = {"select": rule, "select_teacher": selecting}
    drawn(tmp_path / "two", toy_source, accelerator, pipe, candidates=2, **settings)
    drawn(tmp_path / "four", toy_source, accelerator, pipe, candidates=4, **settings)
    several = set()
    for (all_, _), (two, _), (four, meta) in zip(
        *(classes(tmp_path / n) for n in ("all", "two", "four")), strict=True
    ):
        keep, prototype, number = four["pool_kept"], four["pool_prototype"], four["pool_draw"]
        assert prototype[keep].sort().values.tolist() == [0, 1, 2]
        order = prototype[keep].argsort()
        rows = (prototype * 4 + number)[keep][order]
        assert torch.equal(four["images"], all_["images"][rows])  # each is the draw of its number
        assert torch.equal(two["pool_probability"], four["pool_probability"][:6])
        assert torch.equal(four["pool_draw"], torch.arange(4).repeat_interleave(3))
        assert (meta["copies"], meta["selection"]["rule"]) == (1, rule)
        several |= set(number[keep].tolist())
    assert len(several) > 1  # not the first of each
    assert not list(tmp_path.glob("*/run/images/*/part-*"))


def test_what_is_kept_is_what_the_rule_says(tmp_path: Path, toy_source, accelerator, pipe, selecting, caplog) -> None:
    settings = {"candidates": 3, "select_teacher": selecting, "images_per_prototype": 2}
    drawn(tmp_path / "confident", toy_source, accelerator, pipe, select="confident", **settings)
    drawn(tmp_path / "correct", toy_source, accelerator, pipe, select="correct", **settings)
    lacking = 0
    for (confident, _), (correct, meta) in zip(
        classes(tmp_path / "confident"), classes(tmp_path / "correct"), strict=True
    ):
        p, prototype = confident["pool_probability"], confident["pool_prototype"]
        for k in range(3):
            own = prototype == k
            assert int(own.sum()) == 6
            best = p[own].sort(descending=True).values[:2]
            assert torch.equal(p[own & confident["pool_kept"]].sort(descending=True).values, best)
            lacking += int(correct["pool_correct"][own].sum()) < 2
            right = (own & correct["pool_correct"]).nonzero()[:2, 0]
            assert correct["pool_kept"][right].all()
        assert len(confident["images"]) == len(correct["images"]) == 6
        assert meta["selection"]["images"] == 6
    assert lacking > 0
    least = (
        f"{lacking} of 9 prototypes have fewer candidates than images that the teacher convnet3-bn classifies rightly"
    )
    assert least in caplog.text


def test_a_killed_selection_and_small_spools_end_with_the_same_images(
    tmp_path: Path, toy_source, accelerator, pipe, selecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"candidates": 4, "select": "transport", "select_teacher": selecting}
    drawn(tmp_path / "one", toy_source, accelerator, pipe, **settings)
    monkeypatch.setattr(draw, "SPOOL", 1)  # class by class
    drawn(tmp_path / "small", toy_source, accelerator, pipe, **settings)
    assert same_sets(tmp_path / "small", tmp_path / "one")
    run = drawn(tmp_path / "killed", toy_source, accelerator, pipe, draw=False, **settings)
    write, budget = draw.write_tensors, 0

    def stop(path: Path, *rest: Any) -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(draw, "write_tensors", stop)
    for writes in (5, 8, 3):  # within a class, between two, and at the end of one
        budget = writes
        with pytest.raises(KeyboardInterrupt):
            generate(run, pipe, cache_of(run))
    budget = 1000
    generate(run, pipe, cache_of(run))
    assert same_sets(tmp_path / "killed", tmp_path / "one")


def test_real_images_of_a_cell_compete_with_its_draws(
    tmp_path: Path, toy_source, accelerator, pipe, selecting
) -> None:
    settings = {"candidates": 2, "select": "transport", "select_teacher": selecting}
    drawn(tmp_path / "draws", toy_source, accelerator, pipe, **settings)
    run = drawn(tmp_path / "both", toy_source, accelerator, pipe, real_candidates=4, **settings)
    assemble(run)
    s = load_set_of_run(run, 3, "ddoq")
    real_kept = 0
    for label, ((alone, _), (both, meta)) in enumerate(
        zip(classes(tmp_path / "draws"), classes(tmp_path / "both"), strict=True)
    ):
        rows, kept, prototype = both["pool_row"], both["pool_kept"], both["pool_prototype"]
        assert torch.equal(both["pool_probability"][:6], alone["pool_probability"])  # the same draws
        assert rows[:6].eq(-1).all()
        assert torch.equal(both["pool_draw"][:6], alone["pool_draw"])
        real = rows[6:]
        assert len(real.unique()) == len(real) > 3
        assert (toy_source.train.labels[real.numpy()] == label).all()
        p = Prototypes.load(next(iter(run.folder.glob(f"prototypes/*/class-{label:05d}.safetensors"))))
        z, cached = cache_of(run).load(label)
        nearest = squared_cost(z.flatten(1).float(), p.centroids.flatten(1)).argmin(1)
        assert torch.equal(nearest[[cached.tolist().index(int(row)) for row in real]], prototype[6:])
        own = s.labels == label
        chosen = torch.tensor(meta["source_rows"])
        assert sorted(chosen[chosen >= 0].tolist()) == sorted(rows[kept & (rows >= 0)].tolist())
        assert torch.equal(s.source_row[own], torch.where(chosen >= 0, chosen, p.medoid_rows))
        images = read_images(toy_source.train, chosen[chosen >= 0].tolist(), 8, toy_source.preprocess)[0]
        assert torch.equal(s.images[own][chosen >= 0], images)
        assert meta["selection"]["real_kept"] == int((chosen >= 0).sum())
        assert meta["selection"]["w2"] <= meta["selection"]["w2_first"]
        real_kept += meta["selection"]["real_kept"]
    assert real_kept > 0
    assert s.provenance["generate"]["selection"]["real_kept"] == real_kept


def test_real_representatives_are_selected_among_those_of_their_cells(
    tmp_path: Path, toy_source, accelerator, selecting
) -> None:
    chosen = {"real_candidates": 5, "select": "transport", "select_teacher": selecting}
    methods = {"medoids": {"representative": "real"}}
    methods["chosen"] = {"representative": "real", "override": {"generate": chosen}}
    data = {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "codec": {"resolution": 8}}
    run = open_run(from_dict(RunConfig, data | {"ipc": [3], "methods": methods}), toy_source, accelerator)
    cluster(run, encode(run, tiny_kl()))
    generate(run, DistillPipeline(vae=tiny_kl()), cache_of(run))
    assemble(run)
    nearest, selected = (load_set_of_run(run, 3, method) for method in methods)
    assert not torch.equal(nearest.images, selected.images)
    rows = selected.source_row
    assert len(rows.unique()) == len(rows) == 9
    assert torch.equal(selected.images, read_images(toy_source.train, rows.tolist(), 8, toy_source.preprocess)[0])
    folders = sorted(tmp_path.glob("run/images/*"))
    gains = []
    for folder in (f for f in folders if f.is_dir()):
        for path in sorted(folder.glob("class-*")):
            tensors, meta = read_tensors(path)
            if "selection" in meta:
                pool = torch.where(tensors["pool_row"] < 0, -1, tensors["pool_row"])[3:]
                medoids = nearest.source_row[nearest.labels == int(path.stem[6:])]
                assert not torch.isin(pool, medoids).any()
                gains.append(meta["selection"]["w2_first"] - meta["selection"]["w2"])
    assert min(gains) >= 0
    assert max(gains) > 0  # the images differ


def test_prototypes_without_an_image_are_counted_and_their_weight_left_out(
    tmp_path: Path, toy_source, accelerator, pipe, selecting, caplog
) -> None:
    settings = {"candidates": 4, "select": "facility", "select_teacher": selecting, "one_per_prototype": False}
    run = drawn(tmp_path, toy_source, accelerator, pipe, **settings)
    absent = 0
    for tensors, meta in classes(tmp_path):
        numbers = torch.bincount(tensors["pool_prototype"][tensors["pool_kept"]], minlength=3)
        assert torch.tensor(meta["copies"]).expand(3).tolist() == numbers.tolist()
        assert len(tensors["images"]) == 3
        absent += int((numbers == 0).sum())
    assert absent > 0
    assert f"{absent} of 9 prototypes have no image, since others cover" in caplog.text
    assemble(run)
    for label in range(3):
        s = load_set_of_run(run, 3, "ddoq")
        own = s.labels == label
        number = torch.bincount(s.prototype[own], minlength=3)[s.prototype[own]]
        share = s.counts[own] / number
        assert torch.allclose(s.weights[own], (3 * share / share.sum()).sqrt())


@pytest.mark.parametrize("where", ["filter", "weight"])
def test_candidates_are_compared_with_what_pruning_keeps(
    where: str, tmp_path: Path, toy_source, accelerator, pipe
) -> None:
    run = drawn(tmp_path, toy_source, accelerator, pipe, draw=False)
    settings = PruneConfig(policy="hard", share=0.5, where=where, keep_per_ipc=1, keep_share=0.1)  # type: ignore[arg-type]
    real = class_images(cache_of(run), 0, 3, Pruning(settings, torch.arange(24.0), seed=0))
    if where == "filter":
        assert (real.rows.tolist(), len(real.z), real.weights) == (list(range(5)), 5, None)
    else:
        assert real.weights is not None
        assert real.weights.tolist() == [1.0] * 5 + [settings.outside_weight] * 4


def quantizer(centroids: torch.Tensor) -> Prototypes:
    k = len(centroids)
    counts, rows = torch.ones(k, dtype=torch.int64), torch.arange(k)
    return Prototypes(0, "class", centroids, counts, counts.double(), centroids, rows, {})


@pytest.mark.parametrize("where", ["filter", "weight"])
@pytest.mark.parametrize("rule", ["facility", "transport"])
def test_rules_by_features_see_what_pruning_keeps(
    rule: Any, where: Any, tmp_path: Path, toy_source, accelerator, pipe
) -> None:
    """The few images that are kept have one feature vector, and the many that are pruned another."""
    cache = cache_of(drawn(tmp_path, toy_source, accelerator, pipe, draw=False))
    z, rows = cache.load(0)
    ends, kept = torch.eye(2), torch.isin(rows, rows[:3])
    scores = torch.ones(24).index_fill(0, rows[:3], 0.0)
    settings = PruneConfig(policy="hard", share=0.7, where=where, keep_per_ipc=1, keep_share=0.1)
    features: Any = SimpleNamespace(load_rows=lambda label, own: ends[(~kept).long()])
    teacher: Any = None
    for pruning, row in ((Pruning(settings, scores, seed=0), 0), (Pruning(PruneConfig(), None, seed=0), 1)):
        selector = Selector(
            GenerateConfig(mode="dit", select=rule), teacher, cache, 1, pruning, features, lambda rows: rows
        )
        chosen = selector._by_features(quantizer(z.float().mean(0, keepdim=True)), ends, torch.tensor([0, 0]), [1])
        assert chosen.rows.tolist() == [row]


def test_features_of_a_cell_are_the_mean_of_its_own_images() -> None:
    z = torch.tensor([0.0, 1.0, 10.0, 11.0]).view(4, 1, 1, 1)
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, 8.0]])
    p = quantizer(torch.tensor([10.5, 0.5, 40.0]).view(3, 1, 1, 1))  # no image is nearest to the last
    real = ClassImages(z, features, torch.arange(4), None, None)
    assert _cell_features(p, real).tolist() == [[0, 6], [2, 0], [0, 8]]
    weighed = real._replace(weights=torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert _cell_features(p, weighed).tolist() == [[0, 6], [2.5, 0], [0, 8]]


@pytest.mark.parametrize(
    ("changes", "rest"),
    [
        ({"path": "nowhere"}, r"there is no teacher at nowhere; set {}\.path"),
        ({"net": "resnet20"}, r"weights in .* are not a resnet20 .*; set {}\.net to"),
        ({"net": "convnet99"}, r"^{}: .*convnet99"),
        ({"net": "torchvision:nothing", "path": "pretrained"}, r"^{}: .*nothing"),
        ({"classes": [0, 1]}, r"{}\.classes lists 2 different outputs"),
        ({"image_size": 64}, r"{}\.image_size to the side it was trained at"),
        ({"mean": [0.5, 0.5]}, r"{}\.mean="),
    ],
)
def test_refusals_of_a_teacher_name_the_setting_it_stands_in(
    changes: dict[str, Any], rest: str, tmp_path: Path, toy_source, selecting
) -> None:
    wrong = {**selecting, **changes}
    choosing = {"mode": "dit", "candidates": 2, "select": "correct", "select_teacher": selecting}
    stage = {"stage": "fadrm", "steps": [1], "teachers": [selecting]}
    base = {"output_dir": str(tmp_path / "run"), "codec": {"resolution": 8}, "ipc": [2]}
    own = {"x": {"override": {"generate": {"select_teacher": wrong}}}}
    settings = {
        "generate.select_teacher": {"generate": {**choosing, "select_teacher": wrong}},
        "methods.x.override.generate.select_teacher": {"generate": choosing, "methods": own},
        "refine.0.teachers.N": {"refine": [{**stage, "teachers": [wrong]}]},
        "refine.0.validation_teachers.N": {"refine": [{**stage, "validation_teachers": [wrong]}]},
        "methods.x.refine.0.validation_teachers.N": {
            "methods": {"x": {"refine": [{**stage, "validation_teachers": [wrong]}]}}
        },
        "teachers.N": {"teachers": [wrong]},
    }
    for setting, changed in settings.items():
        named = rest.format(re.escape(setting))
        named = named.split(": ")[1] if setting == "teachers.N" and named.startswith("^") else named
        with pytest.raises(InputError, match=named):
            check_settings(from_dict(RunConfig, {**base, **changed}), toy_source, "run")


@pytest.mark.parametrize(
    "setting",
    ["internal_guidance=2", "autoguidance=2", "prototype_guidance=0.1", "measure_guidance=0.1", "repulsion=0.1"],
)
def test_guidance_without_a_denoiser_is_refused(setting: str, accelerator) -> None:
    name = setting.partition("=")[0]
    config = apply_settings(RunConfig(), [f"generate.{setting}"])
    with pytest.raises(
        InputError, match=rf"method 'ddoq' has generate.{setting}, but generate.mode=decode .* or generate.{name}="
    ):
        check_guidance(config)
    check_guidance(apply_settings(config, ["methods.ddoq.override={generate.mode: dit}"]))
    check_guidance(apply_settings(config, ["methods.ddoq.representative=real"]))
    dit = apply_settings(RunConfig(), ["generate.mode=dit", f"generate.{setting}"])
    check_guidance(dit)
    with pytest.raises(InputError, match="has no denoiser to guide"):
        check_plan(
            apply_settings(dit, ["methods.ddoq.override={generate.mode: decode}"]), like_source("3x20"), accelerator
        )


def test_what_does_not_go_together_is_refused_first(selecting) -> None:
    def refused(message: str, **settings: Any) -> None:
        config = apply_settings(RunConfig(), {f"generate.{k}": v for k, v in {"mode": "dit", **settings}.items()})
        with pytest.raises(InputError, match=message):
            check_methods(config)

    refused("candidates=4 and generate.select=none, which would keep the first alone", candidates=4)
    refused("select=correct and one candidate", select="correct", select_teacher=selecting)
    refused("real_candidates=4 and generate.select=none, which would keep the first", real_candidates=4)
    refused("which needs a teacher; set generate.select_teacher.net", real_candidates=2, select="confident")
    refused("which needs a teacher; set generate.select_teacher.net", candidates=2, select="confident")
    refused(
        "a pool as generate.select_teacher",
        candidates=2, select="confident", select_teacher={"net": "pool", "path": "x"},
    )  # fmt: skip
    for same in ({"mode": "decode"}, {"mode": "dit", "noise": "inversion"}):
        with pytest.raises(InputError, match=r"set candidates=1 \(now 2\)"):
            from_dict(GenerateConfig, {**same, "candidates": 2})


def test_candidates_multiply_the_cost_of_drawing(selecting) -> None:
    source = like_source("4x20")
    chosen = {"candidates": 3, "select": "transport", "select_teacher": selecting}
    methods = {"plain": {}, "transport": {"override": {"generate": chosen}}}
    changes = {"methods": methods, "ipc": [2], "generate.mode": "dit", "evaluate.students": []}
    config = apply_settings(RunConfig(), changes)
    plans = {p.stage: p for p in stage_plans(config, source, latent=(4, 8, 8), denoiser_steps=5)}
    calls = plans["generate"].calls
    assert (calls["decode"], calls["denoise"]) == (8 + 24, 5 * (8 + 24))
    # probabilities and features of 24 draws, features of 80 real images
    assert calls[f"select convnet3-bn {selecting['path']}"] == 2 * 24 + 80
    assert plans["generate"].units == "32 images, of which 16 are kept"
    assert plans["generate"].bytes == 16 * 3 * 64 * 64
    assert calls["read"] == 80
    real = apply_settings(config, ["methods.transport.override.generate.real_candidates=2"])
    both = next(p for p in stage_plans(real, source, latent=(4, 8, 8), denoiser_steps=5) if p.stage == "generate")
    assert both.calls[f"select convnet3-bn {selecting['path']}"] == 2 * 24 + 16 + 80
    assert both.calls["read"] == 80 + 16
    assert both.units == "32 images and 16 real ones, of which 16 are kept"
    assert "16 images, chosen from 32 draws, 0.2 MB of pixels, up to 1600 denoiser calls" in plan(config, source)


def test_classes_that_are_walked_together_are_the_units_of_a_plan(selecting) -> None:
    guided = {"measure_guidance": 0.1, "candidates": 2, "select": "correct", "select_teacher": selecting}
    changes = {"ipc": [5], "generate.mode": "dit", "evaluate.students": []}
    changes |= {f"generate.{k}": v for k, v in guided.items()}
    config = apply_settings(RunConfig(), changes)
    plans = stage_plans(config, like_source("3x20"), latent=(4, 8, 8), denoiser_steps=5, processes=4)
    share = next(p.share for p in plans if p.stage == "generate")
    assert share == 2 / 6  # six units of five images on four processes


def test_a_run_selects_labels_and_says_by_whom(world: Path, tmp_path: Path, teachers, caplog) -> None:
    label = {"net": "convnet3", "path": str(world / "teacher.safetensors"), "mean": [0.5] * 3, "std": [0.5] * 3}
    other, same = ({"candidates": 2, "select": "correct", "select_teacher": t} for t in (teachers[0], label))
    prior = {**other, "snr": None, "strength": 1.0}
    methods = {"other": {"override": {"generate": other}}, "same": {"override": {"generate": same}}}
    methods |= {"prior": {"weights": "uniform", "override": {"generate": prior}}, "real": {"representative": "real"}}
    file = full(world, tmp_path, ipc=[2], methods=methods, evaluate__students=[])
    assert main(["run", "--config", str(file), "--cpu"]) == 0
    assert "generate.select_teacher of method 'same' is one of the teachers that label" in caplog.text
    assert "of method 'other'" not in caplog.text
    sets = {m: json.loads((tmp_path / f"run/dataset/ipc2-{m}/provenance.json").read_text()) for m in methods}
    assert sets["other"]["generate"]["selection"]["labels_too"] is False
    assert sets["same"]["generate"]["selection"]["labels_too"] is True
    assert sets["prior"]["generate"]["start"]["strength"] == 1.0
    assert "selection" not in sets["real"]["generate"]
    page = (tmp_path / "run/report.html").read_text()
    assert "The same in all rows: IPC 2, rule correct, candidates 2" in page
    read = checked_page(page)
    pools = [i for i, text in enumerate(read.text) if text.startswith("Candidates of ")]
    assert len(pools) == 3
    kept = [s["generate"]["selection"]["images"] for s in sets.values() if "selection" in s["generate"]]
    assert page.count('class="kept"') == sum(kept) == page.count('class="dropped"')  # one of two candidates
    assert "same at IPC 2: the teacher convnet3 that selects among candidates labels the set too" in page
    files = sorted((tmp_path / "run/images").glob("*/class-00000.safetensors"))
    assert sum("selection" in read_metadata(f) for f in files) == 3


@pytest.mark.multi_process
def test_two_processes_keep_what_one_keeps(world: Path, tmp_path: Path, teachers) -> None:
    chosen = {"candidates": 3, "select": "transport", "select_teacher": teachers[0]}
    guided = {**chosen, "measure_guidance": 0.3, "repulsion": 0.02}
    methods = {"plain": {}, "chosen": {"override": {"generate": chosen}}, "guided": {"override": {"generate": guided}}}
    methods["few"] = {"override": {"cluster.prototypes_per_class": 2}}
    settings: dict[str, Any] = {"ipc": [3], "methods": methods, "evaluate__students": []}
    one, two = tmp_path / "one", tmp_path / "two"
    process = launch(full(world, two, **settings), processes=2)
    assert main(["run", "--config", str(full(world, one, **settings)), "--cpu"]) == 0
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors[-3000:]
    assert json.loads((two / "run" / "provenance.json").read_text())["processes"] == 2
    assert len(list(one.glob("run/images/*/class-*"))) == 12
    assert same_sets(two, one)
