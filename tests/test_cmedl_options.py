"""Every option of CMEDL does what it says and nothing else."""

from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch
from test_cmedl_tables import DEFAULTS
from test_cmedl_values import PAPER, REACHES, SIDE, gradients, method, noise, scene

from unpaired_kd.core import InputError, seeded, torch_rng
from unpaired_kd.methods.cmedl import CMEDL, CmedlOptions
from unpaired_kd.training.method import set_trainable

TERMS = (*REACHES, "after the generators' step")
WITH_FAKE = {"adv", "cyc", "cx", "hint", "hint_g", "kd", "seg_g", "seg_pseudo", "discriminator"}
WITH_FAKE |= {"after the generators' step", "statistics"}
OTHER_GENERATOR = {"networks", "idt", "seg_fake"} | WITH_FAKE
FILE = "a file of weights"  # written when the test runs
EFFECTS = {  # option -> (what else is set, another value, all that changes with it)
    "i2i": ({"side": 64}, "drit", None),
    "drit_weights": ({"side": 64, "i2i": "drit"}, "paper", {"weights"}),
    "translate_first": ({}, True, {"stages", "length", "weights", "hint_g", "seg_g"}),
    "gan": ({}, "bce", {"adv", "discriminator"}),
    "smooth": ({}, 0.9, {"discriminator"}),
    "pool": ({}, 3, {"memory"}),
    "side": ({}, 64, {"memory", "statistics", *TERMS}),
    "width": ({}, 3, OTHER_GENERATOR),
    "blocks": ({}, 2, OTHER_GENERATOR),
    "upsample": ({}, "resize_conv", OTHER_GENERATOR),
    "rate": ({}, 1.0, {"adam"}),
    "beta1": ({}, 0.9, {"adam"}),
    "seg": ({}, "ce", {t for t in TERMS if "seg" in t} | {"after the generators' step"}),
    "kd_tau": ({}, 2.0, {"kd"}),
    "unlabelled": (
        {},
        True,
        {"draws", "stages", "idt", "seg", "statistics"} | WITH_FAKE,
    ),
    "hint": ({}, "low", {"hint layers", "hint", "hint_g"}),
    "hint_to": ({}, "student", {"who moves for the hint"}),
    "hint_reduction": ({}, "sum", {"hint", "hint_g"}),
    "refresh_fake": ({}, True, {"after the generators' step", "statistics"}),
    "infer": ({}, "teacher_on_fake", {"what segments"}),
    "calibrate": ({"infer": "teacher_on_fake"}, True, {"statistics"}),
    "cx_on": ({}, "filters", {"extractor", "context layers", "cx"}),
    "vgg": ({"cx_on": "auto"}, FILE, {"extractor", "context layers", "cx"}),
    "cx_layers": ({}, ("conv2",), {"context layers", "cx"}),
    "cx_h": ({}, 0.1, {"cx"}),
    "cx_direction": ({}, "source", {"cx"}),
    "cx_mask": ({}, "none", {"cx"}),
    "cx_sample": ({}, 5, {"cx"}),
}


def values_of(m, batch):
    "All terms, the networks that the hint moves, and `seg_pseudo` once the generator has moved."
    found = dict.fromkeys(TERMS)
    for stage in m.stages():
        for update in stage.updates:
            set_trainable(m.networks, update.changes)
            for term, f in update.losses({**batch}, noise).items():
                if term in found:
                    found[term] = round(f().item(), 7)
    set_trainable(m.networks, m.learning)
    for net in m.networks.values():
        net.zero_grad(set_to_none=True)
    m.segmentor_losses({**batch}, noise)["hint"]().backward()
    moved = [n for n in m.learning if any(g is not None for g in gradients(m.networks[n]).values())]
    same = {**batch}
    generators = m.stages()[0].updates[0]
    set_trainable(m.networks, generators.changes)
    for term in generators.losses(same, noise).values():
        term()  # the passes of this update
    if not m.options.translate_first:
        with torch.no_grad():
            for n in generators.changes:
                for p in m.networks[n].parameters():
                    p.mul_(1.1)
    after = {term: f() for term, f in m.segmentor_losses(same, noise).items()}["seg_pseudo"]
    return found | {"who moves for the hint": moved, TERMS[-1]: round(after.item(), 7)}


@lru_cache
def everything(options):
    "What a method with these options is and does, as plain data."
    with seeded(0, "everything"):
        m = method(options)
    side = options.side
    batch = scene(options)
    if side > SIDE:
        bigger = torch.nn.Upsample(scale_factor=side // SIDE)
        for n, b in batch.items():
            label = b.label.repeat_interleave(side // SIDE, 1).repeat_interleave(side // SIDE, 2)
            batch[n] = replace(b, image=bigger(b.image), label=label)
    nets = {n: net for n, net in m.networks.items() if not n.startswith("pool")}
    facts = dict(
        draws=CMEDL.draws(options),
        length=CMEDL.length(options, 3),
        weights=m.weights,
        stages=[(s.name, s.draws, [u.name for u in s.updates]) for s in m.stages()],
        adam=m.adam,
        networks={n: [(k, p.shape) for k, p in v.named_parameters()] for n, v in nets.items()},
        memory=m.networks["pool_t"].images.shape if "pool_t" in m.networks else None,
        extractor=type(m.extractor).__name__,
    )
    facts |= {
        "hint layers": m.hints,
        "context layers": m.cx_layers,
        "what segments": type(m.student).__name__,
    }
    facts |= values_of(m, batch)
    with torch.no_grad():  # the later batches of `finish` are this one
        m.finish(lambda i: batch)
    running = [b.sum() for k, b in m.part("teacher").named_buffers() if "running" in k]
    return facts | {"statistics": round(float(sum(running)), 6)}


def test_the_table_names_every_option():
    assert set(EFFECTS) == {f.name for f in fields(CmedlOptions)}
    for option, (_, value, _) in EFFECTS.items():
        assert value != DEFAULTS[option], option


def test_the_same_options_give_the_same():
    assert everything(PAPER) == everything.__wrapped__(PAPER)


@pytest.mark.parametrize("option", EFFECTS)
def test_an_option_changes_what_it_should_and_nothing_else(option, tmp_path):
    others, value, changes = EFFECTS[option]
    base = replace(PAPER, **others)
    if value == FILE:
        value = str(vgg_file(tmp_path))
    before = everything(base)
    after = everything(replace(base, **{option: value}))
    found = {k for k in before if before[k] != after[k]}
    if changes is None:
        assert {"networks", "weights", "stages", "memory", "adam"} <= found
    else:
        assert found == changes


def vgg_file(folder):
    "Weights of the shapes of VGG19, drawn at random."
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    shapes |= {12: (256, 256), 14: (256, 256), 16: (256, 256), 19: (512, 256)}
    g = torch_rng(0, "vgg")
    weights = {}
    for k, (o, i) in shapes.items():
        weights[f"features.{k}.weight"] = torch.randn(o, i, 3, 3, generator=g) / (3 * i**0.5)
        weights[f"features.{k}.bias"] = torch.zeros(o)
    torch.save(weights, folder / "weights.pth")
    return folder / "weights.pth"


def test_options_that_exclude_each_other_and_words_that_are_unknown():
    for bad in (
        dict(i2i="drit", unlabelled=True),
        dict(seg="house"),
        dict(cx_h=0.0),
        dict(pool=-1),
        dict(beta1=1.0),
    ):
        with pytest.raises(InputError):
            CmedlOptions(**bad)
    assert CMEDL.fit(PAPER, 96) == replace(PAPER, side=96)


def test_fakes_are_made_again_only_if_asked_for():
    before = everything(PAPER)
    after = everything(replace(PAPER, refresh_fake=True))
    step = "after the generators' step"
    assert before[step] == before["seg_pseudo"] == after["seg_pseudo"] != after[step]
