"""Two processes on one CUDA device that is not there: they meet, and divide trainings with the results of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda.build import missing
from launching import torchrun

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
WORKER = """
import sys
from pathlib import Path

from fake_cuda.install import install

install()
import torch

from dq.config.students import StudentConfig
from dq.core.errors import RunError
from dq.core.processes import assign_units, hardware_line, make_accelerator
from dq.core.seeds import digest_of_tensors
from dq.networks.training import TrainingSet, fit, normalizer

torch.set_num_threads(1)
try:
    make_accelerator()
    refused = "nothing"
except RunError as e:
    refused = str(e)
a = make_accelerator(share_gpus=True)
images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
data = TrainingSet(images.to(a.device), (torch.arange(8) % 2).to(a.device), 2, normalizer([0.5] * 3, [0.25] * 3))
config = StudentConfig(net="convnet2w4", epochs=1, batch_size=4, augment="dsa", tests=1, dtype="float32")
out = Path(sys.argv[1])
for i in assign_units([1.0] * 3, a.process_index, a.num_processes):
    state = fit(data, config, seed=i).net.state_dict()
    (out / f"student-{i}").write_text(digest_of_tensors(dict(state)))
a.wait_for_everyone()
everything = len(list(out.glob("student-*")))
(out / f"process-{a.process_index}").write_text(f"{hardware_line(a)}; {a.device}; {everything}; {refused}")
"""


def run(command: list[str], out: Path) -> dict[str, str]:
    out.mkdir()
    script = out.with_suffix(".py")
    script.write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script), str(out)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.name: p.read_text() for p in out.iterdir()}


@pytest.mark.slow
def test_two_processes_share_a_gpu(tmp_path: Path) -> None:
    alone = run([sys.executable], tmp_path / "alone")
    both = run(torchrun(2), tmp_path / "both")
    students = [f"student-{i}" for i in range(3)]
    assert len({both[name] for name in students}) == 3
    assert [both[name] for name in students] == [alone[name] for name in students]
    assert alone["process-0"] == "1 process on Fake CUDA (cuda), 1 thread; cuda; 3; nothing"
    for rank in range(2):
        line = both[f"process-{rank}"]
        assert line.startswith(
            "2 processes on Fake CUDA (cuda), 1 thread each; cuda:0; 3; 2 processes on this machine"
        )
