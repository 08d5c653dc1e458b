"""Sets, pipelines and teachers go to a stand-in Hub and come back, over HTTP, by unmodified clients."""

from __future__ import annotations

import dataclasses
import getpass
import html
import io
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hub_server import Hub, Repository, running
from sets import files_of, make, same

from dq.core.cards import BEGIN, END, md, merge_card, public, split_card
from dq.core.files import read_json, read_jsonl, write_json
from dq.core.hub_client import ATTEMPTS, backoff_seconds
from dq.core.redaction import Redaction, redact
from dq.distilled.card import dataset_card
from dq.distilled.set import DistilledSet
from dq.evaluation.results import compare, summarize, to_csv
from dq.run.stages.evaluate import describe_evaluation

READER, GUEST = "hf_reader00000000", "hf_guest000000000"
HEAD = "import dq\nfrom dq.distilled.set import DistilledSet\nfrom sets import make, same\nimport dataclasses\n"


@pytest.fixture(scope="module")
def server():
    with running("dq.cli.main", "dq.distilled.hub", "dq.networks.teacher_loading", "dq.run.distill", "sets") as hub:
        yield hub


@pytest.fixture
def hub(server: Hub):
    server.reset_faults()
    yield server
    assert server.unexpected == []


@pytest.fixture(scope="module")
def unreachable() -> Iterator[Hub]:
    """Nothing listens at the endpoint, so that a connection is refused as it is without a network."""
    hub = Hub(("dq.cli.main", "dq.distilled.hub", "dq.diffusion.prior.train_denoiser", "dq.run.distill"))
    hub.server_close()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def card_of(hub: Hub, name: str, kind: str = "dataset") -> tuple[dict, str]:
    return split_card(hub.files(name, kind)["README.md"].decode())


# --- sets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(server: Hub, home: Path) -> None:
    """Three sets in me/x, one of them in several files."""
    code = (
        HEAD
        + """
import tempfile
import dq.distilled.parquet
from dq.distilled.hub import push_folder
with tempfile.TemporaryDirectory() as scratch:
    make(soft=True).save(scratch, "ipc2-ddoq")
    make(floats=True).save(scratch, "ipc2-d4m")
    dq.distilled.parquet.GROUP_ROWS, dq.distilled.parquet.SHARD_BYTES = 2, 1
    make(soft=True).save(scratch, "ipc10")
    print(push_folder(scratch, "x", license="cc-by-4.0", source_license="MIT"))
"""
    )
    before = server.commits
    assert f"{server.url}/datasets/me/x/commit/" in server.run(code, home)
    assert server.commits == before + 1


@pytest.mark.usefixtures("pushed")
def test_sets_go_there_and_come_back(hub: Hub, home: Path) -> None:
    code = (
        HEAD
        + """
s = make(soft=True)
other = make(floats=True)
for name, expected in (("ipc2-ddoq", s), ("ipc2-d4m", other), ("ipc10", s)):
    found = DistilledSet.from_hub("me/x", name)
    assert same(found, expected), name
    assert found.provenance["config_name"] == name
from datasets import ClassLabel, Image, List, Value, load_dataset
plain = load_dataset("me/x", "ipc2-ddoq", split="train")
assert plain.features["soft_label"] == List(Value("float16"), length=3)
assert plain.features["label"] == ClassLabel(names=["zebra", "ant", "bee"])
assert isinstance(plain.features["image"], Image)
assert plain.features["weight"] == Value("float32")
import numpy as np, torch
stream = list(load_dataset("me/x", "ipc10", split="train", streaming=True))
for rows in (plain, stream):
    for i, row in enumerate(rows):
        assert torch.equal(torch.from_numpy(np.array(row["image"])).permute(2, 0, 1), s.images[i])
        assert row["label"] == s.labels[i] and row["weight"] == s.weights[i] and row["count"] == s.counts[i]
        assert np.array(row["soft_label"], np.float16).tolist() == s.soft_labels[i].tolist()
default = load_dataset("me/x", split="train")
assert (default.config_name, len(default)) == ("ipc2-ddoq", 6)  # the first that was made
assert same(DistilledSet.from_hub("me/x"), s)
try:
    DistilledSet.from_hub("me/x", "nothing")
except dq.InputError as e:
    assert "'nothing'; it has ipc10, ipc2-d4m, ipc2-ddoq" in str(e), e
"""
    )
    hub.run(code, home)
    files = hub.files("me/x")
    assert sorted(f for f in files if f.startswith("ipc10/")) == [
        "ipc10/grid.png",
        "ipc10/provenance.json",
        *(f"ipc10/train-{i:05d}-of-00003.parquet" for i in range(3)),
    ]
    head, body = card_of(hub, "me/x")
    assert head["license"] == "cc-by-4.0"
    assert head["task_categories"] == ["image-classification"]
    assert head["size_categories"] == ["n<1K"]
    assert head["annotations_creators"] == ["machine-generated"]
    assert {"dataset-distillation", "optimal-quantization"} <= set(head["tags"])
    # ipc2 before ipc10
    assert [c["config_name"] for c in head["configs"]] == ["ipc2-d4m", "ipc2-ddoq", "ipc10"]
    assert [c.get("default") for c in head["configs"]] == [None, True, None]
    assert all(c["data_files"][0]["path"] == f"{c['config_name']}/train-*.parquet" for c in head["configs"])
    assert "license: MIT" in body
    # the viewer's types are those of the files
    from datasets import Features

    for info in head["dataset_info"]:
        name = info["config_name"]
        shards = sorted(f for f in files if f.startswith(f"{name}/") and f.endswith(".parquet"))
        schema = pq.read_schema(io.BytesIO(files[shards[0]]))
        assert Features._from_yaml_list(info["features"]) == Features.from_arrow_schema(schema)
        (split,) = info["splits"]
        assert split["name"] == "train"
        assert split["num_examples"] == sum(pq.ParquetFile(io.BytesIO(files[f])).metadata.num_rows for f in shards)
        assert info["download_size"] == sum(len(files[f]) for f in shards)


@pytest.mark.slow
def test_a_second_push_replaces_one_set_and_keeps_the_rest(hub: Hub, home: Path) -> None:
    code = (
        HEAD
        + """
import dq.distilled.parquet
s = make(soft=True)
s.push_to_hub("me/again", "a", license="mit")
dq.distilled.parquet.GROUP_ROWS, dq.distilled.parquet.SHARD_BYTES = 2, 1
s.push_to_hub("me/again", "b")
"""
    )
    hub.run(code, home)
    files = hub.files("me/again")
    assert len([f for f in files if f.startswith("b/train")]) == 3
    head, body = card_of(hub, "me/again")
    assert head["license"] == "mit"  # given once
    # the owner writes into the card, and adds files and a set of their own
    head |= {"pretty_name": "My set", "language": ["en"], "license": "cc0-1.0"}
    head["tags"].append("mine")
    head["configs"].append({"config_name": "raw", "data_files": "raw/*.parquet"})
    text = f"---\n{yaml.safe_dump(head)}---\n# Hello\n\nWritten by hand.\n{body}\n## Thanks\n\nTo all.\n"
    raw = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), raw)
    hub.put("me/again", {"README.md": text.encode(), "raw/a.parquet": raw.getvalue(), "b/notes.md": b"mine"})
    before = hub.files("me/again")
    code = (
        HEAD
        + """
s = make()
s = dataclasses.replace(s, counts=s.counts + 1)
s.push_to_hub("me/again", "b")
from datasets import load_dataset
assert load_dataset("me/again", "b", split="train")["count"] == s.counts.tolist()
assert load_dataset("me/again", "raw", split="train")["a"] == [1]
assert same(DistilledSet.from_hub("me/again", "b"), s)
assert same(DistilledSet.from_hub("me/again", "a"), make(soft=True))
s.push_to_hub("me/again", "b", license="Only for friends", pretty_name="New")
"""
    )
    hub.run(code, home)
    after = hub.files("me/again")
    assert {f: d for f, d in after.items() if not f.startswith(("b/", "README"))} == {
        f: d for f, d in before.items() if not f.startswith(("b/", "README"))
    }
    assert sorted(f for f in after if f.startswith("b/")) == [
        "b/grid.png", "b/notes.md", "b/provenance.json", "b/train-00000-of-00001.parquet"
    ]  # fmt: skip
    head, body = card_of(hub, "me/again")
    assert head["language"] == ["en"]
    assert "mine" in head["tags"]
    assert (head["license"], head["license_name"]) == ("other", "Only for friends")
    assert head["pretty_name"] == "New"
    assert [c["config_name"] for c in head["configs"]] == ["raw", "a", "b"]
    assert body.index("Written by hand.") < body.index(BEGIN) < body.index(END) < body.index("To all.")
    assert body.count("# A distilled image set") == 1


@pytest.mark.usefixtures("pushed")
def test_a_hand_set_license_and_name_stay(hub: Hub) -> None:
    record = read_json_of(hub, "me/x", "ipc10/provenance.json")
    old = "---\nlicense: cc0-1.0\npretty_name: Mine\n---\n"
    assert split_card(dataset_card([record], {}, old=old))[0]["license"] == "cc0-1.0"
    assert split_card(dataset_card([record], {}, old=old))[0]["pretty_name"] == "Mine"
    assert split_card(dataset_card([record], {}))[0]["license"] == "unknown"


def read_json_of(hub: Hub, name: str, file: str) -> dict:
    return json.loads(hub.files(name)[file])


@pytest.mark.usefixtures("pushed")
def test_private_branch_organisation_and_request(hub: Hub, home: Path) -> None:
    code = (
        HEAD
        + f"""
s = make()
s.push_to_hub("lab/secret", "a", private=True, revision="try")
assert same(DistilledSet.from_hub("lab/secret", revision="try"), s)
def refused(call, text):
    try:
        call()
    except dq.InputError as e:
        assert text in str(e), e
        assert "\\n" not in str(e) and "hf_" not in str(e).replace("hf auth", ""), e
    else:
        raise SystemExit("not refused: " + text)
refused(lambda: DistilledSet.from_hub("lab/secret"), "holds no distilled set of dq")
refused(lambda: DistilledSet.from_hub("lab/secret", revision="none"), "lab/secret has no revision 'none'")
refused(lambda: DistilledSet.from_hub("lab/secret", token="{GUEST}"), "the Hub has no repository lab/secret")
refused(lambda: s.push_to_hub("lab/x", token="{READER}"), "the token may not write to lab/x (403)")
refused(lambda: s.push_to_hub("other/x"), "the token may not write to other/x (403)")
refused(lambda: s.push_to_hub("lab/a/b"), "'lab/a/b' cannot name a repository")
refused(lambda: s.push_to_hub("me/x", private=True), "me/x exists already and is public")
refused(lambda: s.push_to_hub("me/x", create_pr=True, revision="y"), "a pull request is opened against main")
pr = s.push_to_hub("me/x", "from-guest", token="{GUEST}", create_pr=True)
print(pr.pr_url)
"""
    )
    assert "/datasets/me/x/discussions/1" in hub.run(code, home)
    repo = hub.repos["dataset", "lab/secret"]
    assert repo.private
    assert list(hub.files("lab/secret")) == [".gitattributes"]
    assert "a/provenance.json" in hub.files("lab/secret", revision="try")
    assert "from-guest/provenance.json" not in hub.files("me/x")
    assert "from-guest/provenance.json" in hub.files("me/x", revision="refs/pr/1")


PUSH = (
    HEAD
    + """
import sys
import dq.distilled.parquet
dq.distilled.parquet.GROUP_ROWS, dq.distilled.parquet.SHARD_BYTES = 2, 1
s = make(soft=True)
s = dataclasses.replace(s, counts=s.counts + int(sys.argv[2]))
try:
    s.push_to_hub(sys.argv[1], "a")
except dq.RunError as e:
    print(e)
"""
)


@pytest.mark.slow
def test_an_upload_that_breaks_off_leaves_the_repository_and_goes_on(hub: Hub, home: Path) -> None:
    hub.run(PUSH, home, "me/broken", "1")
    before = hub.files("me/broken")
    hub.puts.clear()
    hub.on_put = lambda number: 507 if number >= 3 else None
    output = hub.run(PUSH, home, "me/broken", "2")
    assert re.search(
        r"^cannot push to me/broken: .*507.*the repository is as it was: give the same command again", output
    )
    assert hub.files("me/broken") == before
    arrived = {oid for oid in hub.puts if oid in hub.blobs}
    assert len(arrived) >= 2
    hub.on_put = lambda number: 500 if number == 1 else 0 if number == 2 else None  # the client tries these again
    hub.puts.clear()
    assert hub.run(PUSH, home, "me/broken", "2") == ""
    assert not arrived & set(hub.puts)
    assert len(set(hub.puts)) == 1  # of three files and a grid that was there before
    assert hub.files("me/broken") != before


@pytest.mark.slow
def test_two_who_push_at_a_time_both_arrive(hub: Hub, home: Path) -> None:
    hub.run(HEAD + 'make().push_to_hub("me/both", "a")', home)
    theirs = hub.files("me/both")
    calls = []

    def meanwhile(repo: Repository) -> None:
        calls.append(1)
        if len(calls) == 1:  # another set arrives between the reading and the commit
            moved = {f.replace("a/", "z/"): d for f, d in theirs.items() if f.startswith("a/")}
            record = json.loads(moved["z/provenance.json"]) | {"config_name": "z"}
            hub.put("me/both", {**moved, "z/provenance.json": json.dumps(record).encode()})

    hub.on_commit = meanwhile
    hub.run(HEAD + 'make(soft=True).push_to_hub("me/both", "b")', home)
    assert len(calls) == 2
    assert [c["config_name"] for c in card_of(hub, "me/both")[0]["configs"]] == ["a", "b", "z"]
    calls.clear()

    def refuse(repo: Repository) -> int:
        calls.append(1)
        return 409

    hub.on_commit = refuse
    output = hub.run(PUSH, home, "me/both", "5")
    assert output.startswith("cannot push to me/both: ")
    assert len(calls) == ATTEMPTS


def test_waits_between_commits_grow_to_a_bound_and_differ() -> None:
    random.seed(0)
    state = random.getstate()
    waits = {attempt: [backoff_seconds(attempt) for _ in range(200)] for attempt in range(8)}
    assert random.getstate() == state  # no result depends on a push
    for attempt, seconds in waits.items():
        bound = min(8.0, 0.5 * 2**attempt)
        assert 0 <= min(seconds) < 0.2 * bound  # fails once in 2e19
        assert 0.8 * bound < max(seconds) <= bound
        assert len(set(seconds)) > 100


@pytest.mark.usefixtures("pushed")
def test_the_snippet_of_the_card_trains(hub: Hub, home: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", card_of(hub, "me/x")[1], re.DOTALL)
    assert len(snippets) == 2
    output = hub.run("\n".join([*snippets, "print(float(losses.mean()), net[1].weight.shape, len(rows))"]), home)
    assert float(output.split()[0]) > 0
    assert "[3, 75]) 6" in output


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pipelines_go_there_and_come_back(hub: Hub, home: Path) -> None:
    code = """
import torch
import huggingface_hub.constants  # before conftest tells it to stay offline
from models import tiny_dit, tiny_kl
from diffusers import DDIMScheduler, DiTPipeline
from dq import DistillPipeline, InputError, pull
names = {i: n for i, n in enumerate(["red", "green", "blue"])}
pipe = DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler(), id2label=names)
print(pipe.push_to_hub("me/pipe", license="apache-2.0"))
back = DistillPipeline.from_pretrained("me/pipe")
for a, b in ((pipe.vae, back.vae), (pipe.transformer, back.transformer)):
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
assert back.config.id2label == {"0": "red", "1": "green", "2": "blue"}
assert isinstance(DiTPipeline.from_pretrained("me/pipe").transformer, type(pipe.transformer))
folder = pull("me/pipe", "pulled-pipe")
assert DistillPipeline.from_pretrained(folder).digest("dit") == pipe.digest("dit")
DistillPipeline(vae=tiny_kl()).save_pretrained("codec", push_to_hub=True, repo_id="me/codec", private=True)
assert DistillPipeline.from_pretrained("me/codec").digest("decode") == pipe.digest("decode")
other = DistillPipeline(vae=tiny_kl(seed=1), transformer=tiny_dit(seed=1), scheduler=DDIMScheduler(), id2label=names)
other.push_to_hub("me/pipe", "Add a variant", variant="fp16")
assert DistillPipeline.from_pretrained("me/pipe", variant="fp16").digest("dit") == other.digest("dit")
assert DistillPipeline.from_pretrained("me/pipe").digest("dit") == pipe.digest("dit")
"""
    assert "/me/pipe/commit/" in hub.run(code, home)
    head, body = card_of(hub, "me/pipe", "model")
    assert (head["license"], head["library_name"]) == ("apache-2.0", "diffusers")
    assert 'DistillPipeline.from_pretrained("me/pipe")' in body
    assert "red, green, blue" in body
    assert hub.repos["model", "me/codec"].private
    assert 'DistillPipeline.from_pretrained("me/codec")' in card_of(hub, "me/codec", "model")[1]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, toy_images, accelerator) -> Path:
    from dq.config.schema import RunConfig, SourceConfig
    from dq.config.students import EvaluateConfig
    from dq.config.teachers import TrainTeachersConfig
    from dq.data.load import load_source
    from dq.networks.train_teachers import train_teachers

    folder = tmp_path_factory.mktemp("teaching")
    source = load_source(toy_images, class_names=["| <script>", "yes", "#1: a"])
    config = RunConfig(
        cache_dir=str(folder / "cache"),
        source=SourceConfig(image_size=8),
        train_teachers=TrainTeachersConfig(output_dir=str(folder), nets=("convnet3",), epochs=2, batch_size=8),
        evaluate=EvaluateConfig(baselines=(), validation_images=3),
    )
    return train_teachers(config, source, accelerator=accelerator)[0]


def test_teachers_go_there_and_come_back(hub: Hub, home: Path, teacher: Path) -> None:
    done = hub.cli(home, "push", str(teacher), "--hub-model-id", "net", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{hub.url}/me/net/commit/[0-9a-f]{{40}}\n", done.stdout)
    done = hub.cli(home, "pull", "me/net", "--output_dir", "teachers/net")
    assert (done.returncode, done.stdout) == (0, "teachers/net\n"), done.stderr
    pulled = files_of(home / "teachers" / "net")
    assert sorted(pulled) == ["README.md", "model.safetensors", "teacher.json"]
    assert pulled["model.safetensors"] == (teacher / "model.safetensors").read_bytes()
    head, body = card_of(hub, "me/net", "model")
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("mit", "dq", "image-classification")
    facts = read_json(teacher / "teacher.json")
    assert f"{100 * facts['validation_accuracy']:.1f} % of 3 validation images" in body
    assert "seed 0" in body
    assert "&#124; &#60;script&#62;, yes, &#35;1: a" in body
    from dq.config.teachers import TeacherConfig
    from dq.networks.teacher_loading import load_teacher

    config = load_teacher(TeacherConfig(net="convnet3", path=str(home / "teachers" / "net")), 3, 8)
    assert config.digest == load_teacher(TeacherConfig(net="convnet3", path=str(teacher)), 3, 8).digest
    snippet = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert snippet
    hub.run(snippet[1] + "assert teacher.net == 'convnet3'", home)


# --- the command line ---------------------------------------------------------------------------------------------


def finished_run(folder: Path) -> Path:
    """The folder of a run as the stages leave it, with an evaluation."""
    s = make(soft=True)
    provenance = {**s.provenance, "codec": {"path": str(folder / "prior" / "vae")}}
    provenance["source"] = {"origin": str(folder / "my data"), "classes": list(s.class_names)}
    provenance["generate"] = {"mode": "dit", "model": str(folder / "prior")}
    provenance["labels"] = {"teachers": [f"resnet18 of {folder}/teachers/resnet18"]}
    s = dataclasses.replace(s, provenance=provenance)
    s.save(folder / "dataset", "ipc2-ddoq")
    dataclasses.replace(s, weights=torch.ones(6)).save(folder / "dataset", "ipc2-d4m")
    content = read_json(folder / "dataset" / "ipc2-ddoq" / "provenance.json")["content"]

    def training(name: str, digest: str, seed: int, last: float, ipc: str = "2") -> dict:
        fixed = {"student": "convnet3", "labels": "hard", "selected_on": "none", "recipe": 0, "test_images": 100}
        fixed |= {"protocol": "classic", "settings": f"300 epochs | of {folder}", "image_bytes": 1, "label_bytes": 0}
        fixed |= {"ipc": ipc, "images": 6, "train_seconds": 1.0, "best": last, "data": {"set_digest": digest}}
        return {"set": name, "seed": seed, "last": last, **fixed}

    records = [training("ddoq", content, s, a) for s, a in ((0, 0.5), (1, 0.7))]
    records += [
        training("random", "r", 0, 0.25),
        training("random", "r", 0, 0.1, "50"),
        training("full", "f", 0, 0.9, "full"),
    ]
    records += [training("d4m", "of another content", 0, 0.99)]
    (folder / "eval").mkdir()
    (folder / "eval" / "trainings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_card_of_a_pushed_run_opens_with_its_verdict(hub: Hub, home: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    rows = summarize([r for r in read_jsonl(run / "eval" / "trainings.jsonl") if r["set"] != "d4m"])
    (run / "eval" / "summary.csv").write_text(to_csv([row.record() for row in rows]))
    (run / "eval" / "comparisons.csv").write_text(to_csv([c.record() for c in compare(rows)]))
    done = hub.cli(home, "push", str(run), "--repo_id", "lab/verdict")
    assert done.returncode == 0, done.stderr
    opening = html.unescape(card_of(hub, "lab/verdict")[1]).partition("## Use")[0]
    assert "**convnet3, hard, IPC 2: ddoq +25.0 over random, undecided, 1 seed**" in opening
    # without an evaluation there is none, and one from elsewhere is text
    evaluation = json.loads(hub.files("lab/verdict")["ipc2-ddoq/evaluation.json"])
    record = json.loads(hub.files("lab/verdict")["ipc2-ddoq/provenance.json"])
    for verdict, shown in (("<script> | x", True), (["x"], False), (None, False)):
        body = split_card(dataset_card([record], {"ipc2-ddoq": {**evaluation, "verdict": verdict}}))[1]
        assert "<script>" not in body
        assert ("**" in body.partition("## Use")[0]) == shown


@pytest.mark.slow
def test_push_and_pull_on_the_command_line(hub: Hub, home: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    run = finished_run(tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {run}\nhub: {{repo_id: lab/run, license: cc-by-4.0}}\n")
    done = hub.cli(home, "push", "--config", str(config), "--commit_message", "First", "--private")
    assert done.returncode == 0, done.stderr
    assert "/datasets/lab/run/commit/" in done.stdout
    files = hub.files("lab/run")
    head, body = card_of(hub, "lab/run")
    assert hub.repos["dataset", "lab/run"].private
    assert head["license"] == "cc-by-4.0"
    table = [line for line in body.splitlines() if "convnet3" in line and line.startswith("|")]
    assert [[c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table] == [
        ["ddoq", "2", "6", "convnet3", "hard", "classic", "2", "60.0 ± 14.1", ""],
        ["random", "2", "6", "convnet3", "hard", "classic", "1", "25.0", ""],
        ["full", "full", "6", "convnet3", "hard", "classic", "1", "90.0", ""],
    ]
    assert "99.0" not in body
    assert "ipc2-ddoq/evaluation.json" in files
    assert "ipc2-d4m/evaluation.json" not in files
    assert "resnet18" in body
    for name, data in files.items():
        for secret in (str(tmp_path), str(home), "/tmp", tmp_path.name, f"/{getpass.getuser()}/"):
            assert secret.encode() not in data, (name, secret)
    answers = hub.verbs(
        home,
        "pull lab/run --name ipc2-ddoq --output_dir pulled",
        "pull lab/run --output-dir both --quiet",
        f"push {run} --repo-id lab/run --only ipc2-d4m --create_pr --license mit",
    )
    assert [(code, out) for code, out, _ in answers] == [
        (0, "pulled\n"), (0, "both\n"), (0, f"{hub.url}/datasets/lab/run/discussions/1\n")
    ], answers  # fmt: skip
    pulled = DistilledSet.load(home / "pulled")
    assert same(pulled, make(soft=True))
    assert pulled.provenance["source"]["origin"] == "my data"
    assert load_dataset(str(home / "pulled"), split="train")["count"][:] == make().counts.tolist()
    assert "60.0 ± 14.1" in (home / "pulled" / "README.md").read_text()
    assert sorted(p.name for p in (home / "both").iterdir()) == ["README.md", "ipc2-d4m", "ipc2-ddoq"]
    assert card_of(hub, "lab/run")[0]["license"] == "cc-by-4.0"  # until the request is merged


@pytest.mark.usefixtures("pushed")
def test_faults_are_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.put("me/foreign", {"data/train-00000-of-00001.parquet": b"PAR1"})
    hub.put("me/pickles", {"pytorch_model.bin": b"", "config.json": b"{}"}, "model")
    cases = [
        ("push", "say what to push: a FOLDER, or a run by its --config FILE"),
        ("push nowhere --repo_id x", "there is no folder nowhere"),
        ("push . --repo_id x", "holds no distilled set"),
        ("push .", "say where to push: give --repo_id NAME"),
        ("pull me/none --output_dir p", "the Hub has no repository me/none"),
        ("pull me/x", "say where to put it: --output_dir DIR"),
        ("pull me/x --name y --output_dir p", "me/x has no set 'y'; it has ipc10, ipc2-d4m"),
        ("pull me/x --revision r --output_dir p", "me/x has no revision 'r'"),
        ("pull me/foreign --output_dir p", "read it as any data set with `load_source('me/foreign')`"),
        ("pull me/pickles --output_dir p", "holds no pipeline, codec or teacher in safetensors"),
        ("run --config demo --push_to_hub", "--push_to_hub needs to know where to: give --repo_id"),
    ]
    answers = hub.verbs(tmp_path, *(line for line, _ in cases))
    for (line, expected), (code, out, message) in zip(cases, answers, strict=True):
        assert (code, out) == (2, ""), line
        assert expected in message
        assert message.startswith(f"dq {line.split()[0]}: ")
        assert message.count("\n") == 1, message
    assert not (tmp_path / "p").exists()


def test_no_network_and_no_token(hub: Hub, unreachable: Hub, tmp_path: Path) -> None:
    make().save(tmp_path / "sets", "a")
    lines = ("push sets --repo_id x", "run --config demo --push_to_hub --repo_id x")
    (first, _, message), (second, out, early) = hub.verbs(tmp_path, *lines, token=None)
    assert (first, second, out) == (2, 2, "")
    assert "hf auth login" in message
    assert "pushing needs a token; log in with `hf auth login`, or give --token" in early
    done = unreachable.cli(tmp_path, "push", "sets", "--repo_id", "x")
    assert done.returncode == 1
    assert "cannot push to x: the connection to the Hub failed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


NO_NETWORK = """
import sys, time
from dq.core.errors import InputError
from dq.config.prior import PriorConfig, TrainCodecConfig, TrainDenoiserConfig
from dq.diffusion.codec import load_codec
from dq.diffusion.prior.train_codec import new_codec
from dq.diffusion.prior.train_denoiser import new_denoiser
from dq.config.teachers import TeacherConfig
from dq.networks.teacher_loading import load_teacher
from dq.run.distill import DistillPipeline
for open_it in (
    lambda: load_codec("checkpoints/cifr10"),
    lambda: DistillPipeline.from_pretrained("checkpoints/cifr10"),
    lambda: new_codec(PriorConfig(codec=TrainCodecConfig(init="checkpoints/cifr10")), 8),
    lambda: new_denoiser(PriorConfig(denoiser=TrainDenoiserConfig(init="checkpoints/cifr10")), (4, 4, 4), 3),
    lambda: load_teacher(TeacherConfig(net="transformers", path="checkpoints/cifr10"), 3, 8),
):
    began = time.perf_counter()
    try:
        open_it()
    except InputError as e:
        print(f"{time.perf_counter() - began:.1f} {e}")
"""


def test_a_name_without_network_is_refused_within_seconds(unreachable: Hub, tmp_path: Path) -> None:
    lines = unreachable.run(NO_NETWORK, tmp_path, token=None).splitlines()
    assert len(lines) == 5
    for line in lines:
        seconds, message = line.split(" ", 1)
        assert float(seconds) < 10
        assert "there is no model folder checkpoints/cifr10, and the Hub is not reached (" in message
        assert "spelling" not in message


@pytest.mark.slow
@pytest.mark.usefixtures("pushed")
def test_a_token_is_nowhere_though_the_hub_says_it_back(hub: Hub, tmp_path: Path) -> None:
    secret = "hf_secretsecretsecret"
    hub.tokens[secret] = ("me", (), False)
    make().save(tmp_path / "sets", "a")
    lines = [f"push sets --token {secret} --repo_id me/{rest}" for rest in ("new", "x --revision b")]
    for code, out, message in hub.verbs(tmp_path, *lines, token=None):
        assert code == 2, message
        assert secret not in out + message
    hub.tokens[secret] = ("me", (), True)
    hub.on_commit = lambda repo: 507
    for given, token in ((f"--token {secret}", None), ("", secret)):
        ((code, out, message),) = hub.verbs(tmp_path, f"push sets --repo_id new {given}", token=token)
        assert (code, out) == (1, "")
        assert "cannot push to new: Server error '507" in message
        assert "refused for Bearer ***; the repository is as it was" in message
        assert secret not in message
    files = [p for folder in (tmp_path, hub.home) for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in files if secret.encode() in p.read_bytes()]


def test_tokens_are_taken_out_of_text() -> None:
    assert redact("a hf_abcdefghijklmnop b", None) == "a *** b"
    assert redact("my-own-token!", "my-own-token") == "***!"
    assert redact("Authorization: Bearer abc.def") == "Authorization: Bearer ***"
    assert redact("hf_hub_download and HF_TOKEN") == "hf_hub_download and HF_TOKEN"


# --- what the Hub says is not trusted -----------------------------------------------------------------------------


def hostile(hub: Hub, name: str, change) -> None:
    """A repository with one good set, but for a change."""
    files = {f: d for f, d in hub.files("me/x").items() if not f.startswith(("ipc2-d4m", "ipc10"))}
    record = json.loads(files["ipc2-ddoq/provenance.json"])
    change(files, record)
    files["ipc2-ddoq/provenance.json"] = json.dumps(record).encode()
    hub.repos[("dataset", name)] = Repository("dataset", name)
    hub.put(name, files)


@pytest.mark.usefixtures("pushed")
def test_names_and_records_from_the_hub_are_checked(hub: Hub, home: Path, tmp_path: Path) -> None:
    shard = "ipc2-ddoq/train-00000-of-00001.parquet"
    cases = [
        (lambda f, r: f.update({"../evil": b""}), "lists a file '../evil', which would leave its folder"),
        (lambda f, r: f.update({"/etc/evil": b""}), "lists a file '/etc/evil'"),
        (lambda f, r: f.update({"a\\..\\b": b""}), "which would leave its folder"),
        (lambda f, r: f.update({"C:/x": b""}), "lists a file 'C:/x'"),
        (lambda f, r: f.update({"a b/provenance.json": b"{}"}), "'a b' must be letters, digits"),
        (lambda f, r: f.update({"-x/provenance.json": b"[]"}), "is not a record of dq"),
        (lambda f, r: r["files"].update({"../../x.parquet": r["files"][shard[10:]]}), "is damaged or not of dq"),
        (lambda f, r: r.update(config_name="../x"), "is damaged or not of dq"),
        (lambda f, r: r.update(classes="zebra"), "is damaged or not of dq"),
        (lambda f, r: r.update(classes=["ant", "ant", "bee"]), "is damaged or not of dq"),
        (lambda f, r: r.update(x=json.loads("[" * 600 + "]" * 600)), "is damaged or not of dq"),
        (lambda f, r: r.update(rows=10**400), "is damaged or not of dq"),
        (lambda f, r: r["files"][shard[10:]].update(bytes=10**400), "is damaged or not of dq"),
        (lambda f, r: r.update(source={"origin": "\ud800"}), "is not a record of dq"),
        (lambda f, r: r.update(grid={"blake2b": 3}), "is damaged or not of dq"),
        (lambda f, r: f.update({"a/provenance.json": b"[" * 100_000}), "is not a record of dq"),
        (lambda f, r: r.update(rows="6"), "is damaged or not of dq"),
        (lambda f, r: r.update(files={}), "is damaged or not of dq"),
        (lambda f, r: r.update(pixels=[-1, "x"]), "is damaged or not of dq"),
        (lambda f, r: r.update(source=["x"]), "is damaged or not of dq"),
        (lambda f, r: f.pop(shard), f"lacks {shard}"),
    ]
    for i, (change, message) in enumerate(cases):
        hostile(hub, "guest/evil", change)
        assert message in hub.run(PULL, home, "guest/evil", str(tmp_path / "out")), i
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("pushed")
def test_a_file_that_arrives_damaged_is_not_kept(hub: Hub, home: Path, tmp_path: Path) -> None:
    def change(files: dict, record: dict) -> None:
        files["ipc2-ddoq/train-00000-of-00001.parquet"] += b"x"

    hostile(hub, "guest/bad", change)
    assert "is missing or damaged" in hub.run(PULL, home, "guest/bad", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*/*"))
    # what is there already stays
    make().save(tmp_path / "mine", "ipc2-ddoq")
    before = files_of(tmp_path / "mine")
    assert "holds another set of that name" in hub.run(PULL, home, "me/x", str(tmp_path / "mine"), "ipc2-ddoq")
    assert files_of(tmp_path / "mine") == before


PULL = """
import sys
from dq import InputError, RunError, pull
try:
    print(pull(*sys.argv[1:]))
except (InputError, RunError) as e:
    print(e)
"""


# --- cards --------------------------------------------------------------------------------------------------------


def test_any_class_name_fits_into_a_card(tmp_path: Path) -> None:
    from datasets import load_dataset

    names = ("| <script>", "yes", "#1: a", "`x` *b* _c_", "[l](http://e.x)", "a: {b}\n- c", BEGIN + END, "n/a", "~")
    n = len(names)
    s = DistilledSet(
        images=torch.zeros(n, 3, 4, 4, dtype=torch.uint8), labels=torch.arange(n), weights=torch.ones(n),
        class_names=names, prototype=torch.zeros(n, dtype=torch.int64), counts=torch.ones(n, dtype=torch.int64),
        source_row=torch.arange(n), provenance={"source": {"origin": "a|b <i>"}, "method": {"name": "|"}},
    )  # fmt: skip
    for _ in range(2):  # marks among the names must not mislead the second writing
        s.save(tmp_path, "x")
        text = (tmp_path / "README.md").read_text()
        head, body = split_card(text)
        assert list(head["dataset_info"][0]["features"][1]["dtype"]["class_label"]["names"].values()) == list(names)
        assert (body.count(BEGIN), body.count(END)) == (1, 1)
        assert "<script>" not in body
        assert "<i>" not in body
        assert load_dataset(str(tmp_path), split="train").features["label"].names == list(names)
        row = next(line for line in body.splitlines() if line.startswith("| `x`"))
        assert row.count("|") == 9
    assert html.unescape(md("| <script>")) == "| <script>"
    assert html.unescape(md("[l](http://e.x) _a_ b_c @you #1")) == "[l](http://e.x) _a_ b_c @you #1"
    assert md("zebra") == "zebra"
    assert md("aquarium_fish") == "aquarium_fish"


def test_text_of_others_survives_any_card() -> None:
    for old in (
        "",
        "no head at all",
        "---\nbroken: [\n---\ntext",
        "---\n- a list\n---\ntext",
        f"---\na: 1\n---\n{END} {BEGIN}",
    ):
        card = merge_card(old, {"license": "mit"}, "body")
        again = merge_card(card, {"license": "mit"}, "other")
        assert ("text" in again) == ("text" in old)
        assert "body" not in again
        assert again.count("other") == 1
        assert split_card(again)[0]["license"] == "mit"
        assert merge_card(again, {"license": "mit"}, "other") == again


def test_no_path_of_this_machine_is_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "prior").mkdir(parents=True)
    record = {
        "source": {"origin": "/home/jane/my data/cifar", "classes": ["/a/b", "c/d/e"]},
        "codec": {"path": "runs/prior"},  # here, so no Hub id
        "generate": {"model": "facebook/DiT-XL-2-256", "prompt": "a/b/c {name}", "class_map": {"x": "/y/z"}},
        "other": ["~/x/y", r"C:\Users\jane\z", "../up/w", "see /home/jane/run/eval.csv, line 3", "https://a.b/c/d"],
        "cache": {"path": "runs/demo/cache"},
        "number": 3,
    }
    assert public(record) == {
        "source": {"origin": "cifar", "classes": ["/a/b", "c/d/e"]},
        "codec": {"path": "prior"},
        "generate": {"model": "facebook/DiT-XL-2-256", "prompt": "a/b/c {name}", "class_map": {"x": "/y/z"}},
        "other": ["y", "z", "w", "see eval.csv, line 3", "https://a.b/c/d"],
        "cache": {"path": "cache"},
        "number": 3,
    }


def test_an_evaluation_belongs_to_what_was_evaluated(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (written,) = describe_evaluation(run)
    assert written == run / "dataset" / "ipc2-ddoq" / "evaluation.json"
    metadata = read_json(written)
    assert [r["set"] for r in metadata["rows"]] == ["ddoq", "random", "full"]
    assert metadata["rows"][0]["seed_list"] == [0, 1]
    assert str(tmp_path) not in written.read_text()
    card = run / "dataset" / "README.md"
    assert "60.0 ± 14.1" in card.read_text()
    # a set that is made again is not what was evaluated
    s = make(soft=True)
    dataclasses.replace(s, counts=s.counts + 1, provenance={}).save(run / "dataset", "ipc2-ddoq")
    assert "60.0" not in card.read_text()
    # what others wrote in its place breaks no card
    content = read_json(written.parent / "provenance.json")["content"]
    for rows in (None, [1], [{"set": "x"}], [{**metadata["rows"][0], "last_mean": "<b>"}]):
        write_json(written, {"content": content, "rows": rows})
        record = read_json(written.parent / "provenance.json")
        assert "Not measured" in dataset_card([record], {"ipc2-ddoq": read_json(written)})


def test_the_log_shows_no_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(shown := Redaction("my-own-token"))
    try:
        logging.getLogger("dq").warning("sent %s and %s", "my-own-token", "hf_abcdefghijklmnop")
    finally:
        caplog.handler.removeFilter(shown)
    assert caplog.messages == ["sent *** and ***"]


def test_a_data_set_of_the_hub_is_read_as_a_stream(home: Path) -> None:
    code = (
        HEAD
        + """
import os
import numpy as np
from pathlib import Path
from dq.data.images import read_images
from dq.data.load import load_source
from dq.distilled.hub import push_folder
make().save("scratch", "default")
push_folder("scratch", "me/stream")
usual = load_source("scratch/default")
source = load_source("me/stream", streaming=True)
assert source.sequential and source.class_names == ("zebra", "ant", "bee")
assert np.array_equal(source.train.labels, usual.train.labels)
rows = list(range(len(usual.train)))
assert (read_images(source.train, rows, 5, "crop")[0] == read_images(usual.train, rows, 5, "crop")[0]).all()
again = load_source("me/stream", streaming=True)
assert again.fingerprint == source.fingerprint != usual.fingerprint
home = Path(os.environ["HF_HOME"])
copied = [*home.glob("hub/**/*.parquet"), *home.glob("datasets/me___stream/**/*.arrow")]
assert not copied, copied
print("done")
"""
    )
    (home / "stream").mkdir()
    with running() as other:  # whose clients have fetched nothing yet
        assert other.run(code, home / "stream") == "done\n"
        assert other.unexpected == []


def test_flags_that_a_push_does_not_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from dq.cli.main import main

    for flag in (["--dry-run"], ["--report_to", "tensorboard"]):
        with pytest.raises(SystemExit) as stopped:
            main(["push", str(tmp_path), "--repo_id", "me/x", *flag])
        assert stopped.value.code == 2
        assert f"{flag[0]} is not read" in capsys.readouterr().err


def test_a_push_refuses_a_record_that_no_pull_would_take(tmp_path: Path) -> None:
    from dq.core.errors import InputError
    from dq.distilled.hub import push_folder

    dataclasses.replace(make(), provenance={"cluster": "mine"}).save(tmp_path / "odd", "default")
    with pytest.raises(InputError, match=r"the record default/provenance.json of .*odd is damaged or not of dq"):
        push_folder(tmp_path / "odd", "me/odd", token="hf_x")


def test_a_push_keeps_a_head_that_it_cannot_read(hub: Hub, home: Path) -> None:
    (home / "unread").mkdir()
    hub.put("me/unread", {"README.md": b"---\nlicense: [\n---\nmine\n"})
    code = """
from dq.core.errors import InputError
from dq.distilled.hub import push_folder
from sets import make
make().save("scratch", "default")
try:
    push_folder("scratch", "me/unread")
except InputError as e:
    print(e)
"""
    assert "the head of README.md of me/unread cannot be read" in hub.run(code, home / "unread")
    assert hub.files("me/unread") == {"README.md": b"---\nlicense: [\n---\nmine\n"}
