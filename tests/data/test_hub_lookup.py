"""Names of data sets that are no folder: mistyped ones, and those of the Hub, over HTTP."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from hub_server import Hub, running
from PIL import Image

from dq.core.files import suggest_folder

LOAD = """
import json, os, sys, time
from dq.core.errors import InputError
from dq.data.load import load_source
for name, streaming in json.loads(sys.argv[1]):
    began = time.perf_counter()
    try:
        message = str(load_source(name, streaming=streaming))
    except InputError as e:
        message = f"refused: {e}"
    print(json.dumps([time.perf_counter() - began, message]))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running("dq.data.load", "datasets") as server:
        yield server


@pytest.fixture(scope="module")
def unreachable() -> Iterator[Hub]:
    """Nothing listens at the endpoint."""
    server = Hub(("dq.data.load", "datasets"))
    server.server_close()
    yield server
    server.close()


def load(server: Hub, folder: Path, *names: str, streaming: bool = False) -> list[str]:
    """What opening each name ends in; each within seconds."""
    (folder / "photos").mkdir(exist_ok=True)
    lines = server.run(LOAD, folder, json.dumps([(name, streaming) for name in names])).splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == len(names)
    assert all(seconds < 10 for seconds, _ in results)
    return [message for _, message in results]


@pytest.mark.parametrize("streaming", [False, True])
def test_without_the_hub_a_mistyped_folder_is_refused_at_once(
    unreachable: Hub, tmp_path: Path, streaming: bool
) -> None:
    alone, below, other = load(unreachable, tmp_path, "phtos", "photo/train", "zzz", streaming=streaming)
    assert "there is no folder phtos (did you mean photos?), and the Hub is not reached (" in alone
    assert "as OWNER/NAME" in alone
    assert "photo/train cannot be opened as a Hub data set (" in below
    assert "no such local folder (did you mean photos?)" in below
    assert "there is no folder zzz, and the Hub is not reached (" in other


def test_a_name_that_the_hub_lacks_is_refused_with_both_readings(hub: Hub, tmp_path: Path) -> None:
    alone, owned, strange = load(hub, tmp_path, "phtos", "me/phtos", "pho tos")
    assert "there is no folder phtos (did you mean photos?), and the Hub has no data set of that name" in alone
    assert "as OWNER/NAME" in alone
    assert "me/phtos cannot be opened as a Hub data set (" in owned
    assert "did you mean photos?), and the Hub has no data set of that name (it cannot name one)" in strange


def test_a_data_set_of_the_hub_is_opened_and_then_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    cells = []
    for value in range(4):
        data = io.BytesIO()
        Image.new("RGB", (4, 4), (value, 0, 0)).save(data, "png")
        cells.append({"bytes": data.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    hub.put("me/images", {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()})
    (message,) = load(hub, tmp_path, "me/images")
    assert "images 4 of train" in message
    offline = {**hub.environment(hub.home, None), "HF_HUB_OFFLINE": "1"}
    done = hub.client.run(LOAD, json.dumps([("me/images", False)]), cwd=tmp_path, environment=offline)
    assert json.loads(done.stdout)[1] == message


def test_similar_folders_are_named_and_others_are_not(tmp_path: Path) -> None:
    for name in ("photos/train", "photos2", "music", ".photo"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "photo").write_text("a file")
    assert suggest_folder(tmp_path / "phots") == f" (did you mean {tmp_path}/photos or {tmp_path}/photos2?)"
    assert suggest_folder(tmp_path / "phots" / "train").startswith(f" (did you mean {tmp_path}/photos/train or ")
    assert suggest_folder(tmp_path / "photos" / "trian") == f" (did you mean {tmp_path}/photos/train?)"
    assert suggest_folder(tmp_path / "photo").startswith(f" (did you mean {tmp_path}/photos or ")
    for path in (tmp_path / "photos", tmp_path / "zzzz", tmp_path / "zzzz" / "photos"):
        assert suggest_folder(path) == ""
