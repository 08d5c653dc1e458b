"""A method of refinement that this file alone registers goes through a run like those of the package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from models import tiny_kl
from pydantic import Field

from dq.config import validation
from dq.config.kinds import Auto, Whole
from dq.config.overrides import apply_settings
from dq.config.reader import dump_config, from_dict
from dq.config.refinement import STAGES, RefineConfig
from dq.config.schema import RunConfig, load_config
from dq.core.errors import InputError
from dq.core.files import read_json
from dq.distilled.external import load_set
from dq.refine.batches import compose_batches
from dq.refine.method import Batch, Context, Cost, Method, Needs, Refined, Resources, Session, State
from dq.refine.registry import METHODS, method_of
from dq.run.distill import DistillPipeline
from dq.run.folder import open_run
from dq.run.planning.plan import plan
from dq.run.refinement import planned
from dq.run.report import write_report
from dq.run.stages.evaluate import check_evaluation, evaluate_run


@validation.settings
class Darken(RefineConfig):
    """Every step makes the images darker, and the whole set is one batch."""

    stage: Annotated[Literal["darken"], Field(description="method of refinement")] = "darken"
    steps: Annotated[Whole, Field(description="steps")] = 4
    amount: Annotated[Auto[float], Field(description="factor of the brightness of a step; auto: 0.9")] = None
    compose: Annotated[Literal["index", "dealt", "whole"], Field(description="images of a batch")] = "whole"

    @property
    def labels_images(self) -> bool:
        return True


class DarkenMethod(Method):
    config = Darken
    stop_at: int | None = None  # the step before which the next run is killed
    ran: list[int]  # steps that were done

    def __init__(self) -> None:
        self.ran = []

    def resolve(self, stage: Darken, context: Context) -> Darken:
        return dataclasses.replace(stage, amount=0.9 if stage.amount is None else stage.amount)

    def needs(self, stage: Darken) -> Needs:
        return Needs(teachers=False)

    def run(self, batch: Batch, stage: Darken, resources: Resources, session: Session) -> Refined:
        x, first = (session.resume.tensors["x"], session.resume.steps) if session.resume else (batch.images, 0)
        for step in range(first, stage.steps):
            if step == self.stop_at:
                raise KeyboardInterrupt
            x = x * stage.amount
            self.ran.append(step)
            session.step(step)
            session.save(State({"x": x}, {}, step + 1))
        labels = torch.nn.functional.one_hot(batch.labels, resources.classes) * 0.7 + 0.1
        trace = torch.arange(1.0, stage.steps + 1)[:, None]
        return Refined(x, trace, ("steps",), None, labels, "probabilities", step_size=0.02)

    def cost(self, stage: Darken, context: Context) -> Cost:
        return Cost(stage.steps, 1)


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> DarkenMethod:
    method = DarkenMethod()
    monkeypatch.setitem(METHODS, "darken", method)
    return method


def settings(out: Path, **more: Any) -> RunConfig:
    return apply_settings(
        RunConfig(output_dir=str(out / "run"), cache_dir=str(out / "cache")),
        {
            "codec.resolution": 8,
            "ipc": [2],
            "refine": [{"stage": "darken"}],
            "evaluate.seeds": 1,
            "evaluate.baselines": [],
            "evaluate.students": [
                {"net": "convnet3w32", "labels": "fixed", "epochs": 2, "augment": "none", "tests": 1}
            ],
            **more,
        },
    )


def distill(config: RunConfig, toy_source: Any, accelerator: Any) -> Any:
    pipe = DistillPipeline(vae=tiny_kl())
    return pipe.distill(toy_source, ipc=2, config=config, output_dir=config.output_dir, accelerator=accelerator)


def test_it_runs_through_plan_resume_provenance_report_and_evaluation(
    method: DarkenMethod, toy_source: Any, accelerator: Any, tmp_path: Path
) -> None:
    config = settings(tmp_path)
    # the configuration goes to a file and back
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert isinstance(config.refine[0], Darken)
    # the plan knows it, and its batches are one
    assert [(p.name, p.steps) for p in planned(config, "ddoq", toy_source.class_counts().tolist())] == [("darken", 4)]
    assert "darken, 6 images" in plan(config, toy_source)
    check_evaluation(config, toy_source)  # it labels its images, so that no teacher is missed
    # killed behind its second step, it goes on there
    method.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        distill(config, toy_source, accelerator)
    method.stop_at = None
    s = distill(config, toy_source, accelerator)
    assert method.ran == [0, 1, 2, 3]
    whole = distill(settings(tmp_path / "whole"), toy_source, accelerator)
    assert torch.equal(s.images, whole.images)
    # images, labels and step size are in the set, in its record and in the Parquet files
    plain = distill(dataclasses.replace(settings(tmp_path / "plain"), refine=()), toy_source, accelerator)
    assert torch.equal(s.images, (plain.images.float() / 255 * 0.9**4 * 255).round().to(torch.uint8))
    assert s.label_kind == "probabilities"
    assert s.step_size == pytest.approx(0.02)
    torch.testing.assert_close(s.soft_labels.float().sum(1), torch.ones(6), atol=2e-3, rtol=0)
    again = load_set(tmp_path / "run" / "dataset")
    assert (again.label_kind, again.step_size) == (s.label_kind, s.step_size)
    record = read_json(tmp_path / "run" / "dataset" / "ipc2-ddoq" / "provenance.json")
    assert (record["label_kind"], record["step_size"]) == ("probabilities", 0.02)
    import pyarrow.parquet as pq

    file = next((tmp_path / "run" / "dataset" / "ipc2-ddoq").glob("*.parquet"))
    assert pq.read_metadata(file).metadata[b"dq.label_kind"] == b"probabilities"
    # provenance: settings as asked and as filled in, measures before and after
    stage = s.provenance["refine"][0]
    assert stage["settings"]["stage"] == "darken"
    assert stage["settings"]["amount"] is None
    assert stage["resolved"]["amount"] == 0.9
    assert stage["summary"]["after"]["anchor_distance"] > 1
    assert stage["teachers"] == []
    # a finished stage is not done again
    distill(config, toy_source, accelerator)
    assert method.ran == [0, 1, 2, 3] * 2
    # evaluation and report
    run = open_run(
        dataclasses.replace(config, codec=dataclasses.replace(config.codec, resolution=8)), toy_source, accelerator
    )
    rows = evaluate_run(run)
    assert [(r.set, r.labels) for r in rows] == [("ddoq", "fixed")]
    page = write_report(run).read_text()
    assert "stage 1, darken" in page


def test_an_unknown_stage_is_an_error_everywhere(method: DarkenMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "must be a mapping whose stage is one of 'fadrm', 'teddy', 'frepo'"
    for data in ({"stage": "frepos"}, {}, {"stage": ["fadrm"]}, "fadrm"):
        with pytest.raises(InputError, match=message):
            from_dict(RunConfig, {"refine": [data]})
    assert STAGES["darken"] is Darken
    monkeypatch.delitem(METHODS, "darken")
    with pytest.raises(InputError, match="'darken'; choose one of fadrm, teddy, frepo"):
        method_of(Darken())
    with pytest.raises(InputError, match="no method of refinement 'darken'"):
        planned(apply_settings(RunConfig(), {"refine": [{"stage": "darken"}]}), "ddoq")


def test_the_whole_set_is_one_batch() -> None:
    assert compose_batches([2, 0, 3], 2, compose="whole") == [[(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]]


def test_a_step_size_belongs_to_the_whole_set(
    method: DarkenMethod, toy_source: Any, accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DarkenMethod, "batches", lambda self, stage, counts: compose_batches(counts, 3, min_classes=1))
    from dq.core.errors import RunError

    with pytest.raises(RunError, match=r"step size .* 2 batches.*compose=whole"):
        distill(settings(tmp_path), toy_source, accelerator)


def test_labels_that_a_student_cannot_use_are_refused_before_training(
    method: DarkenMethod, toy_source: Any, accelerator: Any, tmp_path: Path
) -> None:
    config = settings(tmp_path)
    s = distill(config, toy_source, accelerator)
    from dq.evaluation.evaluate import evaluate

    marked = dataclasses.replace(s, label_kind="regression")
    with pytest.raises(
        InputError,
        match=r"label_kind=regression, which .*'convnet3' .* with loss=kl; set loss=mse or mse_gt, or labels=hard",
    ):
        evaluate(
            marked, toy_source, protocol="custom", labels="fixed", augment="none", epochs=1, n_seeds=1, baselines=()
        )
