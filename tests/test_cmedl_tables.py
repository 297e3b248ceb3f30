"""CMEDL as tables: stages, presets, weights, rates."""

from dataclasses import asdict, replace

import pytest
from test_cmedl_values import PAPER, method

from unpaired_kd.core import seeded
from unpaired_kd.methods.cmedl import CMEDL, CmedlOptions
from unpaired_kd.networks.registry import make_network


def test_the_stages_are_who_changes_in_which_order():
    def table(options):
        return [
            (s.name, s.epochs, s.anew, s.draws, [(u.name, u.changes) for u in s.updates])
            for s in CMEDL(*segmentor_pair(), options, 7, seed=0).stages()
        ]

    both = ("student", "teacher")
    generators = ("generators", ("g_st", "g_ts"))
    discriminators = ("discriminators", ("d_t", "d_s"))
    segmentors = ("segmentors", both)
    assert table(PAPER) == [
        ("together", None, False, both, [generators, discriminators, segmentors])
    ]
    assert table(replace(PAPER, translate_first=True)) == [
        ("translate", 3, True, both, [generators, discriminators]),
        ("segment", None, True, both, [segmentors]),
    ]
    draws = table(replace(PAPER, unlabelled=True))[0][3]
    assert draws == ("student", "teacher", "unlabelled")
    drit = table(replace(PAPER, i2i="drit"))[0][4]
    assert drit == [
        ("generators", ("content", "style", "drit_generator")),
        ("random style", ("content", "drit_generator")),
        ("discriminators", ("d_image",)),
        ("content discriminator", ("d_content",)),
        segmentors,
    ]


def segmentor_pair():
    config = dict(in_channels=1, classes=1, width=2)
    with seeded(0, "pair"):
        return make_network("unet", config), make_network("unet", config)


# ----------------------------------------------------------------- presets and weights as tables

DEFAULTS = dict(
    i2i="cyclegan",
    drit_weights="drit",
    translate_first=False,
    gan="lsgan",
    smooth=1.0,
    pool=50,
    side=256,
    width=64,
    blocks=9,
    upsample="transposed",
    rate=0.5,
    beta1=0.5,
    seg="dice",
    kd_tau=0.5,
    unlabelled=False,
    hint="high",
    hint_to="both",
    hint_reduction="mean",
    refresh_fake=False,
    infer="student",
    calibrate=False,
    cx_on="auto",
    vgg="",
    cx_layers=(),
    cx_h=0.5,
    cx_direction="target",
    cx_mask="body",
    cx_sample=0,
)
PRESETS = {
    "paper": {},
    "released": {"seg": "ce", "refresh_fake": True},
    "recommended": {"seg": "common", "hint_to": "student", "beta1": 0.9},
}
TRANSLATOR = {"adv": 1.0, "cyc": 10.0, "idt": 0.0, "discriminator": 1.0}
HEARD = {"hint_g": 1.0, "seg_g": 5.0}
TAUGHT = {
    "hint": 1.0,
    "kd": 0.0,
    "seg": 5.0,
    "seg_teacher": 5.0,
    "seg_pseudo": 5.0,
    "seg_fake": 0.0,
}
DRIT = {
    "adv": 1.0,
    "content": 1.0,
    "style_kl": 0.01,
    "self": 10.0,
    "cross": 10.0,
    "code": 0.0,
    "latent": 10.0,
    "discriminator": 1.0,
    "content_discriminator": 1.0,
}
DRIT_AS_PRINTED = DRIT | {"style_kl": 1.0, "self": 1.0, "cross": 0.0, "code": 10.0}
WEIGHTS = [  # changes to the options, preset, all weights
    ({}, "paper", TRANSLATOR | {"cx": 1.0} | HEARD | TAUGHT),
    ({}, "released", TRANSLATOR | {"cx": 1.0, "idt": 5.0} | HEARD | TAUGHT),
    (
        {},
        "recommended",
        TRANSLATOR | {"cx": 1.0} | HEARD | TAUGHT | {"hint": 0.1, "hint_g": 0.1},
    ),
    ({"translate_first": True}, "paper", TRANSLATOR | {"cx": 1.0} | TAUGHT),
    ({"translate_first": True}, "recommended", TRANSLATOR | {"cx": 1.0} | TAUGHT | {"hint": 0.1}),
    ({"i2i": "drit"}, "paper", DRIT | {"cx": 0.0} | HEARD | TAUGHT),
    ({"i2i": "drit"}, "released", DRIT | {"cx": 0.0} | HEARD | TAUGHT),
    (
        {"i2i": "drit", "drit_weights": "paper"},
        "paper",
        DRIT_AS_PRINTED | {"cx": 0.0} | HEARD | TAUGHT,
    ),
]


def test_defaults_and_presets():
    assert asdict(CmedlOptions()) == DEFAULTS
    assert {k: asdict(v) for k, v in CMEDL.presets.items()} == {
        k: DEFAULTS | v for k, v in PRESETS.items()
    }


@pytest.mark.parametrize("changes,preset,weights", WEIGHTS)
def test_weights(changes, preset, weights):
    options = CmedlOptions(**changes)
    assert CMEDL.default_weights(options, preset) == weights
    if preset == "paper":
        assert CMEDL.default_weights(options) == weights
        small = replace(options, side=64, width=2, blocks=1)
        assert method(small).weights == weights


def test_a_frozen_teacher_takes_its_terms_along():
    weights = method(PAPER, teacher_learns=False).weights
    assert weights == {
        k: v for k, v in WEIGHTS[0][2].items() if k not in ("seg_teacher", "seg_pseudo")
    }


def test_rates_and_moments():
    m = method(replace(PAPER, rate=0.25, beta1=0.7))
    betas = (0.7, 0.999)
    slow = dict(rate=0.25, betas=betas)
    full = dict(rate=1.0, betas=betas)
    names = ("g_st", "g_ts", "d_t", "d_s", "pool_t", "pool_s")
    assert m.adam == {"student": full, "teacher": full} | dict.fromkeys(names, slow)
    drit = method(replace(PAPER, i2i="drit", side=64)).adam
    assert {k: v["rate"] for k, v in drit.items()} == {
        "student": 1.0,
        "teacher": 1.0,
        "content": 0.5,
        "style": 0.5,
        "drit_generator": 0.5,
        "d_image": 0.5,
        "d_content": 0.2,
    }
