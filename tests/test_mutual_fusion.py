"""Mutual distillation, fusion, the networks that carry their translator, and the parts of a study
that these methods need."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from studies import make, parts, train_arm
from test_cmedl import (
    Calls,
    Two,
    changed,
    changed_batches,
    equal,
    everything,
    nets,
    parameters,
    updates,
)

from unpaired_kd.core import InputError, seeded, torch_rng
from unpaired_kd.distillation.soft_labels import soft_label_kl
from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.losses.segmentation import soft_dice_loss
from unpaired_kd.methods.fusion import Fusion, FusionOptions
from unpaired_kd.methods.mutual import Mutual, MutualOptions
from unpaired_kd.methods.registry import (
    NoTeacher,
    Peer,
    Pretrained,
    all_methods,
    make_method,
    options_of,
)
from unpaired_kd.networks.registry import build
from unpaired_kd.study.rows import load_rows
from unpaired_kd.study.run import run_study
from unpaired_kd.study.study import Study
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.settings import Settings
from unpaired_kd.translation.cyclegan import Generator
from unpaired_kd.translation.translated import (
    AlphaNet,
    DritTranslator,
    Ensemble,
    Translated,
    fuse_images,
    pack_ensemble,
    pack_translator,
)

MUTUAL = MutualOptions(side=32, width=4, blocks=1, pool=3)
FUSION = FusionOptions(side=32, width=4, blocks=1, pool=3, alpha_width=2)


def learner(folder, method, weights=None, epochs=2, steps=1, data=None, valid=None):
    return Learner(
        method,
        data or Two(),
        folder,
        weights=weights,
        valid=valid,
        settings=Settings(
            epochs=epochs,
            steps=steps,
            bars=False,
            device="cpu",
            precision="fp32",
            schedule="constant",
        ),
    )


def mutual(options=MUTUAL, classes=2):
    return Mutual(*nets(classes=classes), options, 2)


def fusion(fuse="concat", classes=2):
    return Fusion(nets(classes=classes)[0], replace(FUSION, fuse=fuse), 2)


# ---------------------------------------------------------------- mutual distillation

ONLY = {k: 0.0 for k in Mutual.default_weights(MUTUAL)}


class Double(Two):
    def one(self, *a):
        return replace(b := super().one(*a), image=b.image.double())


def plain(student, steps):
    "The student trained on its own labels by a loop of five lines."
    net = student.double().train()
    data = Double()
    adam = torch.optim.AdamW(
        net.parameters(), lr=1e-3, betas=(0.5, 0.999), weight_decay=1e-7, fused=True
    )
    for step in range(steps):
        b = data.batch(step)["student"]
        adam.zero_grad()
        soft_dice_loss(net(b.image), b.label, per_image=True).backward()
        adam.step()
    return net


def test_with_the_labels_alone_the_student_is_trained_as_usual(tmp_path):
    r = learner(tmp_path, mutual(), {**ONLY, "seg": 1.0}, data=Double())
    for net in everything(r).values():
        net.double()
    before = parameters(r)
    for step in range(3):
        for _ in updates(r, 1, step):
            pass
    net = plain(nets()[0], 3)
    assert all(
        torch.allclose(p, q, atol=1e-6)
        for p, q in zip(r.method.networks["student"].parameters(), net.parameters())
    )
    assert changed(before, parameters(r)) == {"student"}


def test_terms_without_weight_make_no_forward_pass(tmp_path):
    r = learner(tmp_path, mutual(), {**ONLY, "seg": 1.0}, data=Double())
    for net in everything(r).values():
        net.double()
    with Calls(everything(r)) as n:
        for _ in updates(r, 1):
            pass
    net = plain(nets()[0], 1)
    assert n == dict(student=1)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(r.method.networks["student"].buffers(), net.buffers())
    )


@pytest.mark.parametrize(
    "term,who",
    [
        ("seg", "student"),
        ("kl", "student"),
        ("seg_assistant", "assistant"),
        ("kl_assistant", "assistant"),
    ],
)
def test_each_segmentor_learns_from_its_own_terms(tmp_path, term, who):
    r = learner(
        tmp_path, mutual(), {**ONLY, "adv": 1.0, "discriminator": 1.0, term: 1.0}
    )  # the translation's terms are of the first stage
    before = parameters(r)
    ((_, values),) = updates(r, 1)
    assert set(values) == {term} and changed(before, parameters(r)) == {who}
    assert {
        n
        for n, net in everything(r).items()
        if any(p.grad is not None and p.grad.any() for p in net.parameters())
    } == {who}


def test_the_first_stage_is_translation_and_the_second_leaves_it_alone(tmp_path):
    r = learner(tmp_path, mutual())
    before = parameters(r)
    for _ in updates(r, 0):
        pass
    assert changed(before, now := parameters(r)) == {"g_st", "g_ts", "d_t", "d_s"}
    with Calls(everything(r)) as n:
        for _ in updates(r, 1):
            pass
    assert changed(now, parameters(r)) == {"student", "assistant"} and n == dict(
        g_ts=1, student=2, assistant=2
    )


def test_mutual_terms_by_hand():
    m = mutual()
    batch = Two().batch(0)
    terms = m.losses(batch, lambda purpose: torch_rng(0, purpose))
    student, assistant = (copy.deepcopy(m.networks[n]) for n in ("student", "assistant"))
    s = batch["student"]
    t = batch["teacher"]
    fake = (m.networks["g_ts"](2 * t.image - 1) + 1) / 2
    expected = {
        "seg": soft_dice_loss(student(s.image), s.label, per_image=True),
        "seg_assistant": soft_dice_loss(assistant(fake), t.label, per_image=True),
        "kl": soft_label_kl(student(s.image), assistant(s.image), 2.0),
        "kl_assistant": soft_label_kl(assistant(fake), student(fake), 2.0),
    }
    for k, v in expected.items():
        assert torch.isclose(terms[k](), v, atol=1e-6)


@pytest.mark.parametrize(
    "make", [mutual, fusion, lambda: fusion("weighted")], ids=["mutual", "concat", "weighted"]
)
def test_resumed_it_ends_the_same(tmp_path, make):
    def one(folder):
        return learner(tmp_path / folder, make(), steps=2, valid=[Two().one("student", 9)])

    whole = one("whole")
    broken = one("broken")
    history = whole.fit()
    draw = broken.data.batch

    def batch(step, *a):
        if step == 2:
            raise KeyboardInterrupt
        return draw(step, *a)

    broken.data.batch = batch
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert one("broken").fit() == history
    a, b = (load_checkpoint(tmp_path / f / "last.pt") for f in ("whole", "broken"))
    assert equal(a["networks"], b["networks"]) and equal(a["optimisers"], b["optimisers"])


@pytest.mark.parametrize("change", [dict(i2i="drit", side=64), dict(unlabelled=True)])
def test_mutual_and_fusion_refuse_what_they_cannot(change):
    with pytest.raises(InputError, match="mutual"):
        mutual(replace(MUTUAL, **change))
    with pytest.raises(InputError, match="fusion"):
        Fusion(nets()[0], replace(FUSION, **change), 2)


def test_the_assistant_may_be_wider_but_reads_and_scores_the_same(tmp_path):
    with seeded(3, "wide"):
        other = build("unet", dict(in_channels=1, classes=1, width=8))
    m = Mutual(nets()[0], other, MUTUAL, 2)
    assert math.isfinite(learner(tmp_path, m).fit()[-1]["kl_assistant"]) and m.student(
        Two().batch(0)["student"].image
    ).shape == (2, 1, 32, 32)
    for odd in (dict(in_channels=3, classes=1), dict(in_channels=1, classes=3)):
        with pytest.raises(
            InputError, match="the assistant has (in_channels|classes)=3, the student 1"
        ):
            Mutual(nets()[0], build("unet", dict(width=4, **odd)), MUTUAL, 2)


def test_more_refusals(tmp_path):
    with pytest.raises(InputError, match="translate_first"):
        Fusion(nets()[0], replace(FUSION, translate_first=False), 2)
    with pytest.raises(InputError, match="fuse"):
        fusion("replace")
    with pytest.raises(InputError, match="two stages"):
        Fusion(nets()[0], FUSION, 1)
    with pytest.raises(InputError, match="labels"):
        learner(tmp_path, mutual(), data=changed_batches("teacher", label=lambda b: None)()).fit()


# ---------------------------------------------------------------- fusion


def test_alpha_is_a_share_and_starts_in_the_middle():
    with seeded(0, "alpha"):
        net = AlphaNet(2, 4)
    x = torch.rand(3, 2, 32, 32, generator=torch_rng(0, "x"))
    assert torch.equal(net(x), torch.full((3, 1, 1, 1), 0.5))
    net.head[-1].weight.data.normal_(0, 0.3, generator=torch_rng(0, "w"))
    a = net(x)
    assert a.shape == (3, 1, 1, 1) and ((a > 0) & (a < 1)).all() and a.std() > 0


def test_a_share_of_nothing_leaves_the_translation_out():
    x, fake = (torch.rand(2, 3, 8, 8, generator=torch_rng(0, n)) for n in ("x", "fake"))

    def of(value):
        return fuse_images(
            x, fake, "weighted", lambda both: torch.full((len(both), 1, 1, 1), value)
        )

    none = of(0.0)
    all_ = of(1.0)
    half = of(0.5)
    assert (
        torch.equal(none[:, :3], x)
        and not none[:, 3:].any()
        and torch.equal(all_[:, 3:], fake)
        and not all_[:, :3].any()
    )
    assert torch.allclose(half, torch.cat([x, fake], 1) / 2)
    assert (
        torch.equal(fuse_images(x, fake, "concat"), torch.cat([x, fake], 1))
        and fuse_images(x, fake, "replace") is fake
    )
    with pytest.raises(InputError, match="fuse"):
        fuse_images(x, fake, "mean")


@pytest.mark.parametrize("fuse", ["concat", "weighted"])
def test_fusion_learns_on_a_finished_translator(tmp_path, fuse):
    r = learner(tmp_path, fusion(fuse, classes=3), data=Two(classes=3))
    assert r.method.networks["student"].config["in_channels"] == 2
    before = parameters(r)
    for _ in updates(r, 0):
        pass
    assert changed(before, now := parameters(r)) == {"g_st", "g_ts", "d_t", "d_s"}
    learners = {"student"} | ({"alpha"} if fuse == "weighted" else set())
    with Calls(everything(r)) as n:
        for _ in updates(r, 1):
            pass
    assert changed(now, parameters(r)) == learners and n == {"g_st": 1, **{k: 1 for k in learners}}


@pytest.mark.parametrize(
    "make,classes,name",
    [
        (mutual, 2, "ensemble"),
        (lambda: mutual(classes=3), 3, "ensemble"),
        (fusion, 2, "translated"),
        (lambda: fusion("weighted", 3), 3, "translated"),
    ],
    ids=["mutual", "mutual 3", "concat", "weighted 3"],
)
def test_what_is_saved_is_whole_and_comes_back(tmp_path, make, classes, name):
    r = learner(
        tmp_path / "run",
        make(),
        data=Two(classes=classes),
        valid=[Two(classes=classes).one("student", 9)],
    )
    r.fit()
    net = r.best_student().eval()
    recipe = Recipe(
        channels=1,
        in_channels=1,
        classes=("background", "a", "b")[:classes],
        network=name,
        network_config=net.config,
        patch=64,
    )
    back = Student.load(Student(net, recipe).save(tmp_path / "s"), device="cpu")
    x = torch.rand(2, 1, 32, 32, generator=torch_rng(0, "x"))
    with torch.no_grad():
        assert torch.allclose(back.network(x), net(x), atol=1e-5)
    assert json.loads((tmp_path / "s/config.json").read_text())["recipe"]["network"] == name
    assert back.predict(np.zeros((40, 36), np.uint8)).shape == (40, 36)
    mine = {id(p) for n in r.method.networks.values() for p in n.parameters()}
    assert {
        id(p) for p in net.parameters()
    } <= mine  # nothing is copied, so it follows the training
    assert not [k for k in net.state_dict() if k.startswith(("d_", "pool", "g_ts"))]


@pytest.mark.parametrize("classes", [2, 4])
def test_an_ensemble_averages_probabilities(classes):
    members = nets(classes=classes)
    x = torch.rand(2, 1, 32, 32, generator=torch_rng(0, "x"))
    members = [m.eval() for m in members]
    p = (lambda z: z.softmax(1)) if classes > 2 else torch.sigmoid
    with torch.no_grad():
        assert torch.allclose(
            p(pack_ensemble(*members)(x)), sum(p(m(x)) for m in members) / 2, atol=1e-5
        )
    with torch.no_grad():
        assert torch.allclose(
            p(pack_ensemble(members[0], members[0])(x)), p(members[0](x)), atol=1e-5
        )


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="in_channels"):
        pack_translator(nets()[0], Generator(1, 4, 1), "concat")
    with pytest.raises(InputError, match="fuse"):
        Translated(fuse="mean")
    with pytest.raises(InputError, match="translator"):
        Translated(network_config=dict(in_channels=1), translator="unit")
    with pytest.raises(InputError, match="2-D"):
        Translated(dims=3)
    with pytest.raises(InputError, match="members"):
        Ensemble()
    with pytest.raises(InputError, match="classes"):
        Ensemble(1, 3, 2, [dict(network="unet", config=dict(in_channels=1, classes=1, width=4))])


@pytest.mark.parametrize(
    "generator,side",
    [(Generator(1, 4, 1), 32), (DritTranslator(1, 4, 1), 32)],
    ids=["cyclegan", "drit"],
)
def test_a_packed_network_is_its_parts_in_a_row(generator, side):
    net = nets()[0].eval()
    x = torch.rand(1, 1, side, side, generator=torch_rng(0, "x"))
    packed = pack_translator(net, generator.eval()).eval()
    with torch.no_grad():
        assert torch.equal(packed(x), net((generator(2 * x - 1) + 1) / 2))
    twin = build("translated", packed.config)
    twin.load_state_dict(packed.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), packed(x))


@pytest.mark.parametrize("kind", ["translated", "ensemble"])
def test_a_packed_student_opens_where_nobody_has_read_translation(tmp_path, kind):
    net = (
        pack_translator(nets()[0], Generator(1, 4, 1))
        if kind == "translated"
        else pack_ensemble(*nets())
    )
    recipe = dict(channels=1, in_channels=1, network=kind, network_config=net.config, patch=64)
    Student(net, Recipe(**recipe)).save(tmp_path / "s")
    code = f"""import sys
from unpaired_kd.inference.student import Student
assert not [m for m in sys.modules if m.startswith("unpaired_kd.translation")]
print(type(Student.load({str(tmp_path / "s")!r}, device="cpu").network).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [type(net).__name__], done.stderr


# ------------------------------------------------------- a study knows methods by their names


def test_the_table_makes_every_method():
    tiny = {
        "cmedl": dict(width=4, blocks=1, cx_on="filters"),
        "mutual": dict(width=4, blocks=1),
        "fusion": dict(width=4, blocks=1, fuse="weighted", alpha_width=2),
    }
    for name, cls in all_methods().items():
        patterns = (
            dict(
                tap="conv4",
                encoder_config=dict(width=4, dim=8, depth=1, heads=1, tokens=4),
                codes=8,
                code_dim=4,
                inner=8,
                decoder=4,
            )
            if name == "vpbsd"
            else {}
        )
        options = options_of(name, "recommended", tiny.get(name, patterns), 32)
        student, teacher = nets()
        m = make_method(
            name,
            student,
            cls.teacher.build(student, options, 2, 0).student
            if isinstance(cls.teacher, Pretrained)
            else teacher,
            options,
            2,
            0,
        )
        assert m.weights.keys() >= {"seg"} and m.stages() and m.networks["student"] is not None
        m.check_weights(m.weights)
        if name in tiny:
            assert (
                options.side == 32
                and cls.teacher
                == {"cmedl": Peer("teacher"), "mutual": Peer("student"), "fusion": NoTeacher()}[
                    name
                ]
            )
    assert options_of("fusion", "recommended", {"fuse": "weighted"}, 32).translate_first
    assert make_method("fusion", *nets(), replace(FUSION), 2, 0).weights == {
        "adv": 1.0,
        "cyc": 10.0,
        "idt": 0.0,
        "discriminator": 1.0,
        "seg": 1.0,
    }
    with pytest.raises(InputError, match="fuse"):
        options_of("mutual", "recommended", {"fuse": "concat"}, 32)


TINY = dict(width=4, blocks=1, pool=3)
NONE = {k: None for k in ("alone", "fine-tuned", "placebo", "distilled")}
CMEDL_ARM = dict(
    method="cmedl", start="scratch", preset="paper", options=dict(**TINY, cx_on="filters")
)
CONFIG = dict(
    patch=48,
    batch=2,
    width=4,
    epochs=2,
    teacher_epochs=1,
    steps=2,
    precision="fp32",
    student_labels=2,
    arms={
        **NONE,
        "cmedl": CMEDL_ARM,
        "on fake": dict(reuses="cmedl", options=dict(infer="teacher_on_fake")),
        "mutual": dict(method="mutual", start="scratch", options=TINY),
        "fusion": dict(method="fusion", start="scratch", options=TINY),
    },
)


def scores(rows, arm):
    return [r["dsc"] for r in rows if r["arm"] == arm]


@pytest.mark.parametrize("arm,kind", [("mutual", Ensemble), ("fusion", Translated)])
def test_a_study_trains_and_scores_the_rivals(tmp_path, arm, kind):
    result = train_arm(tmp_path, make(CONFIG, steps=1, epochs=1), arm, 0, "cpu")
    history = load_checkpoint(tmp_path / "checkpoints" / f"{arm}-0" / "last.pt")["history"]
    assert type(result.network) is kind and [h["stage"] for h in history] == [
        "translate",
        "segment",
    ]  # the student is trained as long as any other
    assert len(load_rows(tmp_path / "checkpoints" / f"{arm}-0" / "metrics.csv")) == len(
        parts(make(CONFIG), 0).student_test
    )


def test_an_arm_that_shares_scores_the_same_training_otherwise(tmp_path):
    arms = {k: v for k, v in CONFIG["arms"].items() if k not in ("mutual", "fusion")}
    config = make(CONFIG, lr=1e-2, steps=12, validation=1, arms=arms)
    place = tmp_path / "checkpoints"
    own = train_arm(tmp_path, config, "cmedl", 0, "cpu").network
    before = (place / "cmedl-0" / "last.pt").read_bytes()
    shown = train_arm(tmp_path, config, "on fake", 0, "cpu").network
    assert (place / "cmedl-0" / "last.pt").read_bytes() == before and not (
        place / "on fake-0" / "last.pt"
    ).exists()
    saved = load_checkpoint(place / "cmedl-0" / "best.pt")["networks"]
    assert (
        equal(dict(shown.segmentor.state_dict()), dict(saved["teacher"]))
        and equal(dict(shown.generator.state_dict()), dict(saved["g_st"]))
        and equal(dict(own.state_dict()), dict(saved["student"]))
    )
    rows = run_study(tmp_path, config, [0])  # nothing is left to do: it collects
    assert (place / "cmedl-0" / "last.pt").read_bytes() == before and {r["arm"] for r in rows} == {
        "cmedl",
        "on fake",
    }
    assert len(scores(rows, "cmedl")) == len(scores(rows, "on fake")) == len(
        parts(config, 0).student_test
    ) and scores(rows, "cmedl") != scores(rows, "on fake")


@pytest.mark.parametrize(
    "arm",
    [
        dict(reuses="nobody", options=dict(infer="student")),
        dict(reuses="late", options=dict(infer="student")),
        dict(reuses="cmedl"),
        dict(reuses="cmedl", options={}),
        dict(reuses="cmedl", options=dict(infer="student", hint="low")),
        dict(reuses="cmedl", options=dict(infer="student"), start="scratch"),
        dict(reuses="cmedl", options=dict(infer="student"), weights={"kd": 1.0}),
        dict(reuses="on fake", options=dict(infer="student")),
        dict(reuses="x", options=dict(infer="student")),
    ],
)
def test_what_may_be_shared(arm):
    with pytest.raises(InputError, match="'x'"):
        make(arms={**CONFIG["arms"], "x": arm, "late": CMEDL_ARM})


def test_a_sharing_arm_is_its_source_with_another_output():
    study = Study(make(CONFIG))
    a = study.arm("cmedl")
    b = study.arm("on fake")
    assert {k: v for k, v in b.record().items() if k not in ("reuses", "options")} == {
        k: v for k, v in a.record().items() if k not in ("reuses", "options")
    }
    assert (
        b.reuses == "cmedl"
        and not a.reuses
        and b.options == {**a.options, "infer": "teacher_on_fake"}
    )


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(early_stop=2), "validation"),
        (dict(teacher_share=0.0), "teacher_share"),
        (dict(teacher_share=1.5), "teacher_share"),
        (dict(teacher_share=-0.5), "teacher_share"),
        (dict(validation=1, stop_on="hd95"), "stop_on"),
        (dict(network="unett"), "unet"),
        (dict(network="densefcn"), "32"),
        (dict(student_labels=10**6, label_unit="groups"), "label budget"),
        (dict(arms={"x": dict(reuses="distilled", options=dict(infer="student"))}), "infer"),
        (
            dict(arms={"x": {**CMEDL_ARM, "options": dict(i2i="drit", unlabelled=True)}}),
            "one to one",
        ),
        (
            dict(
                arms={"x": {**CMEDL_ARM, "options": dict(TINY, cx_on="vgg19", vgg="nowhere.pth")}}
            ),
            "nowhere",
        ),
        (dict(arms={"x": {**CMEDL_ARM, "weights": {"adv": 0}}}), "adv"),
        (dict(arms={"x": {**CMEDL_ARM, "options": dict(TINY, hint="top")}}), "unknown hint"),
        (dict(arms={"x": {**CMEDL_ARM, "options": dict(TINY, gan="x")}}), "gan|GAN"),
        (dict(arms={"x": dict(method="fusion", start="teacher", options=TINY)}), "start"),
        (dict(arms={"x": dict(method="mutual", teacher="placebo", options=TINY)}), "placebo"),
        (
            dict(arms={"x": dict(method="fusion", start="scratch", options=dict(TINY, fuse="x"))}),
            "fuse",
        ),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_written(tmp_path, bad, words):
    arms = {**NONE, **bad.get("arms", {"cmedl": CMEDL_ARM})}
    if "reuses" in next(iter(bad.get("arms", {}).values()), {}):
        arms.pop("distilled")
    with pytest.raises(InputError, match=words):
        run_study(tmp_path / "run", make(CONFIG, **{**bad, "arms": arms}), [0], workers=1)
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_need_patients_that_are_left(tmp_path):
    groups = len(
        set(parts(make(CONFIG), 0).student_train.groups)
        | set(parts(make(CONFIG), 0).student_rest.groups)
    )
    arms = {**NONE, "x": {**CMEDL_ARM, "options": dict(TINY, cx_on="filters", unlabelled=True)}}
    with pytest.raises(InputError, match="'x'.*unlabelled"):
        run_study(
            tmp_path / "run",
            make(CONFIG, student_labels=groups, label_unit="groups", arms=arms),
            [0],
            workers=1,
        )
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_are_learnt_from_and_stay_unlabelled(tmp_path):
    config = make(
        CONFIG,
        epochs=1,
        arms={**NONE, "x": {**CMEDL_ARM, "options": dict(TINY, cx_on="filters", unlabelled=True)}},
    )
    d = parts(config, 0)
    rest = d.student_rest
    assert len(rest) and not set(rest.groups) & {
        *d.student_train.groups,
        *d.student_test.groups,
        *d.student_valid.groups,
    }
    assert Study(config).patches(rest, 0, "unlabelled").batch(0).label is None
    kept = train_arm(tmp_path / "a", config, "x", 0, "cpu").network.state_dict()
    without = make(CONFIG, epochs=1, arms={**NONE, "x": CMEDL_ARM})
    assert not equal(
        dict(kept), dict(train_arm(tmp_path / "b", without, "x", 0, "cpu").network.state_dict())
    )


def test_validation_patients_are_nobody_elses():
    config = make(CONFIG, validation=2, label_unit="groups")
    d = parts(config, 0)
    groups = [
        set(c.groups) for c in (d.student_train, d.student_valid, d.student_rest, d.student_test)
    ]
    assert len(groups[1]) == 2 and sum(map(len, groups)) == len(set.union(*groups))
    without = parts(make(CONFIG, label_unit="groups"), 0)
    assert (
        without.student_train.ids == d.student_train.ids
        and without.student_test.ids == d.student_test.ids
        and not len(without.student_valid)
    )


@pytest.mark.parametrize("stop_on", ["dice", "loss"])
def test_early_stopping_watches_what_it_is_told(tmp_path, stop_on):
    config = make(
        CONFIG,
        validation=2,
        early_stop=1,
        stop_on=stop_on,
        epochs=6,
        steps=1,
        lr=1e-12,
        arms={**NONE, "one": dict(method="single", start="scratch")},
    )
    train_arm(tmp_path, config, "one", 0, "cpu")
    history = load_checkpoint(tmp_path / "checkpoints/one-0/last.pt")["history"]
    watched = [h["val_dice"] if stop_on == "dice" else -h["val_loss"] for h in history]
    best = watched.index(max(watched))
    assert {"val_dice", "val_loss"} <= history[0].keys() and len(history) == min(6, best + 2)
    if stop_on == "dice":
        assert len(history) < 6


def test_a_smaller_share_of_teachers_patients_is_a_part_of_a_larger_one():
    def of(share):
        return set(parts(make(CONFIG, teacher_share=share), 0).teacher_train.groups)

    whole = of(1.0)
    half = of(0.5)
    least = of(1e-6)
    assert least < half < whole and len(half) == round(len(whole) / 2) and len(least) == 1
    tests = [parts(make(CONFIG, teacher_share=s), 0) for s in (1.0, 0.5)]
    assert (
        tests[0].teacher_test.ids == tests[1].teacher_test.ids
        and tests[0].student_train.ids == tests[1].student_train.ids
    )


@pytest.mark.parametrize("name", ["unet_bilinear", "mrrn"])
def test_the_architecture_is_a_field_of_the_study(tmp_path, name):
    config = make(
        CONFIG,
        network=name,
        epochs=1,
        steps=1,
        arms={**NONE, "one": dict(method="single", start="scratch")},
    )
    result = train_arm(tmp_path, config, "one", 0, "cpu")
    back = Student.load(result.save(tmp_path / "s"), device="cpu")
    assert back.recipe.network == name and type(back.network) is type(result.network)
