"""Random partners of the same class: whose label they carry, who has none, what is random, where
the gradient goes.
"""

import pytest
import torch

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.distillation.correspondence import random_same_class

SHAPES = {"row": ((40,), (30,)), "image": ((9, 7), (6, 11)), "volume": ((3, 5, 6), (4, 3, 7))}


def case(kind="image", classes=4, seed=0, images=(3, 2)):
    "Teacher's values (3,2,*s'): label and own number of every pixel. And both label maps."
    at_t, at_s = SHAPES[kind]
    r = torch_rng(seed, kind)
    y_t = torch.randint(classes, (images[0], *at_t), generator=r)
    y_s = torch.randint(classes, (images[1], *at_s), generator=r)
    number = torch.arange(y_t.numel()).reshape(y_t.shape)
    return torch.stack([y_t, number], 1).double(), y_t, y_s


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_partner_has_the_own_label(kind, seed):
    values, y_t, y_s = case(kind, seed=seed)
    out, found = random_same_class(values, y_t, y_s, 4, torch_rng(seed))
    assert (
        out.shape == (2, 2, *y_s.shape[1:])
        and out.dtype == values.dtype
        and found.shape == y_s.shape
        and found.dtype == torch.bool
    )
    assert found.all() and torch.equal(out[:, 0].long(), y_s)
    assert torch.equal(y_t.flatten()[out[:, 1].long()], y_s)  # all channels come from one pixel


def test_the_generator_decides():
    values, y_t, y_s = case()

    def draw(seed):
        return random_same_class(values, y_t, y_s, 4, torch_rng(seed))[0]

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    g = torch_rng(0)
    first, second = (random_same_class(values, y_t, y_s, 4, g)[0] for _ in range(2))
    assert torch.equal(first, draw(0)) and not torch.equal(first, second)


def test_without_a_generator_the_global_one_decides():
    values, y_t, y_s = case()
    torch.manual_seed(3)
    a = random_same_class(values, y_t, y_s, 4)[0]
    torch.manual_seed(3)
    b = random_same_class(values, y_t, y_s, 4)[0]
    assert torch.equal(a, b)


def test_every_member_is_as_likely_as_any_other():
    """3000 pixels draw from 10 members spread over two images: each about 300 times (standard
    deviation 16)."""
    values = torch.arange(20.0).reshape(2, 1, 10)
    y_t = torch.tensor([[1, 0] * 5, [0, 1] * 5])
    out, _ = random_same_class(values, y_t, torch.ones(1, 3000, dtype=torch.long), 2, torch_rng(0))
    times = torch.bincount(out.flatten().long(), minlength=20)
    members = y_t.flatten() == 1
    assert (times[~members] == 0).all() and ((times[members] - 300).abs() < 80).all()


def test_the_order_of_the_teachers_pixels_does_not_matter_on_average():
    values, y_t, y_s = case("row")
    order = torch.randperm(40, generator=torch_rng(0, "order"))

    def mean(v, y):
        return torch.stack(
            [random_same_class(v, y, y_s, 4, torch_rng(i))[0][:, 1].mean() for i in range(400)]
        ).mean()

    assert (
        abs(mean(values, y_t) - mean(values[..., order], y_t[:, order])) < 1.5
    )  # of numbers up to 119


@pytest.mark.parametrize("absent", range(4))
def test_a_class_that_the_teacher_lacks_has_no_partner(absent):
    values, y_t, y_s = case()
    values = values + 1
    y_t = torch.where(y_t == absent, (absent + 1) % 4, y_t)
    out, found = random_same_class(values, y_t, y_s, 4, torch_rng(0))
    assert torch.equal(found, y_s != absent)
    assert (out.movedim(1, -1)[~found] == 0).all() and (out.movedim(1, -1)[found] > 0).all()


def test_no_common_class():
    values, y_t, y_s = case()
    out, found = random_same_class(values, y_t * 0, y_s * 0 + 1, 2, torch_rng(0))
    assert not found.any() and not out.any()


@pytest.mark.parametrize("void", [-1, 4, 255])
def test_labels_outside_the_classes(void):
    values, y_t, y_s = case()
    y_t = y_t.clone()
    y_s = y_s.clone()
    y_t[0] = void
    y_s[0] = void
    out, found = random_same_class(values, y_t, y_s, 4, torch_rng(0))
    assert not found[0].any() and found[1].all() and not out[0].any()
    assert (out[1, 1] >= y_t[0].numel()).all()  # nothing from the void image


def test_gradient_goes_to_the_drawn_pixels_only():
    values, y_t, y_s = case("row")
    values = values.requires_grad_()
    out, found = random_same_class(values, y_t, torch.where(y_s == 3, 9, y_s), 4, torch_rng(0))
    out[:, 0].sum().backward()
    times = torch.bincount(out[:, 1].long()[found], minlength=y_t.numel()).reshape(y_t.shape)
    assert torch.equal(values.grad[:, 0], times.double()) and not values.grad[:, 1].any()
    assert times.sum() == found.sum() < found.numel()


def test_one_pixel_a_class():
    out, found = random_same_class(
        torch.tensor([[[5.0, 7.0]]]),
        torch.tensor([[1, 0]]),
        torch.tensor([[0, 1, 1]]),
        2,
        torch_rng(0),
    )
    assert out.tolist() == [[[7.0, 5.0, 5.0]]] and found.all()


@pytest.mark.parametrize(
    "y_t", [torch.zeros(2, 9, 7), torch.zeros(3, 7, 9), torch.zeros(3, 63), torch.zeros(3, 1, 9, 7)]
)
def test_labels_of_another_shape(y_t):
    with pytest.raises(InputError, match="do not fit"):
        random_same_class(case()[0], y_t.long(), case()[2], 4)
