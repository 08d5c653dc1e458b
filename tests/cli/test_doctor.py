"""`dq doctor` and `dq completion`: each thing that may be wrong is made wrong, and told from one in order."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from fork_server import ForkServer
from launching import torchrun

from dq.cli.completion import completion_script, setting_names
from dq.cli.doctor import MIN_FREE, examine
from dq.cli.main import main
from dq.cli.parser import build_parser
from dq.config.overrides import apply_settings
from dq.config.reader import to_dict
from dq.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
SITE = next(p for p in sys.path if (Path(p) / "torch").is_dir())

pytestmark = pytest.mark.slow


Ask = Callable[..., tuple[int, dict]]
CODE = """
import os, sys
cores, folders = sys.argv.pop(1), sys.argv.pop(1)
os.sched_setaffinity(0, [int(c) for c in cores.split(",")])
sys.path[:0] = folders.split(":") if folders else []
from dq.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def run_doctor() -> Iterator[Ask]:
    """Gives exit code and report of the command in a process of its own, whose environment no library has read."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLURM", "WORLD", "RANK"))}
    clean["PYTHONPATH"] = str(ROOT)
    server = ForkServer(clean, "torch", "dq.cli.main", "dq.cli.doctor")

    def ask(tmp_path: Path, *flags: str, cores: Iterable[int] = (), folder: Path | str = "", **env: str):
        arguments = ["doctor", "--json", "--cpu"]
        usual = {"--output_dir": str(tmp_path / "run"), "--cache_dir": str(tmp_path / "cache")}
        arguments += [x for name, value in usual.items() if name not in flags for x in (name, value)] + [*flags]
        usable = ",".join(str(c) for c in cores or os.sched_getaffinity(0))
        done = server.run(CODE, usable, str(folder), *arguments, cwd=tmp_path, environment={**clean, **env})
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    yield ask
    server.close()


def test_a_machine_in_order(run_doctor: Ask, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, report = run_doctor(tmp_path)
    assert (code, report["problems"]) == (0, [])
    facts = report["facts"]
    assert facts["packages"]["torch"].startswith(torch.__version__)
    assert facts["packages"]["accelerate"] == importlib.metadata.version("accelerate")
    assert facts["a run will use"]["engine"].startswith("torch ")
    assert facts["a run will use"]["device"] == "cpu"
    assert facts["launch"]["processes"] == "1"
    assert f"of {os.cpu_count()} cores" in facts["devices"]["cpu"]
    assert not (tmp_path / "run").exists()
    # and as text, where every value begins in one column of its section
    assert main(["doctor", "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]) == 0
    output = capsys.readouterr().out
    assert output.rstrip().endswith("no problems found")
    rows = output.split("\n\n")[0].splitlines()[1:]
    assert len({len(r) - len(r[2:].split("  ", 1)[1].lstrip()) for r in rows}) == 1


def test_fewer_cores_are_seen(run_doctor: Ask, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot become fewer")
    cores = sorted(os.sched_getaffinity(0))
    assert run_doctor(tmp_path, cores=cores[:1])[1]["facts"]["devices"]["cpu"].startswith("1 of ")
    assert run_doctor(tmp_path)[1]["facts"]["devices"]["cpu"].startswith(f"{len(cores)} of ")


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many is not a number"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
    ],
)
def test_a_launch_that_is_none(run_doctor: Ask, tmp_path: Path, env: dict[str, str], problem: str) -> None:
    code, report = run_doctor(tmp_path, **env)
    assert code == 1
    assert len(report["problems"]) == 1
    assert problem in report["problems"][0]


@pytest.mark.multi_process
def test_a_true_launch_has_no_problem(tmp_path: Path) -> None:
    command = torchrun()
    command += ["-m", "dq.cli", "doctor", "--json", "--cpu", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one process speaks
    assert report["facts"]["launch"]["processes"] == "2"


def test_folders_that_cannot_be_written(run_doctor: Ask, tmp_path: Path) -> None:
    code, report = run_doctor(tmp_path, "--output_dir", "/proc/dq/run")
    assert code == 1
    assert report["problems"][0].startswith("output_dir /proc/dq/run cannot be written")
    (tmp_path / "file").write_text("")
    code, report = run_doctor(tmp_path, "--cache_dir", str(tmp_path / "file" / "cache"))
    assert code == 1
    assert "is no folder" in " ".join(report["problems"])


def test_little_disk_is_a_problem(tmp_path: Path) -> None:
    config = apply_settings(RunConfig(), {"output_dir": str(tmp_path / "a"), "cache_dir": str(tmp_path / "b")})
    assert examine(config).problems == []
    problems = examine(config, min_free=1 << 60).problems
    assert len(problems) == 2
    assert all("free some, or choose another" in p for p in problems)
    assert MIN_FREE == 2**30


def test_the_token_is_told_of_and_never_told(run_doctor: Ask, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "hf")}
    assert run_doctor(tmp_path, **home)[1]["facts"]["hub"]["token"] == "no"
    code, report = run_doctor(tmp_path, HF_TOKEN="hf_thisisnotatoken", HF_ENDPOINT="http://localhost:1", **home)
    assert code == 0
    assert report["facts"]["hub"]["token"] == "yes, from HF_TOKEN"
    assert "notatoken" not in json.dumps(report)
    assert report["facts"]["hub"]["endpoint"] == "http://localhost:1"
    assert report["facts"]["hub"]["cache"].startswith(str(tmp_path / "hf"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_thisisnotatoken")
    report = run_doctor(tmp_path, **home)[1]
    assert report["facts"]["hub"]["token"] == f"yes, from {tmp_path / 'hf' / 'token'}"
    assert "notatoken" not in json.dumps(report)


def packages_without(tmp_path: Path, *names: str) -> Path:
    """A folder of links to all installed packages but some."""
    folder = tmp_path / "site"
    folder.mkdir()
    left_out = tuple(n.lower().replace("-", "_") for n in names)
    for entry in Path(SITE).iterdir():
        if not entry.name.lower().replace("-", "_").startswith(left_out) and not entry.name.endswith(".pth"):
            (folder / entry.name).symlink_to(entry)
    return folder


def without_site(folder: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-m", "dq.cli", "doctor", "--cpu"]
    command += ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_missing_packages_are_named(tmp_path: Path) -> None:
    absent = (
        "diffusers",
        "transformers",
        "accelerate",
        "datasets",
        "huggingface_hub",
        "faiss",
        "sklearn",
        "scikit_learn",
    )
    done = without_site(packages_without(tmp_path, *absent), tmp_path)
    assert done.returncode == 1, done.stderr
    for name in ("diffusers", "accelerate", "datasets", "huggingface_hub", "scikit-learn"):
        assert f"- {name} is not installed; pip install {name}" in done.stdout
    assert "faiss            not installed; the engine torch needs none" in done.stdout
    assert "transformers is not installed" not in done.stdout  # few need it


def fake(folder: Path, name: str, code: str, version: str = "1.0") -> None:
    """An installed package of this name."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_torchvision_of_another_torch(run_doctor: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "fake"
    fake(folder, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    done = without_site(packages_without(tmp_path, "torchvision"), tmp_path)
    assert done.returncode == 0, done.stdout
    code, report = run_doctor(tmp_path, folder=folder)
    assert code == 1
    assert report["facts"]["packages"]["torchvision"] == "1.0: broken"
    assert "does not import beside torch" in report["problems"][0]
    assert "nms does not exist" in report["problems"][0]


def test_two_wheels_of_faiss(run_doctor: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "fake"
    info = folder / "faiss_gpu-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.0\n")
    code, report = run_doctor(tmp_path, folder=folder)
    assert code == 1
    assert "faiss-cpu and faiss-gpu are both installed" in report["problems"][0]


def test_paths_of_a_configuration(run_doctor: Ask, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "vae").mkdir()
    data = {
        "source": {"path": str(tmp_path / "images")},
        "codec": {"path": str(tmp_path / "vae")},
        "generate": {"model": "some/model"},
        "teachers": [{"net": "resnet20", "path": str(tmp_path / "teacher")}],
        "methods": {
            "a": {"refine": [{"stage": "fadrm", "anchors": "file", "anchor_path": str(tmp_path / "anchors")}]}
        },
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(data))
    code, report = run_doctor(tmp_path, "--config", str(file))
    assert code == 1
    message = " ".join(report["problems"])
    assert len(report["problems"]) == 2
    assert f"teachers.0.path={tmp_path / 'teacher'} does not exist" in message
    assert f"methods.a.refine.0.anchor_path={tmp_path / 'anchors'} does not exist" in message
    assert report["facts"]["paths"]["generate.model"] == "some/model, taken for a Hub id"
    (tmp_path / "teacher").mkdir()
    (tmp_path / "anchors").mkdir()
    assert run_doctor(tmp_path, "--config", str(file))[0] == 0
    # without the Hub an id must be a folder or in its cache
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    code, report = run_doctor(tmp_path, "--config", str(file), **home)
    assert code == 1
    assert "generate.model=some/model is not a local folder, and the Hub is switched off" in report["problems"][0]
    (tmp_path / "hf" / "hub" / "models--some--model").mkdir(parents=True)
    assert run_doctor(tmp_path, "--config", str(file), **home)[0] == 0


def test_the_demo_makes_what_it_names(run_doctor: Ask, tmp_path: Path) -> None:
    assert run_doctor(tmp_path, "--config", "demo")[0] == 0


def test_what_a_configuration_asks_of_this_machine(run_doctor: Ask, tmp_path: Path) -> None:
    code, report = run_doctor(tmp_path, "--set", "generate.dtype=float16", "report_to=[wandb]")
    assert code == 1
    assert report["problems"][0].startswith("generate.dtype=float16 is much slower than float32 on this CPU")
    assert report["problems"][1] == "report_to names wandb, which is not installed; pip install wandb"
    assert main(["doctor", "--config", str(tmp_path / "none.yaml")]) == 2


# --- completion ---------------------------------------------------------------------------------------------------


def completed(tmp_path: Path, line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    script = tmp_path / "dq.bash"
    if not script.is_file():
        script.write_text(completion_script(build_parser(), "bash"))
    words = line.split(" ")
    quoted = " ".join(f"'{w}'" for w in words)
    code = (
        f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        "f=$(complete -p dq | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        f"$f dq '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    return done.stdout.split()


def test_bash_completes_verbs_options_and_choices(tmp_path: Path) -> None:
    assert set(completed(tmp_path, "dq ge")) == {"generate"}
    assert {"run", "encode", "doctor", "completion"} <= set(completed(tmp_path, "dq "))
    assert set(completed(tmp_path, "dq completion ")) >= {"bash", "zsh", "tcsh"}
    assert set(completed(tmp_path, "dq run --output")) == {"--output_dir", "--output-dir"}
    assert set(completed(tmp_path, "dq evaluate --protocol s")) == {"sre2l"}
    assert set(completed(tmp_path, "dq run --report_to t")) == {"trackio", "tensorboard"}


def test_bash_completes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "minefield").mkdir()
    assert {"mine.yaml"} <= set(completed(tmp_path, "dq run --config mi"))
    assert completed(tmp_path, "dq run --output_dir mi") == ["minefield"]


def test_bash_completes_settings(tmp_path: Path) -> None:
    assert set(completed(tmp_path, "dq run --set generate.gui")) == {
        "generate.guidance_scale=",
        "generate.guidance_interval=",
    }
    assert completed(tmp_path, "dq run --set cluster.engine=torch codec.res") == ["codec.resolution="]


def test_every_setting_has_a_name() -> None:
    names = setting_names()
    assert {"seed", "ipc", "cluster.engine", "prior.codec.lr", "report_to", "methods"} <= set(names)
    assert len(names) == len(set(names))
    values = to_dict(RunConfig())
    for name in names:  # each can be reached
        node = values
        for part in name.split("."):
            if node is None:  # an optional section
                break
            node = node[part]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_command_prints_a_script(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["completion", shell]) == 0
    output = capsys.readouterr().out
    assert "train-denoiser" in output
    assert "AUTOMATICALLY GENERATED" in output
