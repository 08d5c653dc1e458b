"""The launch configurations: what each starts, and that a run divided by them leaves the bytes of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import free_port, torchrun
from runs import config, results

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
ACCELERATE = Path(sys.executable).with_name("accelerate")
LOOK = """
import sys
from pathlib import Path

from dq.core.processes import check_launch, hardware_line, make_accelerator

a = make_accelerator(cpu=True)
lines = f"{hardware_line(a)}\\nnote: {check_launch(a)}"
Path(sys.argv[1], f"process-{a.process_index}").write_text(lines)  # a file each: a pipe mixes lines
"""

pytestmark = pytest.mark.slow


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def small(world: Path, out: Path) -> Path:
    # the dtypes of this process, which takes float32 for `auto` whatever the CPU has
    return config(world, out, ipc=[1], evaluate__students=[], generate__dtype="float32")


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run of one process."""
    from dq.cli.main import main

    out = tmp_path_factory.mktemp("alone")
    assert main(["run", "--config", str(small(world, out)), "--cpu"]) == 0
    return results(out)


def launch(file: str, *flags: str) -> list[str]:
    return [str(ACCELERATE), "launch", "--config_file", str(CONFIGS / file), *flags]


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each wrote to standard error, after all of them have ended well."""
    output = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), output
    return output


def start(command: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment(**env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("file", "machines", "processes"),
    [("cpu.yaml", 1, 2), ("gpu1.yaml", 1, 1), ("gpu8.yaml", 1, 8), ("nodes2x8.yaml", 2, 16)],
)
def test_accelerate_reads_every_file(file: str, machines: int, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    result = load_config_from_file(str(CONFIGS / file))
    assert (result.num_machines, result.num_processes) == (machines, processes)
    assert result.mixed_precision == "no"
    assert not result.use_cpu
    assert {f.name for f in CONFIGS.glob("*.yaml")} == {"cpu.yaml", "gpu1.yaml", "gpu8.yaml", "nodes2x8.yaml"}


@pytest.mark.long
def test_the_file_of_one_gpu_starts_one_process(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    finish([start([*launch("gpu1.yaml"), str(tmp_path / "look.py"), str(tmp_path)])])
    assert [path.name for path in tmp_path.glob("process-*")] == ["process-0"]
    assert (tmp_path / "process-0").read_text().startswith("1 process on cpu, ")


@pytest.mark.multi_process
def test_two_processes_leave_the_bytes_of_one(world: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    command = [*launch("cpu.yaml", "--main_process_port", free_port()), "-m", "dq.cli", "run"]
    finish([start([*command, "--config", str(small(world, tmp_path)), "--cpu"])])
    assert results(tmp_path) == alone
    assert '"processes": 2' in (tmp_path / "run" / "provenance.json").read_text()


def encodes(tmp_path: Path, alone: dict[str, bytes]) -> None:
    """Two processes have written the latents of one; how later stages are divided does not depend on the launcher."""
    latents = {k: v for k, v in alone.items() if k.startswith("cache/latents-")}
    assert latents
    assert results(tmp_path) == latents
    assert '"processes": 2' in (tmp_path / "run" / "provenance.json").read_text()


@pytest.mark.long
@pytest.mark.multi_process
def test_two_machines_of_accelerate(world: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    file = str(small(world, tmp_path))
    flags = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    program = ["-m", "dq.cli", "encode", "--config", file, "--cpu"]
    nodes = [launch("nodes2x8.yaml", *flags, "--machine_rank", str(rank)) for rank in (0, 1)]
    finish([start([*node, *program]) for node in nodes])
    encodes(tmp_path, alone)


@pytest.mark.long
@pytest.mark.multi_process
def test_two_machines_of_torchrun(world: Path, tmp_path: Path, alone: dict[str, bytes]) -> None:
    file = str(small(world, tmp_path))
    base = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    base += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    program = ["-m", "dq.cli", "encode", "--config", file, "--cpu"]
    finish([start([*base, "--node_rank", str(rank), *program]) for rank in (0, 1)])
    encodes(tmp_path, alone)


NOTE = "note: accelerate launch was asked for 2 processes but started 1"


def test_a_launch_that_starts_one_process_for_two_says_so(world: Path, tmp_path: Path) -> None:
    """What a user types, and what the note tells to type instead."""
    command = [str(ACCELERATE), "launch", "--num_processes", "2", "-m", "dq.cli", "encode"]
    (output,) = finish([start([*command, "--config", str(small(world, tmp_path))], HF_HOME=str(tmp_path))])
    ours = lines_on_processes(output)
    assert ours[0] == "1 process on cpu, 1 thread"
    assert ours[1].startswith(NOTE)
    assert "`accelerate launch --multi_gpu --num_processes 2 -m dq.cli ...`" in ours[1]
    assert "`torchrun --nproc_per_node 2 -m dq.cli ...`" in ours[1]
    assert '"processes": 1' in (tmp_path / "run" / "provenance.json").read_text()


@pytest.mark.long
def test_a_launch_on_the_cpu_starts_one_process_as_well(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    flags = ["--num_processes", "2", "--cpu"]
    finish([start([str(ACCELERATE), "launch", *flags, str(tmp_path / "look.py"), str(tmp_path)])])
    first, note = (tmp_path / "process-0").read_text().splitlines()
    assert first == "1 process on cpu, 1 thread"
    assert note.startswith(NOTE)


@pytest.mark.long
@pytest.mark.multi_process
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_what_the_note_tells_to_type_starts_two(launcher: str, world: Path, tmp_path: Path) -> None:
    flags = ["launch", "--multi_gpu", "--main_process_port", "0", "--num_processes", "2", "-m"]
    program = [*torchrun(2), "-m"] if launcher == "torchrun" else [str(ACCELERATE), *flags]
    command = [*program, "dq.cli", "encode", "--config", str(small(world, tmp_path))]
    (output,) = finish([start(command, HF_HOME=str(tmp_path))])
    assert lines_on_processes(output) == ["2 processes on cpu, 1 thread each"]
    assert '"processes": 2' in (tmp_path / "run" / "provenance.json").read_text()


@pytest.mark.long
@pytest.mark.multi_process
def test_a_dry_run_of_two_processes_prints_one_plan(world: Path, tmp_path: Path) -> None:
    program = [*torchrun(2), "-m", "dq.cli", "run", "--config", str(small(world, tmp_path)), "--cpu", "--dry-run"]
    done = subprocess.run(
        program, env=environment(HF_HOME=str(tmp_path)), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 processes" in done.stdout
    assert done.stdout.count("writes to") == 1
    assert not (tmp_path / "run").exists()


def lines_on_processes(output: str) -> list[str]:
    return [line for line in output.splitlines() if "process" in line and (" on cpu, " in line or "note:" in line)]


# --- SLURM --------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
# two nodes on one machine: every task gets the command and its own rank
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ "$1" == show ]]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> "$ASKED"; fi
"""


def slurm(tmp_path: Path, srun: str = SRUN) -> dict[str, str]:
    """An environment in which `srun` and `scontrol` stand for a cluster of two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "ASKED": str(tmp_path / "asked"),
        "ACCELERATE": str(ACCELERATE),
        "GPUS_PER_NODE": "1",
        "SLURM_JOB_ID": "9655",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }


def test_the_batch_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(CONFIGS / "slurm_2x8.sh")], check=True, timeout=30)


@pytest.mark.multi_process
def test_the_batch_script_starts_one_run_on_two_nodes(world: Path, tmp_path: Path, alone) -> None:
    command = ["bash", str(CONFIGS / "slurm_2x8.sh"), "encode", "--config", str(small(world, tmp_path)), "--cpu"]
    finish([start(command, **slurm(tmp_path))])
    encodes(tmp_path, alone)


def test_the_exit_status_of_a_run_that_fails_is_that_of_the_job(tmp_path: Path) -> None:
    p = start(["bash", str(CONFIGS / "slurm_2x8.sh"), "run"], **slurm(tmp_path, "#!/bin/bash\nexit 3\n"))
    p.communicate(timeout=60)
    assert p.returncode == 3


def test_the_batch_script_asks_to_be_queued_again(tmp_path: Path) -> None:
    env = slurm(tmp_path, "#!/bin/bash\ntouch $ASKED.started; sleep 2; exit 143\n")
    p = start(["bash", str(CONFIGS / "slurm_2x8.sh"), "run"], **env)
    for _ in range(100):
        if (tmp_path / "asked.started").exists():
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGUSR1)
    output, _ = p.communicate(timeout=60)
    assert (tmp_path / "asked").read_text() == "requeue 9655\n"
    assert "back into the queue" in output
    assert p.returncode == 143
