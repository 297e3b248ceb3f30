"""Losses: values by hand, parity with MONAI, gradients, and the released forms."""

import math

import pytest
import torch

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.losses.segmentation import (
    cross_entropy_loss,
    hard_dice_loss,
    released_segmentation_loss,
    segmentation_loss,
    soft_dice_loss,
)

SHAPES = [(2, 1, 12, 10), (3, 4, 12, 10), (2, 1, 6, 7, 8), (2, 3, 6, 7, 8)]


def example(shape, seed=0):
    b, k, *s = shape
    x = 2 * torch.randn(shape, generator=torch_rng(seed, "x"), dtype=torch.float64)
    y = torch.randint(0, max(k, 2), (b, *s), generator=torch_rng(seed, "y"))
    return x, y


def certain(y, k):
    "Logits that are sure of `y`."
    if k == 1:
        return torch.where(y[:, None] > 0, 40.0, -40.0)
    return 80.0 * torch.nn.functional.one_hot(y, k).movedim(-1, 1) - 40


@pytest.mark.parametrize(
    "shape, background", [(s, b) for s in SHAPES for b in (False, True) if s[1] > 1 or not b]
)
@pytest.mark.parametrize("per_image", [False, True])
def test_dice_equals_monai(shape, per_image, background):
    from monai.losses import DiceLoss

    x, y = example(shape)
    k = shape[1]
    theirs = DiceLoss(
        include_background=k == 1 or background,
        to_onehot_y=k > 1,
        sigmoid=k == 1,
        softmax=k > 1,
        smooth_nr=1.0,
        smooth_dr=1.0,
        batch=not per_image,
    )
    assert soft_dice_loss(x, y, per_image=per_image, background=background).item() == pytest.approx(
        theirs(x, y[:, None]).item(), abs=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    x, y = example(shape)
    x = x[..., :3, :3].clone().requires_grad_()
    y = y[..., :3, :3]
    assert torch.autograd.gradcheck(lambda x: soft_dice_loss(x, y), x)
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, y, per_image=True), x)
    assert not hard_dice_loss(x, y).requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_limits(shape):
    _, y = example(shape)
    k = shape[1]
    for f in (soft_dice_loss, hard_dice_loss, cross_entropy_loss, segmentation_loss):
        assert f(certain(y, k), y).item() == pytest.approx(0, abs=1e-5)
        assert f(certain(y * 0, k), y * 0).item() == pytest.approx(0, abs=1e-5)  # empty and empty
        wrong = certain(1 - y if k == 1 else (y + 1) % k, k)
        assert f(wrong, y).item() > 0.9
        assert math.isfinite(f(1e4 * wrong, y).item())


def test_one_logit_is_two():
    x, y = example((2, 1, 12, 10))
    two = torch.cat([torch.zeros_like(x), x], 1)
    for f in (soft_dice_loss, cross_entropy_loss, hard_dice_loss):
        assert f(two, y).item() == pytest.approx(f(x, y).item(), abs=1e-7)


def test_parts_and_weight():
    x, y = example((2, 3, 8, 8))
    d = soft_dice_loss(x, y)
    c = cross_entropy_loss(x, y)
    assert segmentation_loss(x, y).item() == pytest.approx((d + 0.5 * c).item())
    assert segmentation_loss(x, y, bce=2).item() == pytest.approx((d + 2 * c).item())
    assert torch.equal(segmentation_loss(x, y, bce=0), d)


def test_batch_or_image():
    x, y = example((4, 1, 8, 8))
    each = torch.stack([soft_dice_loss(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    assert soft_dice_loss(x, y, per_image=True).item() == pytest.approx(each.mean().item())
    assert soft_dice_loss(x, y).item() != pytest.approx(each.mean().item(), abs=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    assert soft_dice_loss(x[order], y[order]).item() == pytest.approx(soft_dice_loss(x, y).item())


def test_half_precision_sums_in_float32():
    x = torch.full((1, 1, 512, 512), 9.0)
    y = torch.ones(1, 512, 512, dtype=torch.int64)
    assert soft_dice_loss(x.half(), y).item() == pytest.approx(
        soft_dice_loss(x, y).item(), abs=1e-3
    )
    assert segmentation_loss(x.bfloat16(), y).dtype == torch.float32


def test_released():
    x, y = example((2, 1, 8, 8))
    assert released_segmentation_loss(x, y).item() == pytest.approx(
        (hard_dice_loss(x, y) + 0.5 * cross_entropy_loss(x, y)).item()
    )
    leaf = x.clone().requires_grad_()
    (a,) = torch.autograd.grad(released_segmentation_loss(leaf, y), leaf)
    (b,) = torch.autograd.grad(0.5 * cross_entropy_loss(leaf, y), leaf)
    assert torch.equal(a, b)  # the Dice term teaches nothing
    y3 = torch.zeros(1, 50, dtype=torch.int64)
    assert released_segmentation_loss(certain(y3, 3), y3, bce=1.0).item() == pytest.approx(
        math.log(1 + 2 / math.e), abs=1e-5
    )
    assert math.log(1 + 2 / math.e) == pytest.approx(0.551, abs=5e-4)


@pytest.mark.parametrize(
    "x, y, words",
    [
        ((2, 1, 8, 8), (2, 1, 8, 8), "do not fit"),
        ((2, 1, 8, 8), (2, 8, 9), "do not fit"),
        ((2, 3, 8, 8), (1, 8, 8), "do not fit"),
        ((2, 8), (2,), "do not fit"),
    ],
)
def test_wrong_shapes(x, y, words):
    for f in (soft_dice_loss, hard_dice_loss, cross_entropy_loss, segmentation_loss):
        with pytest.raises(InputError, match=words):
            f(torch.zeros(x), torch.zeros(y, dtype=torch.int64))


def test_wrong_labels():
    x = torch.zeros(1, 3, 4, 4)
    y = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="labels 0 to 5"):
        segmentation_loss(x, y.index_fill(2, torch.tensor([0]), 5))
    with pytest.raises(InputError, match="labels -1"):
        segmentation_loss(x, y - 1)
    with pytest.raises(InputError, match="instance map"):
        segmentation_loss(x[:, :1], y + 2)
    with pytest.raises(InputError, match="whole-number"):
        segmentation_loss(x, y.float())
    with pytest.raises(InputError, match="no labels"):
        segmentation_loss(x, None)
