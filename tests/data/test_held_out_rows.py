"""pipelines/hold_out.py: settings are chosen on rows of train, which the copy's train split does not have."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = Path(__file__).parents[2] / "pipelines" / "hold_out.py"


def hold_out(tmp_path, images):
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    for split, first in (("train", 0), ("test", 1000)):
        rows = {"image": [str(first + i).encode() for i in range(60)], "label": [i % 3 for i in range(60)]}
        pq.write_table(pa.table(rows), data / f"{split}-0.parquet")
    command = [sys.executable, SCRIPT, data, tmp_path / "out", "--images", str(images)]
    return subprocess.run(command, capture_output=True, text=True)


def test_rows_of_train_are_divided_by_class_and_test_is_not_read(tmp_path):
    assert hold_out(tmp_path, 12).returncode == 0
    train, test = (pq.read_table(next((tmp_path / "out").glob(f"{s}-*"))) for s in ("train", "test"))
    images = train["image"].to_pylist(), test["image"].to_pylist()
    assert set(images[0]) | set(images[1]) == {str(i).encode() for i in range(60)}
    assert not set(images[0]) & set(images[1])
    assert np.bincount(test["label"].to_numpy()).tolist() == [4, 4, 4]


def test_more_than_a_class_has_is_refused(tmp_path):
    p = hold_out(tmp_path, 60)
    assert p.returncode == 1
    assert "cannot be held out" in p.stderr
