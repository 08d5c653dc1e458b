from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dq.core import devices, processes
from dq.core.devices import available_cores, cores_per_process, reader_threads, set_threads, tf32_products
from dq.core.errors import RunError
from dq.core.processes import check_launch, hardware_line, make_accelerator, shared_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """No launcher and no user has said how many threads there are; torch's own number is put back afterwards."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def cores(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(devices, "available_cores", lambda: number)


# --- cores and threads --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities")
def test_cores_follow_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000", "job/cpu.max": "600000 100000", "job/step/cpu.max": "200000 100000"}, 2),
        ({"cpu/job/step/cpu.cfs_quota_us": "400000", "cpu/job/step/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_cores_follow_the_quotas_of_control_groups(files, expected: int, tmp_path: Path, monkeypatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    real = devices.read_text
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "read_text", lambda p: "0::/job/step\n" if p == "/proc/self/cgroup" else real(p))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert available_cores() == expected


def test_processes_of_a_machine_share_its_cores(threads: pytest.MonkeyPatch) -> None:
    cores(threads, 16)
    shares = []
    for number in ("1", "4", "8", "32", "what"):
        threads.setenv("LOCAL_WORLD_SIZE", number)
        shares.append(cores_per_process())
    assert shares == [16, 4, 2, 1, 16]


def test_threads_are_bounded_by_the_share_of_the_cores(threads: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(8)
    cores(threads, 8)
    threads.setenv("LOCAL_WORLD_SIZE", "2")
    assert set_threads() == torch.get_num_threads() == 4
    torch.set_num_threads(1)  # by the user's program
    assert set_threads() == 1


def test_the_user_says_how_many_threads_there_are(threads: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    cores(threads, 2)
    threads.setenv("OMP_NUM_THREADS", "3")
    assert set_threads() == 3


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"])
@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ([], ["torchrun", "--nproc_per_node", "2"], 4),
        (["OMP_NUM_THREADS=1"], ["torchrun", "--nproc_per_node", "2"], 1),
        ([], ["accelerate", "launch", "--num-cpu-threads-per-process=1"], 1),
    ],
)
def test_the_one_thread_of_a_launcher_is_replaced(
    launcher: str, environment: list[str], arguments: list[str], expected: int, threads: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    cores(threads, 8)
    threads.setenv("LOCAL_WORLD_SIZE", "2")
    threads.setenv("OMP_NUM_THREADS", "1")
    threads.setenv(launcher, "none")
    threads.setattr(devices, "launcher_environment", lambda: environment)
    threads.setattr(devices, "launcher_arguments", lambda: arguments)
    assert set_threads() == expected


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
@pytest.mark.slow
@pytest.mark.parametrize(("own", "expected"), [({}, str(available_cores())), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_accelerate_launch_leaves_all_cores_to_one_process(own: dict[str, str], expected: str, tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text("from dq.core.devices import set_threads\nprint(set_threads())")
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION")}
    env |= {"PYTHONPATH": str(ROOT), **own}
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == [expected], done.stderr


def test_images_are_read_by_all_cores_unless_a_network_needs_them(threads: pytest.MonkeyPatch) -> None:
    cores(threads, 16)
    assert reader_threads() == reader_threads("cuda") == 16
    assert reader_threads("cpu") == 4
    cores(threads, 2)
    assert reader_threads("cpu") == 1


# --- waiting threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "own", "expected"),
    [
        ("", {}, "passive passive"),
        ("", {"OMP_WAIT_POLICY": "active"}, "active active"),
        ("import torch; ", {}, "None None"),
    ],
)
def test_waiting_threads_do_not_spin(before: str, own: dict[str, str], expected: str) -> None:
    """torch reads the policy when it is imported; what it was then, and what children inherit."""
    code = f"""
import os, sys
from importlib.machinery import ModuleSpec
class Look:  # an empty module in the place of torch, whose import takes seconds
    policy = None
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            Look.policy = os.environ.get("OMP_WAIT_POLICY")
            return ModuleSpec(name, self)
    def create_module(self, spec): pass
    def exec_module(self, module): pass
sys.meta_path.insert(0, Look())
{before}import dq, torch
print(Look.policy, os.environ.get("OMP_WAIT_POLICY"))
"""
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"PYTHONPATH": str(ROOT), **own}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == expected, done.stderr


def test_every_target_of_the_makefile_that_tests_lets_threads_sleep() -> None:
    assert "export OMP_WAIT_POLICY := passive" in (ROOT / "Makefile").read_text().splitlines()


# --- processes and devices ----------------------------------------------------------------------------------------


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"2 processes .* 1 GPU.*at most 1, or give --share_gpus"):
        make_accelerator()


def test_gpus_are_dealt_out_in_turn() -> None:
    assert [str(shared_gpu(rank, 2)) for rank in range(5)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert str(shared_gpu(3, 1)) == "cuda:0"


def accelerator_flags(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A function that makes an accelerator and tells whether it was told to use the CPU."""
    import accelerate

    seen: list[bool] = []
    real = accelerate.Accelerator
    monkeypatch.setattr(accelerate, "Accelerator", lambda *, cpu, **k: seen.append(cpu) or real(cpu=True, **k))

    def make() -> bool:
        make_accelerator()
        return seen[-1]

    return make


def test_only_cuda_is_taken_as_accelerator_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    make = accelerator_flags(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # as with Apple's mps
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make()
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    assert not make()


def test_the_first_line_says_what_the_run_uses(accelerator, toy_world_config, caplog) -> None:
    from dq.cli.main import main

    assert hardware_line(accelerator) == "1 process on cpu, 1 thread"
    assert main(["encode", "--config", str(toy_world_config), "--cpu"]) == 0
    assert caplog.messages[0] == "1 process on cpu, 1 thread"


@pytest.fixture
def toy_world_config(world: Path, tmp_path: Path) -> Path:
    from runs import config

    return config(world, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["python", "/bin/accelerate", "launch", "--num_processes", "2", "-m", "dq.cli", "run"], 2),
        (["python", "/bin/accelerate", "launch", "--cpu", "--num-processes=3", "-m", "dq.cli", "run"], 3),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "dq.cli", "run"], 2),
        (["accelerate-launch", "--config_file", "FILE", "-m", "dq.cli", "run"], 4),
        (["python", "/bin/accelerate", "launch", "-m", "dq.cli", "run", "--num_processes", "2"], 0),
        (["python", "/bin/accelerate", "launch", "--num_processes", "1", "-m", "dq.cli", "run"], 0),
        (["bash"], 0),
        ([], 0),
    ],
)
def test_a_launcher_that_asked_for_more_processes_is_told_what_to_pass(
    arguments: list[str], expected: int, accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    file = tmp_path / "four.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 4\nuse_cpu: true\n"
        "mixed_precision: 'no'\nnum_machines: 1\ndebug: false\n"
    )
    arguments = [a.replace("FILE", str(file)) for a in arguments]
    monkeypatch.setattr(processes, "launcher_arguments", lambda: arguments)
    note = check_launch(accelerator)
    assert (note is None) == (expected == 0)
    if note is not None:
        assert f"was asked for {expected} processes but started 1" in note
        assert f"`accelerate launch --multi_gpu --num_processes {expected} -m dq.cli ...`" in note
        assert f"`torchrun --nproc_per_node {expected} -m dq.cli ...`" in note


# --- float32 products ---------------------------------------------------------------------------------------------


def test_tf32_holds_inside_of_its_block_only() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with tf32_products():
        assert matmul.allow_tf32
        with tf32_products():
            pass
        assert matmul.allow_tf32
    assert matmul.allow_tf32 == before
    with pytest.raises(ValueError, match="inside"), tf32_products():
        raise ValueError("inside")
    assert matmul.allow_tf32 == before
