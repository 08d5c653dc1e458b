"""Numbers of a prior's quality on sets whose answer is known, and the verb that measures one."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from models import tiny_dit, tiny_kl
from page_check import checked_page
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dq.cli.main import main
from dq.core.errors import InputError, RunError
from dq.core.files import read_json, read_tensors
from dq.core.seeds import generator
from dq.diffusion.card import MARKER, write_card
from dq.diffusion.class_sampling import ClassModel, sample_latents
from dq.diffusion.prior.curves import loss_figure, read_curves
from dq.diffusion.prior.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    least_rmse,
    nearest,
    nearest_ratio,
)
from dq.diffusion.prior.samples import Draw, sample_images, stored_samples
from dq.networks.zoo import make_net
from dq.run.distill import DistillPipeline


def normal(n: int, d: int, *name: object) -> Tensor:
    return torch.randn(n, d, generator=generator("test", *name), dtype=torch.float64)


def standardized(x: Tensor) -> Tensor:
    """Rows with mean 0 and covariance 1, exactly."""
    x = x - x.mean(0)
    covariance = x.T @ x / (len(x) - 1)
    return x @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, "rotation")).Q


# --- Fréchet distance ---------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_analytic_one() -> None:
    """|m|^2 + sum (s_x - s_y)^2 where the covariances commute; 2 x 2 ones that do not, by the closed form of the
    trace: Tr (AB)^(1/2) = sqrt(Tr AB + 2 sqrt(det AB))."""
    x, y = standardized(normal(200, 4, "x")), standardized(normal(300, 4, "y"))
    a, b = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([2.0, 2, 1, 0]).double()
    shift = torch.tensor([1.0, 0, -2, 0]).double()
    assert frechet_distance(x * a, y * b + shift) == pytest.approx(5 + 1 + 0 + 4 + 16, rel=1e-9)
    p, q = torch.tensor([[2.0, 1], [0, 1]]).double(), torch.tensor([[1.0, 0], [-3, 1]]).double()
    x, y = x[:, :2], y[:, :2]
    s, t = p.T @ p, q.T @ q
    root = math.sqrt(float((s @ t).trace()) + 2 * math.sqrt(float(torch.linalg.det(s @ t))))
    assert frechet_distance(x @ p, y @ q) == pytest.approx(float(s.trace() + t.trace()) - 2 * root, rel=1e-9)


@pytest.mark.parametrize("n", [10, 100])  # fewer and more rows than dimensions
def test_frechet_distance_of_equal_sets_is_zero_and_survives_rotation(n: int) -> None:
    x, y = normal(n, 30, "a"), 2 * normal(n + 5, 30, "b") + 1
    assert frechet_distance(x, x) < 1e-10
    assert frechet_distance(x, x[torch.randperm(n, generator=generator("test"))]) < 1e-10
    d = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(d, rel=1e-10)
    assert frechet_distance(x @ rotation(30), y @ rotation(30)) == pytest.approx(d, rel=1e-9)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * d, rel=1e-9)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(d, rel=1e-5)


def test_frechet_distance_falls_with_the_number_of_rows_as_documented() -> None:
    distances = [frechet_distance(normal(n, 20, "a", n), normal(n, 20, "b", n)) for n in (10, 100, 1000)]
    assert distances[0] > 3 * distances[1] > 9 * distances[2] > 0


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "1 rows of features are too few; give at least 2"),
        (torch.zeros(5, 3), torch.zeros(5, 4), r"must be \(n, d\) and \(m, d\), not \(5, 3\) and \(5, 4\)"),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3), "NaN or infinite; check the teacher"),
    ],
)
def test_impossible_features_are_named(x: Tensor, y: Tensor, message: str) -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(InputError, match=message):
            distance(x, y)


# --- kernel distance ----------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_u_statistic_by_hand() -> None:
    x, y = normal(4, 2, "x"), normal(4, 2, "y")

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 2 + 1) ** 3

    n = range(4)
    within = sum(k(v[i], v[j]) for v in (x, y) for i in n for j in n if i != j) / 12
    across = sum(k(a, b) for a in x for b in y) / 16
    assert kernel_distance(x, y, subsets=2, size=4) == pytest.approx((within - 2 * across, 0), abs=1e-12)


def test_kernel_distance_is_unbiased_symmetric_and_seeded() -> None:
    """Over independent pairs of sets of one law the mean is within three of its standard errors of 0."""
    pairs = [(normal(40, 5, "x", i), normal(40, 5, "y", i)) for i in range(60)]
    values = torch.tensor([kernel_distance(x, y, subsets=1, size=40)[0] for x, y in pairs])
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 3 * error
    assert (values < 0).any()  # as no biased estimate ever is
    x, y = pairs[0][0], pairs[0][1] + 1
    mean, std = kernel_distance(x, y, subsets=20)
    assert mean > 3 * error
    assert std > 0
    assert kernel_distance(x, y, subsets=20) == (mean, std)
    assert kernel_distance(x, y, subsets=20, seed=1) != (mean, std)
    assert kernel_distance(x, y, subsets=1, size=40)[0] == pytest.approx(kernel_distance(y, x, subsets=1, size=40)[0])
    with pytest.raises(InputError, match=r"20 subsets of 41 rows .* 2 to 40 rows"):
        kernel_distance(x, y, subsets=20, size=41)


# --- density and coverage -----------------------------------------------------------------------------------------


def test_density_and_coverage_by_hand() -> None:
    """On a line, k = 1: balls of radius 1, 1 and 3 around 0, 1 and 4 hold 1, 1 and 0 of {0.5}; the third ends at 1 and
    7, outside."""
    real = torch.tensor([[0.0], [1], [4]])
    assert density_coverage(real, torch.tensor([[0.5]]), 1) == (2, 2 / 3)
    assert density_coverage(real, torch.tensor([[0.5], [9]]), 1) == (1, 2 / 3)
    assert density_coverage(real, torch.tensor([[3.0]]), 1) == (1, 1 / 3)
    with pytest.raises(InputError, match="3 real images have no 3 neighbors"):
        density_coverage(real, real, 3)


def test_density_and_coverage_of_constructed_sets() -> None:
    real = normal(300, 4, "real")
    density, coverage = density_coverage(real, real)
    assert coverage == 1
    # a ball holds its center and all but the farthest of the k neighbors: k of k
    assert density == pytest.approx(1, abs=1e-6)
    assert density_coverage(real, real + 100) == (0, 0)
    density, coverage = density_coverage(real, normal(300, 4, "fake"))
    # E coverage = 1 - C(n - k, m) / C(n, m), about 1 - 2^-k for n = m (Naeem et al. 2020, section 3)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.04)
    assert density == pytest.approx(1, abs=0.15)
    collapsed = density_coverage(real, real[:1] * 0 + 1e-3 * normal(300, 4, "mode"))
    assert collapsed[1] < 0.3
    assert collapsed[0] > 1  # density alone would praise it


def test_blocks_change_nothing() -> None:
    x, y = normal(50, 6, "x").float(), normal(70, 6, "y").float()
    whole = nearest(x, y, 3)
    torch.testing.assert_close(whole[0], torch.cdist(x.double(), y.double()).sort(1).values[:, :3])
    for rows in (1, 7, 50):
        d, i = nearest(x, y, 3, rows=rows)
        torch.testing.assert_close(d, whole[0], rtol=1e-9, atol=1e-9)
        assert torch.equal(i, whole[1])
        assert density_coverage(y, x, 4, rows=rows) == density_coverage(y, x, 4)
    with pytest.raises(InputError, match="70 rows have no 71 nearest"):
        nearest(x, y, 71)


# --- copies -------------------------------------------------------------------------------------------------------


def test_copies_of_train_images_are_found_and_new_images_are_not() -> None:
    train, test, new = normal(2000, 8, "train"), normal(500, 8, "test"), normal(500, 8, "new")
    usual = nearest(test, train)[0][:, 0]
    share, ratio = nearest_ratio(nearest(new, train)[0][:, 0], usual)
    # 500 draws of 1 %: mean 5, deviation 2.2
    assert share <= 0.03
    assert ratio == pytest.approx(1, abs=0.1)
    copies = torch.cat([new[:350], train[:150] + 1e-4])
    d, i = nearest(copies, train)
    share, _ = nearest_ratio(d[:, 0], usual)
    assert 0.3 <= share <= 0.33
    assert i[350:, 0].tolist() == list(range(150))
    assert nearest_ratio(nearest(train[:100], train)[0][:, 0], usual)[1] < 1e-6
    assert nearest_ratio(usual, usual) == (pytest.approx(0.01), 1)
    with pytest.raises(InputError, match="test images are train images"):
        nearest_ratio(usual, torch.zeros(5))


def test_least_rmse_is_in_gray_levels() -> None:
    image = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    off = image.clone()
    off[0, 0, 0, 0] = 220  # one of twelve values by 120
    candidates = torch.stack([image + 50, off], 1)
    assert least_rmse(image, candidates).tolist() == pytest.approx([120 / math.sqrt(12)])
    assert least_rmse(image, torch.stack([off, image], 1)).tolist() == [0]


# --- samples ------------------------------------------------------------------------------------------------------


def schedulers() -> dict:
    import diffusers as d

    return {
        "ddim": d.DDIMScheduler(clip_sample=False),
        "euler": d.EulerDiscreteScheduler(),  # begins at noise times a deviation far from 1, and scales its input
        "ancestral": d.EulerAncestralDiscreteScheduler(),  # draws noise in every step
        "flow": d.FlowMatchEulerDiscreteScheduler(shift=2.0),
        "dpm-flow": d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }


def pipe_of(scheduler, **options) -> DistillPipeline:
    return DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(**options), scheduler=scheduler)


@pytest.mark.parametrize("name", ["ddim", "euler", "ancestral", "flow", "dpm-flow"])
def test_a_sample_does_not_depend_on_the_others(name: str) -> None:
    pipe = pipe_of(schedulers()[name])
    options = {"guidance_scale": 2.0, "num_inference_steps": 4}

    def drawn(places: list[tuple[int, int]]) -> Tensor:
        generators = [generator(0, "prior sample", c, i) for c, i in places]
        return sample_latents(
            ClassModel(pipe.transformer, pipe.scheduler), [c for c, _ in places], generators, **options
        )

    places = [(c, i) for c in range(3) for i in range(2)]
    whole = drawn(places)
    assert whole.shape == (6, 4, 4, 4)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(drawn(places[::-1]).flip(0), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([drawn([p]) for p in places]), whole, rtol=1e-4, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.01
    assert (whole[0] - drawn([(1, 0)])[0]).abs().max() > 0.01


def test_latents_are_those_of_the_stock_pipeline() -> None:
    """Without guidance, for whose null class the stock pipeline takes row 1,000. Stock starts from noise of deviation
    1, ours from what the grid's first step makes of a latent of zeros: a few 1e-4 less."""
    from diffusers import DiTPipeline

    scheduler = schedulers()["ddim"]
    for out_channels in (4, 8):  # without and with a learned variance
        pipe = pipe_of(scheduler, out_channels=out_channels)
        stock = DiTPipeline(pipe.transformer, pipe.vae, scheduler)
        stock.set_progress_bar_config(disable=True)
        options = {"guidance_scale": 1.0, "num_inference_steps": 5}
        expected = stock([1], generator=generator("test"), output_type="pt", **options).images
        z = sample_latents(ClassModel(pipe.transformer, pipe.scheduler), [1], [generator("test")], **options)
        with torch.no_grad():
            image = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close((image / 2 + 0.5).clamp(0, 1), expected, rtol=1e-3, atol=1e-3)


def test_a_flow_walk_lands_on_the_point_that_the_velocity_names() -> None:
    """dx/dsigma = noise - x_0 for a known x_0: Euler steps from sigma 1 to 0 end there exactly."""
    pipe = pipe_of(schedulers()["flow"])
    target = normal(1, 64, "target").float().view(1, 4, 4, 4)
    noise = torch.randn(4, 4, 4, generator=generator("test"))
    pipe.transformer.forward = lambda x, timestep, class_labels: type("Out", (), {"sample": noise - target})
    z = sample_latents(
        ClassModel(pipe.transformer, pipe.scheduler),
        [0],
        [generator("test")],
        guidance_scale=1.0,
        num_inference_steps=7,
    )
    torch.testing.assert_close(z, target, rtol=1e-5, atol=1e-5)


def test_images_are_stored_by_what_decides_them(tmp_path: Path, monkeypatch) -> None:
    pipe = pipe_of(schedulers()["ddim"])

    def draw(**changes) -> Draw:
        settings = {
            "pipe": pipe,
            "scheduler": pipe.scheduler,
            "condition_ids": (0, 1, 2),
            "counts": (2, 0, 3),
            "num_inference_steps": 2,
            "image_size": 8,
            "seed": 0,
            "batch_size": 2,
        }
        return Draw(**{**settings, **changes})

    assert draw().labels.tolist() == [0, 0, 2, 2, 2]
    images = stored_samples(draw(), 2.0, tmp_path)
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.uint8
    one_by_one = sample_images(draw(batch_size=1), 2.0)
    assert (one_by_one.int() - images.int()).abs().max() <= 1
    # fewer images, and the same ones
    fewer = sample_images(draw(counts=(1, 0, 2)), 2.0)
    assert (fewer.int() - images[[0, 2, 3]].int()).abs().max() <= 1
    for change in ({"seed": 1}, {"num_inference_steps": 3}, {"image_size": 4}, {"condition_ids": (0, 1, 1)}):
        stored_samples(draw(**change), 2.0, tmp_path)
    stored_samples(draw(), 3.0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    monkeypatch.setattr("dq.diffusion.prior.samples.sample_in_pieces", lambda *a, **k: pytest.fail("drawn again"))
    assert torch.equal(stored_samples(draw(batch_size=5), 2.0, tmp_path), images)


def test_a_model_that_breaks_is_one_sentence() -> None:
    pipe = pipe_of(schedulers()["ddim"])
    torch.nn.init.constant_(pipe.transformer.proj_out_2.bias, math.inf)
    with pytest.raises(RunError, match=r"NaN .*generate\.dtype"):
        sample_latents(
            ClassModel(pipe.transformer, pipe.scheduler),
            [0],
            [generator("test")],
            guidance_scale=2.0,
            num_inference_steps=2,
        )


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, toy_images) -> Path:
    """Images by class, an untrained prior with the records of a training, and a teacher that knows the colors."""
    root = tmp_path_factory.mktemp("world")
    for split, (images, labels) in toy_images.items():
        for i, (x, c) in enumerate(zip(images, labels.tolist(), strict=True)):
            folder = root / "images" / split / "rgb"[c]
            folder.mkdir(parents=True, exist_ok=True)
            array = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / f"{i:03d}.png")
    prior = root / "prior"
    pipe_of(schedulers()["ddim"]).save_pretrained(prior)
    settings = {"steps": 20, "batch_size": 8, "lr": 0.002, "dtype": "float32"}
    record = {"settings": settings, "versions": {"torch": "2.0"}, "seconds": 3725.0, "hardware": "two cores"}
    (prior / "transformer" / "training.json").write_text(json.dumps(record))
    log = [{"stage": "denoiser", "step": s, "loss": 1 / s, "held_out_0.99": 2 / s, "grad_norm": 1} for s in (10, 20)]
    (prior / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    x, y = toy_images["train"]
    y = torch.tensor([2, 1, 0])[y]  # folders in the order b, g, r
    net = make_net("convnet3", 3, 8, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((x - 0.5) / 0.5), y).backward()
        optimizer.step()
    save_file(net.state_dict(), root / "teacher.safetensors")
    return root


def config(world: Path, out: Path, **changes) -> list[str]:
    data = {
        "output_dir": str(out / "report"),
        "cache_dir": str(world / "cache"),
        "source": {"path": str(world / "images"), "image_size": 8},
        "codec": {"resolution": 8},
        "generate": {"model": str(world / "prior"), "batch_size": 5},
        "teachers": [
            {"net": "convnet3", "path": str(world / "teacher.safetensors"), "mean": [0.5] * 3, "std": [0.5] * 3}
        ],
        "prior_report": {"guidance": [1, 3], "num_inference_steps": 3, "neighbors": 2, "shown": 3, **changes},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(data))
    return ["prior-report", "--config", str(out / "config.yaml"), "--cpu", "--quiet"]


def contents(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("prior_*.*"), *folder.glob("prior_samples/*"), *folder.glob("figures/*")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def reported(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reported")
    assert main(config(world, out, data="toys/colors", license="cc0-1.0", command="dq train-denoiser")) == 0
    return out


def test_the_table_says_what_was_measured(world: Path, reported: Path, capsys) -> None:
    with open(reported / "report" / "prior_quality.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["row"] for r in rows] == ["real test", "real train", "codec", "guidance 1", "guidance 3"]
    assert {r["images"] for r in rows} == {"12"}  # four test images of each class
    assert (rows[0]["accuracy"], rows[1]["accuracy"]) == ("1.0", "1.0")
    assert all(0 < float(r["accuracy"]) <= 1 / 2 for r in rows[2:])  # neither codec nor denoiser was trained
    assert rows[0]["frechet"] == rows[1]["near_share"] == rows[2]["near_share"] == ""
    # a sample of untrained models is farther from real images than these from one another
    assert all(float(r["frechet"]) > 2 * float(rows[1]["frechet"]) > 0 for r in rows[2:])
    assert all(float(r["kernel"]) > float(rows[1]["kernel"]) for r in rows[2:])
    assert all(float(r["coverage"]) < float(rows[1]["coverage"]) for r in rows[2:])
    assert all(float(r["median_ratio"]) > 1 and r["near_share"] == "0.0" for r in rows[3:])
    assert all(float(r["pixel_rmse"]) > 0 for r in (rows[0], *rows[3:]))
    assert {(r["steps"], r["scheduler"], r["seed"], r["teacher"]) for r in rows} == {
        ("3", "DDIMScheduler", "0", "convnet3")
    }
    records = [json.loads(line) for line in (reported / "report" / "prior_quality.jsonl").read_text().splitlines()]
    assert [r["row"] for r in records] == [r["row"] for r in rows]
    assert records[0]["settings"]["per_class"] == 100
    assert {"dq", "torch", "diffusers", "prior", "data", "teachers"} <= records[0].keys()
    kept = read_json(world / "prior" / "quality.json")
    assert [r["frechet"] for r in kept["records"]] == [r["frechet"] for r in records]
    assert str(world) not in json.dumps(kept)


def test_the_page_holds_everything(reported: Path) -> None:
    page = (reported / "report" / "prior_report.html").read_text()
    assert checked_page(page).headings[0] == (1, "Quality of a prior")
    assert page.count('src="data:image/png;base64,') == 5  # two grids at two scales, and the losses
    assert "src=" not in page.replace('src="data:', "")
    figures = reported / "report" / "figures"
    scale, cell = 8, 8 + 2
    assert Image.open(figures / "prior-samples-3.png").size == (scale * (3 * cell - 2), scale * (3 * cell - 2))
    assert Image.open(figures / "prior-nearest-1.png").size == (scale * (6 * cell - 2), scale * (3 * cell - 2))


def test_a_second_call_draws_nothing_and_prints_the_same(world: Path, reported: Path, capsys, monkeypatch) -> None:
    before = contents(reported / "report")
    monkeypatch.setattr("dq.diffusion.prior.samples.sample_images", lambda *a, **k: pytest.fail("drawn again"))
    args = config(world, reported, data="toys/colors", license="cc0-1.0", command="dq train-denoiser")
    assert main(args) == 0
    assert contents(reported / "report") == before
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("| images | number | accuracy % | Fréchet |")
    assert [line.split("|")[1].strip() for line in out[2:7]] == [
        "real test", "real train", "codec", "guidance 1", "guidance 3",
    ]  # fmt: skip
    assert out[7:] == [str(reported / "report" / n) for n in ("prior_quality.csv", "prior_report.html")]


def test_a_killed_report_goes_on_with_the_scale_it_was_at(world: Path, reported: Path, tmp_path: Path, monkeypatch):
    import dq.diffusion.prior.samples as module

    real, scales = module.sample_images, []

    def interrupted(draw, guidance_scale, **options):
        if guidance_scale == 3:
            raise KeyboardInterrupt
        return real(draw, guidance_scale, **options)

    def counted(draw, guidance_scale, **options):
        scales.append(guidance_scale)
        return real(draw, guidance_scale, **options)

    shutil.copytree(world / "prior", tmp_path / "prior")
    args = [*config(world, tmp_path), "--set", f"generate.model={tmp_path / 'prior'}"]
    monkeypatch.setattr(module, "sample_images", interrupted)
    assert main(args) == 130
    assert len(list((tmp_path / "report" / "prior_samples").iterdir())) == 1
    monkeypatch.setattr(module, "sample_images", counted)
    assert main([*args, "generate.batch_size=7"]) == 0
    assert scales == [3.0]
    resumed, whole = contents(tmp_path / "report"), contents(reported / "report")
    assert resumed.keys() == whole.keys()
    assert resumed["prior_quality.csv"] == whole["prior_quality.csv"]
    # another scale is drawn beside those that are there
    assert main([*args, "prior_report.guidance=[1, 2, 3]"]) == 0
    assert scales == [3.0, 2.0]


def test_the_card_says_where_the_prior_is_from(world: Path, reported: Path) -> None:
    card = (world / "prior" / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    assert yaml.safe_load(head) == {
        "license": "cc0-1.0",
        "library_name": "diffusers",
        "tags": ["diffusers", "dit", "class-conditional", "dataset-distillation"],
        "datasets": ["toys/colors"],
    }
    parameters = sum(p.numel() for p in tiny_dit().parameters())
    assert f"| `transformer` | DiTTransformer2DModel | {parameters:,} |" in body
    assert 'DistillPipeline.from_pretrained("THIS_FOLDER_OR_REPO")' in body
    assert "| time | 1 h 2 min | not recorded |" in body
    assert "| hardware | two cores | not recorded |" in body
    assert "Trained on: toys/colors. License: cc0-1.0." in body
    assert "dq train-denoiser" in body
    assert "draws latents of 3 classes at 4x4x4" in body
    assert "into images of 8 px" in body
    assert "| guidance 3 | 12 |" in body
    assert "12 images a row, at most 100 of each of 3 classes, at 8 px" in body
    assert "{{" not in card
    assert "\n\n\n" not in card


def test_a_card_of_anothers_is_kept_and_text_is_quoted(world: Path, tmp_path: Path) -> None:
    pipe_of(schedulers()["ddim"]).save_pretrained(tmp_path / "prior")
    card = write_card(tmp_path / "prior", data_name="my own: pictures", license='mine, "all"')
    head = yaml.safe_load(card.read_text().split("---\n")[1])
    assert (head["license"], head["license_name"], "datasets" in head) == ("other", 'mine, "all"', False)
    assert MARKER in card.read_text()
    assert "Not measured; `dq prior-report` does it." in card.read_text()
    assert write_card(tmp_path / "prior") == card  # its own is replaced
    card.write_text("by hand")
    with pytest.raises(RunError, match=r"README.md was not written by dq and is kept; move it away"):
        write_card(tmp_path / "prior")
    assert card.read_text() == "by hand"
    with pytest.raises(InputError, match="is not the local folder of a DiT, so it gets no card"):
        write_card(tmp_path)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ("generate.model=null", 2, "no prior is named; set generate.model to its folder"),
        ("teachers=[]", 2, "a prior is measured in the features of a teacher"),
        ("prior_report.guidance=[2, 2]", 2, "prior_report.guidance must list different scales"),
        ("prior_report.per_class=0", 2, "prior_report.per_class must be a whole number of at least 1"),
        ("prior_report.neighbors=12", 2, "has test and train images for 12 samples only"),
        ("codec.resolution=16", 2, "codec.resolution=16 gives 8x8 latents but the DiT takes 4x4"),
        ("generate.scheduler=DDIM", 2, "generate.scheduler=DDIM is none that this model"),
    ],
)
def test_what_is_missing_is_one_sentence(world: Path, tmp_path: Path, capsys, settings, code, message) -> None:
    assert main([*config(world, tmp_path), "--set", settings]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dq prior-report: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("report/prior_*"))


def test_a_dry_run_counts_the_calls(world: Path, tmp_path: Path, capsys) -> None:
    assert main([*config(world, tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "12 images from pure noise at each of 2 guidance scales, 3 steps, 72 denoiser calls" in out
    assert not (tmp_path / "report").exists()


def test_curves_take_the_last_record_of_a_step(tmp_path: Path) -> None:
    lines = [
        {"stage": "codec", "step": 1, "loss": 5, "psnr": 1},
        {"stage": "denoiser", "step": 2, "loss": 3.0, "held_out_0.99": 4.0, "grad_norm": 1.0},
        {"stage": "denoiser", "step": 1, "loss": 9.0, "held_out_loss": None},
        {"stage": "denoiser", "step": 2, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves == {
        "codec": {"loss": [(1, 5.0)]},
        "denoiser": {"loss": [(1, 9.0), (2, 2.0)], "held_out_0.99": [(2, 4.0)], "grad_norm": [(2, 1.0)]},
    }
    upper = loss_figure(curves).axes[1]
    assert [line.get_label() for line in upper.lines] == ["loss", "held out 0.99"]
    assert upper.get_yscale() == "log"
    assert read_curves(tmp_path / "none.jsonl") == {}


def test_stored_images_are_the_ones_in_the_file(reported: Path) -> None:
    files = sorted((reported / "report" / "prior_samples").iterdir())
    assert [f.name.split("-")[1] for f in files] == ["1", "3"]
    tensors, facts = read_tensors(files[1])
    assert facts == {"guidance_scale": 3.0}
    assert tensors["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
