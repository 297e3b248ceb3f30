"""Properties of the batched augmentation: image and label stay together, draws are independent of
each other, bad input is named."""

import math

import pytest
import torch

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.data.augment import Augment, _affine_matrices, _draw_grid, blur, swap_sides, warp

OFF = {f: 0 for f in Augment.__dataclass_fields__}
MOVES = dict(flip=0.5, rot90=True, rotate=30.0, scale=0.2, shift=0.1, elastic=2.0)
COLOURS = dict(brightness=0.2, contrast=0.3, gamma=0.3, noise=0.1, blur=1.0)


def batch(shape=(4, 1, 32, 32), classes=4, seed=0):
    "Blocks of 4 px of random classes, and an image in which each class has a grey of its own."
    g = torch_rng(seed, "blocks")
    coarse = torch.randint(
        0, classes, (shape[0], 1, *[n // 4 for n in shape[2:]]), generator=g
    ).float()
    label = torch.nn.functional.interpolate(coarse, size=shape[2:], mode="nearest")[:, 0]
    image = (label / (classes - 1))[:, None].expand(shape).clone()
    return image, label.long()


SHAPES = [(4, 1, 32, 32), (3, 3, 24, 48), (2, 1, 8, 24, 24), (2, 2, 8, 16, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_off_is_the_identity(shape):
    image, label = batch(shape)
    a, b = Augment(**OFF)(image, label, torch_rng(0))
    assert torch.equal(a, image) and torch.equal(b, label)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_address_same_batch(shape):
    image, label = batch(shape)
    a = Augment(**MOVES, **COLOURS)
    one = a(image, label, torch_rng(1, "x"))
    two = a(image, label, torch_rng(1, "x"))
    other = a(image, label, torch_rng(2, "x"))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert (
        one[0].shape == image.shape
        and one[1].shape == label.shape
        and one[0].min() >= 0
        and one[0].max() <= 1
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_mirrors_and_quarter_turns_keep_image_and_label_equal(shape):
    image, label = batch(shape)
    for seed in range(8):
        a, b = Augment(**{**OFF, "flip": 0.5, "rot90": True})(image, label, torch_rng(seed))
        assert torch.equal((a[:, 0] * 3).round().long(), b)
        assert torch.equal(
            b.flatten(1).sort(1).values, label.flatten(1).sort(1).values
        )  # a permutation of the pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_any_motion_keeps_image_and_label_together(shape):
    image, label = batch(shape, classes=2)
    for seed in range(4):
        a, b = Augment(**{**OFF, **MOVES})(image, label, torch_rng(seed))
        assert ((a[:, 0] > 0.5).long() == b).float().mean() > 0.97


def test_labels_read_the_grid_as_images_do():
    x = torch.arange(2 * 15 * 15).reshape(2, 15, 15)
    grid = _draw_grid(
        Augment(**MOVES),
        (2, 1, 15, 15),
        torch.rand(2, 19, generator=torch_rng(0)),
        torch.rand(2, 2, 5, 5, generator=torch_rng(1)),
        "cpu",
    )
    as_image = torch.nn.functional.grid_sample(
        x[:, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False
    )[:, 0]
    assert torch.equal(warp(x, grid), as_image.long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_keep_type_and_values(dtype):
    image, label = batch()
    label = (label * 60).to(dtype)
    b = Augment(**MOVES)(image, label, torch_rng(3))[1]
    assert b.dtype == dtype and set(b.unique().tolist()) <= {0, 60, 120, 180}


def test_large_instance_numbers_survive():
    label = torch.full((1, 16, 16), 2**24 - 1)
    assert (Augment(**MOVES)(torch.zeros(1, 1, 16, 16), label, torch_rng(0))[1] == 2**24 - 1).all()


def test_an_ablation_leaves_the_other_changes_as_they_were():
    image, label = batch()
    full = Augment(**MOVES, **COLOURS)(image, label, torch_rng(5))[1]
    assert torch.equal(full, Augment(**{**OFF, **MOVES})(image, label, torch_rng(5))[1])

    def still(**k):
        return Augment(**{**OFF, "brightness": 0.2, **k})(image * 0.5 + 0.25, None, torch_rng(5))[0]

    assert torch.equal(still(), still(elastic=0, noise=0)) and not torch.equal(
        still(), still(noise=0.1)
    )
    rng_a = torch_rng(6)
    rng_b = torch_rng(6)
    Augment(**OFF)(image, label, rng_a)
    Augment(**MOVES, **COLOURS)(image, label, rng_b)
    assert torch.equal(
        torch.rand(3, generator=rng_a), torch.rand(3, generator=rng_b)
    )  # both drew equally many numbers


def test_intensity_leaves_labels_and_places_alone():
    image, label = batch()
    a, b = Augment(**{**OFF, **COLOURS, "blur": 0, "noise": 0})(image, label, torch_rng(0))
    assert torch.equal(b, label)
    for x, y in zip(a, label):  # one grey per class before, one grey per class after
        assert all(x[0][y == c].std() < 1e-6 for c in y.unique())
    assert (a - image).abs().mean() > 0.01


def test_channels_change_alike_unless_hue_is_on():
    grey = batch((4, 1, 16, 16))[0].expand(4, 3, 16, 16)
    same = {**OFF, **COLOURS, "noise": 0}
    a = Augment(**same)(grey, None, torch_rng(0))[0]
    assert torch.equal(a[:, 0], a[:, 1])
    b = Augment(**{**same, "hue": 0.3})(grey, None, torch_rng(0))[0]
    assert not torch.equal(b[:, 0], b[:, 1])
    one = Augment(**{**same, "hue": 0.3})(grey[:, :1], None, torch_rng(0))[0]
    torch.testing.assert_close(one[:, 0], a[:, 0])  # one channel has no hue


def test_a_turn_is_rigid_in_images_that_are_not_square():
    m = _affine_matrices(
        torch.ones(1, 2),
        torch.zeros(1).long(),
        torch.tensor([0.4]),
        torch.zeros(1),
        torch.zeros(1, 2),
        (30, 60),
    )
    half = torch.tensor([30.0, 15.0])
    A = m[0, :, :2] * half[:, None] / half  # back to px
    torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-6, rtol=0)
    assert math.isclose(float(torch.det(A)), 1, abs_tol=1e-6)


def test_motion_stays_within_its_limits():
    n = 200
    side = 33
    u = torch.rand(n, 19, generator=torch_rng(0))
    none = torch.zeros(n, 2, 5, 5) + 0.5
    base = _draw_grid(Augment(**OFF), (n, 1, side, side), u, none, "cpu")
    shift = _draw_grid(Augment(**{**OFF, "shift": 0.1}), (n, 1, side, side), u, none, "cpu") - base
    assert 0.15 < shift.abs().max() <= 0.2 + 1e-6  # 0.1 of a side is 0.2 in coordinates of -1..1
    scale = _draw_grid(Augment(**{**OFF, "scale": 0.2}), (n, 1, side, side), u, none, "cpu") / base
    scale = scale[:, 0, 0, 0]
    assert math.exp(-0.2) - 1e-5 <= scale.min() < 0.9 and 1.1 < scale.max() <= math.exp(0.2) + 1e-5
    bent = (
        _draw_grid(
            Augment(**{**OFF, "elastic": 3.0}),
            (n, 1, side, side),
            u,
            torch.rand(n, 2, 5, 5, generator=torch_rng(1)),
            "cpu",
        )
        - base
    )
    assert 2 < bent.abs().max() * side / 2 <= 3 + 1e-4


@pytest.mark.parametrize("shape", [(3, 2, 20, 20), (2, 1, 6, 12, 16)])
def test_blur_keeps_constants_and_has_its_own_width_for_each_image(shape):
    torch.testing.assert_close(
        blur(torch.full(shape, 0.3), torch.linspace(0, 2, shape[0])), torch.full(shape, 0.3)
    )
    x = torch.rand(shape, generator=torch_rng(0))
    sigma = torch.tensor([0.0, 1.5, 0.5])[: shape[0]]
    together = blur(x, sigma)
    torch.testing.assert_close(together[0], x[0])
    torch.testing.assert_close(together[1:2], blur(x[1:2], sigma[1:2]))
    assert together[1].std() < 0.6 * x[1].std()


def test_gradients_pass_through_the_image():
    image = batch()[0].requires_grad_()
    Augment(**MOVES)(image, None, torch_rng(0))[0].sum().backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: Augment(rotate=-1), "rotate"),
        (lambda: Augment(flip=1.5), "flip"),
        (lambda: Augment(blur=float("nan")), "blur"),
        (lambda: Augment(scale="large"), "scale"),
        (lambda: Augment()(torch.zeros(2, 16, 16)), "B,C,H,W"),
        (lambda: Augment()(torch.zeros(2, 1, 16, 16, dtype=torch.uint8)), "float"),
        (lambda: Augment()(torch.zeros(2, 1, 16, 16), torch.zeros(2, 16, 8).long()), "labels"),
        (lambda: Augment()(torch.zeros(2, 1, 16, 16), torch.zeros(2, 16, 16)), "whole numbers"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()


@pytest.mark.parametrize("shape", SHAPES)
def test_swap_exchanges_pairs_in_mirror_images_and_nowhere_else(shape):
    image, label = batch(shape, classes=5)
    seen = set()
    for seed in range(6):
        plain = Augment(**{**OFF, "flip": 0.5})(image, label, torch_rng(seed))
        swapped = Augment(**{**OFF, "flip": 0.5, "swap": ((2, 3),)})(image, label, torch_rng(seed))
        assert torch.equal(plain[0], swapped[0])
        for a, b, y in zip(plain[1], swapped[1], label):
            other = torch.where(a == 2, 3, torch.where(a == 3, 2, a))
            axes = [d for d in range(y.ndim)]
            odd = [[k for k in axes if m >> k & 1] for m in range(2 ** len(axes))]
            hits = [len(f) % 2 for f in odd if torch.equal(y.flip(f), a)]
            assert len(hits) == 1  # the picture tells which flips there were
            assert torch.equal(b, other if hits[0] else a)
            seen.add(hits[0])
    assert seen == {0, 1}


def test_swap_needs_mirrors_and_survives_quarter_turns_and_yaml():
    image, label = batch(classes=5)
    for off in ({"flip": 0}, {"flip": 0, "rot90": True, "rotate": 20}):
        a, b = (
            Augment(**{**OFF, **off, "swap": s})(image, label, torch_rng(3))[1]
            for s in ((), [[2, 3]])
        )
        assert torch.equal(a, b)
    assert Augment(swap=[[2, 3], [1, 4]]).swap == ((2, 3), (1, 4)) and Augment(swap=0).swap == ()
    assert Augment(flip=1.0, swap=[[2, 3]])(image, None, torch_rng(0))[1] is None
    assert hash(Augment(swap=[[2, 3]])) == hash(Augment(swap=((2, 3),)))  # plain, frozen data


@pytest.mark.parametrize(
    "wrong", [(2, 3), [(2, 2)], [(1, 2), (2, 3)], [(0, 1)], "ab", [(1, 2, 3)], 5, [("a", "b")]]
)
def test_wrong_pairs_are_refused(wrong):
    with pytest.raises(InputError, match="swap="):
        Augment(swap=wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_swapping_twice_changes_nothing(dtype):
    label = batch(classes=5)[1].to(dtype)
    once = swap_sides(label, [(2, 3), (1, 4)])
    assert (
        once.dtype == dtype
        and not torch.equal(once, label)
        and torch.equal(swap_sides(once, [(2, 3), (1, 4)]), label)
    )
