"""CMEDL through the learner: who learns from which term, what a step leaves alone, what a killed
run costs, and what leaves with the student.

What a correct implementation must do, and the tests that look (of this file where no file is
named):

1  weights are counted
    test_cmedl_networks::test_counts
    test_cyclegan::test_counts_and_shapes
    test_drit::test_counts
2  shapes of scores and taps
    test_cmedl_networks::test_shapes_at_256
3  a discriminator sees 70 px, 30 x 30 scores
    test_cyclegan::test_receptive_field_is_70
    test_cyclegan::test_counts_and_shapes
4  range and sides of translations
    test_cyclegan::test_generator_keeps_shape_and_range_and_equals_itself_in_eval
    test_cyclegan::test_bad_images_are_refused
5  contextual loss of an image with itself
    test_contextual::test_identity_order_and_scale
6  order and scale do not matter
    test_contextual::test_identity_order_and_scale
7  it grows with noise
    test_the_contextual_loss_grows_with_noise
8  a collapsed output costs ln N
    test_contextual::test_bounds_and_collapse
9  flat background, and its mask
    test_contextual::test_equal_positions_leave_finite_gradients
    test_flat_background_is_masked_out
10 in blocks as in one piece
    test_contextual::test_blocks_equal_the_whole_matrix
11 half precision
    test_contextual::test_half_precision_and_autocast
    test_contextual::test_vectors_without_length
12 little is kept
    test_contextual::test_nothing_of_matrix_size_is_kept
13 hint between equal networks
    test_identical_networks_have_nothing_to_hint
14 gradients reach whom they should
    test_gradient_flow
    test_each_discriminator_teaches_one_generator
    test_a_frozen_teacher_gives_hints_and_gets_none
    test_translation_first_teaches_the_translation_by_its_own_terms_only
    test_drit::test_gradient_flow
15 a step leaves the others alone
    test_a_step_leaves_the_others_bit_identical
    test_every_pass_moves_the_statistics_once
    test_the_extractor_passes_gradient_and_never_changes
16 perfect generators, blind discriminators
    test_perfect_generators_and_blind_discriminators_pay_nothing
17 the discriminators' memory
    test_cyclegan::test_buffer_fills_then_swaps_half
    test_cyclegan::test_buffer_half_way_and_size_zero_and_batches_larger_than_it
    test_cyclegan::test_buffer_restored_from_state_dict_draws_the_same
18 Dice
    test_losses::test_limits
    test_losses::test_one_logit_is_two
    test_losses::test_gradients
19 soft labels and class means
    test_soft_labels_vanish_at_equal_scores
    test_a_class_mean_reads_its_own_pixels
    test_lessons::test_kl_agrees_with_torch
20 no weight, no forward pass
    test_forward_passes
    test_a_term_without_weight_is_not_in_the_history
    test_mutual_fusion::test_terms_without_weight_make_no_forward_pass
21 the student leaves alone
    test_the_student_leaves_alone
22 the same again, also after a kill
    test_the_same_seed_gives_the_same_losses
    test_resumed_after_every_epoch_it_ends_the_same
23 four images by heart
    test_four_phantoms_are_learnt_by_heart_and_the_hint_is_taken
24 CMEDL against the student alone
    no test: measured over seeds in a chapter of results
25 no patient on two sides
    test_clinical::test_no_patient_is_on_both_sides_in_either_sequence
26 image and label move together
    test_clinical::test_a_warped_disc_and_its_warped_label_agree
    test_augment::test_any_motion_keeps_image_and_label_together
27 scores of shifted spheres
    test_agreement::test_shifted_spheres_have_their_analytic_scores
    test_agreement::test_a_miss_is_counted_left_out_and_imputed
28 unpaired images have no PSNR
    test_quality::test_unpaired_input_is_refused
29 Wilcoxon is scipy's
    test_agreement::test_wilcoxon_reproduces_scipys_manual
30 t-SNE
    test_analysis::test_pixels_are_balanced_bounded_and_the_same_every_time
    test_analysis::test_embedding_is_repeatable_names_its_engine_and_keeps_neighbours
31 DRIT
    test_drit::test_kl
    test_drit::test_undecided_discriminators
    test_drit::test_latent_leaves_no_trace_on_the_style_encoder
32 the share of a translation
    test_mutual_fusion::test_alpha_is_a_share_and_starts_in_the_middle
    test_mutual_fusion::test_a_share_of_nothing_leaves_the_translation_out
33 what VGG19 is shown
    test_vgg_is_shown_the_colours_it_was_trained_on
    test_contextual::test_vgg_is_torchvisions
"""

import copy
from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest
import torch
from torch import nn

from unpaired_kd.core import InputError, get_annotations, seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.distillation.class_means import class_mean_kl
from unpaired_kd.distillation.hints import LEVELS, feature_rms, hint_layers, hint_loss
from unpaired_kd.distillation.soft_labels import soft_label_kl
from unpaired_kd.losses.segmentation import cross_entropy_loss, segmentation_loss, soft_dice_loss
from unpaired_kd.methods.cmedl import CMEDL, CmedlOptions
from unpaired_kd.methods.registry import make_method, options_of
from unpaired_kd.networks.registry import make_network
from unpaired_kd.networks.taps import Taps
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.method import set_modes
from unpaired_kd.training.settings import Settings
from unpaired_kd.translation.contextual import FilterBank, body_mask, contextual_loss
from unpaired_kd.translation.cyclegan import (
    cycle_loss,
    discriminator_gan_loss,
    generator_gan_loss,
    identity_loss,
    to_signed,
)

CHOICES = {
    k: get_args(kind)
    for k, kind in get_annotations(CmedlOptions).items()
    if get_origin(kind) is Literal
}
SMALL = CmedlOptions(side=32, width=4, blocks=1, pool=3, cx_on="filters")
DRIT = replace(SMALL, i2i="drit", side=64)
FREE = {
    "adv": 0.0,
    "content": 0.0,
    "style_kl": 0.0,
    "self": 0.0,
    "cross": 0.0,
    "latent": 0.0,
    "cyc": 0.0,
    "discriminator": 0.0,
    "content_discriminator": 0.0,
}


class Two:
    """Batches of blocks in noise for each source; the batch is a function of (source, step). The
    unlabelled source has no labels."""

    def __init__(self, side=32, classes=2, names=("student", "teacher")):
        self.side = side
        self.n = 2 if side == 32 else 1
        self.classes = classes
        self.names = names

    def batch(self, step, names=None, rank=0):
        return {s: self.one(s, step) for s in names or self.names}

    def one(self, source, step):
        g = torch_rng(0, source, step)
        side = self.side
        label = torch.zeros(self.n, side, side, dtype=torch.long)
        for i in range(self.n):
            y, x = torch.randint(4, side - 14, (2,), generator=g).tolist()
            label[i, y : y + 10, x : x + 10] = 1 + i % (self.classes - 1)
        image = (
            0.3
            + (0.4 if source == "teacher" else 0.2) * (label[:, None] > 0)
            + 0.1 * torch.rand(self.n, 1, side, side, generator=g)
        ).clamp(0, 1)
        return Batch(
            image=image,
            label=None if source == "unlabelled" else label,
            ids=[""] * self.n,
            label_groups=[""] * self.n,
        )


def nets(name="unet", classes=2, width=4):
    config = dict(in_channels=1, classes=1 if classes == 2 else classes, width=width)
    with seeded(0, "s"):
        student = make_network(name, config)
    with seeded(0, "t"):
        teacher = make_network(name, config)
    return student, teacher


def learner(
    folder,
    options=SMALL,
    weights=None,
    epochs=1,
    steps=1,
    data=None,
    lr=1e-3,
    classes=2,
    network="unet",
    teacher_learns=True,
    valid=None,
    **k,
):
    method = CMEDL(*nets(network, classes), options, epochs, seed=0, teacher_learns=teacher_learns)
    if data is None:
        data = Two(
            options.side,
            classes=classes,
            names=("student", "teacher") + (("unlabelled",) if options.unlabelled else ()),
        )
    return Learner(
        method,
        data,
        folder,
        weights=weights,
        valid=valid,
        settings=Settings(
            epochs=epochs,
            steps=steps,
            lr=lr,
            bars=False,
            device="cpu",
            precision="fp32",
            schedule="constant",
            **k,
        ),
    )


def updates(r, stage=0, step=0):
    """Run the updates of one batch through the learner's own `_update`; yields each update when it
    has run, with the values of its terms."""
    stage = r.stages[stage]
    set_modes(r.method, stage)
    batch = r.data.batch(step, stage.draws)
    for u in stage.updates:
        for net in everything(r).values():
            for p in net.parameters():
                p.grad = None
        yield u, r._update(u, [(batch, r._noise(step))])


def everything(r):
    return {**r.method.networks, **r.method.frozen}


def state(r, *names):
    return {
        f"{n}.{k}": v.clone()
        for n, net in everything(r).items()
        if not names or n in names
        for k, v in net.state_dict().items()
    }


def parameters(r):
    return {
        f"{n}.{k}": v.detach().clone()
        for n, net in everything(r).items()
        for k, v in net.named_parameters()
    }


def changed(a, b):
    return {k.split(".")[0] for k in a if not torch.equal(a[k], b[k])}


def same(a, b):
    return a.keys() == b.keys() and not changed(a, b)


class Calls:
    "How often each network runs."

    def __init__(self, networks):
        self.n, self.handles = (
            {},
            [
                net.register_forward_hook(
                    lambda *a, n=n: self.n.__setitem__(n, self.n.get(n, 0) + 1)
                )
                for n, net in networks.items()
            ],
        )

    def __enter__(self):
        return self.n

    def __exit__(self, *error):
        for h in self.handles:
            h.remove()


def calls(r, stage=0):
    with Calls(everything(r)) as n:
        for _ in updates(r, stage):
            pass
    return n


# ---------------------------------------------------------------- the hint


@pytest.mark.parametrize(
    "name,side", [("unet", 32), ("unet_bilinear", 32), ("densefcn", 64), ("mrrn", 32)]
)
@pytest.mark.parametrize("training", [True, False])
def test_identical_networks_have_nothing_to_hint(name, side, training):
    student = nets(name)[0].train(training)
    if name == "densefcn":
        for m in student.modules():
            if isinstance(m, nn.Dropout) or type(m).__name__.startswith("Dropout"):
                m.p = 0.0
    teacher = copy.deepcopy(student)
    x = Two(side).one("student", 0).image
    for level in LEVELS:
        names = hint_layers(student, teacher, level)

        def features(net, names=names):
            with Taps(net, names) as taps:
                net(x)
                return list(taps.take().values())

        f = features(student)
        g = features(teacher)
        assert (
            len(f) == len(names)
            and hint_loss(f, g).item() == 0.0
            and hint_loss(f, g, "sum").item() == 0.0
        )
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch_rng(0, "perturb")))
    loss = hint_loss(features(student), [v.detach() for v in features(teacher)])
    loss.backward()
    assert loss > 0 and feature_rms(f) > 0
    ran = []
    for m in student.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, *a: ran.append(m))
    student(x)
    assert (
        ran[-1].kernel_size == (1, 1) and ran[-1].weight.grad is None and ran[-1].bias.grad is None
    )


def test_hint_reductions_by_hand():
    f = [torch.ones(2, 3, 4, 4), torch.zeros(2, 1, 2, 2)]
    g = [torch.zeros(2, 3, 4, 4), torch.full((2, 1, 2, 2), 2.0)]
    assert hint_loss(f, g) == 1 + 4 and hint_loss(f, g, "sum") == 96 + 4 * 8
    assert hint_loss([v.half() for v in f], g).dtype == torch.float32
    assert feature_rms(g) == 1.0
    for bad, words in [
        ((f, g[:1]), "layers"),
        (([], []), "at least one"),
        ((f, [g[0], g[1][:1]]), "layer 1"),
    ]:
        with pytest.raises(InputError, match=words):
            hint_loss(*bad)
    with pytest.raises(InputError, match="mean"):
        hint_loss(f, g, "max")


# ---------------------------------------------------------------- who learns from what

G = {"g_st", "g_ts"}
D = {"d_t", "d_s"}
BOTH = {"student", "teacher"}
E_G = {"content", "style", "drit_generator"}
CODE_G = {"content", "drit_generator"}
FLOW = [  # options, term, the update that has it, the networks that it reaches
    *[
        (SMALL, term, "generators", who)
        for term, who in [
            ("adv", G),
            ("cyc", G),
            ("idt", G),
            ("cx", {"g_st"}),
            ("hint_g", {"g_st"}),
            ("seg_g", {"g_st"}),
        ]
    ],
    (SMALL, "discriminator", "discriminators", D),
    *[
        (SMALL, term, "segmentors", who)
        for term, who in [
            ("hint", BOTH),
            ("kd", {"student"}),
            ("seg", {"student"}),
            ("seg_teacher", {"teacher"}),
            ("seg_pseudo", {"teacher"}),
            ("seg_fake", {"student"}),
        ]
    ],
    *[
        (replace(SMALL, hint_to="student"), term, "segmentors", who)
        for term, who in [("hint", {"student"}), ("seg_pseudo", {"teacher"})]
    ],
    *[
        (replace(SMALL, refresh_fake=True), term, "segmentors", who)
        for term, who in [("hint", BOTH), ("seg_pseudo", {"teacher"}), ("seg_fake", {"student"})]
    ],
    *[(replace(SMALL, cx_on="teacher"), term, "generators", {"g_st"}) for term in ("cx", "hint_g")],
    *[
        (replace(SMALL, hint=level), term, update, who)
        for level in ("low", "mid")
        for term, update, who in [("hint", "segmentors", BOTH), ("hint_g", "generators", {"g_st"})]
    ],
    *[
        (replace(SMALL, unlabelled=True), term, update, who)
        for term, update, who in [
            ("hint", "segmentors", BOTH),
            ("cx", "generators", {"g_st"}),
            ("seg_g", "generators", {"g_st"}),
            ("kd", "segmentors", {"student"}),
        ]
    ],
    *[
        (DRIT, term, "generators", who)
        for term, who in [
            ("adv", E_G),
            ("content", {"content"}),
            ("style_kl", {"style"}),
            ("self", E_G),
            ("cross", E_G),
            ("code", E_G),
            ("cx", CODE_G),
            ("hint_g", CODE_G),
            ("seg_g", CODE_G),
        ]
    ],
    (DRIT, "latent", "random style", CODE_G),
    (DRIT, "discriminator", "discriminators", {"d_image"}),
    (DRIT, "content_discriminator", "content discriminator", {"d_content"}),
    *[
        (DRIT, term, "segmentors", who)
        for term, who in [("hint", BOTH), ("seg_pseudo", {"teacher"}), ("seg_fake", {"student"})]
    ],
]


def alone(folder, options, term, **k):
    """A learner in which only one term has a weight, without the check that a hint needs a
    translation."""
    method = CMEDL(*nets(), options, 2, 0, **k)
    method.check_weights = lambda weights: None
    names = ("student", "teacher") + (("unlabelled",) if options.unlabelled else ())
    return Learner(
        method,
        Two(options.side, names=names),
        folder,
        weights={t: float(t == term) for t in method.weights},
        settings=Settings(epochs=2, steps=1, bars=False, device="cpu", precision="fp32"),
    )


def flow(r, stage=0):
    """({update: networks that it gave a gradient}, the networks that changed, the terms that were
    computed)."""
    before = parameters(r)
    reached = {}
    terms = set()
    for u, values in updates(r, stage):
        terms |= set(values)
        got = {
            n
            for n, net in everything(r).items()
            if any(p.grad is not None and p.grad.any() for p in net.parameters())
        }
        if got:
            reached[u.name] = got
    return reached, changed(before, parameters(r)), terms


@pytest.mark.parametrize(
    "options,term,update,who", FLOW, ids=lambda v: v if isinstance(v, str) else ""
)
def test_gradient_flow(tmp_path, options, term, update, who):
    reached, moved, terms = flow(alone(tmp_path, options, term))
    assert terms == {term} and reached == {update: who} and moved == who


@pytest.mark.parametrize("silent,who", [("d_s", "g_st"), ("d_t", "g_ts")])
def test_each_discriminator_teaches_one_generator(tmp_path, silent, who):
    r = alone(tmp_path, SMALL, "adv")
    last = [m for m in r.method.networks[silent].modules() if isinstance(m, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
    assert flow(r)[0] == {"generators": {who}}


def test_a_frozen_teacher_gives_hints_and_gets_none(tmp_path):
    r = alone(tmp_path, SMALL, "hint", teacher_learns=False)
    assert flow(r)[:2] == ({"segmentors": {"student"}}, {"student"})
    assert "seg_teacher" not in {
        t for u in r.stages[0].updates for t in u.losses(r.data.batch(0), r._noise(0))
    }
    reached, moved, _ = flow(alone(tmp_path, SMALL, "hint_g", teacher_learns=False))
    assert (reached, moved) == ({"generators": {"g_st"}}, {"g_st"})


@pytest.mark.parametrize("options", [SMALL, DRIT], ids=["cyclegan", "drit"])
def test_translation_first_teaches_the_translation_by_its_own_terms_only(tmp_path, options):
    own = [
        {
            t
            for u in alone(tmp_path, replace(options, translate_first=True), "seg")
            .stages[s]
            .updates
            for t in u.losses(Two(options.side).batch(0), lambda p: torch_rng(0, p))
        }
        for s in (0, 1)
    ]
    assert not own[0] & {"hint_g", "seg_g", "hint", "seg"} and own[1] == {
        "hint",
        "kd",
        "seg",
        "seg_teacher",
        "seg_pseudo",
        "seg_fake",
    }
    reached, moved, _ = flow(alone(tmp_path, replace(options, translate_first=True), "hint"), 1)
    assert reached == {"segmentors": BOTH} and moved == BOTH


def test_the_extractor_passes_gradient_and_never_changes(tmp_path, monkeypatch):
    from unpaired_kd.translation import contextual

    monkeypatch.setattr(
        contextual,
        "load_vgg19",
        lambda *a, **k: {
            f"features.{k}": 0.05 * torch.randn(v.shape, generator=torch_rng(0, k))
            for k, v in contextual.build_vgg19_body().state_dict().items()
        },
    )
    for options in (SMALL, replace(SMALL, cx_on="vgg19", vgg="not read")):
        r = alone(tmp_path, options, "cx")
        before = state(r, "extractor")
        assert (
            before
            and flow(r)[:2] == ({"generators": {"g_st"}}, {"g_st"})
            and same(before, state(r, "extractor"))
        )


# ---------------------------------------------------------------- what a step leaves alone


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        replace(SMALL, cx_on="teacher"),
        DRIT,
        replace(SMALL, refresh_fake=True, unlabelled=True),
    ],
    ids=["cyclegan", "teacher's features", "drit", "all"],
)
def test_a_step_leaves_the_others_bit_identical(tmp_path, options):
    r = learner(
        tmp_path,
        options,
        {"kd": 1.0, "seg_fake": 1.0, "cx": 1.0, **({} if options.i2i == "drit" else {"idt": 1.0})},
    )
    segmentors = ("student", "teacher")
    translation = [n for n in r.method.networks if n not in ("student", "teacher")]
    before = [state(r, *segmentors), state(r, *translation)]
    left = []
    for u, _ in updates(r):
        now = [state(r, *segmentors), state(r, *translation)]
        if u.name == "segmentors":
            assert same(before[1], now[1]) and changed(before[0], now[0]) == set(segmentors)
        else:
            assert same(before[0], now[0]) and changed(before[1], now[1]) - {
                "pool_t",
                "pool_s",
            } == set(u.changes)
        before = now
        left.append(u.name)
    assert left[0] == "generators" and left[-1] == "segmentors"


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        replace(SMALL, cx_on="teacher"),
        replace(SMALL, unlabelled=True),
        replace(SMALL, refresh_fake=True),
        replace(SMALL, refresh_fake=True, cx_on="teacher"),
    ],
    ids=[
        "filters",
        "teacher's features",
        "unlabelled",
        "new fakes",
        "new fakes, teacher's features",
    ],
)
def test_every_pass_moves_the_statistics_once(tmp_path, options):
    r = learner(tmp_path, options)
    student, teacher, g_st = (
        copy.deepcopy(r.method.networks[n]).train() for n in ("student", "teacher", "g_st")
    )
    batch = r.data.batch(0, r.stages[0].draws)
    for _ in updates(r):
        pass
    x = (
        torch.cat([batch["student"].image, batch["unlabelled"].image])
        if options.unlabelled
        else batch["student"].image
    )
    if options.refresh_fake:
        g_st = r.method.networks["g_st"]  # only the fakes that the segmentors learn from count
    with torch.no_grad():
        fake = (g_st(to_signed(x)) + 1) / 2
        student(x)
        other = copy.deepcopy(teacher)
        for net, passes in (
            (teacher, (fake, batch["teacher"].image)),
            (other, (batch["teacher"].image, fake)),
        ):
            for image in passes:
                net(image)

    def buffers(net):
        return dict(net.named_buffers())

    def close(a, b):
        return all(torch.allclose(v, b[k], atol=1e-6) for k, v in a.items())

    mine, theirs = (buffers(r.method.networks[n]) for n in ("student", "teacher"))
    assert close(mine, buffers(student))
    assert {int(v) for k, v in theirs.items() if "tracked" in k} == {2} and (
        close(theirs, buffers(teacher)) or close(theirs, buffers(other))
    )


def naive(r, batch):
    """The losses and gradients of one iteration with every forward pass made where it is needed, on
    copies of the networks."""
    n = {k: copy.deepcopy(v).requires_grad_(True) for k, v in r.method.networks.items()}
    o = r.method.options
    w = r.weights
    s = batch["student"]
    t = batch["teacher"]
    x_s = to_signed(s.image)
    x_t = to_signed(t.image)
    bank = FilterBank().double()

    def unit(v):
        return (v + 1) / 2

    def segment(name, x, layers=r.method.hints):
        with Taps(n[name].train(), layers) as taps:
            return n[name](unit(x)), list(taps.take().values())

    look = (
        (lambda x: segment("teacher", x, r.method.cx_layers)[1])
        if r.method.extractor is None
        else bank
    )

    def st():
        return n["g_st"](x_s)

    def ts():
        return n["g_ts"](x_t)

    def seg(logits, y):
        return soft_dice_loss(logits, y, per_image=True)

    def context():
        return sum(
            contextual_loss(
                a, b, o.cx_h, o.cx_direction, *[body_mask(v, a.shape[2:]) for v in (x_s, x_t)]
            )
            for a, b in zip(look(st()), [f.detach() for f in look(x_t)])
        )

    first = {
        "adv": lambda: generator_gan_loss(n["d_t"](st())) + generator_gan_loss(n["d_s"](ts())),
        "cyc": lambda: cycle_loss(x_s, n["g_ts"](st())) + cycle_loss(x_t, n["g_st"](ts())),
        "idt": lambda: identity_loss(x_t, n["g_st"](x_t)) + identity_loss(x_s, n["g_ts"](x_s)),
        "cx": context,
        "hint_g": lambda: hint_loss(
            [f.detach() for f in segment("student", x_s)[1]], segment("teacher", st())[1]
        ),
        "seg_g": lambda: seg(segment("teacher", st())[0], s.label),
    }
    discriminator = {
        "discriminator": lambda: sum(
            discriminator_gan_loss(n[d](real), n[d](fake.detach()))
            for d, real, fake in (("d_t", x_t, st()), ("d_s", x_s, ts()))
        )
    }

    def pseudo():
        return segment("teacher", st().detach())

    last = {
        "hint": lambda: hint_loss(segment("student", x_s)[1], pseudo()[1]),
        "kd": lambda: soft_label_kl(segment("student", x_s)[0], pseudo()[0].detach(), o.kd_tau),
        "seg": lambda: seg(segment("student", x_s)[0], s.label),
        "seg_fake": lambda: seg(segment("student", ts().detach())[0], t.label),
        "seg_teacher": lambda: seg(segment("teacher", x_t)[0], t.label),
        "seg_pseudo": lambda: seg(pseudo()[0], s.label),
    }
    values = {}
    gradients = {}
    for terms, changes in ((first, G), (discriminator, D), (last, BOTH)):
        for net in n.values():
            net.zero_grad(set_to_none=True)
        found = {k: f() for k, f in terms.items()}
        sum(w[k] * v for k, v in found.items()).backward()
        values |= {k: v.item() for k, v in found.items()}
        gradients |= {f"{k}.{p}": v.grad for k in changes for p, v in n[k].named_parameters()}
    return values, gradients


@pytest.mark.parametrize(
    "options,passes",
    [
        (SMALL, dict(student=2, teacher=2, extractor=2)),
        (replace(SMALL, cx_on="teacher"), dict(student=2, teacher=2)),
    ],
    ids=["filters", "teacher's features"],
)
def test_sharing_forward_passes_changes_no_loss_and_no_gradient(tmp_path, options, passes):
    class Double(Two):
        def one(self, *a):
            return replace(b := super().one(*a), image=b.image.double())

    r = learner(tmp_path, options, {"idt": 5.0, "kd": 1.0, "seg_fake": 1.0}, data=Double())
    for net in everything(r).values():
        net.double()
    values, gradients = naive(r, r.data.batch(0))
    mine = {}
    found = {}
    with Calls(everything(r)) as n:
        for u, terms in updates(r):
            mine |= {k: v.item() for k, v in terms.items()}
            found |= {
                f"{k}.{p}": None if v.grad is None else v.grad.clone()
                for k in u.changes
                for p, v in r.method.networks[k].named_parameters()
            }
    assert mine.keys() == values.keys() and all(
        abs(mine[k] - v) < 1e-6 * max(1, abs(v)) for k, v in values.items()
    )
    assert found.keys() == gradients.keys()
    for k, g in gradients.items():
        assert (g is None) == (found[k] is None) and (
            g is None or (g - found[k]).abs().max() <= 1e-6 * max(1.0, g.abs().max())
        ), k
    assert n == dict(
        g_st=3, g_ts=3, d_t=3, d_s=3, **passes
    )  # one more of each generator for the identity, of the student for seg_fake


# ---------------------------------------------------------------- terms without weight cost nothing

COUNTS = [  # options, weights, forward passes of an iteration
    (SMALL, {}, dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=2, extractor=2)),
    (SMALL, {"idt": 1.0}, dict(g_st=3, g_ts=3, d_t=3, d_s=3, student=1, teacher=2, extractor=2)),
    (SMALL, {"cx": 0.0}, dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=2)),
    (SMALL, {"cyc": 0.0}, dict(g_st=1, g_ts=1, d_t=3, d_s=3, student=1, teacher=2, extractor=2)),
    (
        SMALL,
        {"seg_teacher": 0.0},
        dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=1, extractor=2),
    ),
    (
        SMALL,
        {"seg_fake": 1.0},
        dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=2, teacher=2, extractor=2),
    ),
    (SMALL, {"kd": 1.0}, dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=2, extractor=2)),
    (
        SMALL,
        {"hint": 0.0, "hint_g": 0.0, "seg_g": 0.0, "seg_pseudo": 0.0},
        dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=1, extractor=2),
    ),
    (
        SMALL,
        {
            "hint": 0.0,
            "hint_g": 0.0,
            "seg_g": 0.0,
            "seg_pseudo": 0.0,
            "seg_teacher": 0.0,
            "adv": 0.0,
            "cyc": 0.0,
            "cx": 0.0,
            "discriminator": 0.0,
        },
        dict(student=1),
    ),
    (replace(SMALL, cx_on="teacher"), {}, dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=2)),
    (
        replace(SMALL, refresh_fake=True),
        {},
        dict(g_st=3, g_ts=2, d_t=3, d_s=3, student=1, teacher=3, extractor=2),
    ),
    (
        replace(SMALL, unlabelled=True),
        {},
        dict(g_st=2, g_ts=2, d_t=3, d_s=3, student=1, teacher=2, extractor=2),
    ),
]


@pytest.mark.parametrize("options,weights,expected", COUNTS)
def test_forward_passes(tmp_path, options, weights, expected):
    assert calls(learner(tmp_path, options, weights)) == expected


@pytest.mark.parametrize(
    "term", ["cyc", "cx", "hint_g", "seg_g", "hint", "seg", "seg_teacher", "seg_pseudo", "adv"]
)
def test_a_term_without_weight_is_not_in_the_history(tmp_path, term):
    off = (
        {term: 0.0}
        if term != "adv"
        else {k: 0.0 for k in ("adv", "hint", "hint_g", "seg_g", "seg_pseudo")}
    )
    values = {k for _, v in updates(learner(tmp_path, SMALL, off)) for k in v}
    assert not values & set(off) and len(values) == 10 - len(off)


# ----------------------------------------------- the translation's losses at known places


def test_perfect_generators_and_blind_discriminators_pay_nothing(tmp_path):
    class One(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 1, 3, 3)

    r = learner(tmp_path, SMALL, {"idt": 1.0})
    r.method.networks.update(g_st=nn.Identity(), g_ts=nn.Identity(), d_t=One(), d_s=One())
    batch = r.data.batch(0)
    terms = r.stages[0].updates[0].losses(batch, r._noise(0))
    assert terms["cyc"]() == 0 and terms["adv"]() == 0 and terms["idt"]() == 0
    values = r.stages[0].updates[1].losses(batch, r._noise(0))
    assert (
        values["discriminator"]() == 1.0
    )  # half for real images (right), half for fakes (wrong), two discriminators


def test_the_contextual_loss_grows_with_noise():
    g, noise = (
        f(1, 16, 16, 16, generator=torch_rng(0, n))
        for f, n in ((torch.rand, "g"), (torch.randn, "noise"))
    )
    values = [contextual_loss(g + s * noise, g, 0.5).item() for s in (0.0, 0.1, 0.2, 0.5)]
    assert (
        abs(values[0]) < 1e-6
        and values[0] <= values[1] + 1e-6
        and values[1] < values[2] < values[3]
        and values[3] > 1
    )


def test_flat_background_is_masked_out():
    g = torch.rand(1, 16, 10, 10, generator=torch_rng(0, "g"))
    g[:, :, :5] = g[:, :, :1, :1]
    inside = torch.zeros(1, 10, 10, dtype=torch.bool)
    inside[:, 5:] = True
    assert (
        abs(contextual_loss(g, g).exp() - 1 / (0.5 + 0.01)) < 1e-2
        and contextual_loss(g, g, mask_f=inside, mask_g=inside).abs() < 1e-6
    )


def test_vgg_is_shown_the_colours_it_was_trained_on():
    from unpaired_kd.translation.contextual import VGG19Features

    with pytest.warns(UserWarning, match="random"):
        net = VGG19Features(random=True)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(1, 3, 16, 16)
    assert net.prepare(to_signed(mean)).abs().max() < 1e-6
    assert [f.shape[1] for f in net(to_signed(mean))] == [256, 256, 512]


# ---------------------------------------------------------------- soft labels


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("channels", [1, 4])
def test_soft_labels_vanish_at_equal_scores(tau, channels):
    z, w = (3 * torch.randn(2, channels, 8, 8, generator=torch_rng(0, n)) for n in "zw")
    assert soft_label_kl(z, z.clone(), tau).abs() < 1e-6 < soft_label_kl(z, w, tau)


def test_a_class_mean_reads_its_own_pixels():
    s, t = (torch.randn(1, 4, 8, 8, generator=torch_rng(0, n)) for n in "st")
    y_s = torch.arange(64).remainder(3).reshape(1, 8, 8)
    y_t = torch.ones(
        1, 8, 8, dtype=torch.long
    )  # class 1 only on the teacher's side, class 3 nowhere
    other = torch.where((y_s == 1)[:, None], s, torch.randn(s.shape, generator=torch_rng(0, "o")))
    value = class_mean_kl(s, y_s, t, y_t, 4)
    assert (
        value > 0
        and torch.equal(value, class_mean_kl(other, y_s, t, y_t, 4))
        and not torch.equal(value, class_mean_kl(s + (y_s == 1)[:, None] * t, y_s, t, y_t, 4))
    )
    none = class_mean_kl(s.requires_grad_(), y_s * 0, t, y_t, 4)
    assert none == 0 and (
        not none.requires_grad or torch.autograd.grad(none, s)[0].isfinite().all()
    )


# ---------------------------------------------------------------- repeatability


def test_the_same_seed_gives_the_same_losses(tmp_path):
    def losses(folder, seed=0):
        method = CMEDL(*nets(), SMALL, 1, seed)
        r = Learner(
            method,
            Two(),
            tmp_path / folder,
            seed=seed,
            settings=Settings(epochs=1, steps=5, bars=False, device="cpu", precision="fp32"),
        )
        return [
            {k: v.item() for _, values in updates(r, step=i) for k, v in values.items()}
            for i in range(5)
        ]

    first = losses("a")
    again = losses("b")
    other = losses("c", 1)
    assert first == again and len(first[0]) == 10
    assert all(a["cyc"] != b["cyc"] for a, b in zip(first, other))


RUNS = {
    "cyclegan": replace(SMALL, pool=3, cx_sample=40),
    "drit": replace(DRIT, refresh_fake=True),
    "translate_first": replace(SMALL, translate_first=True),
    "unlabelled": replace(SMALL, unlabelled=True, cx_on="teacher"),
}


@pytest.mark.parametrize("options", RUNS.values(), ids=list(RUNS))
def test_resumed_after_every_epoch_it_ends_the_same(tmp_path, options):
    steps = 1 if options.i2i == "drit" or options.unlabelled else 2

    def one(folder):
        return learner(
            tmp_path / folder,
            options,
            epochs=3,
            steps=steps,
            valid=[Two(options.side).one("student", 99)],
        )

    whole = one("whole")
    history = whole.fit()
    for stop in (steps, 2 * steps):
        r = one("broken")
        draw = r.data.batch

        def batch(step, *a, stop=stop, draw=draw):
            if step == stop:
                raise KeyboardInterrupt
            return draw(step, *a)

        r.data.batch = batch
        with pytest.raises(KeyboardInterrupt):
            r.fit()
        torch.manual_seed(stop)  # another process has another global generator
    last = one("broken")
    assert last.fit() == history and last.position == whole.position
    a, b = (load_checkpoint(tmp_path / f / "last.pt") for f in ("whole", "broken"))
    for part in ("networks", "optimisers"):
        assert equal(a[part], b[part])
    if "pool_t" in a["networks"]:
        assert (
            int(a["networks"]["pool_t"]["count"]) == 3 and a["networks"]["pool_t"]["images"].any()
        )


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_another_option_or_another_frozen_teacher_is_refused(tmp_path):
    learner(tmp_path).fit()
    with pytest.raises(InputError, match="last.pt"):
        learner(tmp_path, replace(SMALL, kd_tau=0.7)).fit()
    learner(tmp_path / "frozen", teacher_learns=False).fit()
    r = learner(tmp_path / "frozen", teacher_learns=False)
    assert r.identity == learner(tmp_path / "frozen", teacher_learns=False).identity
    student, teacher = nets()
    with torch.no_grad():
        teacher.conv1[0].weight.add_(1)
    assert CMEDL(student, teacher, SMALL, 1, teacher_learns=False).identity() != r.method.identity()


# ---------------------------------------------------------------- it learns


def four(modality, side=32):
    "The slice with most tumour of four chest phantoms."
    from unpaired_kd.data.phantoms.chest import ChestKnobs, draw_chest

    knobs = ChestKnobs(size=side, slices=5, pixel=192 / side)
    volumes = [
        [torch.as_tensor(v) for v in draw_chest(modality, 0, p, knobs)[:2]] for p in range(4)
    ]
    at = [int(y.flatten(1).sum(1).argmax()) for _, y in volumes]
    return Batch(
        torch.stack([x[None, i].float() for (x, _), i in zip(volumes, at)]),
        torch.stack([y[i].long() for (_, y), i in zip(volumes, at)]),
        [""] * 4,
        [""] * 4,
    )


@pytest.mark.slow
def test_four_phantoms_are_learnt_by_heart_and_the_hint_is_taken(tmp_path):
    batch = {"student": four("ct"), "teacher": four("mr")}

    class Fixed:
        def batch(self, *a):
            return batch

    method = CMEDL(*nets(width=16), replace(SMALL, seg="dice_ce"), 12)
    history = Learner(
        method,
        Fixed(),
        tmp_path,
        weights={"hint": 2.0, "seg": 10.0},
        valid=[batch["student"]],
        settings=Settings(
            epochs=12, steps=5, lr=5e-3, bars=False, device="cpu", precision="fp32", save_every=100
        ),
    ).fit()
    assert max(h["val_dice"] for h in history) > 0.95
    assert history[-1]["hint"] < 0.5 * max(h["hint"] for h in history[:3])


# ---------------------------------------------------------------- what leaves with the student

ALONE = """
import sys
class Wall:
    def find_spec(self, name, *a):
        needed_in_training = ("methods", "training", "translation.cyclegan", "translation.drit",
                              "translation.contextual")
        if name.startswith(tuple("unpaired_kd." + part for part in needed_in_training)):
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
import numpy as np, torch
from unpaired_kd.inference.student import Student
s = Student.load(sys.argv[1], device="cpu")
np.save(sys.argv[3], s.probabilities(np.load(sys.argv[2])))
"""


def test_the_student_leaves_alone(tmp_path):
    import subprocess
    import sys

    import numpy as np
    from safetensors.torch import load_file

    from unpaired_kd.inference.student import Recipe, Student

    r = learner(tmp_path / "run")
    r.fit()
    bare = nets()[0]
    net = r.best_student().eval()
    assert net is r.method.networks["student"] and type(net) is type(bare)
    folder = Student(
        net, Recipe(channels=1, in_channels=1, network_config=net.config, patch=64)
    ).save(tmp_path / "student")
    saved = load_file(folder / "weights.safetensors")
    assert saved.keys() == bare.state_dict().keys() and all(
        saved[k].shape == v.shape for k, v in bare.state_dict().items()
    )
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in bare.parameters())
    words = (
        "g_st",
        "g_ts",
        "generator",
        "d_t",
        "discriminator",
        "teacher",
        "extractor",
        "features.",
        "pool",
        "alpha",
    )
    assert not [k for k in saved if any(w in k for w in words)]
    image = np.random.default_rng(0).integers(0, 256, (40, 36), np.uint8)
    np.save(tmp_path / "image.npy", image)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder, tmp_path / "image.npy", tmp_path / "out.npy"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert np.array_equal(
        np.load(tmp_path / "out.npy"), Student.load(folder, device="cpu").probabilities(image)
    )
    x = torch.rand(1, 1, 32, 32, generator=torch_rng(0, "x"))
    exported = torch.export.export(net, (x,))
    assert exported.state_dict.keys() <= bare.state_dict().keys()
    with torch.no_grad():
        assert torch.allclose(exported.module()(x), net(x), atol=1e-5)


@pytest.mark.parametrize("options", [SMALL, DRIT], ids=["cyclegan", "drit"])
def test_the_teacher_on_translations_leaves_with_its_translator(tmp_path, options):
    from unpaired_kd.inference.student import Recipe, Student

    r = learner(
        tmp_path / "run",
        replace(options, infer="teacher_on_fake"),
        epochs=2,
        valid=[Two(options.side).one("student", 9)],
    )
    r.fit()
    net = r.best_student().eval()
    x = Two(options.side).one("student", 7).image
    kept = Student.load(
        Student(
            net,
            Recipe(
                channels=1, in_channels=1, network="translated", network_config=net.config, patch=64
            ),
        ).save(tmp_path / "s"),
        device="cpu",
    ).network
    assert not [
        k for k in net.state_dict() if k.startswith(("student", "d_", "g_ts", "pool", "extractor"))
    ]
    n = r.method.networks
    with torch.no_grad():
        if options.i2i == "cyclegan":
            assert torch.allclose(
                net(x), n["teacher"].eval()((n["g_st"](2 * x - 1) + 1) / 2), atol=1e-6
            )
        assert torch.allclose(kept(x), net(x), atol=1e-5) and not torch.allclose(
            net(x), n["student"].eval()(x), atol=1e-3
        )


# ---------------------------------------------------------------- bad input

NEEDS = ("hint", "hint_g", "kd", "seg_g", "seg_pseudo", "seg_fake")


@pytest.mark.parametrize("term", NEEDS)
def test_lessons_need_a_translation(tmp_path, term):
    off = {**{t: 0.0 for t in NEEDS}, "adv": 0.0}
    with pytest.raises(InputError, match=f"{term} need.*adv"):
        learner(tmp_path, SMALL, {**off, term: 1.0})
    learner(tmp_path, SMALL, off)


def test_generators_need_discriminators_that_learn(tmp_path):
    with pytest.raises(InputError, match="discriminator"):
        learner(tmp_path, SMALL, {"discriminator": 0.0})


@pytest.mark.parametrize(
    "options,words",
    [
        *[({name: "x"}, name) for name in CHOICES],
        ({"hint": "top"}, "unknown hint"),
        ({"kd_tau": 0.0}, "kd_tau"),
        ({"rate": -1.0}, "rate"),
        ({"cx_h": 0.0}, "cx_h"),
        ({"pool": -1}, "pool"),
        ({"side": 0}, "side"),
        ({"cx_sample": -1}, "cx_sample"),
        ({"cx_on": "vgg16"}, "unknown cx_on"),
        ({"cx_on": "vgg19", "vgg": "nowhere/vgg19-dcbb9e9d.pth"}, "nowhere"),
        ({"cx_on": "auto", "vgg": "nowhere.pth"}, "nowhere"),
        ({"upsample": "x"}, "upsample"),
        ({"i2i": "drit", "unlabelled": True}, "one to one"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        CMEDL(*nets(), replace(SMALL, **options), 2)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"gan": "x"}, "unknown gan"),
        ({"hint_reduction": "x"}, "reduction"),
        ({"cx_direction": "x"}, "direction"),
    ],
)
def test_wrong_words_for_the_losses_are_refused_before_training(options, words):
    with pytest.raises(InputError, match=words):
        CMEDL(*nets(), replace(SMALL, **options), 2)


def test_networks_that_do_not_fit_are_refused():
    student, teacher = nets()
    with pytest.raises(InputError, match="channels"):
        CMEDL(student, nets(width=8)[1], SMALL, 2)
    with pytest.raises(InputError, match="Bilinear"):
        CMEDL(student, nets("unet_bilinear")[1], SMALL, 2)
    with pytest.raises(InputError, match="classes"):
        CMEDL(student, nets(classes=3)[1], SMALL, 2)
    with pytest.raises(InputError, match="in_channels=3, the student 1"):
        CMEDL(student, make_network("unet", dict(in_channels=3, classes=1, width=4)), SMALL, 2)
    with pytest.raises(InputError, match="2-D"):
        CMEDL(
            *[make_network("unet", dict(in_channels=1, classes=1, width=4, dims=3)) for _ in "st"],
            SMALL,
            2,
        )
    with pytest.raises(InputError, match="two stages"):
        CMEDL(student, teacher, replace(SMALL, translate_first=True), 1)

    class Plain(nn.Conv2d):
        config = dict(in_channels=1, classes=1, dims=2)

    with pytest.raises(InputError, match="hint_layers"):
        CMEDL(Plain(1, 1, 1), Plain(1, 1, 1), SMALL, 2)


def changed_batches(source, **change):
    class Bad(Two):
        def one(self, name, step):
            return (
                replace(
                    super().one(name, step),
                    **{k: f(super(Bad, self).one(name, step)) for k, f in change.items()},
                )
                if name == source
                else super().one(name, step)
            )

    return Bad


@pytest.mark.parametrize("source", ["student", "teacher"])
@pytest.mark.parametrize(
    "change,words",
    [
        (dict(image=lambda b: 2 * b.image), r"\[0,1\]"),
        (dict(image=lambda b: b.image - 1), r"\[0,1\]"),
        (dict(image=lambda b: b.image * float("nan")), r"\[0,1\]"),
        (dict(label=lambda b: None), "labels"),
        (dict(image=lambda b: b.image.expand(-1, 3, -1, -1)), "channels"),
        (
            dict(image=lambda b: b.image[:, :, :24, :24], label=lambda b: b.label[:, :24, :24]),
            "side=32",
        ),
    ],
)
def test_wrong_batches_are_refused_before_the_first_step(tmp_path, source, change, words):
    r = learner(tmp_path, data=changed_batches(source, **change)())
    before = parameters(r)
    with pytest.raises(InputError, match=f"{source}: .*{words}"):
        r.fit()
    assert same(before, parameters(r))


def test_images_that_are_not_square_are_refused_or_work(tmp_path):
    for source in ("student", "teacher"):
        data = changed_batches(
            source, image=lambda b: b.image[:, :, :16], label=lambda b: b.label[:, :16]
        )()
        with pytest.raises(InputError, match="side"):
            learner(tmp_path / source, data=data).fit()


def test_options_from_a_study_are_checked():
    assert options_of("cmedl", "paper", {}, 64) == CmedlOptions(side=64)
    assert options_of(
        "cmedl", "paper", {"side": 32, "kd_tau": 1, "cx_layers": ["conv3"]}, 64
    ) == CmedlOptions(side=32, kd_tau=1, cx_layers=("conv3",))
    for changes, words in [
        ({"tau": 1}, "tau"),
        ({"width": "4"}, "width"),
        ({"unlabelled": 1}, "unlabelled"),
        ({"i2i": "unit"}, "i2i"),
        ({"pool": 3.5}, "pool"),
    ]:
        with pytest.raises(InputError, match=words):
            options_of("cmedl", "paper", changes, 64)
    with pytest.raises(InputError, match="preset"):
        options_of("cmedl", "best", {}, 64)
    with pytest.raises(InputError, match="method"):
        options_of("cmdel", "paper", {}, 64)


@pytest.mark.parametrize("preset", CMEDL.presets)
def test_every_preset_trains(tmp_path, preset):
    options = options_of("cmedl", preset, dict(width=4, blocks=1, cx_on="filters"), 32)
    method = make_method("cmedl", *nets(classes=3), options, 1, 0, preset)
    assert method.weights["idt"] == (5.0 if preset == "released" else 0.0)
    row = Learner(
        method,
        Two(classes=3),
        tmp_path,
        settings=Settings(epochs=1, steps=2, bars=False, device="cpu", precision="fp32"),
    ).fit()[-1]
    assert {
        "adv",
        "cyc",
        "cx",
        "hint",
        "hint_g",
        "seg",
        "seg_pseudo",
        "discriminator",
        "dice_fake",
        "contrast",
        "discriminator_right",
        "rms_teacher",
    } <= row.keys() and ("idt" in row) == (preset == "released")


@pytest.mark.parametrize("name,side", [("unet_bilinear", 32), ("densefcn", 32), ("mrrn", 32)])
def test_every_architecture_trains(tmp_path, name, side):
    r = learner(tmp_path, replace(SMALL, side=side, cx_on="teacher"), network=name)
    assert torch.isfinite(
        torch.tensor([r.fit()[-1][k] for k in ("hint", "cx", "seg", "seg_teacher")])
    ).all()


def test_segmentation_losses_by_name():
    logits = torch.randn(2, 1, 8, 8, generator=torch_rng(0, "l"))
    label = Two(32).one("student", 0).label[:, :8, :8]

    def of(seg):
        return CMEDL(*nets(), replace(SMALL, seg=seg), 1).segmentation(logits, label)

    dice = soft_dice_loss(logits, label, per_image=True)
    ce = cross_entropy_loss(logits, label)
    assert of("common") == segmentation_loss(logits, label)
    assert of("dice") == dice and of("ce") == ce and torch.isclose(of("dice_ce"), dice + ce)


def test_the_segmentors_learn_faster_and_all_have_the_same_moments():
    for options in (SMALL, DRIT):
        adam = CMEDL(*nets(), options, 1).adam
        assert (
            {n for n, a in adam.items() if a["rate"] == 1.0} == {"student", "teacher"}
            and max(a["rate"] for n, a in adam.items() if n not in BOTH) == 0.5
            and {a["betas"] for a in adam.values()} == {(0.5, 0.999)}
        )


def test_only_a_teacher_that_segments_translations_is_calibrated(tmp_path):
    r = learner(tmp_path, steps=2)
    r.fit()
    m = r.method

    def state():
        return copy.deepcopy({k: n.state_dict() for k, n in m.networks.items()})

    before = state()
    m.finish(r._fixed)
    assert all(
        torch.equal(v, before[k][n])
        for k, net in m.networks.items()
        for n, v in net.state_dict().items()
    )
    m.options = replace(m.options, infer="teacher_on_fake", calibrate=True)
    m.finish(r._fixed)
    changed = {
        (k, n.rsplit(".", 1)[1])
        for k, net in m.networks.items()
        for n, v in net.state_dict().items()
        if not torch.equal(v, before[k][n])
    }
    assert (
        {("teacher", "running_mean"), ("teacher", "running_var")}
        <= changed
        <= {("teacher", n) for n in ("running_mean", "running_var", "num_batches_tracked")}
    )
