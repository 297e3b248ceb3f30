"""UMMKD, the single network and attention transfer by value, against float64 by hand."""

from dataclasses import fields

import by_hand_lotus as hand
import pytest
import torch
from test_lotus_values import Net, fill, scene_batch
from torch import nn

from unpaired_kd.methods.attention_transfer import (
    AttentionOptions,
    AttentionTransfer,
    attention,
    class_attention,
)
from unpaired_kd.methods.single import Single
from unpaired_kd.methods.ummkd import UMMKD, UmmkdOptions, rarity_weighted_cross_entropy


def method(options=UmmkdOptions(), classes=3):  # noqa: B008
    m = UMMKD(Net(1 if classes == 2 else classes, 1), options)
    fill(m.networks["norms"], 5)
    return m


def logits_by_hand(P, image, norms):
    "The shared kernels with one set of norms, in training mode."
    x = hand.conv(P, "student.conv9.0", hand.conv(P, "student.conv8", image.double()))
    return hand.conv(P, "student.conv10", hand.norm(P, norms, x, True))


def weighted_cross_entropy(x, y):
    "Each class weighs 1 minus its share of the pixels; the mean is over pixels."
    p = hand.probabilities(x)
    total = 0.0
    for k in range(p.shape[1]):
        inside = y == k
        total = total - (1 - inside.double().mean()) * p.movedim(1, -1)[inside][:, k].log().sum()
    return total / y.numel()


def terms_by_hand(m, classes, tau=2.0, direction="symmetric", ce="rarity", ce_weight=1.0):
    P = hand.doubles(**m.networks)
    P |= {k.replace("norms.layers.conv9/1", "other"): v for k, v in P.items()}
    batch = scene_batch(classes)
    entropy = weighted_cross_entropy if ce == "rarity" else hand.cross_entropy
    y_s, y_t = batch["student"].label, batch["teacher"].label
    x_s = logits_by_hand(P, batch["student"].image, "student.conv9.1")
    x_t = logits_by_hand(P, batch["teacher"].image, "other")
    terms = dict(
        seg=hand.dice_of_batch(x_s, y_s) + ce_weight * entropy(x_s, y_s),
        seg_teacher=hand.dice_of_batch(x_t, y_t) + ce_weight * entropy(x_t, y_t),
        kl=hand.class_mean_kl(x_s, y_s, x_t, y_t, classes, tau, direction),
    )
    return terms, P


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("term", ["seg", "seg_teacher", "kl"])
@pytest.mark.parametrize(
    "options", [{}, dict(tau=5.0, kl_direction="forward", ce="plain", ce_weight=0.3)], ids=str
)
def test_a_term_has_the_value_and_gradient_of_its_formula(options, term, classes):
    m = method(UmmkdOptions(**options), classes)
    found = m.losses(scene_batch(classes), None)[term]()
    words = {k.removeprefix("kl_"): v for k, v in options.items()}
    terms, P = terms_by_hand(m, classes, **words)
    assert found.item() == pytest.approx(terms[term].item(), rel=1e-4)
    found.backward()
    terms[term].backward()
    for name, net in m.networks.items():
        for k, p in net.named_parameters():
            expected = P[f"{name}.{k}"].grad
            got = torch.zeros_like(p) if p.grad is None else p.grad
            want = torch.zeros_like(p) if expected is None else expected.float()
            assert torch.allclose(got, want, rtol=2e-3, atol=1e-6), (name, k)


CHANGES = {  # option -> another value, the terms that change
    "tau": (4.0, {"kl"}),
    "kl_direction": ("reverse", {"kl"}),
    "ce": ("plain", {"seg", "seg_teacher"}),
    "ce_weight": (2.0, {"seg", "seg_teacher"}),
}


@pytest.mark.parametrize("option", [f.name for f in fields(UmmkdOptions)])
def test_an_option_changes_what_it_should_and_nothing_else(option):
    value, expected = CHANGES[option]
    found = []
    for options in (UmmkdOptions(), UmmkdOptions(**{option: value})):
        terms = method(options).losses(scene_batch(3), None)
        found.append({k: f().item() for k, f in terms.items()})
    assert {k for k in found[0] if found[0][k] != found[1][k]} == expected


def test_the_preset_and_the_weights_are_these():
    assert list(UMMKD.presets) == ["recommended"]
    found = {f.name: getattr(UMMKD.presets["recommended"], f.name) for f in fields(UmmkdOptions)}
    assert found == dict(tau=2.0, kl_direction="symmetric", ce="rarity", ce_weight=1.0)
    assert method().weights == dict(seg=1.0, seg_teacher=1.0, kl=0.5)


def test_the_weights_of_the_classes_are_shares_of_the_whole_batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    y = torch.zeros(2, 4, 4, dtype=torch.long)
    y[0, :2] = 1
    y[1, 0, 0] = 2
    found = rarity_weighted_cross_entropy(x, y)
    assert found.item() == pytest.approx(weighted_cross_entropy(x, y).item(), rel=1e-5)


# ---------------------------------------------------------------- the single network
@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_single_network_learns_soft_dice_and_half_a_cross_entropy(source):
    m = Single(Net(3, 1), learns_from=source)
    assert m.weights == {"seg": 1.0} and m.stages()[0].draws == (source,)
    found = m.losses(scene_batch(3), None)["seg"]()
    P = hand.doubles(student=m.student)
    b = scene_batch(3)[source]
    expected = hand.segmentation(logits_by_hand(P, b.image, "student.conv9.1"), b.label, 0.5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    for k, p in m.student.named_parameters():
        if P[f"student.{k}"].grad is not None:
            assert torch.allclose(p.grad, P[f"student.{k}"].grad.float(), rtol=1e-3, atol=1e-6), k


# ---------------------------------------------------------------- attention transfer
def attention_by_hand(f, y):
    "Energy over its mean over the image, averaged over each class."
    energy = f.square().mean(1)
    energy = energy / energy.mean((1, 2), keepdim=True)
    return {int(k): energy[y == k].mean() for k in y.unique()}


def test_attention_by_class():
    f = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(32).reshape(2, 4, 4) % 3
    found, expected = class_attention(f, y), attention_by_hand(f, y)
    assert found.keys() == expected.keys()
    for k, v in expected.items():
        assert found[k].item() == pytest.approx(v.item(), rel=1e-5)
    assert torch.allclose(attention(f).mean((1, 2)), torch.ones(2))


@pytest.mark.parametrize("taps", [("conv9",), ("conv8", "conv9")])
def test_the_attention_term_is_a_mean_square_over_layers_and_classes(taps):
    m = AttentionTransfer(Net(3, 1), Net(3, 2), AttentionOptions(taps=taps))
    assert m.weights == {"seg": 1.0, "attention": 0.1}
    terms = m.losses(scene_batch(3), None)
    P = hand.doubles(student=m.student, teacher=m.frozen["teacher"])
    features = {}
    for name, train in (("student", True), ("teacher", False)):
        z8 = hand.conv(P, f"{name}.conv8", scene_batch(3)[name].image.double())
        z9 = hand.norm(P, f"{name}.conv9.1", hand.conv(P, f"{name}.conv9.0", z8), train)
        features[name] = dict(conv8=z8, conv9=z9)
    gaps = []
    for tap in taps:
        own = attention_by_hand(features["student"][tap], scene_batch(3)["student"].label)
        wanted = attention_by_hand(features["teacher"][tap], scene_batch(3)["teacher"].label)
        gaps += [own[k] - wanted[k].detach() for k in own]
    expected = torch.stack(gaps).square().mean()
    found = terms["attention"]()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    expected.backward()
    assert torch.allclose(
        m.student.conv8.weight.grad, P["student.conv8.weight"].grad.float(), rtol=1e-3, atol=1e-7
    )
    assert isinstance(m.frozen["teacher"], nn.Module)
    assert all(p.grad is None for p in m.frozen["teacher"].parameters())
