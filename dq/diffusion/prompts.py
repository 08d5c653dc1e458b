"""Text prompts of classes as conditions of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dq.config.schema import GenerateConfig
from dq.core.devices import tf32_products
from dq.diffusion.weaker_models import ClassPredict

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


def prompt_conditions(
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    names: Sequence[str],
    config: GenerateConfig,
) -> tuple[ClassPredict, Tensor, Tensor]:
    """The UNet as a function of (x, t, text), and its conditions.

    Returns:
        The function, and the embedded prompts and negative prompts of the names, (B, L, D) both.
    """
    prompts = [config.prompt.format(name=n.replace("_", " ")) for n in names]
    distinct = list(dict.fromkeys([*prompts, config.negative_prompt]))  # a class has one prompt
    dtype = unet.dtype
    embedded = _embed(tokenizer, text_encoder, distinct).to(dtype)
    cond = embedded[[distinct.index(p) for p in prompts]]
    null = embedded[distinct.index(config.negative_prompt)].expand_as(cond)

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with tf32_products():
            return unet(x.to(dtype), t, encoder_hidden_states=text).sample.float()

    return predict, cond, null


def _embed(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad(), tf32_products():
        return text_encoder(tokens.input_ids.to(text_encoder.device))[0]
