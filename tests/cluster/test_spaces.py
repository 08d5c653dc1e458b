"""The space of quantization: what is compared, what is kept of it, and whose features they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_kl
from torch import Tensor

from dq.cluster.kmeans import kmeans, nearest
from dq.cluster.prototypes import make_prototypes
from dq.cluster.spaces import embed, principal_coordinates
from dq.config.reader import from_dict
from dq.config.schema import ClusterConfig, RunConfig
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_tensors, write_json, write_tensors
from dq.core.seeds import derive_seed
from dq.data.load import load_source
from dq.data.source import ImageSource
from dq.run.distill import DistillPipeline
from dq.run.folder import Run, open_run
from dq.run.stages.assemble import assemble, load_set_of_run
from dq.run.stages.cluster import cluster, cluster_settings, clusterings, load_prototypes, prototype_folder
from dq.run.stages.encode import cache_of, encode
from dq.run.stages.features import features_of
from dq.run.stages.generate import generate

SPACES = ("latents", "pca", "whitened", "features", "joint")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_class(n: int = 60) -> tuple[Tensor, Tensor]:
    """Latents (n, 2, 3, 3) of uneven variances, as the cache stores them, and features (n, 5)."""
    z = randn(n, 18) * torch.linspace(3, 0.5, 18) + 1
    return z.view(n, 2, 3, 3).half(), randn(n, 5, seed=1).abs()


def config(space: str, **settings: Any) -> ClusterConfig:
    return ClusterConfig(space=space, **{"dims": 4} | settings)  # type: ignore[arg-type]


def distances(x: Tensor) -> Tensor:
    return torch.pdist(x.double())


def partition(labels: Tensor) -> set[frozenset[int]]:
    return {frozenset((labels == c).nonzero()[:, 0].tolist()) for c in labels.unique()}


# --- one class ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(200, 6), (30, 50)])
def test_all_principal_directions_are_an_isometry(n: int, d: int) -> None:
    x = randn(n, d) + 5
    y = embed(x, None, config("pca", dims=min(n - 1, d)))
    torch.testing.assert_close(distances(y), distances(x), rtol=1e-5, atol=1e-5)
    a, b = kmeans(x, 5, start=x[:5]), kmeans(y, 5, start=y[:5])
    assert torch.equal(a.labels, b.labels)
    assert b.inertia == pytest.approx(a.inertia, rel=1e-5)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (20, 300)])
def test_principal_coordinates_are_those_of_the_svd(n: int, d: int) -> None:
    x = randn(n, d) * torch.linspace(2, 0.1, d) + 3
    y = principal_coordinates(x, 5)
    u, s, vh = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    sign = vh[:5].gather(1, vh[:5].abs().argmax(1, keepdim=True)).sign().T
    torch.testing.assert_close(y, (u * s)[:, :5].mul(sign).float(), rtol=1e-4, atol=1e-4)


def test_number_of_directions() -> None:
    assert principal_coordinates(randn(200, 100)).shape == (200, 64)
    assert principal_coordinates(randn(200, 100), 7).shape == (200, 7)
    assert principal_coordinates(randn(200, 3), 7).shape == (200, 3)
    assert principal_coordinates(randn(5, 100), 64).shape == (5, 4)
    line = randn(50, 1) @ randn(1, 9, seed=1)
    assert principal_coordinates(line.double()).shape == (50, 1)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("n", [1, 7])
def test_equal_images_have_one_coordinate_zero(n: int, whiten: bool) -> None:
    y = principal_coordinates(randn(1, 20).expand(n, 20), whiten=whiten)
    assert torch.equal(y, torch.zeros(n, 1))


def test_whitened_coordinates_have_unit_variance_and_no_correlation() -> None:
    z, _ = one_class(500)
    y = embed(z, None, config("whitened", dims=10)).double()
    torch.testing.assert_close(y.T @ y / 500, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-4)


def test_whitening_in_all_directions_is_warned_of() -> None:
    z, _ = one_class(9)
    with pytest.warns(UserWarning, match="whitening 9 images in 8 directions"):
        y = embed(z, None, config("whitened", dims=None))
    assert torch.pdist(y).std() < 1e-3 * torch.pdist(y).mean()


def test_parts_of_a_joint_space_have_unit_variance() -> None:
    z, f = one_class()
    y = embed(z, f, config("joint", feature_weight=4.0))
    assert y.shape == (60, 23)
    variance = y.var(0, correction=0)
    assert [float(variance[:18].sum()), float(variance[18:].sum())] == pytest.approx([1, 4], rel=1e-5)
    torch.testing.assert_close(embed(z * 2, f * 10 + 3, config("joint", feature_weight=4.0)), y, rtol=1e-3, atol=1e-5)


def test_a_joint_space_is_the_latents_at_weight_0_and_the_features_at_a_huge_one() -> None:
    z, f = one_class()
    own = partition(kmeans(embed(z, None, config("latents")), 4).labels)
    other = partition(kmeans(embed(z, f, config("features")), 4).labels)
    assert own != other
    assert partition(kmeans(embed(z, f, config("joint", feature_weight=0.0)), 4).labels) == own
    assert partition(kmeans(embed(z, f, config("joint", feature_weight=1e8)), 4).labels) == other


@pytest.mark.parametrize("space", SPACES)
def test_another_order_of_the_images_is_another_order_of_the_points(space: str) -> None:
    z, f = one_class()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    a, b = (embed(z, f, config(space))[order], embed(z[order], f[order], config(space)))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["pca", "whitened", "joint"])
def test_a_rotation_of_the_latents_changes_no_distance(space: str) -> None:
    z, f = one_class()
    q = torch.linalg.qr(randn(18, 18, seed=5)).Q
    z = z.flatten(1).float()
    a, b = embed(z, f, config(space)), embed(z @ q, f, config(space))
    torch.testing.assert_close(distances(a), distances(b), rtol=1e-4, atol=1e-4)


def test_features_are_taken_as_they_are_and_missed_where_they_are_needed() -> None:
    z, f = one_class()
    assert torch.equal(embed(z, f, config("features")), f)
    with pytest.raises(InputError, match=r"cluster.space=joint compares 60 images .* of which there are none"):
        embed(z, None, config("joint"))
    with pytest.raises(InputError, match="of which there are 59"):
        embed(z, f[:59], config("features"))


@pytest.mark.parametrize("engine", ["torch", "minibatch", "barycenter"])
@pytest.mark.parametrize("space", SPACES[1:])
def test_centroids_are_means_of_latents_and_medoids_nearest_in_the_space(space: str, engine: str) -> None:
    z, f = one_class()
    x = embed(z, f, config(space))
    r = kmeans(x, 4, config=config(space, engine=engine))
    p = make_prototypes(0, "a", z, torch.arange(100, 160), r, points=x)
    assert p.counts.sum() == 60
    for c in range(4):
        members = (r.labels == c).nonzero()[:, 0]
        torch.testing.assert_close(p.centroids[c], z[members].float().mean(0), rtol=1e-4, atol=1e-5)
        best = members[(x[members] - r.centroids[c]).square().sum(1).argmin()]
        assert p.medoid_rows[c] == 100 + best
        assert torch.equal(p.medoids[c], z[best].float())
        assert p.counts[c] == len(members)
        expected = float((x[members] - r.centroids[c]).double().square().sum())
        assert float(p.sse[c]) == pytest.approx(expected, rel=1e-4)


# --- runs ---------------------------------------------------------------------------------------------------------


def write_teacher(file: Path, x: Tensor, y: Tensor, *, classes: int = 3, seed: int = 0, steps: int = 20) -> Path:
    """A ConvNet that knows its training images, for pixels of mean and std 0.5."""
    from safetensors.torch import save_file

    from dq.networks.zoo import make_net

    net = make_net("convnet3", classes, x.shape[-1], seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((x - 0.5) / 0.5), y).backward()
        optimizer.step()
    save_file(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def teacher(toy_images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "a.safetensors", *toy_images["train"])


def overrides(*spaces: str, **more: Any) -> dict[str, Any]:
    """Methods that differ in their space alone."""
    return {s: {"override": {"cluster": {"space": s, "dims": 3, **more}}} for s in spaces}


def make_run(
    out: Path, source: ImageSource, accelerator: Any, teacher: Path | None, methods: dict[str, Any], **more: Any
) -> Run:
    teachers = [{"net": "convnet3", "path": str(teacher), "mean": [0.5] * 3, "std": [0.5] * 3}] if teacher else []
    data = {
        "output_dir": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "codec": {"resolution": 8},
        "ipc": [2],
        "methods": methods,
        "teachers": teachers,
    }
    return open_run(from_dict(RunConfig, data | more), source, accelerator)


def clustered(run: Run) -> Run:
    encode(run, tiny_kl())
    cluster(run, cache_of(run))
    return run


def points(run: Run, method: str, ipc: int = 2) -> list[Any]:
    return list(load_prototypes(run, cache_of(run), ipc, run.resolved(method)))


def shards(out: Path, pattern: str = "cache/features-*/part-*") -> dict[str, tuple[bytes, int]]:
    return {str(f.relative_to(out)): (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob(pattern)}


def test_a_run_in_every_space(tmp_path: Path, toy_source, accelerator, teacher: Path) -> None:
    run = make_run(tmp_path, toy_source, accelerator, teacher, overrides(*SPACES))
    pipe = DistillPipeline(vae=tiny_kl())
    cache = encode(run, pipe.vae)
    cluster(run, cache)
    generate(run, pipe, cache)
    assemble(run)
    sets = {(2, m): load_set_of_run(run, 2, m) for m in run.config.methods}
    folders = {f.name.rsplit("-", 1)[0] for f in (tmp_path / "run" / "prototypes").iterdir()}
    assert folders == {"ipc00002-torch", *(f"ipc00002-torch-{s}" for s in SPACES[1:])}
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    records = {(e["space"], e["class"]): e for e in events if e["stage"] == "quantization"}
    assert set(records) == {(s, c) for s in SPACES for c in range(3)}
    for space in SPACES:
        for p in points(run, space):
            z, rows = cache.load(p.label)
            assert p.counts.sum() == len(rows)
            assert set(p.medoid_rows.tolist()) <= set(rows.tolist())
            assert p.stats["space"] == space
            assert 0 < p.stats["explained_latents"] < 1
            assert p.stats["median_norm"] == records["latents", p.label]["median_norm"]
            if space == "latents":
                assert p.stats["explained_latents"] == pytest.approx(p.stats["explained"], abs=1e-5)
                assert p.stats["w2_latents"] == pytest.approx(p.stats["w2_mass"], rel=1e-5)
                x = z.flatten(1).float()
                assert torch.equal(nearest(x, p.centroids.flatten(1)).bincount(), p.counts)
        made_with = sets[2, space].provenance["cluster"]
        assert made_with["space"] == space
        assert ("teacher" in made_with) == (space in ("features", "joint"))
        assert len(load_set_of_run(run, 2, space)) == 6


def test_without_features_no_teacher_is_opened(tmp_path: Path, toy_source, accelerator) -> None:
    run = clustered(make_run(tmp_path, toy_source, accelerator, Path("/nowhere"), overrides("latents", "pca")))
    assert len(points(run, "latents")) == len(points(run, "pca")) == 3
    assert not (tmp_path / "run" / "features.json").exists()
    assert not list(tmp_path.glob("cache/features-*"))
    with pytest.raises(InputError, match="there is no teacher at /nowhere"):
        clustered(make_run(tmp_path, toy_source, accelerator, Path("/nowhere"), overrides("latents", "joint")))


@pytest.mark.parametrize("space", ["features", "joint"])
def test_a_space_of_features_needs_a_teacher(tmp_path: Path, toy_source, accelerator, space: str) -> None:
    with pytest.raises(InputError, match=f"method '{space}' has cluster.space={space}, .*; set teachers.0.net and"):
        make_run(tmp_path, toy_source, accelerator, None, overrides("latents", space))
    assert not (tmp_path / "run").exists()


def test_features_are_computed_once_and_after_a_kill_only_what_is_missing(
    tmp_path: Path, toy_source, accelerator, teacher: Path
) -> None:
    run = clustered(make_run(tmp_path, toy_source, accelerator, teacher, overrides("features")))
    first = shards(tmp_path)
    assert len(first) == 3
    before = shards(tmp_path, "run/prototypes/*/class-*")
    cluster(run, cache_of(run))
    assert shards(tmp_path) == first
    lost = features_of(run).path(1)
    lost.unlink()
    for file in tmp_path.glob("run/prototypes/*/class-*"):
        file.unlink()
    cluster(run, cache_of(run))
    again = shards(tmp_path)
    assert {k: v[0] for k, v in again.items()} == {k: v[0] for k, v in first.items()}
    assert [k for k in first if again[k][1] != first[k][1]] == [str(lost.relative_to(tmp_path))]
    after = shards(tmp_path, "run/prototypes/*/class-*")
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}


def test_features_are_the_teachers_of_the_images_in_their_rows(
    tmp_path: Path, toy_source, toy_images, accelerator, teacher: Path
) -> None:
    from dq.networks.teacher_loading import load_teacher

    run = clustered(make_run(tmp_path, toy_source, accelerator, teacher, overrides("features")))
    net = load_teacher(run.config.teachers[0], 3, 8)
    images = (toy_images["train"][0] * 255).round().to(torch.uint8)
    cache = features_of(run)
    for c in range(3):
        features, rows = cache.load(c)
        assert torch.equal(rows, cache_of(run).load(c)[1])
        torch.testing.assert_close(features, net.features(images[rows]), rtol=1e-4, atol=1e-5)
        assert cache.width() == features.shape[1]


def test_evaluation_reads_the_features_that_a_run_was_clustered_by(
    tmp_path: Path, toy_source, toy_images, accelerator, teacher: Path
) -> None:
    from dq.networks.real_data import load_real_data
    from dq.networks.teacher_loading import load_teacher

    run = clustered(make_run(tmp_path, toy_source, accelerator, teacher, overrides("features")))
    before = shards(tmp_path)
    c = run.config
    bench = load_real_data(
        toy_source,
        8,
        cache_dir=tmp_path / "cache",
        device=run.device,
        teachers=c.teachers,
    )
    images = (toy_images["train"][0] * 255).round().to(torch.uint8)
    expected = load_teacher(c.teachers[0], 3, 8).features(images)
    torch.testing.assert_close(bench.features(), expected, rtol=1e-4, atol=1e-5)
    assert shards(tmp_path) == before


def test_another_teacher_has_another_folder_and_other_prototypes(
    tmp_path: Path, toy_source, toy_images, accelerator, teacher: Path
) -> None:
    run = clustered(make_run(tmp_path, toy_source, accelerator, teacher, overrides("latents", "features")))
    cache = cache_of(run)
    names = [prototype_folder(run, cache, 2, run.resolved(m)).name for m in ("latents", "features")]
    other = write_teacher(tmp_path / "b.safetensors", *toy_images["train"], seed=1)
    moved = make_run(tmp_path, toy_source, accelerator, other, overrides("latents", "features"))
    with pytest.raises(InputError, match=r"features of another teacher.*`dq cluster`"):
        points(moved, "features")
    before = shards(tmp_path) | shards(tmp_path, "run/prototypes/*/class-*")
    clustered(moved)
    now = [prototype_folder(moved, cache, 2, moved.resolved(m)).name for m in ("latents", "features")]
    assert now[0] == names[0]
    assert now[1] != names[1]
    after = shards(tmp_path) | shards(tmp_path, "run/prototypes/*/class-*")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 6


def test_later_stages_do_not_need_the_teacher(
    tmp_path: Path, toy_source, toy_images, accelerator, teacher: Path
) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(teacher.read_bytes())
    run = make_run(tmp_path, toy_source, accelerator, path, overrides("joint"))
    with pytest.raises(InputError, match=r"no features .*`dq cluster`"):
        features_of(run)
    clustered(run)
    path.unlink()
    pipe = DistillPipeline(vae=tiny_kl())
    generate(run, pipe, cache_of(run))
    assemble(run)
    assert len(load_set_of_run(run, 2, "joint")) == 6


def test_features_of_other_images_are_refused(tmp_path: Path, toy_source, accelerator, teacher: Path) -> None:
    run = clustered(make_run(tmp_path, toy_source, accelerator, teacher, overrides("features")))
    file = features_of(run).path(2)
    tensors, meta = read_tensors(file)
    assert tensors["labels"].tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    write_tensors(file, {k: v[:-1] for k, v in tensors.items()}, meta)
    more = make_run(tmp_path, toy_source, accelerator, teacher, overrides("features"), ipc=[2, 3])
    with pytest.raises(RunError, match=r"6 images .* 7 images of class 2 'blue'; delete"):
        cluster(more, cache_of(more))


def test_a_teacher_that_knows_nothing_is_not_asked_for_features(
    tmp_path: Path, toy_source, toy_images, accelerator
) -> None:
    x, y = toy_images["train"]
    wrong = write_teacher(tmp_path / "wrong.safetensors", x, (y + 1) % 3)
    with pytest.raises(InputError, match="its class order or input normalization is probably not"):
        clustered(make_run(tmp_path, toy_source, accelerator, wrong, overrides("features")))
    assert not list(tmp_path.glob("cache/features-*/part-*"))


def test_spaces_may_be_added_to_a_run_and_only_their_own_settings_count(
    tmp_path: Path, toy_source, accelerator
) -> None:
    plain = {"cluster": {"space": "latents"}}
    run = clustered(make_run(tmp_path, toy_source, accelerator, None, {"a": {}, "b": {"override": plain}}))
    first = shards(tmp_path, "run/prototypes/*/class-*")
    assert len(first) == 3
    # what the latents do not read makes no other folder
    unread = {"cluster": {"dims": 2, "feature_weight": 7.0}}
    more = {"a": {}, "b": {"override": unread}} | overrides("pca")
    run = clustered(make_run(tmp_path, toy_source, accelerator, None, more))
    assert first.items() <= shards(tmp_path, "run/prototypes/*/class-*").items()
    assert len(shards(tmp_path, "run/prototypes/*/class-*")) == 6
    assert len(clusterings(run)) == 2
    # the digest of the latents' folders is of the settings that there were before there was a choice
    settings = cluster_settings(run.config.cluster)
    assert not {"space", "dims", "feature_weight"} & settings.keys()


def test_a_set_of_another_space_is_not_taken_for_this_ones(tmp_path: Path, toy_source, accelerator) -> None:
    pipe = DistillPipeline(vae=tiny_kl())
    run = clustered(make_run(tmp_path, toy_source, accelerator, None, {"a": {}}))
    generate(run, pipe, cache_of(run))
    assemble(run)
    other = make_run(tmp_path, toy_source, accelerator, None, {"a": {"override": {"cluster.space": "pca"}}})
    with pytest.raises(InputError, match=r"the set ipc2-a was made with method.override=\{\}, not .*pca"):
        load_set_of_run(other, 2, "a")
    # a set from before there was a choice is one of the latents
    file = tmp_path / "run" / "dataset" / "ipc2-a" / "provenance.json"
    record = read_json(file)
    for key in ("space", "dims", "feature_weight"):
        del record["cluster"][key]
    write_json(file, record)
    assert len(load_set_of_run(run, 2, "a")) == 4 + 2


def test_features_separate_what_latents_do_not(tmp_path: Path, accelerator) -> None:
    """Class "a" has two textures under a brightness that varies far more: the latents see the light, the features of
    a teacher that was taught the textures see these."""
    g = torch.Generator().manual_seed(0)
    texture = torch.arange(48) % 2
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 - 0.5
    stripes = (torch.arange(8)[:, None] + torch.zeros(8)) % 2 - 0.5
    light = torch.rand(48, 1, 1, 1, generator=g) * 0.7 + 0.15
    a = light + 0.15 * torch.stack([board, stripes])[texture][:, None].expand(-1, 3, -1, -1)
    a = (a + 0.02 * torch.randn(a.shape, generator=g)).clamp(0, 1)
    b = torch.rand(24, 3, 8, 8, generator=g)
    images = torch.cat([a, b])
    source = load_source((images, torch.cat([torch.zeros(48), torch.ones(24)]).long()), class_names=["a", "b"])
    taught = torch.cat([texture, torch.full((24,), 2)])
    # outputs: board, stripes, b; as a classifier of a and b it may be wrong about the stripes
    file = write_teacher(tmp_path / "t.safetensors", images, taught, steps=40)
    teachers = [{"net": "convnet3", "path": str(file), "mean": [0.5] * 3, "std": [0.5] * 3, "classes": [0, 2]}]
    run = make_run(tmp_path, source, accelerator, None, overrides("latents", "features"), teachers=teachers)
    clustered(run)

    def purity(space: str) -> float:
        p = points(run, space)[0]
        cache = cache_of(run)
        z, rows = cache.load(0)
        f, _ = features_of(run).load(0)
        x = embed(z, f, run.resolved(space).cluster)
        r = kmeans(x, 2, seed=derive_seed(0, "cluster", 2, 0))
        assert torch.equal(r.counts, p.counts)
        same = (r.labels == texture[rows]).double().mean()
        return float(torch.maximum(same, 1 - same))

    assert purity("features") == 1
    assert points(run, "features")[0].counts.tolist() == [24, 24]
    assert purity("latents") < 0.75
    latent, feature = points(run, "latents")[0].stats, points(run, "features")[0].stats
    assert latent["explained_latents"] > feature["explained_latents"]
    assert latent["w2_latents"] < feature["w2_latents"]
