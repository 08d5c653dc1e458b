"""RandAugment against PIL's operations, which torchvision calls, at the magnitudes that torchvision gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dq.config.students import ViewConfig
from dq.data.rand_augment import OPERATIONS, apply_operation, draw_operations, rand_augment
from dq.data.views import apply_views, draw_views

SIGNED = OPERATIONS[1:10]


def pictures(side: int) -> torch.Tensor:
    """Noise, low contrast, a gradient, one color: (4, 3, side, side) uint8."""
    rng = np.random.default_rng(side)
    ramp = np.add.outer(np.arange(side), 3 * np.arange(side))
    kinds = [
        rng.integers(0, 256, (side, side, 3)),
        rng.normal(120, 25, (side, side, 3)).clip(0, 255),
        np.stack([ramp, 2 * ramp, 255 - ramp], -1) % 256,
        np.full((side, side, 3), 77),
    ]
    return torch.from_numpy(np.stack(kinds).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def by_pil(x: torch.Tensor, operation: str, sign: int) -> torch.Tensor:
    """An image (3, S, S) at magnitude 9 of 0, ..., 30, the default, with the numbers written out."""
    image, side = Image.fromarray(x.permute(1, 2, 0).numpy()), x.shape[-1]
    pixels = sign * int(150 / 331 * side * 0.3)

    def moved(*matrix: float) -> Image.Image:
        return image.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    result = {
        "identity": lambda: image,
        "shear_x": lambda: moved(1, 0.09 * sign, 0, 0, 1, 0),
        "shear_y": lambda: moved(1, 0, 0, 0.09 * sign, 1, 0),
        "translate_x": lambda: moved(1, 0, -pixels, 0, 1, 0),
        "translate_y": lambda: moved(1, 0, 0, 0, 1, -pixels),
        "rotate": lambda: image.rotate(9 * sign, Image.Resampling.NEAREST),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + 0.27 * sign),
        "color": lambda: ImageEnhance.Color(image).enhance(1 + 0.27 * sign),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + 0.27 * sign),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.27 * sign),
        "posterize": lambda: ImageOps.posterize(image, 7),
        "solarize": lambda: ImageOps.solarize(image, 178.5),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[operation]()
    return torch.from_numpy(np.array(result)).permute(2, 0, 1)


@pytest.mark.parametrize("side", [7, 32, 64])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_pil_s_bit_for_bit(operation: str, side: int) -> None:
    x = pictures(side)
    for sign in (1, -1) if operation in SIGNED else (1,):
        changed = apply_operation(x, operation, 9, negative=sign < 0)
        expected = torch.stack([by_pil(image, operation, sign) for image in x])
        assert torch.equal(changed, expected)
        if side > 7:  # which is too small to be moved by a pixel, and to be equalized
            assert torch.equal(changed, x) == (operation == "identity")


def test_only_operations_with_a_direction_have_a_sign() -> None:
    x = pictures(32)
    for operation in OPERATIONS:
        both = [apply_operation(x, operation, 9, negative=negative) for negative in (False, True)]
        assert torch.equal(*both) == (operation not in SIGNED)


def test_magnitude_zero_of_geometry_and_color_changes_nothing() -> None:
    x = pictures(32)
    for operation in OPERATIONS[:11]:
        assert torch.equal(apply_operation(x, operation, 0), x), operation


def test_operations_follow_one_another_and_images_are_alone() -> None:
    x = pictures(32).repeat(7, 1, 1, 1)
    before = x.clone()
    codes = torch.from_numpy(draw_operations(np.random.default_rng(0), len(x), 2))
    changed = rand_augment(x, codes, 9)
    assert torch.equal(x, before)
    for i, (first, second) in enumerate(codes.tolist()):
        image = x[i : i + 1]
        for code in (first, second):
            image = apply_operation(image, OPERATIONS[code // 2], 9, negative=bool(code % 2))
        assert torch.equal(changed[i], image[0])
        assert torch.equal(rand_augment(x[i : i + 1], codes[i : i + 1], 9), image)


def test_floats_are_rounded_to_8_bits() -> None:
    x = pictures(16)
    codes = torch.from_numpy(draw_operations(np.random.default_rng(1), len(x), 2))
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 0.8 - 0.4
    as_floats = ((x + noise) / 255).clamp(0, 1)
    assert torch.equal(rand_augment(as_floats, codes, 9), rand_augment(x, codes, 9))


def test_draws_are_uniform_over_operations_and_signs() -> None:
    codes = draw_operations(np.random.default_rng(2), 14_000, 2)
    assert codes.shape == (14_000, 2)
    assert codes.dtype == np.uint8
    counts = np.bincount(codes.ravel(), minlength=28)
    assert len(counts) == 28
    assert (abs(counts - 1000) < 5 * np.sqrt(1000)).all()
    assert draw_operations(np.random.default_rng(2), 3, 0).shape == (3, 0)


@pytest.mark.gpu
def test_an_accelerator_makes_the_same_pixels() -> None:
    x = pictures(32)
    for operation in OPERATIONS:
        on_device = apply_operation(x.to("cuda"), operation, 9, negative=True).cpu()
        assert torch.equal(on_device, apply_operation(x, operation, 9, negative=True)), operation
    codes = torch.from_numpy(draw_operations(np.random.default_rng(3), len(x), 2))
    assert torch.equal(rand_augment(x.to("cuda"), codes, 9).cpu(), rand_augment(x, codes, 9))


@pytest.mark.gpu
def test_views_with_every_draw_on_an_accelerator() -> None:
    images = pictures(16).repeat(3, 1, 1, 1)
    for config in (
        ViewConfig(rand_augment=2, shuffle=2, flip=0.5, mix="cutmix"),
        ViewConfig(rand_augment=1, crop_pad=0.125, flip=0.5, mix="mixup"),
    ):
        views = draw_views(config, 12, 16, batch_size=12, accumulate=1, seed=0, epoch=0)
        on_device = apply_views(config, images.to("cuda"), views, 0, slice(0, 12)).cpu()
        torch.testing.assert_close(on_device, apply_views(config, images, views, 0, slice(0, 12)), rtol=0, atol=1e-6)
