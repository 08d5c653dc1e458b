"""What `from_pretrained` obeys and what it refuses, and names that are no model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from models import sd_pipe, tiny_dit, tiny_kl

from dq.core.errors import InputError
from dq.core.model_files import open_model
from dq.diffusion.codec import load_codec
from dq.diffusion.loading import cast
from dq.run.distill import DistillPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dit/`, a pipeline, and `vae/`, an autoencoder alone, both with a second variant of the weights."""
    root = tmp_path_factory.mktemp("models")
    for variant in (None, "fp16"):
        seed = 0 if variant is None else 1
        pipe = DistillPipeline(vae=tiny_kl(seed=seed), transformer=tiny_dit(seed=seed), scheduler=DDIMScheduler())
        pipe.save_pretrained(root / "dit", variant=variant)
        tiny_kl(seed=seed).save_pretrained(root / "vae", variant=variant)
    return root


@pytest.mark.parametrize("name", ["vae", "dit"])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": None}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": {"vae": "float16"}}, torch.float16),
        ({"dtype": {"default": torch.bfloat16}}, torch.bfloat16),
        ({"dtype": {"transformer": torch.float16}}, torch.float32),
    ],
)
def test_dtypes_are_obeyed(folder: Path, name: str, given: dict, dtype: torch.dtype) -> None:
    assert DistillPipeline.from_pretrained(folder / name, **given).vae.dtype == dtype


@pytest.mark.parametrize("name", ["vae", "dit"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "auto"}, "dtype is one of float32, .* not 'auto'"),
        ({"torch_dtype": "half"}, "dtype is one of float32, .* not 'half'"),
        ({"dtype": torch.int8}, "dtype is one of float32, .* not torch.int8"),
        ({"dtype": {"vae": 16}}, "dtype is one of float32, .* not 16"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "two names of one setting; give dtype alone"),
        ({"use_safetensors": False}, "use_safetensors=False would unpickle weights"),
        ({"trust_remote_code": True}, "would run code of a repository"),
        ({"custom_pipeline": "some/where"}, "would run code of a repository"),
        ({"transfomer": None}, "no argument 'transfomer'; did you mean 'transformer'"),
        ({"safety_checker": None}, "no argument 'safety_checker'"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(folder: Path, name: str, given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillPipeline.from_pretrained(folder / name, **given)


def test_an_autoencoder_alone_takes_the_other_components(folder: Path) -> None:
    transformer, scheduler = tiny_dit(), DDIMScheduler()
    pipe = DistillPipeline.from_pretrained(
        folder / "vae", transformer=transformer, scheduler=scheduler, id2label={0: "fig"}, device_map="cpu"
    )
    assert (pipe.transformer, pipe.scheduler) == (transformer, scheduler)
    assert pipe.config.id2label == {"0": "fig"}
    alone = DistillPipeline.from_pretrained(folder / "dit", subfolder="vae")
    assert alone.default_mode == "decode"
    with pytest.raises(InputError, match=r"nowhere has no config.json"):
        DistillPipeline.from_pretrained(folder / "dit", subfolder="nowhere")


@pytest.mark.parametrize("name", ["vae", "dit"])
def test_variants_are_obeyed(folder: Path, name: str) -> None:
    first, second = (DistillPipeline.from_pretrained(folder / name, variant=v).vae for v in (None, "fp16"))
    assert not torch.equal(first.post_quant_conv.weight, second.post_quant_conv.weight)
    with pytest.raises(InputError, match=r"cannot be loaded .*bf16"):
        DistillPipeline.from_pretrained(folder / name, variant="bf16")


@pytest.mark.parametrize("part", ["transformer", "scheduler", "vae"])
def test_a_pipeline_that_lacks_a_part_is_refused(tmp_path: Path, part: str) -> None:
    DistillPipeline(vae=tiny_kl(), transformer=tiny_dit(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    own = {"transformer": tiny_dit, "scheduler": DDIMScheduler, "vae": tiny_kl}[part]()
    for absent in ({k: v for k, v in index.items() if k != part}, {**index, part: [None, None]}):
        (tmp_path / "model_index.json").write_text(json.dumps(absent))
        with pytest.raises(InputError, match=f"is a DiTPipeline without a {part}; get the model again"):
            DistillPipeline.from_pretrained(tmp_path)
        assert getattr(DistillPipeline.from_pretrained(tmp_path, **{part: own}), part) is own


# --- names that are no model --------------------------------------------------------------------------------------


def test_a_model_of_the_cache_needs_no_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = "0" * 40
    cached = tmp_path / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(sha)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / sha).symlink_to(folder / "vae", target_is_directory=True)
    pipe = DistillPipeline.from_pretrained("me/tiny", cache_dir=tmp_path)
    expected = load_codec(folder / "vae").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in pipe.vae.state_dict().items())
    with pytest.raises(InputError, match=r"the Hub is not reached \(HF_HUB_OFFLINE is set\)"):
        open_model("me/tinny", cache_dir=tmp_path)


def test_paths_that_name_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file, not a model folder"):
        open_model(tmp_path / "file")
    for path in (tmp_path / "nothing", "./nothing", "a/b/c", "nothing"):
        with pytest.raises(InputError, match=r"there is no model folder .*; give a folder with config.json"):
            open_model(path)


# --- what diffusers prints ----------------------------------------------------------------------------------------


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_latent_statistics_are_no_news_and_other_keys_are(tmp_path: Path, diffusers_log) -> None:
    from diffusers import AutoencoderTiny

    codec = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    codec.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    codec.save_pretrained(tmp_path / "vae")
    assert load_codec(tmp_path / "vae").config["latents_std"] == [2.0] * 4
    pipe = DistillPipeline(vae=codec, transformer=tiny_dit(), scheduler=DDIMScheduler())
    pipe.save_pretrained(tmp_path / "dit")
    DistillPipeline.from_pretrained(tmp_path / "dit")
    assert "will be ignored" not in diffusers_log.text
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "latent_chanels": 8}))
    load_codec(tmp_path / "vae")
    assert "'latent_chanels': 8" in diffusers_log.text
    diffusers_log.clear()
    AutoencoderTiny.from_pretrained(tmp_path / "dit" / "vae")  # not by this package, which obeys them
    assert "latents_mean" in diffusers_log.text


def test_quiet_shows_no_bar_of_loading(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    sd_pipe(tmp_path / "tokens").save_pretrained(tmp_path / "sd")  # whose text encoder transformers loads
    capsys.readouterr()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # which a command with --quiet sets for its process

    DistillPipeline.from_pretrained(folder / "dit")
    assert "Loading pipeline components" in capsys.readouterr().err
    monkeypatch.setenv("TQDM_DISABLE", "1")
    DistillPipeline.from_pretrained(folder / "dit")
    DistillPipeline.from_pretrained(tmp_path / "sd")
    shown = capsys.readouterr().err
    assert "Loading" not in shown
    assert "%|" not in shown
    assert diffusers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("make", [tiny_dit, tiny_kl])
def test_casting_says_nothing_where_diffusers_does(make: Callable[[], Any], diffusers_log) -> None:
    model = cast(make(), torch.bfloat16)
    assert not diffusers_log.records
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    make().to(torch.bfloat16)
    assert "should be kept in float32" in diffusers_log.text
