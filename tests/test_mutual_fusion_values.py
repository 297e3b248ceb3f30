"""Mutual distillation and fusion by value: every term and its gradient against `by_hand.py` in
float64, defaults and weights as tables, every option shown to do something."""

from dataclasses import asdict, fields, replace

import by_hand
import pytest
import torch

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.methods.fusion import Fusion, FusionOptions
from unpaired_kd.methods.mutual import Mutual, MutualOptions
from unpaired_kd.networks.registry import make_network
from unpaired_kd.training.method import set_trainable

SIDE = 32
SMALL = dict(side=SIDE, width=2, blocks=1)


def noise(purpose):
    return torch_rng(0, purpose)


def images(name, classes):
    g = torch_rng(0, "mutual values", name)
    label = torch.zeros(2, SIDE, SIDE, dtype=torch.long)
    for i in range(2):
        label[i, 4 + 3 * i : 16, 6 : 20 + i] = 1 + i % (classes - 1)
    label = label.transpose(1, 2).flip(1).contiguous() if name == "teacher" else label
    image = (
        0.2 + 0.3 * torch.rand(2, 1, SIDE, SIDE, generator=g).double() + 0.3 * label[:, None] / 2
    )
    return Batch(image, label, ["", ""], ["", ""])


def scene(classes=2):
    return {n: images(n, classes) for n in ("student", "teacher")}


def segmentor(stream, classes, **more):
    logits = 1 if classes == 2 else classes
    with seeded(0, stream):
        return make_network("unet", dict(in_channels=1, classes=logits, width=2) | more)


def ready(m):
    with torch.no_grad():
        for name in ("g_st", "g_ts"):
            for p in m.networks[name].parameters():
                p.mul_(10)
        if "alpha" in m.networks:
            for k, p in enumerate(m.networks["alpha"].head.parameters()):
                p.normal_(0, 0.5, generator=torch_rng(k, "alpha"))
    for net in m.networks.values():
        net.double().train()
    return m


def mutual(options=None, classes=2):
    options = options or MutualOptions(**SMALL)
    pair = segmentor("student", classes), segmentor("assistant", classes)
    return ready(Mutual(*pair, options, 4, seed=0))


def fusion(options=None, classes=2):
    options = options or FusionOptions(**SMALL, alpha_width=2)
    return ready(Fusion(segmentor("student", classes), options, 4, seed=0))


def gradient_sizes(m):
    return {n: [p.grad for p in net.parameters()] for n, net in m.networks.items()}


def check(m, update, term, by_formula, reaches, batch):
    set_trainable(m.networks, update.changes)
    for net in m.networks.values():
        net.zero_grad(set_to_none=True)
    value = update.losses({**batch}, noise)[term]()
    value.backward()
    found = gradient_sizes(m)
    for net in m.networks.values():
        net.requires_grad_(True)
    wanted = by_formula()
    assert torch.isclose(value.double(), wanted, rtol=1e-5), term
    for name, net in m.networks.items():
        weights = list(net.parameters())
        if not weights:
            continue
        grads = torch.autograd.grad(wanted, weights, retain_graph=True, allow_unused=True)
        for g, have in zip(grads, found[name]):
            if name not in reaches or g is None:
                assert have is None or not have.any(), (term, name)
            else:
                assert torch.allclose(have, g, rtol=1e-3, atol=1e-4 * float(g.abs().max()) + 1e-12)


@pytest.mark.parametrize("classes,changes", [(2, {}), (3, {"seg": "common", "kd_tau": 3.0})])
def test_terms_of_mutual_distillation(classes, changes):
    options = MutualOptions(**SMALL, **changes)
    m = mutual(options, classes)
    batch = scene(classes)
    student = m.networks["student"]
    assistant = m.networks["assistant"]
    x_s = batch["student"].image
    fake = (m.networks["g_ts"](2 * batch["teacher"].image - 1).detach() + 1) / 2
    tau = options.kd_tau

    def seg(logits, name):
        return by_hand.segmentation(options.seg, logits, batch[name].label)

    terms = {
        "seg": (lambda: seg(student(x_s), "student"), "student"),
        "seg_assistant": (lambda: seg(assistant(fake), "teacher"), "assistant"),
        "kl": (
            lambda: by_hand.soft_labels(student(x_s), assistant(x_s).detach(), tau),
            "student",
        ),
        "kl_assistant": (
            lambda: by_hand.soft_labels(assistant(fake), student(fake).detach(), tau),
            "assistant",
        ),
    }
    (update,) = m.stages()[1].updates
    assert update.changes == ("student", "assistant")
    assert set(update.losses({**batch}, noise)) == set(terms)
    for term, (by_formula, who) in terms.items():
        check(m, update, term, by_formula, (who,), batch)


def test_a_guide_on_translations_leaves_the_students_statistics():
    m = mutual()
    batch = scene()
    before = [b.clone() for b in m.networks["student"].buffers()]
    m.losses(batch, noise)["kl_assistant"]()
    assert all(torch.equal(a, b) for a, b in zip(before, m.networks["student"].buffers()))
    m.losses({**batch}, noise)["kl"]()
    assert not all(torch.equal(a, b) for a, b in zip(before, m.networks["student"].buffers()))


def test_what_is_shipped_is_the_mean_probability():
    m = mutual(classes=3)
    x = scene(3)["student"].image.float()
    for n in m.learning:
        m.networks[n].float().eval()
    p = [by_hand.probabilities(m.networks[n](x), 1.0) for n in m.learning]
    found = by_hand.probabilities(m.student.eval()(x), 1.0)
    assert torch.allclose(found, (p[0] + p[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("fuse", ["concat", "weighted"])
@pytest.mark.parametrize("seg", ["dice", "ce"])
def test_the_term_of_fusion(fuse, seg):
    options = FusionOptions(**SMALL, fuse=fuse, seg=seg, alpha_width=2)
    m = fusion(options)
    batch = scene()
    x_s = batch["student"].image
    fake = (m.networks["g_st"](2 * x_s - 1).detach() + 1) / 2
    assert m.networks["student"].config["in_channels"] == 2

    def by_formula():
        both = torch.cat([x_s, fake], 1)
        if fuse == "weighted":
            alpha = m.networks["alpha"](both)
            both = torch.cat([(1 - alpha) * x_s, alpha * fake], 1)
        logits = m.networks["student"](both)
        return by_hand.segmentation(seg, logits, batch["student"].label)

    (update,) = m.stages()[1].updates
    reaches = ("student", "alpha") if fuse == "weighted" else ("student",)
    assert update.changes == reaches
    check(m, update, "seg", by_formula, reaches, batch)


# ----------------------------------------------------------------- tables

TRANSLATOR = dict(
    i2i="cyclegan",
    drit_weights="drit",
    translate_first=True,
    gan="lsgan",
    smooth=1.0,
    pool=50,
    side=256,
    width=64,
    blocks=9,
    upsample="transposed",
    rate=0.5,
    beta1=0.5,
)
SEGMENTOR = dict(seg="dice", kd_tau=0.5, unlabelled=False)
WEIGHTS = {"adv": 1.0, "cyc": 10.0, "idt": 0.0, "discriminator": 1.0}


def test_defaults_presets_and_weights():
    assert asdict(MutualOptions()) == TRANSLATOR | SEGMENTOR | {"kd_tau": 2.0}
    assert asdict(FusionOptions()) == TRANSLATOR | SEGMENTOR | {"fuse": "concat", "alpha_width": 64}
    assert Mutual.presets == {"recommended": MutualOptions()}
    assert Fusion.presets == {"recommended": FusionOptions()}
    halves = {"seg": 1.0, "seg_assistant": 1.0, "kl": 0.5, "kl_assistant": 0.5}
    assert Mutual.default_weights(MutualOptions()) == WEIGHTS | halves
    assert Fusion.default_weights(FusionOptions()) == WEIGHTS | {"seg": 1.0}


@pytest.mark.parametrize("make", [mutual, fusion])
def test_translation_comes_first_and_segmentors_learn_faster(make):
    m = make()
    first, second = m.stages()
    assert (first.name, first.epochs, first.anew) == ("translate", 2, True)
    assert (second.name, second.epochs, second.anew) == ("segment", None, True)
    assert [u.name for u in first.updates] == ["generators", "discriminators"]
    assert set(first.updates[0].losses(scene(), noise)) == {"adv", "cyc", "idt"}
    rates = {n: v["rate"] for n, v in m.adam.items()}
    assert {n for n, rate in rates.items() if rate == 1.0} == set(m.learning)
    assert set(rates.values()) == {1.0, 0.5}


def everything(make, options):
    with seeded(0, "all"):
        m = make(options)
    batch = scene()
    facts = dict(
        length=type(m).length(options, 3), adam=m.adam, stages=[s.name for s in m.stages()]
    )
    facts["memory"] = m.networks["pool_t"].images.shape
    nets = {n: net for n, net in m.networks.items() if not n.startswith("pool")}
    facts["networks"] = {n: [p.shape for p in net.parameters()] for n, net in nets.items()}
    for stage in m.stages():
        for update in stage.updates:
            for term, f in update.losses({**batch}, noise).items():
                facts[term] = round(f().item(), 8)
    return facts


TRANSLATED = {"networks", "adv", "cyc", "idt", "discriminator"}
EFFECTS = {  # option -> (another value, what changes in mutual distillation, what in fusion)
    "gan": ("bce", {"adv", "discriminator"}, {"adv", "discriminator"}),
    "smooth": (0.9, {"discriminator"}, {"discriminator"}),
    "pool": (3, {"memory"}, {"memory"}),
    "width": (3, TRANSLATED | {"seg_assistant", "kl_assistant"}, TRANSLATED | {"seg"}),
    "blocks": (2, TRANSLATED | {"seg_assistant", "kl_assistant"}, TRANSLATED | {"seg"}),
    "upsample": (
        "resize_conv",
        TRANSLATED | {"seg_assistant", "kl_assistant"},
        TRANSLATED | {"seg"},
    ),
    "rate": (1.0, {"adam"}, {"adam"}),
    "beta1": (0.9, {"adam"}, {"adam"}),
    "seg": ("ce", {"seg", "seg_assistant"}, {"seg"}),
    "kd_tau": (1.0, {"kl", "kl_assistant"}, set()),
    "translate_first": (False, {"length", "stages"}, None),
    "fuse": ("weighted", None, {"networks", "adam", "seg"}),
    "alpha_width": (3, None, {"networks", "seg"}),
}
REFUSED = {"i2i": "drit", "unlabelled": True}  # values that neither method takes
ELSEWHERE = {"side", "drit_weights"}  # fitted to the patches; of DRIT only


def test_the_table_names_every_option():
    names = {f.name for cls in (MutualOptions, FusionOptions) for f in fields(cls)}
    assert set(EFFECTS) | set(REFUSED) | ELSEWHERE == names
    for name, value in REFUSED.items():
        for cls in (MutualOptions, FusionOptions):
            with pytest.raises(ValueError, match="written for"):
                cls(**{name: value})
    for cls in (Mutual, Fusion):
        assert cls.fit(cls.Options(), 96).side == 96


@pytest.mark.parametrize("make", [mutual, fusion])
@pytest.mark.parametrize("option", EFFECTS)
def test_an_option_changes_what_it_should_and_nothing_else(make, option):
    value, *changes = EFFECTS[option]
    changes = changes[make is fusion]
    if changes is None:
        return
    base = MutualOptions(**SMALL) if make is mutual else FusionOptions(**SMALL, alpha_width=2)
    if option == "alpha_width":
        base = replace(base, fuse="weighted")
    before = everything(make, base)
    after = everything(make, replace(base, **{option: value}))
    assert {k for k in before if before[k] != after.get(k)} == changes
