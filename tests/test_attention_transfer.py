"""Attention transfer without pairs: numbers computed by hand, and who learns."""

import copy
import math

import pytest
import torch
from test_lotus import Two, nets, run

from unpaired_kd.core import InputError, seeded
from unpaired_kd.methods.attention_transfer import (
    AttentionOptions,
    AttentionTransfer,
    attention,
    class_attention,
)
from unpaired_kd.methods.registry import Expert, all_methods, make_method, options_of
from unpaired_kd.networks.unet import UNet

F = torch.tensor(
    [[[[3.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]]]
)  # energies 5, 1, 1, 0: mean 1.75
Y = torch.tensor([[[1, 0], [0, 0]]])


def test_an_attention_map_by_hand():
    assert torch.allclose(attention(F), torch.tensor([[[5.0, 1.0], [1.0, 0.0]]]) / 1.75)
    assert torch.allclose(
        attention(torch.cat([F, 9 * F])).flatten(1).mean(1), torch.ones(2)
    )  # each image by itself
    assert torch.equal(
        attention(torch.zeros(1, 2, 4, 4)), torch.zeros(1, 4, 4)
    )  # a silent layer looks nowhere
    assert attention(torch.rand(2, 3, 4, 4, 4)).shape == (2, 4, 4, 4)


def test_neither_scale_nor_channels_matter():
    assert torch.allclose(attention(7 * F), attention(F)) and torch.allclose(
        attention(F.repeat(1, 5, 1, 1)), attention(F)
    )
    assert not torch.allclose(attention(F + 1), attention(F))


def test_class_attention_by_hand():
    found = class_attention(F, Y)
    assert found.keys() == {0, 1}
    assert found[1].item() == pytest.approx(5 / 1.75) and found[0].item() == pytest.approx(
        2 / 3 / 1.75
    )
    assert class_attention(F, torch.zeros_like(Y)).keys() == {0}


def test_labels_of_the_whole_image_fit_pooled_features():
    whole = Y.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert class_attention(F, whole)[1].item() == pytest.approx(5 / 1.75)


def method(student=None, teacher=None, **options):
    s, t = nets()
    return AttentionTransfer(student or s, teacher or t, AttentionOptions(**options))


def test_the_loss_is_the_squared_gap_of_class_means():
    m = method(taps=("conv9",))
    batch = Two().batch(0)
    terms = m.losses(batch, None)
    _, own = m.run(m.student, batch["student"])
    _, wanted = m.run(m.frozen["teacher"], batch["teacher"])
    by_hand = sum((own[0][k] - wanted[0][k]) ** 2 for k in (0, 1)) / 2
    assert terms.keys() == {"seg", "attention"} == m.weights.keys()
    assert terms["attention"]().item() == pytest.approx(by_hand.item(), rel=1e-5) and by_hand > 0


def test_a_student_that_is_its_teacher_on_its_images_has_nothing_to_learn():
    m = method()
    b = Two().batch(0)["teacher"]
    m.student.load_state_dict(m.frozen["teacher"].state_dict())
    m.student.eval()
    assert m.losses({"student": b, "teacher": b}, None)["attention"]().item() == pytest.approx(
        0, abs=1e-10
    )


def test_only_the_student_gets_a_gradient_and_only_up_to_the_tap():
    m = method(taps=("conv9",))
    m.losses(Two().batch(0), None)["attention"]().backward()
    assert all(p.grad is None for p in m.frozen["teacher"].parameters())
    assert m.student.conv1[0].weight.grad.abs().sum() > 0
    assert m.student.conv10.weight.grad is None


def test_classes_that_one_side_lacks_are_left_out():
    m = method(taps=("conv9",))
    batch = Two().batch(0)
    batch["teacher"].label[:] = 0
    _, own = m.run(m.student, batch["student"])
    _, wanted = m.run(m.frozen["teacher"], batch["teacher"])
    assert m.losses(batch, None)["attention"]().item() == pytest.approx(
        ((own[0][0] - wanted[0][0]) ** 2).item(), rel=1e-5
    )
    batch["student"].label[:] = 1
    lesson = m.losses(batch, None)["attention"]()  # nothing is shared
    assert lesson.item() == 0 and lesson.requires_grad


@pytest.mark.parametrize("dims,classes", [(2, 2), (3, 3)])
def test_it_trains_a_narrow_student_from_a_wide_teacher(tmp_path, dims, classes):
    student, _ = nets(dims, classes)
    with seeded(1, "wide"):
        teacher = UNet(in_channels=1, classes=1 if classes == 2 else classes, width=8, dims=dims)
    before = copy.deepcopy(teacher.state_dict())
    r = run(tmp_path, AttentionTransfer(student, teacher), Two(dims, classes), epochs=3)
    assert [h["stage"] for h in r.history] == ["train"] * 3
    assert (
        all(math.isfinite(h["attention"]) for h in r.history)
        and r.history[-1]["seg"] < r.history[0]["seg"]
    )
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_it_is_in_the_table_and_refuses_by_name():
    assert all_methods()["attention_transfer"].teacher == Expert()
    m = make_method(
        "attention_transfer",
        *nets(),
        options_of("attention_transfer", "recommended", {"taps": ["conv8"]}, 32),
        1,
        0,
    )
    assert m.options.taps == ("conv8",) and m.weights == {"seg": 1.0, "attention": 0.1}
    with pytest.raises(InputError, match="attention_transfer: unknown option 'tap'.*'taps'"):
        options_of("attention_transfer", "recommended", {"tap": ["conv8"]}, 32)
    with pytest.raises(InputError, match="conv10"):
        method(taps=("conv11",))
