"""LOTUS beyond its chapter: three dimensions, several taps, every option, number formats,
resumption across the change of stage.
"""

import copy
import math
from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest
import torch

from unpaired_kd.core import InputError, get_annotations, seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.distillation.soft_labels import soft_label_kl
from unpaired_kd.methods.controls import copy_weights, make_placebo
from unpaired_kd.methods.lotus import LOTUS, LotusOptions, Scene
from unpaired_kd.networks.registry import make_network, weights_digest
from unpaired_kd.networks.unet import UNet
from unpaired_kd.training.calibrate import recalibrate_batchnorm
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.rules import NotSettled
from unpaired_kd.training.settings import Settings

# option -> the words that it may be
CHOICES = {
    k: get_args(kind)
    for k, kind in get_annotations(LotusOptions).items()
    if get_origin(kind) is Literal
}


class Two:
    "Teacher and student batches of noise with blocks; the batch is a function of the step."

    def __init__(self, dims=2, classes=2):
        self.dims = dims
        self.classes = classes

    def batch(self, step, names=None, rank=0):
        return {n: self.one(n, step) for n in names or ("student", "teacher")}

    def one(self, name, step):
        g = torch_rng(0, name, step)
        size = 32 if self.dims == 2 else 16
        label = torch.zeros(2, *[size] * self.dims, dtype=torch.long)
        for k in range(1, self.classes):
            label[(slice(None), *[slice(3 * k, 3 * k + 3)] * self.dims)] = k
        image = (
            label[:, None] * (0.3 if name == "student" else -0.3)
            + 0.5
            + 0.1 * torch.randn(2, 1, *[size] * self.dims, generator=g)
        )
        return Batch(image=image, label=label, ids=["", ""], label_groups=["", ""])


def nets(dims=2, classes=2, width=4):
    with seeded(0, "t"):
        teacher = UNet(
            in_channels=1, classes=1 if classes == 2 else classes, width=width, dims=dims
        )
    with seeded(0, "s"):
        student = UNet(
            in_channels=1, classes=1 if classes == 2 else classes, width=width, dims=dims
        )
    return student, recalibrate_batchnorm(
        teacher, [Two(dims, classes).batch(i)["teacher"].image for i in range(2)]
    )


def run(folder, method, data, epochs=2, precision="fp32", **k):
    r = Learner(
        method,
        data,
        folder,
        settings=Settings(
            epochs=epochs, steps=2, bars=False, device="cpu", precision=precision, **k
        ),
    )
    r.fit()
    return r


@pytest.mark.parametrize(
    "dims,classes,taps",
    [(2, 2, ("conv8", "conv9")), (2, 4, ("conv9",)), (3, 3, ("conv9",)), (2, 2, ("conv9.5",))],
)
def test_dimensions_classes_and_taps(tmp_path, dims, classes, taps):
    student, teacher = nets(dims, classes)
    before = copy.deepcopy(teacher.state_dict())
    r = run(
        tmp_path, LOTUS(student, teacher, LotusOptions(taps=taps), epochs=2), Two(dims, classes)
    )
    assert [h["stage"] for h in r.history] == ["denoise", "distil"]
    assert {"seg", "diff", "kl", "gamma"} <= r.history[0].keys() and {
        "seg",
        "kl",
        "ifv",
    } <= r.history[1].keys()
    assert 0 < r.history[0]["gamma"] < 1
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("name,value", [(k, v) for k, values in CHOICES.items() for v in values])
def test_every_choice_trains(tmp_path, name, value):
    student, teacher = nets()
    also = {
        "kl_reduction": dict(correspondence="positional"),
        "ifv_on": dict(correspondence="positional"),
    }.get(name, {})
    r = run(
        tmp_path,
        LOTUS(student, teacher, LotusOptions(side=16, **{name: value}, **also), epochs=2),
        Two(),
        epochs=2,
    )
    assert len(r.history) == 2 and all(
        math.isfinite(v) for h in r.history for v in h.values() if isinstance(v, float)
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("preset", LOTUS.presets)
def test_every_preset_trains_and_leaves_the_teacher_alone(tmp_path, preset, classes):
    student, teacher = nets(classes=classes)
    before = copy.deepcopy(teacher.state_dict())
    r = run(
        tmp_path,
        LOTUS(student, teacher, replace(LOTUS.presets[preset], side=32), epochs=4),
        Two(classes=classes),
        epochs=4,
    )
    assert len(r.history) == 4 and all(
        torch.equal(v, before[k]) for k, v in teacher.state_dict().items()
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(adabn=True),
        dict(kl_reduction="row"),
        dict(ifv_on="logits"),
        dict(kl_reduction="row", correspondence="class"),
    ],
)
def test_choices_that_exclude_each_other(options):
    with pytest.raises(InputError):
        LOTUS(*nets(), LotusOptions(**options))


def test_the_released_total_is_the_published_one():
    with seeded(0):
        m = LOTUS(UNet(), UNet(), LOTUS.presets["released"])
    assert sum(p.numel() for n in m.networks.values() for p in n.parameters()) == 3_016_883


def test_the_released_variation_term_has_no_gradient_for_one_class_and_one_for_more():
    for classes in (2, 3):
        student, teacher = nets(classes=classes)
        m = LOTUS(student, teacher, replace(LOTUS.presets["released"], side=32))
        x = Scene(m, Two(classes=classes).batch(0), lambda p: torch_rng(0, p), clean=False)
        g = torch.autograd.grad(m.ifv(x), x.student[0])[0]
        assert (g.abs().max() == 0) == (classes == 2)


def test_hard_dice_teaches_by_cross_entropy_alone():
    student, teacher = nets()
    grads = []
    for o in (LotusOptions(dice="hard", bce=1.0), LotusOptions(dice="hard", bce=0.0)):
        m = LOTUS(student, teacher, o)
        loss = m.seg(Scene(m, Two().batch(0), lambda p: torch_rng(0, p)))
        grads.append(
            loss.requires_grad
            and torch.autograd.grad(loss, student.conv10.weight)[0].abs().sum().item()
        )
    assert grads[0] > 0 and not grads[1]


def test_a_class_that_one_side_lacks_is_skipped_and_counted(tmp_path):
    class Lacks(Two):
        def one(self, name, step):
            b = super().one(name, step)
            if name == "teacher":
                b.label[b.label == 2] = 0
            return b

    student, teacher = nets(classes=3)
    history = run(tmp_path, LOTUS(student, teacher, epochs=2), Lacks(classes=3)).history
    assert (
        history[0]["skipped"] == 2 and history[1]["skipped"] == 2
    )  # kl and projection, then kl and ifv: class 2 in each
    student, teacher = nets(classes=3)
    assert (
        run(tmp_path / "all", LOTUS(student, teacher, epochs=2), Two(classes=3)).history[0][
            "skipped"
        ]
        == 0
    )


def test_a_gamma_that_never_settles_stops_at_the_cap_and_says_so(tmp_path):
    student, teacher = nets()
    with pytest.warns(NotSettled, match="cap of 2 epochs.*gamma"):
        r = run(tmp_path, LOTUS(student, teacher, epochs=4), Two(), epochs=4)
    assert [h.get("ended") for h in r.history] == [None, "cap", None, None]
    student, teacher = nets()
    r = run(
        tmp_path / "b", LOTUS(student, teacher, LotusOptions(patience=1), epochs=4), Two(), epochs=4
    )
    assert [h.get("ended") for h in r.history] == ["settled", None, None, None]


def test_adapted_statistics_are_those_of_the_students_images_and_are_saved(tmp_path):
    o = LotusOptions(teacher_input="student", adabn=True, correspondence="positional")
    student, teacher = nets()
    m = LOTUS(student, teacher, o, epochs=2)
    r = run(tmp_path, m, Two())
    expected = recalibrate_batchnorm(
        copy.deepcopy(teacher), [r._fixed(i)["student"].image for i in range(8)]
    ).state_dict()
    assert all(torch.allclose(v, expected[k]) for k, v in m.adapted().items())
    assert not torch.allclose(m.adapted()["conv1.1.running_mean"], teacher.conv1[1].running_mean)
    assert any(
        k.endswith("running_mean")
        for k in load_checkpoint(tmp_path / "last.pt")["networks"]["adabn"]
    )


def test_a_student_that_equals_its_adapted_teacher_has_nothing_to_learn():
    student, teacher = nets()
    student.load_state_dict(teacher.state_dict())
    m = LOTUS(
        student.eval(), teacher, LotusOptions(teacher_input="student", correspondence="positional")
    )
    assert m.kl(Scene(m, Two().batch(0), lambda p: torch_rng(0, p))).abs() < 1e-6


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_refuses_another_word(name):
    with pytest.raises(InputError, match=name):
        LOTUS(*nets(), LotusOptions(**{name: "x"}))


@pytest.mark.parametrize(
    "bad",
    [
        dict(taps=()),
        dict(stride=0),
        dict(quantiles=0),
        dict(patience=0),
        dict(denoise_share=0.0),
        dict(head="conv11"),
    ],
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(InputError):
        LOTUS(*nets(), LotusOptions(**bad))


def test_bfloat16_stays_finite_and_close(tmp_path):
    losses = {}
    for p in ("fp32", "bf16"):
        student, teacher = nets()
        losses[p] = run(tmp_path / p, LOTUS(student, teacher, epochs=2), Two(), precision=p).history
    for a, b in zip(losses["fp32"], losses["bf16"]):
        assert abs(a["seg"] - b["seg"]) < 0.02
        assert all(0 < b[k] < 100 for k in ("seg", "diff", "kl", "ifv") if k in b)


def test_recomputed_denoising_gives_the_same_gradient():
    grads = []
    for checkpoint in (False, True):
        student, teacher = nets()
        m = LOTUS(student, teacher, LotusOptions(kl_on="head", checkpoint=checkpoint))
        m.kl(Scene(m, Two().batch(0), lambda purpose: torch_rng(0, purpose))).backward()
        grads.append(student.conv1[0].weight.grad.clone())
    assert grads[0].abs().sum() > 0 and torch.allclose(grads[0], grads[1], atol=1e-7)


def test_stopped_between_the_stages_and_resumed(tmp_path):
    def build(folder):
        student, teacher = nets()
        return Learner(
            LOTUS(student, teacher, epochs=4),
            Two(),
            tmp_path / folder,
            settings=Settings(epochs=4, steps=2, bars=False, device="cpu", precision="fp32"),
        )

    whole = build("whole")
    whole.fit()
    broken = build("broken")
    broken.tell = lambda row: (
        (_ for _ in ()).throw(KeyboardInterrupt) if row["epoch"] == 2 else None
    )
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    build("broken").fit()
    a, b = (load_checkpoint(tmp_path / f / "last.pt")["networks"] for f in ("whole", "broken"))
    assert all(torch.equal(v, b[n][k]) for n in a for k, v in a[n].items())


def test_a_term_without_weight_never_runs_the_teacher(tmp_path):
    student, teacher = nets()
    m = LOTUS(student, teacher, epochs=2)

    def forbidden(*a):
        raise AssertionError("the teacher was run for a loss")

    x = Scene(m, Two().batch(0), lambda p: torch_rng(0, p))
    teacher.forward = forbidden
    m.seg(x).backward()
    with pytest.raises(AssertionError):
        m.kl(x)


def test_the_placebo_differs_from_the_teacher_in_weights_only():
    student, teacher = nets()
    fake = make_placebo(teacher, [Two().batch(i)["teacher"].image for i in range(4)], seed=1)
    assert fake.config == teacher.config and not torch.equal(
        fake.conv1[0].weight, teacher.conv1[0].weight
    )
    assert copy_weights(student, fake) is student and torch.equal(
        student.conv5[0].weight, fake.conv5[0].weight
    )


@pytest.mark.parametrize("dims,classes", [(2, 2), (3, 3)])
def test_joint_training_the_student_also_segments_the_teachers_images(tmp_path, dims, classes):
    student, teacher = nets(dims, classes)
    m = LOTUS(student, teacher, LotusOptions(joint=True), epochs=3)
    r = run(tmp_path, m, Two(dims, classes), epochs=3)
    assert (
        all("seg_teacher" in h for h in r.history)
        and "norms" in load_checkpoint(tmp_path / "last.pt")["networks"]
    )
    student.zero_grad()
    m.distil_losses(Two(dims, classes).batch(0), lambda p: torch_rng(0, p))[
        "seg_teacher"
    ]().backward()
    assert student.conv1[0].weight.grad.abs().sum() > 0 and student.conv1[1].weight.grad is None


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_teachers_features_have_one_scale_at_every_stride(stride):
    student, teacher = nets()
    m = LOTUS(student, teacher, LotusOptions(stride=stride))
    m.begin(m.stages()[0], lambda i: Two().batch(i))
    z = torch.cat([Scene(m, Two().batch(i), None).z_teacher["conv9"] for i in range(8)])
    alive = m.scale("conv9").std > 2e-3
    assert (z.std((0, 2, 3))[alive] - 1).abs().max() < 0.02 and z.mean((0, 2, 3)).abs().max() < 0.02


def test_the_projection_is_learnt_by_all_but_the_student():
    student, teacher = nets()
    m = LOTUS(student, teacher, LotusOptions(), epochs=2)
    m.begin(m.stages()[0], lambda i: Two().batch(i))
    m.denoise_losses(Two().batch(0), lambda p: torch_rng(0, p))["projection"]().backward()
    assert all(p.grad is None for p in student.parameters())
    block = m.part("diffusion", "conv9")
    assert all(
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in n.parameters())
        for n in (m.networks["projector"], block.adapter, block.trans, block.proj)
    )


def test_the_adapted_statistics_reach_the_lesson():
    o = LotusOptions(teacher_input="student", adabn=True, correspondence="positional")
    student, teacher = nets()
    m = LOTUS(student, teacher, o)
    m.begin(m.stages()[0], lambda i: Two().batch(i))
    batch = Two().batch(0)
    expected = recalibrate_batchnorm(
        copy.deepcopy(teacher), [Two().batch(i)["student"].image for i in range(8)]
    )(batch["student"].image)
    seen = Scene(m, batch, None).reference[0]
    assert torch.allclose(seen, expected, atol=1e-5) and not torch.allclose(
        seen, teacher(batch["student"].image), atol=1e-2
    )


def test_a_checkpoint_belongs_to_its_teacher(tmp_path):
    student, teacher = nets()
    run(tmp_path, LOTUS(student, teacher, epochs=2), Two())
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.conv1[0].weight.mul_(1.01)
    with pytest.raises(InputError, match="another method"):
        run(tmp_path, LOTUS(nets()[0], other, epochs=2), Two())


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(ifv_classes=(5,)), "0 to 1"),
        (dict(taps=("conv8",)), "reads 4 channels"),
        (dict(tau=0.0), "tau"),
        (dict(eta=2.0), "eta"),
    ],
)
def test_options_that_do_not_fit_the_networks(bad, words):
    with pytest.raises(InputError, match=words):
        LOTUS(*nets(), LotusOptions(**bad))


@pytest.mark.parametrize(
    "options",
    [
        dict(correspondence="random"),
        dict(correspondence="positional", kl_on="features", kl_reduction="row"),
        dict(kl_on="head", correspondence="positional"),
        dict(teacher_input="student", adabn=True, correspondence="positional"),
        dict(distill_from="raw"),
        dict(projector="width", side=8),
    ],
)
def test_every_way_of_comparing_in_three_dimensions(tmp_path, options):
    student, teacher = nets(dims=3, classes=3)
    r = run(
        tmp_path, LOTUS(student, teacher, LotusOptions(**options), epochs=2), Two(dims=3, classes=3)
    )
    assert [h["stage"] for h in r.history] == ["denoise", "distil"] and all(
        math.isfinite(v) for h in r.history for v in h.values() if isinstance(v, float)
    )


def test_the_released_reduction_is_width_over_channels_times_the_mean_over_pixels():
    student, teacher = nets()
    values = []
    for reduction in ("pixel", "row"):
        m = LOTUS(
            student,
            teacher,
            LotusOptions(
                stride=1,
                kl_on="features",
                correspondence="positional",
                kl_reduction=reduction,
                tau=10.0,
            ),
        )
        x = Scene(m, Two().batch(0), lambda p: torch_rng(0, p), clean=False)
        values.append(m.kl(x))
    width = 32
    channels = 4
    assert torch.isclose(values[1] / values[0], torch.tensor(width / channels))


def test_a_random_partner_is_of_the_same_class_and_another_draw_another_partner():
    student, teacher = nets()
    m = LOTUS(student, teacher, LotusOptions(correspondence="random"))
    terms = [
        m.kl(Scene(m, Two().batch(0), lambda p, s=s: torch_rng(s, p))).item() for s in (0, 0, 1)
    ]
    assert terms[0] == terms[1] != terms[2]


def test_the_fingerprint_of_a_teacher_knows_weights_only():
    _, teacher = nets()
    first = weights_digest(teacher)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert weights_digest(copy.deepcopy(teacher).to(memory_format=torch.channels_last)) == first
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        teacher.conv1[0].weight[0, 0, 0, 0] += 1e-6
    assert weights_digest(teacher) != first


# ---------------------------------------------------------------- two sizes of networks


def wide(width=32, **config):
    with seeded(1, "wide"):
        return recalibrate_batchnorm(
            UNet(**{**dict(in_channels=1, classes=1, width=width), **config}),
            [Two().batch(i)["teacher"].image for i in range(2)],
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(kl_on="head"),
        dict(kl_on="features"),
        dict(correspondence="positional", ifv_on="logits"),
        dict(taps=("conv8", "conv9")),
    ],
    ids=str,
)
def test_a_wide_teacher_teaches_a_narrow_student(tmp_path, options):
    student = nets(width=8)[0]
    teacher = wide()
    before = copy.deepcopy(teacher.state_dict())
    m = LOTUS(student, teacher, LotusOptions(**options), epochs=2)
    x = Scene(m, Two().batch(0), lambda p: torch_rng(0, p))
    assert (
        x.student[1]["conv9"].shape[1] == 8
        and x.projected["conv9"].shape[1] == x.z_teacher["conv9"].shape[1] == 32
    )
    r = run(tmp_path, m, Two())
    assert (
        all(math.isfinite(h[k]) for h in r.history for k in ("seg", "kl"))
        and r.history[1]["ifv"] >= 0
    )
    assert (
        all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
        and student.config["width"] == 8
    )


def test_a_teacher_of_another_network_teaches_where_layers_have_one_name(tmp_path):
    with seeded(2, "other"):
        teacher = recalibrate_batchnorm(
            make_network("unet_bilinear", dict(in_channels=1, classes=1, width=8)),
            [Two().batch(0)["teacher"].image],
        )
    r = run(tmp_path, LOTUS(nets()[0], teacher, epochs=2), Two())
    assert all(math.isfinite(h["kl"]) for h in r.history) and r.history[0]["kl"] > 0
    with pytest.raises(InputError, match="the teacher, a DenseFCN: .*both networks"):
        LOTUS(nets()[0], make_network("densefcn", dict(in_channels=1, classes=1, width=8)))
    with pytest.raises(InputError, match="the student, a DenseFCN: .*both networks"):
        LOTUS(make_network("densefcn", dict(in_channels=1, classes=1, width=8)), teacher)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(projector="none"), "projector='channel'"),
        (dict(taps=("conv11",)), "conv10"),
        (dict(head="head"), "layer of the teacher"),
    ],
)
def test_sizes_that_cannot_meet_are_refused_with_a_reason(options, words):
    with pytest.raises(InputError, match=words):
        LOTUS(nets(width=8)[0], wide(), LotusOptions(**options))


@pytest.mark.parametrize("options", [dict(joint=True), dict(teacher_input="student")], ids=str)
def test_who_sees_the_others_images_reads_as_many_channels(options):
    colour = UNet(in_channels=3, classes=1, width=4)
    LOTUS(nets()[0], colour)  # each looks at its own images
    with pytest.raises(InputError, match="reads 3 channels, the student 1.*same in_channels"):
        LOTUS(nets()[0], colour, LotusOptions(**options))


def test_a_weight_for_the_teachers_images_needs_them():
    m = LOTUS(*nets())
    assert (
        m.weights["seg_teacher"] == 0
        and LOTUS(*nets(), LotusOptions(joint=True)).weights["seg_teacher"] == 0.3
    )
    m.check_weights(m.weights)
    with pytest.raises(InputError, match="joint"):
        m.check_weights({**m.weights, "seg_teacher": 1.0})


# ---------------------------------------------------------------- the release; tau


def test_the_second_stage_of_the_release_compares_bare_features():
    "KL(z_h, conv9 of the student): no projector, no unit length."
    student, teacher = nets()
    m = LOTUS(student, teacher, replace(LOTUS.presets["released"], side=32))
    batch = Two().batch(0)
    value = m.distil_losses(batch, lambda p: torch_rng(0, p))["kl"]()
    taken = {}
    hooks = [
        net.conv9.register_forward_hook(lambda _, __, f, n=n: taken.update({n: f}))
        for n, net in (("student", student), ("teacher", teacher))
    ]
    with torch.no_grad():
        student(batch["student"].image)
        teacher(batch["teacher"].image)
    for hook in hooks:
        hook.remove()
    log_t = (taken["teacher"].double() / 10).log_softmax(1)
    log_s = (taken["student"].double() / 10).log_softmax(1)
    terms = log_t.exp() * (log_t - log_s)  # (B,C,H,W)
    assert value.item() == pytest.approx(terms.sum(-1).mean().item(), rel=1e-4)
    value.backward()
    assert all(p.grad is None for p in m.networks["projector"].parameters())


def test_bare_features_need_equal_channels():
    o = LotusOptions(distill_from="denoised_then_raw")
    with pytest.raises(InputError, match="8 channels in the student and 32 in the teacher"):
        LOTUS(nets(width=8)[0], wide(), o)


@pytest.mark.parametrize("tau", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("correspondence", ["class", "positional"])
def test_tau_squared_keeps_the_size_of_the_gradient(tau, correspondence):
    "With the factor the term is that of the chapter on soft labels; without it, 1/tau^2 of that."
    size = {}
    for squared in (False, True):
        student, teacher = nets()
        o = LotusOptions(correspondence=correspondence, tau=tau, tau_squared=squared)
        m = LOTUS(student, teacher, o)
        x = Scene(m, Two().batch(0), lambda p: torch_rng(0, p))
        size[squared] = torch.autograd.grad(m.kl(x), x.student[0])[0]
        if correspondence == "positional":
            logits = x.student[0].detach().requires_grad_()
            whole = soft_label_kl(logits, x.reference[0], tau, "symmetric", squared)
            (expected,) = torch.autograd.grad(whole, logits)
            assert torch.allclose(size[squared], expected, rtol=1e-4, atol=1e-9)
    assert torch.allclose(size[True], size[False] * tau**2, rtol=1e-4, atol=1e-9)
