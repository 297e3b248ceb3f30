"""VpbSD through the learner and the study: what stays frozen, what never sees a label, what a
killed run costs, what is exported, and what is refused."""

import copy
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from studies import first_name, learner_of, make, parts, train_arm, train_first
from torch import nn

from unpaired_kd.core import InputError, digest, read_csv, read_json, seeded, torch_rng, write_csv
from unpaired_kd.data.formats.images import Image
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.data.patches import Batch
from unpaired_kd.distillation.codebook import run_kmeans, unit_vectors
from unpaired_kd.losses.segmentation import segmentation_loss
from unpaired_kd.methods import vpbsd as vpbsd_module
from unpaired_kd.methods.registry import make_method, options_of
from unpaired_kd.methods.single import Single
from unpaired_kd.methods.vpbsd import (
    VPBSD,
    FrozenNetwork,
    PatternTeacher,
    Reconstruction,
    VpbsdOptions,
    build_teacher_training,
    draw_random_codes,
    gather_tokens,
    mask_blocks,
    measure_occupancy,
    pattern_health,
    pseudo_loss,
    select_teacher_options,
)
from unpaired_kd.networks.registry import weights_digest
from unpaired_kd.networks.volumes import LightUNet, count_cost
from unpaired_kd.study import run as study_module
from unpaired_kd.study.checks import check_study
from unpaired_kd.study.folder import collect, pretrain_tasks
from unpaired_kd.study.parts import contents, open_both
from unpaired_kd.study.records import DONE, keep_record, read_sealed
from unpaired_kd.study.run import export_student, run_study
from unpaired_kd.study.school import School
from unpaired_kd.study.study import Study
from unpaired_kd.study.trainings import PretrainTask, TeacherTask, finished
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.method import set_modes
from unpaired_kd.training.settings import Settings

ENCODER = dict(width=4, dim=8, depth=1, heads=2, tokens=2)
T = dict(encoder_config=ENCODER, inner=8, decoder=4, codes=16, code_dim=4)
TINY = VpbsdOptions(**T)


class Tubes:
    "Labelled and unlabelled batches of noise with blocks; a batch is a function of (name, step)."

    def __init__(self, dims=3, classes=2, size=None):
        self.dims = dims
        self.classes = classes
        self.size = size or (32,) * 2 if dims == 2 else size or (16,) * 3

    def batch(self, step, names=None, rank=0):
        return {n: self.one(n, step) for n in names or ("student", "unlabelled")}

    def one(self, name, step):
        g = torch_rng(0, name, step)
        label = torch.zeros(2, *self.size, dtype=torch.long)
        for i, at in enumerate(torch.randint(0, 8, (2,), generator=g).tolist()):
            for k in range(1, self.classes):
                label[(i, *[slice((at + 4 * k) % n, (at + 4 * k) % n + 4) for n in self.size])] = k
        image = (
            0.25 * label[:, None] + 0.3 + 0.1 * torch.randn(2, 1, *self.size, generator=g)
        ).clamp(0, 1)
        return Batch(
            image=image,
            label=label if name == "student" else None,
            ids=["", ""],
            label_groups=["", ""],
        )


def light(dims=3, classes=2, seed=0, **k):
    with seeded(seed, "student"):
        return LightUNet(classes=1 if classes == 2 else classes, width=2, dims=dims, **k)


def taught(student, options=TINY, data=None, seed=0):
    """A teacher whose codes are those of k-means on real tokens: as good as a trained one for
    most questions."""
    m = build_teacher_training(student, options, 2, seed)
    m.begin(m.stages()[0], (data or Tubes(student.config["dims"])).batch)
    return m.student.eval()


def method(options=TINY, dims=3, classes=2, seed=0, **k):
    student = light(dims, classes, **k)
    return VPBSD(student, taught(student, options, Tubes(dims, classes)), options, seed=seed)


def runner(folder, m, data=None, epochs=2, steps=2, **k):
    weights = k.pop("weights", None)
    tell = k.pop("tell", lambda row: None)
    return Learner(
        m,
        data or Tubes(),
        folder,
        settings=Settings(
            epochs=epochs, steps=steps, bars=False, device="cpu", precision="fp32", **k
        ),
        weights=weights,
        tell=tell,
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def noise(purpose):
    return torch_rng(0, purpose)


# ---------------------------------------------------------------- the teacher stays (A12)


class Loose(nn.Module):
    "What `Frozen` would be without its protection: the control."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *x):
        return self.net(*x)


class Tyrant(Tubes):
    "Calls `.train()` on one container of all networks before every step."

    def batch(self, *a):
        if self.all is not None:
            self.all.train()
        return super().batch(*a)


def before_and_after(tmp_path, monkeypatch, dims, tyrant, wrapper):
    monkeypatch.setattr(vpbsd_module, "FrozenNetwork", wrapper)
    m = method(dims=dims)
    data = Tyrant(dims)
    data.all = nn.ModuleList([*m.networks.values(), *m.frozen.values()]) if tyrant else None

    def marks():
        return (
            weights_digest(m.pattern_teacher),
            weights_digest(m.pattern_teacher.codebook),
            m.identity()["teacher"],
        )

    before = marks()
    student = weights_digest(m.student)
    runner(tmp_path, m, data).fit()
    assert weights_digest(m.student) != student
    return before, marks(), m


@pytest.mark.parametrize("tyrant", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_teacher_and_its_codebook_stay(tmp_path, monkeypatch, dims, tyrant):
    before, after, m = before_and_after(tmp_path, monkeypatch, dims, tyrant, FrozenNetwork)
    assert before == after
    assert not any(x.training for x in m.pattern_teacher.modules()) and not any(
        p.requires_grad or p.grad is not None for p in m.pattern_teacher.parameters()
    )
    assert m.pattern_teacher.codebook.frozen


def test_without_protection_the_codebook_moves(tmp_path, monkeypatch):
    before, after, _ = before_and_after(tmp_path, monkeypatch, 3, True, Loose)
    assert before[1] != after[1] and before[0] != after[0]


def test_no_container_unfreezes():
    m = method()
    for way in (
        lambda: m.frozen["teacher"].train(),
        lambda: nn.ModuleList([m.frozen["teacher"]]).train(True),
        lambda: m.pattern_teacher.codebook.train(),
    ):
        way()
        assert not m.pattern_teacher.codebook.training
    assert not m.frozen["teacher"].training


# ------------------------------------ without the new terms it is `Single` (A13)


def test_without_semi_and_dis_it_is_single_to_the_bit(tmp_path):
    ours = runner(tmp_path / "v", method(), weights=dict(semi=0, dis=0))
    alone = runner(tmp_path / "s", Single(light()))
    for r in (ours, alone):
        r.fit()
    assert equal(ours.method.student.state_dict(), alone.method.student.state_dict())
    assert not equal(alone.method.student.state_dict(), light().state_dict())
    more = runner(tmp_path / "m", method(), weights=dict(dis=0))
    more.fit()
    assert not equal(more.method.student.state_dict(), alone.method.student.state_dict())


# ---------------------------------------------------------------- stages of the teacher


def finished_teacher(folder, options=TINY, epochs=4, steps=2, data=None, dims=3, **k):
    r = runner(
        folder,
        build_teacher_training(light(dims), options, epochs),
        data or Tubes(dims),
        epochs,
        steps,
        **k,
    )
    return r, r.fit()


def test_two_stages_each_with_its_own_networks_patches_and_rates(tmp_path):
    m = build_teacher_training(light(), TINY, 10)
    first, second = m.stages()
    assert (first.name, first.epochs, first.draws) == ("pretrain", 7, ("unlabelled",)) and (
        second.name,
        second.epochs,
        second.draws,
    ) == ("finetune", None, ("student",))
    assert set(first.updates[0].changes) == {"tokens", "codebook", "reconstruct"} and set(
        second.updates[0].changes
    ) == {"tokens", "segment"}
    r, history = finished_teacher(tmp_path, schedule="constant")
    assert [h["stage"] for h in history] == ["pretrain"] * 3 + ["finetune"]
    assert (
        {"rec", "cb"} <= history[0].keys()
        and "seg" not in history[0]
        and {"seg", "cb"} <= history[-1].keys()
        and "rec" not in history[-1]
    )
    rate = {n: o.param_groups[0]["lr"] for n, o in r.optimisers.items()}
    assert (
        math.isclose(rate["tokens"], 1e-4)
        and math.isclose(rate["segment"], 1e-3)
        and math.isclose(rate["reconstruct"], 1e-3)
    )
    assert r.method.student is r.method.pattern_teacher and set(r.method.networks) == {
        "tokens",
        "codebook",
        "reconstruct",
        "segment",
    }


@pytest.mark.parametrize(
    "epochs,share,lengths",
    [(2, 0.7, (1, 1)), (2, 0.01, (1, 1)), (3, 0.99, (2, 1)), (10, 0.7, (7, 3))],
)
def test_both_stages_have_at_least_one_epoch(epochs, share, lengths):
    first = (
        build_teacher_training(light(), replace(TINY, pretrain=share), epochs).stages()[0].epochs
    )
    assert (first, epochs - first) == lengths


def test_rates_are_factors_and_the_schedule_starts_again(tmp_path):
    r, history = finished_teacher(
        tmp_path, replace(TINY, teacher_rate=0.5, encoder_rate=0.2, pretrain=0.5), epochs=4, steps=4
    )
    lr = [h["lr"] for h in history]
    assert (
        lr[0] > lr[1]
        and lr[2] > lr[3]
        and lr[2] > lr[1]
        and math.isclose(lr[0], lr[2])
        and math.isclose(lr[1], lr[3])
    )
    rate = {n: o.param_groups[0]["lr"] for n, o in r.optimisers.items()}
    assert (
        math.isclose(rate["tokens"], 0.1 * lr[-1])
        and math.isclose(rate["segment"], 0.5 * lr[-1])
        and math.isclose(rate["reconstruct"], 0.5 * lr[1])
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_codes_learn_in_stage_1_and_never_again(tmp_path, dims):
    digests = {}

    def tell(row):
        digests[row["epoch"]] = (
            weights_digest(r.method.codebook),
            weights_digest(r.method.pattern_teacher.segment),
            weights_digest(r.method.networks["reconstruct"]),
        )

    r = runner(
        tmp_path,
        build_teacher_training(light(dims), replace(TINY, pretrain=0.5), 4),
        Tubes(dims),
        epochs=4,
        tell=tell,
    )
    r.fit()
    book, segment, paint = zip(*(digests[e] for e in range(4)))
    assert book[0] != book[1] and book[1] == book[2] == book[3]
    assert segment[0] == segment[1] != segment[2] and paint[0] != paint[1] == paint[2] == paint[3]


@pytest.mark.parametrize("epochs", [4, 10, 20])
def test_restarts_end_before_the_stage_does(tmp_path, epochs):
    """A decay that forgets at once restarts codes in every step while it may; in the last tenth
    of stage 1, and in stage 2, nothing restarts."""
    steps = {4: 21, 10: 4, 20: 2}[epochs]
    counts = []
    m = build_teacher_training(
        light(), replace(TINY, decay=0.5, pretrain=(epochs - 1) / epochs), epochs
    )
    inner = m.pretrain_losses
    m.pretrain_losses = lambda b, n: (counts.append(int(m.codebook.restarted)), inner(b, n))[1]
    history = runner(tmp_path, m, epochs=epochs, steps=steps).fit()
    assert counts[len(counts) // 2] > 0 and history[-1]["restarted"] == int(m.codebook.restarted)
    assert counts[-(len(counts) // 10)] == int(m.codebook.restarted) > counts[-(len(counts) // 5)]


def test_the_monitor_counts_use_error_and_restarts(tmp_path):
    r, history = finished_teacher(tmp_path)
    for h in history:
        assert (
            1 <= h["perplexity"] <= 16
            and 0 < h["active"] <= 1
            and h["rec_over_var"] > 0
            and h["restarted"] == int(h["restarted"])
        )


def test_the_first_codes_are_tokens_and_the_input_is_standardised():
    m = build_teacher_training(light(), TINY, 2)
    data = Tubes()
    m.begin(m.stages()[0], data.batch)
    seen = torch.cat([data.batch(i)["unlabelled"].image.flatten() for i in range(8)])
    t = m.pattern_teacher.tokens
    assert torch.allclose(t.mean, seen.mean()) and torch.allclose(t.std, seen.std())
    x = t.standardise(seen.view(16, 1, 16, 16, 16))
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3
    assert torch.allclose(m.codebook.table.norm(dim=1), torch.ones(16), atol=1e-5)
    before = {k: v.clone() for k, v in m.student.state_dict().items()}
    m.begin(m.stages()[1], data.batch)
    changed = {k for k, v in m.student.state_dict().items() if not torch.equal(v, before[k])}
    assert all(
        k.startswith("tokens.spread.") for k in changed
    )  # statistics of the tokens, nothing that was learned


def test_the_codebook_starts_from_k_means_of_the_tokens():
    m = build_teacher_training(light(), TINY, 2)
    t = copy.deepcopy(m.pattern_teacher.tokens)
    m.begin(m.stages()[0], Tubes().batch)
    t.mean.copy_(m.pattern_teacher.tokens.mean)
    t.std.copy_(m.pattern_teacher.tokens.std)
    expected, _ = run_kmeans(
        gather_tokens(t, lambda i: Tubes().batch(i)["unlabelled"].image, 160),
        16,
        cosine=True,
        seed=m.seed,
    )
    assert torch.allclose(m.codebook.table, expected, atol=1e-5)


def test_tokens_have_mean_0_and_deviation_1_in_every_channel():
    m = build_teacher_training(light(), TINY, 2)
    m.begin(m.stages()[0], Tubes().batch)
    z = (
        m.pattern_teacher.tokens.train()(Tubes().batch(3)["unlabelled"].image)[0]
        .movedim(1, -1)
        .flatten(0, -2)
    )
    assert z.mean(0).abs().max() < 1e-4 and (z.std(0, correction=0) - 1).abs().max() < 1e-2


def test_stage_2_moves_the_statistics_and_pays_for_the_way_to_the_codes():
    m = build_teacher_training(light(), TINY, 2)
    batch = Tubes().batch(5)
    for stage in m.stages():
        m.begin(stage, Tubes().batch)
    set_modes(m, m.stages()[1])
    spread = m.pattern_teacher.tokens.spread
    before = m.pattern_teacher.tokens.spread.running_mean.clone()
    terms = m.finetune_losses(batch, None)
    terms["seg"]()
    assert spread.training and (spread.running_mean - before).abs().max() > 1e-4
    loss = terms["cb"]()
    z = unit_vectors(m.pattern_teacher.tokens(batch["student"].image)[0])
    near = (
        z.movedim(1, -1).flatten(0, -2) @ m.codebook.table.T
    )  # by hand: |z - e|^2 = 2 - 2 cos, mean over channels
    assert (
        loss.item()
        == pytest.approx(m.codebook.beta * (2 - 2 * near.amax(1)).mean().item() / 4, rel=1e-3)
        and loss > 0
    )
    loss.backward()
    assert (
        sum(
            p.grad.abs().sum()
            for p in m.pattern_teacher.tokens.encoder.parameters()
            if p.grad is not None
        )
        > 0
    )


def test_tokens_are_gathered_until_they_are_enough():
    m = build_teacher_training(light(), TINY, 2)
    asked = []
    out = gather_tokens(
        m.pattern_teacher.tokens.train(),
        lambda i: (asked.append(i), Tubes().batch(i)["unlabelled"].image)[1],
        40,
    )
    assert (
        out.shape == (48, 4)
        and asked == [0, 1, 2]
        and m.pattern_teacher.tokens.training
        and not out.requires_grad
    )


def test_blocks_are_hidden():
    x = torch.rand(4, 1, 32, 32, 32, generator=torch_rng(0, "x"))
    y = mask_blocks(x, (8, 8, 8), 0.5, 7.0, torch_rng(0, "h"))
    blocks = (y == 7).view(4, 4, 8, 4, 8, 4, 8).float().mean((2, 4, 6))
    assert set(blocks.unique().tolist()) == {0.0, 1.0} and 0.35 < blocks.mean() < 0.65
    assert torch.equal(y[y != 7], x[y != 7]) and torch.equal(
        mask_blocks(x, (8, 8, 8), 0.0, 7.0, torch_rng(0, "h")), x
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(mask=0.5),
        dict(codebook="euclidean"),
        dict(codebook="fsq"),
        dict(gradient="rotate"),
        dict(quantise=False),
    ],
    ids=str,
)
def test_every_teacher_trains_and_teaches(tmp_path, change):
    options = replace(TINY, **change)
    r, history = finished_teacher(tmp_path / "t", options, epochs=2)
    assert all(math.isfinite(v) for h in history for v in h.values() if isinstance(v, float))
    for target in ("quantised", "random"):
        m = VPBSD(light(), r.method.student, replace(options, target=target))
        h = runner(tmp_path / target, m, epochs=1).fit()[0]
        assert math.isfinite(h["dis"]) and h["dis"] > 0


# ---------------------------------------------------------------- resumed runs


def killed(build, whole_folder, folder, stops):
    """Fit once in one piece; fit again, stopped before each of the batches `stops`; compare
    weights, history and optimisers."""
    whole = build(whole_folder)
    history = whole.fit()
    for stop in stops:
        r = build(folder)
        draw = r.data.batch

        def batch(step, *a, stop=stop, draw=draw):
            if step == stop:
                raise KeyboardInterrupt
            return draw(step, *a)

        r.data.batch = batch
        with pytest.raises(KeyboardInterrupt):
            r.fit()
        torch.manual_seed(stop)
    last = build(folder)
    assert last.fit() == history and last.position == whole.position
    a, b = (load_checkpoint(f / "last.pt") for f in (whole_folder, folder))
    for n in a["networks"]:
        assert equal(a["networks"][n], b["networks"][n]), n
    assert str(a["optimisers"]) == str(b["optimisers"])


@pytest.mark.parametrize(
    "options", [TINY, replace(TINY, mask=0.5, decay=0.5)], ids=["plain", "masked, restarting"]
)
def test_a_killed_teacher_ends_the_same(tmp_path, options):
    """Four epochs of two steps, two in each stage: killed in the second epoch of both, and at
    the change of stage."""
    options = replace(options, pretrain=0.5)
    killed(
        lambda f: runner(f, build_teacher_training(light(), options, 4), epochs=4),
        tmp_path / "a",
        tmp_path / "b",
        (2, 3, 4, 6),
    )


@pytest.mark.parametrize(
    "options",
    [TINY, replace(TINY, target="random", pseudo="soft")],
    ids=["recommended", "random, soft"],
)
def test_a_killed_student_ends_the_same(tmp_path, options):
    killed(lambda f: runner(f, method(options), epochs=3), tmp_path / "a", tmp_path / "b", (2, 5))


def test_a_student_does_not_go_on_with_another_teacher(tmp_path):
    runner(tmp_path, method(), epochs=1).fit()
    student = light()
    other = VPBSD(student, taught(student, seed=1), TINY)
    with pytest.raises(InputError, match="last.pt"):
        runner(tmp_path, other, epochs=1).fit()


# ---------------------------------------------------------------- what the student learns


@pytest.mark.parametrize("kind", ["cosine", "code_ce", "channel", "hint"])
@pytest.mark.parametrize("target", ["quantised", "unquantised", "random"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_pattern_loss_teaches_the_student_and_only_the_student(dims, target, kind):
    if kind == "code_ce" and target == "unquantised":
        with pytest.raises(InputError, match="code_ce"):
            replace(TINY, pattern_loss=kind, target=target)
        return
    options = replace(TINY, pattern_loss=kind, target=target)
    m = method(options, dims)
    data = Tubes(dims)
    loss = m.losses(data.batch(0), noise)["dis"]()
    assert loss.ndim == 0 and loss.isfinite() and loss > 0
    loss.backward()

    def grad(net):
        return sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None)

    assert grad(m.student.bottom) > 0 and grad(m.networks["projector"]) > 0
    assert grad(m.student.head) == 0  # the term ends at the tap
    assert all(p.grad is None for p in m.pattern_teacher.parameters())


def test_the_three_terms_look_at_what_they_should():
    m = method()
    b = Tubes().batch(0)
    asked = {"student": [], "teacher": []}
    m.student.register_forward_pre_hook(lambda net, x: asked["student"].append(x[0]))
    m.pattern_teacher.tokens.register_forward_pre_hook(lambda net, x: asked["teacher"].append(x[0]))
    terms = m.losses(b, noise)
    assert set(terms) == {"seg", "semi", "dis"} == set(m.weights) and not asked["student"]
    terms["seg"]()
    assert (
        len(asked["student"]) == 1
        and not asked["teacher"]
        and torch.equal(asked["student"][0], b["student"].image)
    )
    terms["semi"]()
    assert torch.equal(asked["teacher"][0], b["unlabelled"].image)  # the teacher sees the weak view
    assert not torch.equal(asked["student"][1], b["unlabelled"].image)  # the student another one
    terms["dis"]()
    assert len(asked["student"]) == 2 and len(asked["teacher"]) == 2  # both sides once a patch


def test_equal_views_where_the_strong_change_is_empty():
    m = method(replace(TINY, strong={}))
    b = Tubes().batch(0)
    seen = []
    m.student.register_forward_pre_hook(lambda net, x: seen.append(x[0]))
    m.losses(b, noise)["semi"]()
    assert torch.equal(seen[0], b["unlabelled"].image)


def test_dis_weighs_labelled_and_unlabelled_patches_alike():
    m = method()
    b = Tubes().batch(0)
    b["unlabelled"] = replace(b["unlabelled"], image=b["unlabelled"].image[:1])
    x = vpbsd_module.BatchOutputs(m, b, noise)
    parts = [m.pattern_term(x.student(w)[1], x.teacher(w)) for w in ("labelled", "unlabelled")]
    x2 = m.losses(b, noise)["dis"]()
    assert torch.allclose(x2, (2 * parts[0] + parts[1]) / 3, atol=1e-6)


def test_a_student_that_says_the_code_has_nothing_to_learn():
    m = method()
    m.networks["projector"] = nn.Identity()
    taught = vpbsd_module.BatchOutputs(m, Tubes().batch(0), noise).teacher("unlabelled")
    codes = taught.quantised.codes
    assert m.pattern_term(3 * codes, taught).abs() < 1e-6
    assert m.pattern_term(codes.flip(1), taught) > 1e-6


def test_a_finer_student_is_averaged_to_the_teachers_grid():
    m = method(replace(TINY, tap="join1"))
    loss = m.losses(Tubes().batch(0), noise)["dis"]()
    loss.backward()
    assert loss > 0 and m.student.join1[0].weight.grad.abs().sum() > 0


def test_the_random_codebook_is_a_function_of_the_seed():
    table = torch.nn.functional.normalize(torch.randn(16, 4, generator=torch_rng(0, "t"))) * 3
    a = draw_random_codes(table, 0)
    b = draw_random_codes(table, 0)
    c = draw_random_codes(table, 1)
    assert (
        torch.equal(a, b)
        and not torch.equal(a, c)
        and a.shape == table.shape
        and not torch.allclose(a, table)
    )
    assert torch.allclose(a.norm(dim=1), torch.full((16,), 3.0), atol=1e-5)
    m = [method(replace(TINY, target="random"), seed=s) for s in (0, 0, 1)]
    assert torch.equal(m[0].random_codes, m[1].random_codes) and not torch.equal(
        m[0].random_codes, m[2].random_codes
    )


def test_the_table_is_where_the_teacher_is(monkeypatch):
    "A learner moves the teacher to its device after the method was made."
    m = method(replace(TINY, pattern_loss="code_ce"))
    seen = {}
    taught = vpbsd_module.BatchOutputs(m, Tubes().batch(0), noise).teacher("unlabelled")
    monkeypatch.setattr(
        vpbsd_module, "pattern_loss", lambda u, codes, kind, **k: seen.update(u=u, **k)
    )
    monkeypatch.setattr(vpbsd_module, "average_to_grid", lambda f, size: f)
    m.networks["projector"] = nn.Identity()
    m.frozen["teacher"].to("meta")
    z = taught.tokens.to("meta")
    quantised = type(taught.quantised)(*(t.to("meta") for t in taught.quantised))
    m.pattern_term(torch.empty_like(z), taught._replace(tokens=z, quantised=quantised))
    assert seen["table"].device == seen["u"].device


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(pattern_loss="code_ce"),
        dict(pattern_loss="code_ce", target="random"),
        dict(target="random"),
        dict(pattern_loss="hint"),
        dict(target="unquantised"),
    ],
    ids=str,
)
def test_teacher_and_student_train_on_a_gpu(tmp_path, change):
    options = replace(TINY, **change)
    settings = Settings(epochs=2, steps=2, bars=False, precision="bf16")
    teacher = Learner(
        build_teacher_training(light(), options, 2), Tubes(), tmp_path / "t", settings=settings
    )
    teacher.fit()
    h = Learner(
        VPBSD(light(), teacher.method.student, options), Tubes(), tmp_path / "s", settings=settings
    ).fit()
    assert all(math.isfinite(r["dis"]) for r in h)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_full(tmp_path, precision):
    h = {}
    for p in (precision, "fp32"):
        settings = Settings(epochs=2, steps=2, bars=False, device="cpu", precision=p)
        r = Learner(
            build_teacher_training(light(), TINY, 2), Tubes(), tmp_path / p / "t", settings=settings
        )
        h[p] = (
            r.fit()
            + Learner(
                VPBSD(light(), r.method.student, TINY),
                Tubes(),
                tmp_path / p / "s",
                settings=settings,
            ).fit()
        )
        assert r.method.codebook.table.dtype == torch.float32
    for a, b in zip(h[precision], h["fp32"]):
        for k in ("rec", "cb", "seg", "semi", "dis"):
            assert abs(a.get(k, 0) - b.get(k, 0)) < 0.15


# ---------------------------------------------------------------- pseudo labels

SHAPES = [(2, 1, 8, 8), (2, 1, 6, 6, 6), (2, 3, 8, 8), (2, 3, 6, 6, 6)]


def scores(shape, name):
    return 2 * torch.randn(shape, generator=torch_rng(0, name))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bce", [0.0, 0.5, 1.0])
def test_hard_pseudo_labels_are_labels(shape, bce):
    x = scores(shape, "x").requires_grad_()
    t = scores(shape, "t").requires_grad_()
    label = (t[:, 0] > 0).long() if shape[1] == 1 else t.argmax(1)
    a = pseudo_loss(x, t, bce=bce)
    b = segmentation_loss(x, label, bce=bce)
    assert torch.allclose(a, b, atol=1e-6)
    a.backward()
    assert t.grad is None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pseudo", ["hard", "soft"])
def test_doubtful_voxels_teach_nothing(shape, pseudo):
    x = scores(shape, "x").requires_grad_()
    t = scores(shape, "t")
    p = torch.cat([1 - t.sigmoid(), t.sigmoid()], 1) if shape[1] == 1 else t.softmax(1)
    unsure = p.amax(1) < 0.5 + 0.2
    assert 0 < unsure.float().mean() < 1
    pseudo_loss(x, t, pseudo, doubt=0.2).backward()
    g = x.grad.abs().sum(1)
    assert (g[unsure] == 0).all() and (g[~unsure] > 0).float().mean() > 0.99
    moved = torch.where(unsure[:, None], x.detach() + 5, x.detach())
    assert torch.allclose(
        pseudo_loss(moved, t, pseudo, doubt=0.2), pseudo_loss(x, t, pseudo, doubt=0.2), atol=1e-6
    )


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_a_teacher_without_any_conviction_gives_a_finite_loss_without_gradient(shape):
    x = scores(shape, "x").requires_grad_()
    t = torch.zeros(shape)
    for pseudo in ("hard", "soft"):
        loss = pseudo_loss(x, t, pseudo, doubt=0.3)
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("doubt", [0.0, 0.1])
def test_a_soft_target_is_met_where_student_and_teacher_agree(shape, doubt):
    "No small step away from equality lowers the loss."
    t = scores(shape, "t")
    x = t.clone().requires_grad_()
    at = pseudo_loss(x, t, "soft", doubt)
    for i in range(8):
        for size in (0.02, 0.5):
            assert pseudo_loss(t + size * scores(shape, i), t, "soft", doubt) > at - 1e-6
    for shift in (-0.3, 0.3):
        assert (
            pseudo_loss(
                t
                + shift
                * (
                    torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2)) > 0
                    if shape[1] > 1
                    else 1
                ),
                t,
                "soft",
                doubt,
            )
            > at - 1e-6
        )


def test_half_precision_pseudo_labels():
    x = scores(SHAPES[0], "x")
    t = scores(SHAPES[0], "t")
    half = pseudo_loss(x.bfloat16(), t.bfloat16())
    assert half.dtype == torch.float32 and abs(half - pseudo_loss(x, t)) < 0.02
    assert pseudo_loss(x * 1e4, t * 1e4).isfinite()


# ---------------------------------------------------------------- counts (A17)


def test_the_defaults_cost_what_the_documentation_says():
    cube = (1, 1, 96, 96, 96)
    student = count_cost(LightUNet(), cube)
    assert student["parameters"] == 350_809 and abs(student["flop"] / 1e9 - 23.9) < 0.05
    with seeded(0, "t"):
        teacher = PatternTeacher().eval()
    cost = count_cost(Bypass(teacher), cube)
    assert (
        cost["parameters"] == sum(p.numel() for p in teacher.parameters())
        and abs(cost["parameters"] / 1e6 - 23.25) < 0.3
    )
    assert (
        64 < cost["parameters"] / student["parameters"] < 68
        and 6.5 < cost["flop"] / student["flop"] < 8
    )


class Bypass(nn.Module):
    "The teacher without its codebook, whose search costs next to nothing."

    def __init__(self, teacher):
        super().__init__()
        self.tokens = teacher.tokens
        self.segment = teacher.segment

    def forward(self, x):
        return self.segment(*self.tokens(x))


def test_a_whole_teacher_can_be_counted():
    teacher = taught(light())
    before = weights_digest(teacher)
    whole, bypass = (count_cost(n, (1, 1, 16, 16, 16)) for n in (teacher, Bypass(teacher)))
    assert (
        whole["parameters"] == bypass["parameters"]
        and bypass["flop"] <= whole["flop"] < 1.1 * bypass["flop"]
    )
    assert weights_digest(teacher) == before


# ---------------------------------------------------------------- health


def test_occupancy_is_the_share_of_foreground():
    label = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    label[0, :8, :8, :4] = 1
    label[0, 8:, 8:, 8:] = 2
    o = measure_occupancy(label, (2, 2, 2))
    assert o[0, 0, 0, 0] == 0.5 and o[0, 1, 1, 1] == 1 and o.sum() == 1.5
    assert measure_occupancy(label[:, 0], (2, 2)).shape == (1, 2, 2)


def test_health_changes_nothing_and_counts_all_tokens():
    teacher = taught(light()).train()
    before = weights_digest(teacher)
    h = pattern_health(teacher, [Tubes().one("student", i) for i in range(3)])
    assert weights_digest(teacher) == before and teacher.training and h["tokens"] == 3 * 2 * 8
    assert (
        0 < h["active"] <= 1
        and 1 <= h["perplexity"] <= 16
        and 0 <= h["active_vessel"] <= h["active"]
    )


# ---------------------------------------------------------------- studies

ONLY = {"fine-tuned": None, "placebo": None, "distilled": None}
VESSELS = dict(
    data="phantom:vessels",
    data_options={"volumes": 8, "size": 32},
    teacher="twophoton",
    student="lightsheet",
    dims=3,
    network="light_unet",
    width=2,
    patch=16,
    batch=2,
    epochs=2,
    teacher_epochs=2,
    steps=2,
    student_labels=2,
    test=2,
    teacher_test=1,
    precision="fp32",
    start="scratch",
    arms=ONLY,
)


def with_arms(flat, **arms):
    return dict(
        flat,
        arms={
            **ONLY,
            **{
                k: dict(method="vpbsd", **{"options": T, **v})
                if v is not None and "method" not in v
                else v
                for k, v in arms.items()
            },
        },
    )


def here(monkeypatch):
    "Let studies run in this process: the processes are tested elsewhere."
    monkeypatch.setattr(
        study_module,
        "_run_in_processes",
        lambda tasks, study, tell, workers: study_module._run_here(tasks, study, tell),
    )


ARMS = with_arms(
    VESSELS,
    vpbsd={},
    silent=dict(weights={"semi": 0, "dis": 0}),
    hint=dict(options={**T, "pattern_loss": "hint"}),
    untrained=dict(teacher="placebo"),
    reconstruction=dict(method="reconstruction"),
    recalibrated=dict(method="recalibrated"),
    warm=dict(start="teacher"),
    lotus=dict(method="lotus", start="teacher", options={"taps": ["join1"], "head": "head"}),
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A finished study in three dimensions with every kind of arm that this method brings."
    folder = tmp_path_factory.mktemp("study")
    patch = pytest.MonkeyPatch()
    here(patch)
    try:
        rows = run_study(folder, make(ARMS), [0])
    finally:
        patch.undo()
    return folder, rows


def teacher_of(folder, flat, name):
    "The teacher that an arm gets."
    study = Study(make(flat), folder)
    school = School(study, study.arm(name), 0)
    return VPBSD.teacher.give(school)


def state(folder, arm):
    return load_checkpoint(folder / "checkpoints" / f"{arm}-0" / "last.pt")["networks"]


def test_every_arm_ends_with_scores(study):
    folder, rows = study
    name = first_name(make(ARMS), "vpbsd")
    assert {r["arm"] for r in rows} == {
        "teacher",
        "alone",
        "vpbsd",
        "silent",
        "hint",
        "untrained",
        "reconstruction",
        "recalibrated",
        "warm",
        "lotus",
        name,
    }
    assert len({r["case"] for r in rows if r["arm"] == "vpbsd"}) == 2 and all(
        0 <= r["dsc"] <= 1 for r in rows
    )
    stages = {r["arm"]: r["stage"] for r in read_csv(folder / "history.csv")}
    assert (
        stages["vpbsd"] == "distil"
        and stages[name] == "finetune"
        and stages["reconstruction"] == "train"
    )


def test_a_finished_study_is_not_run_again(study, monkeypatch):
    here(monkeypatch)
    monkeypatch.setattr(Learner, "_epoch", lambda *a: pytest.fail("trained again"))
    assert run_study(study[0], make(ARMS), [0]) == study[1]


def test_a_worker_can_train_and_load_the_teacher(study, monkeypatch):
    from queue import Queue

    queue = Queue()
    name = first_name(make(ARMS), "vpbsd")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    study_module._run_in_worker(PretrainTask(name, 0), make(ARMS), study[0], queue)
    assert queue.empty() and finished(study[0], PretrainTask(name, 0))


def test_one_teacher_for_all_arms_that_want_the_same(study):
    folder = study[0]
    config = make(ARMS)
    assert len(list((folder / "checkpoints").glob("vpbsd teacher*"))) == 1 and first_name(
        config, "hint"
    ) == first_name(config, "silent")
    assert first_name(config, "untrained") == "" == first_name(config, "alone")
    wide = make(with_arms(VESSELS, a={}, b=dict(options={**T, "codes": 17})))
    assert first_name(wide, "a") != first_name(wide, "b")


def test_without_the_new_terms_an_arm_is_the_arm_alone(study):
    assert equal(state(study[0], "silent")["student"], state(study[0], "alone")["student"])
    assert not equal(state(study[0], "vpbsd")["student"], state(study[0], "alone")["student"])
    assert not equal(state(study[0], "vpbsd")["student"], state(study[0], "hint")["student"])
    assert equal(
        state(study[0], "recalibrated")["student"], state(study[0], "alone")["student"]
    )  # until its statistics are measured again


def test_more_seeds_get_their_own_teacher(study):
    assert (
        len(set(pretrain_tasks(Study(make(ARMS)), [0, 1])))
        == 2
        == len(pretrain_tasks(Study(make(ARMS)), [0, 1]))
    )


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(InputError, match=r"vpbsd teacher .*-0 is not finished"):
        learner_of(tmp_path, make(ARMS), "vpbsd", 0)


@pytest.mark.parametrize(
    "damage",
    [
        "decoder of another shape",
        "codebook of another size",
        "no codebook",
        "another network",
        "no checkpoint",
    ],
)
def test_a_teacher_that_does_not_fit_is_named(study, tmp_path, damage):
    name = first_name(make(ARMS), "vpbsd")
    path = tmp_path / "checkpoints" / f"{name}-0" / "last.pt"
    path.parent.mkdir(parents=True)
    saved = load_checkpoint(study[0] / "checkpoints" / f"{name}-0" / "last.pt")
    n = saved["networks"]
    if damage == "decoder of another shape":
        n["segment"] = {k: v[:1] for k, v in n["segment"].items()}
    if damage == "codebook of another size":
        n["codebook"]["table"] = torch.zeros(8, 4)
    if damage == "no codebook":
        del n["codebook"]
    if damage == "another network":
        saved["networks"] = {"student": light().state_dict()}
    torch.save(saved, path)
    if damage == "no checkpoint":
        path.write_bytes(b"nothing")
    keep_record(
        path.parent,
        ["last.pt"],
        task=["first", name, 0],
        data=digest(contents(make(ARMS).images), 64),
    )
    with pytest.raises(InputError, match=r"last\.pt"):
        teacher_of(tmp_path, ARMS, "vpbsd")


def test_the_teacher_of_an_arm_is_the_trained_one(study):
    teacher = teacher_of(study[0], ARMS, "vpbsd")
    name = first_name(make(ARMS), "vpbsd")
    saved = state(study[0], name)
    assert torch.equal(teacher.codebook.table, saved["codebook"]["table"]) and equal(
        teacher.tokens.state_dict(), saved["tokens"]
    )
    untrained = teacher_of(study[0], ARMS, "untrained")
    assert not torch.equal(untrained.codebook.table, saved["codebook"]["table"])


# ---------------------------------------------------------------- what is exported (A16)

ALONE = """
import sys
class Wall:
    def find_spec(self, name, *a):
        for room in (
            "methods",
            "distillation.codebook",
            "distillation.patterns",
            "training",
            "study.run",
        ):
            if name.startswith("unpaired_kd." + room): raise ImportError(name)
sys.meta_path.insert(0, Wall())
import numpy as np, torch
from unpaired_kd.inference.student import Student
s = Student.load(sys.argv[1], device="cpu")
np.save(sys.argv[3], s.predict(np.load(sys.argv[2])))
part = s.prepare(np.load(sys.argv[2])[:16, :, :24]).contiguous()
with torch.no_grad(): np.save(sys.argv[4], s.network.eval()(part).numpy())
"""


def test_the_student_leaves_alone(study, tmp_path):
    from safetensors.torch import load_file

    folder = export_student(Study(make(ARMS), study[0]), study[1], arm="vpbsd")
    saved = load_file(folder / "weights.safetensors")
    bare = light()
    assert saved.keys() == bare.state_dict().keys() and equal(
        saved, state(study[0], "vpbsd")["student"]
    )
    assert not [
        k
        for k in saved
        if any(
            w in k for w in ("teacher", "codebook", "table", "projector", "phi", "tokens", "pi_in")
        )
    ]
    image = np.random.default_rng(0).integers(0, 256, (21, 24, 30), np.uint8)
    np.save(tmp_path / "image.npy", image)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE,
            folder,
            tmp_path / "image.npy",
            tmp_path / "label.npy",
            tmp_path / "logits.npy",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    bare.load_state_dict(saved)
    trained = train_arm(study[0], make(ARMS), "vpbsd", 0)  # finished: only loaded
    with torch.no_grad():
        z = trained.network.eval()(trained.prepare(image[:16, :, :24])).numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - z).max() < 1e-6
    assert (
        np.array_equal(np.load(tmp_path / "label.npy"), trained.predict(image))
        and np.load(tmp_path / "label.npy").shape == image.shape
    )


# ------------------------------------ no label of an unlabelled volume is read (A14)


def folders(place, n=8, size=16):
    "A data set of small TIFF volumes, two modalities."
    for modality, base in (("bright", 60), ("dark", 120)):
        for i in range(n):
            b = Tubes(size=(size,) * 3).one("student", base + i)
            write_image(
                place / modality / "images" / f"{modality}{i}.tif",
                Image((255 * b.image[0]).byte().numpy(), spacing=(1.0, 1.0, 1.0)),
            )
            write_label(
                place / modality / "labels" / f"{modality}{i}.tif",
                b.label[0].numpy().astype(np.uint8),
            )
    return str(place)


def on_folders(data, **k):
    return make(
        with_arms(
            dict(
                VESSELS,
                data=data,
                data_options={"label_kind": "semantic"},
                classes=["background", "vessel"],
                teacher="dark",
                student="bright",
                bright_share=0.5,
                **k,
            ),
            vpbsd={},
        )
    )


@pytest.mark.filterwarnings("ignore:.*groups.csv")
def test_labels_of_unlabelled_volumes_are_never_read(tmp_path, monkeypatch):
    """They are there, as a data set has them, and hold nothing that could be read; opening looks
    at the first volume only."""
    from unpaired_kd.data.formats import images

    data = folders(tmp_path / "data")
    read = []
    config = on_folders(data)
    opened = images.read_label
    rest = parts(config, 0).student_rest.ids
    hidden_files = [
        tmp_path / "data" / "bright" / "labels" / f"{i}.tif" for i in rest if i != "bright0"
    ]
    for f in hidden_files:
        f.write_bytes(b"no image")
    monkeypatch.setattr(
        images, "read_label", lambda p, *a, **k: (read.append(str(p)), opened(p, *a, **k))[1]
    )
    d = parts(config, 0, tmp_path / "run")
    run = tmp_path / "run"
    assert len(set(read)) <= 2  # with names and kind of the classes given
    assert d.student_rest.ids == rest and len(rest) == 4 and not d.student_rest.has_labels
    train_first(run, config, first_name(config, "vpbsd"), 0, "cpu")
    train_arm(run, config, "vpbsd", 0, "cpu")
    assert read and not set(read) & {str(f) for f in hidden_files}
    first = {str(c.cases[0].label) for c in open_both(config.images)}
    used = {
        str(c.label)
        for part in (d.student_train, d.student_test, d.teacher_train)
        for c in part.cases
    }
    assert set(read) <= used | first


def test_what_has_no_label_cannot_be_asked_for_one():
    d = parts(make(ARMS), 0)
    assert (
        all(c.label is None for c in d.student_rest.cases)
        and not d.student_rest.has_labels
        and set(d.student_rest.label_groups) == {""}
    )
    b = Study(make(ARMS)).patches(d.student_rest, 0, "unlabelled", True).batch(0)
    assert b.label is None and b.image.shape == (2, 1, 16, 16, 16)


BONE = dict(
    data="phantom:bone",
    data_options={"patients": 6, "images_per_patient": 1, "knobs": {"size": 64}},
    network="light_unet",
    network_options={"dims": 2},
    width=2,
    patch=32,
    batch=2,
    epochs=2,
    teacher_epochs=2,
    steps=2,
    student_labels=2,
    test=2,
    teacher_test=1,
    precision="fp32",
    start="scratch",
)


def test_the_disease_of_an_unlabelled_image_is_forgotten():
    d = parts(make(with_arms(BONE, vpbsd={})), 0)
    assert set(d.student_train.label_groups) - {""} and set(d.student_rest.label_groups) == {""}


def test_unlabelled_patches_are_moved_and_not_recoloured(study):
    patches = learner_of(study[0], make(ARMS), "vpbsd", 0).data.patches
    colours = ("brightness", "contrast", "gamma", "noise", "blur", "hue")

    def change(n):
        return {c: getattr(patches[n].augment, c) for c in colours}

    assert (
        not any(change("unlabelled").values())
        and any(change("student").values())
        and patches["unlabelled"].augment.flip
    )
    assert set(learner_of(study[0], make(ARMS), "alone", 0).data.patches) == {"student", "teacher"}


# ---------------------------------------------------------------- who is where (A15)

SPLITS = [
    dict(),
    dict(unlabelled=2),
    dict(validation=2),
    dict(validation=1, unlabelled=1),
    dict(score_on="validation"),
    dict(score_on="validation", unlabelled=1),
    dict(score_on="validation", validation=1, unlabelled=1),
    dict(label_unit="groups"),
    dict(test=0.5),
]


@pytest.mark.parametrize("change", SPLITS, ids=str)
def test_no_group_is_in_two_parts(tmp_path, change):
    config = make(ARMS, data_options={"volumes": 10, "size": 24}, **change)
    kept = {}
    for seed in (0, 1, 2):
        d = parts(config, seed, tmp_path)
        groups = {
            n: set(getattr(d, n).groups)
            for n in ("student_train", "student_test", "student_valid", "student_rest")
        }
        names = [(a, b) for a in groups for b in groups if a < b]
        assert not [(a, b) for a, b in names if groups[a] & groups[b]]
        assert groups["student_train"] and groups["student_test"] and groups["student_rest"]
        assert len(groups["student_valid"]) == change.get("validation", 0)
        if "unlabelled" in change:
            assert len(groups["student_rest"]) == change["unlabelled"]
        assert set(d.student_rest.ids) == set(
            parts(config, seed, tmp_path).student_rest.ids
        )  # the same again, from the file
        saved = read_json(tmp_path / "splits" / f"student-{seed}.json")
        tested = set(saved["parts"]["test"])
        assert saved["hash"] and not tested & (
            set(d.student_train.ids) | set(d.student_rest.ids) | set(d.student_valid.ids)
        )
        if config.split.score_on == "validation":
            assert not tested & set(d.student_test.ids)
        else:
            assert tested == set(d.student_test.ids)
        kept[seed] = d.student_test.ids
    assert kept[0] != kept[1] or kept[0] != kept[2]


def test_a_shared_patient_is_kept_from_the_teacher_and_unlabelled_volumes_stay_of_the_student(
    tmp_path,
):
    data = folders(tmp_path / "data")

    def rows(m, who):
        return "id,group\n" + "".join(f"{m}{i},{w}\n" for i, w in enumerate(who))

    (tmp_path / "data/bright/groups.csv").write_text(rows("bright", "abcdefgh"))
    (tmp_path / "data/dark/groups.csv").write_text(rows("dark", "abcdwxyz"))
    for seed in (0, 1):
        d = parts(on_folders(data), seed)
        students = (
            set(d.student_train.groups) | set(d.student_rest.groups) | set(d.student_test.groups)
        )
        tested = set(d.student_test.groups)
        assert students == set("abcdefgh") and d.teacher_train.groups
        assert not set(d.teacher_train.groups) & tested  # others it may share with the student
        assert set("abcdwxyz") - tested == set(d.teacher_train.groups) | set(d.teacher_test.groups)


def test_scores_do_not_change_sides_when_an_arm_is_added(tmp_path):
    """With score_on=validation, an arm that learns without labels must not move the scored
    volumes of a run folder that has scores already, or be refused."""
    alone = dict(VESSELS, score_on="validation")
    before = parts(make(alone), 0, tmp_path)
    try:
        after = parts(make(with_arms(alone, vpbsd={})), 0, tmp_path)
    except InputError:
        return
    assert before.student_test.ids == after.student_test.ids


def test_all_parts_of_a_seed_are_on_record(study):
    """From the run folder alone one can tell which volumes were labelled, which were unlabelled
    and which were tested."""
    d = parts(make(ARMS), 0)
    found = {}
    for f in (study[0] / "splits").glob("student-*.json"):
        for ids in read_json(f)["parts"].values():
            found[tuple(sorted(ids))] = f.name
    for part in (d.student_train, d.student_rest, d.student_test):
        assert tuple(sorted(part.ids)) in found


# ------------------------------------ two dimensions, thin stacks, other encoders


def finish(folder, config, monkeypatch):
    here(monkeypatch)
    rows = run_study(folder, make(config), [0])
    assert all(0 <= r["dsc"] <= 1 for r in rows)
    return {r["arm"] for r in rows}


def test_a_codebook_and_a_hint_in_two_dimensions(tmp_path, monkeypatch):
    arms = finish(
        tmp_path,
        with_arms(BONE, vpbsd={}, hint=dict(options={**T, "pattern_loss": "hint"})),
        monkeypatch,
    )
    assert {"alone", "vpbsd", "hint"} < arms


def test_thin_stacks(tmp_path, monkeypatch):
    config = with_arms(
        dict(
            VESSELS,
            teacher="lightsheet",
            student="twophoton",
            depth=16,
            patch=32,
            network_options={"flat": 2},
            steps=1,
        ),
        vpbsd={},
    )
    assert "vpbsd" in finish(tmp_path, config, monkeypatch)
    net = Study(make(config)).network(make(config).student, 0, "student")
    teacher = teacher_of(tmp_path, config, "vpbsd")
    assert tuple(net.strides) == tuple(teacher.strides) == (2, 8, 8)
    assert teacher.outputs(torch.rand(1, 1, 16, 32, 32)).quantised.index.shape == (1, 8, 4, 4)


@pytest.mark.parametrize(
    "encoder,config,size",
    [
        ("swin", dict(feature_size=12, window=2), 16),
        ("unetr", dict(feature_size=2, size=16, hidden=12, heads=2), 32),
    ],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_other_encoders_teach(dims, encoder, config, size):
    options = replace(TINY, encoder=encoder, encoder_config=config)
    data = Tubes(dims, size=(2 * size,) * 2 if dims == 2 else (size,) * 3)
    student = light(dims)
    m = VPBSD(student, taught(student, options, data), options)
    terms = m.losses(data.batch(0), noise)
    assert all(t().isfinite() for t in terms.values())
    assert m.pattern_teacher.stride == (8 if encoder == "swin" else 16)


def test_the_best_epoch_by_validation(tmp_path, monkeypatch):
    here(monkeypatch)
    config = with_arms(
        dict(VESSELS, validation=1, unlabelled=1, bright_share=0.5, topology=True, steps=1),
        vpbsd={},
    )
    rows = run_study(tmp_path, make(config), [0])
    assert (
        "val_dice" in next(r for r in read_csv(tmp_path / "history.csv") if r["arm"] == "vpbsd")
        and (tmp_path / "checkpoints/vpbsd-0/best.pt").exists()
    )
    assert all("cldice" in r for r in rows if r["arm"] == "vpbsd")
    assert len(set(parts(make(config), 0, tmp_path).student_rest.groups)) == 1


def test_the_control_reconstructs_without_labels_then_learns(tmp_path):
    def build(folder):
        return runner(folder, Reconstruction(light(), epochs=4), epochs=4)

    asked = []
    r = build(tmp_path / "a")
    draw = r.data.batch
    r.data.batch = lambda step, names=None, rank=0: (asked.append(names), draw(step, names, rank))[
        1
    ]
    history = r.fit()
    assert (
        [h["stage"] for h in history] == ["reconstruct", "reconstruct", "train", "train"]
        and "seg" not in history[0]
        and "rec" not in history[-1]
    )
    assert [n for n in asked if n] == [("unlabelled",)] * 4 + [("student",)] * 4
    assert math.isclose(history[0]["lr"], history[2]["lr"])
    killed(build, tmp_path / "b", tmp_path / "c", (2, 4, 6))


def test_more_classes(tmp_path):
    data = Tubes(classes=3)
    student = light(classes=3)
    r = runner(tmp_path / "t", build_teacher_training(student, TINY, 2), data, 2)
    r.fit()
    h = runner(tmp_path / "s", VPBSD(student, r.method.student, TINY), data, 1).fit()
    assert (
        math.isfinite(h[0]["semi"]) and r.method.student(torch.rand(1, 1, 16, 16, 16)).shape[1] == 3
    )


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(encoder="resnet"), "encoder"),
        (dict(codebook="vq"), "codebook"),
        (dict(gradient="reinforce"), "gradient"),
        (dict(pattern_loss="cosin"), "pattern_loss"),
        (dict(target="teacher"), "target"),
        (dict(pseudo="firm"), "pseudo"),
        (dict(pretrain=0.0), "pretrain"),
        (dict(pretrain=1.0), "pretrain"),
        (dict(mask=1.0), "mask"),
        (dict(mask=-0.1), "mask"),
        (dict(doubt=0.5), "doubt"),
        (dict(unlabelled=False), "unlabelled"),
        (dict(codebook="fsq", pattern_loss="code_ce"), "fsq"),
        (dict(strong={"elastic": 1.0}), "strong"),
        (dict(codes=0), "codes"),
        (dict(code_dim=0), "dim"),
        (dict(decay=1.0), "decay"),
        (dict(encoder_config={"widht": 4}), "widht"),
        (dict(inner=0), "inner"),
        (dict(teacher_rate=-1.0), "teacher_rate"),
        (dict(bce=-1.0), "bce"),
    ],
    ids=lambda v: str(v),
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_bad_options_are_refused_before_training(bad, word):
    flat = with_arms(VESSELS, bad=dict(options={**T, **bad}))
    with pytest.raises(InputError, match=word):
        check_study(Study(make(flat)), [0])


def test_a_teacher_of_other_options_or_another_kind():
    student = light()
    teacher = taught(student)
    for change in (
        dict(codes=8),
        dict(code_dim=8),
        dict(quantise=False),
        dict(bce=1.0),
        dict(encoder_config={**ENCODER, "depth": 2}),
    ):
        with pytest.raises(InputError, match="other options"):
            VPBSD(student, teacher, replace(TINY, **change))
    for change in (
        dict(pattern_loss="channel"),
        dict(doubt=0.1),
        dict(strong={}),
        dict(pseudo="soft"),
    ):
        VPBSD(student, teacher, replace(TINY, **change))
    for wrong in (light(), None):  # a network of labels alone, and none at all
        with pytest.raises(InputError, match="PatternTeacher"):
            VPBSD(student, wrong, TINY)
    with pytest.raises(InputError, match="nowhere"):
        VPBSD(student, teacher, replace(TINY, tap="nowhere"))


@pytest.mark.parametrize("other", [dict(classes=3), dict(dims=2), dict(in_channels=3)], ids=str)
def test_a_teacher_of_other_classes_channels_or_axes(other):
    with pytest.raises(InputError):
        VPBSD(light(**other), taught(light()), TINY)


def test_a_weight_of_an_unknown_term():
    with pytest.raises(InputError, match="kl"):
        check_study(Study(make(with_arms(VESSELS, v=dict(weights={"kl": 1.0})))), [0])


@pytest.mark.parametrize(
    "change,word",
    [
        (dict(dims=2), "dims"),
        (dict(network="unet", dims=3, patch=24), "patch"),
        (dict(depth=12), "depth"),
        (dict(patch=20), "patch"),
        (dict(teacher_epochs=1), "teacher_epochs"),
        (dict(network_options={"dims": 2}), "dims"),
        (dict(unlabelled=-1), "unlabelled"),
        (dict(student_labels=6), "unlabelled"),
        (dict(data="phantom:bone", teacher="histology", student="microct"), "dims|3-D|volumes"),
    ],
    ids=lambda v: str(v),
)
def test_settings_that_cannot_work_are_refused_before_training(change, word):
    flat = dict(with_arms(VESSELS, v={}), **change)
    if "data" in change:
        flat = dict(
            flat, data_options={"patients": 8, "images_per_patient": 1, "knobs": {"size": 48}}
        )
    with pytest.raises(InputError, match=word):
        check_study(Study(make(flat)), [0])


@pytest.mark.parametrize(
    "change,options",
    [
        (dict(network="unet", patch=32), {}),
        (
            dict(patch=24),
            dict(encoder="unetr", encoder_config=dict(feature_size=2, size=16, hidden=12, heads=2)),
        ),
        (
            dict(network_options={"flat": 2}, depth=8),
            dict(encoder="swin", encoder_config=dict(feature_size=12, window=2)),
        ),
    ],
    ids=[
        "a student coarser than the teacher",
        "a patch that the teacher cannot halve",
        "an encoder that cannot leave the depth alone",
    ],
)
def test_a_student_and_a_teacher_that_do_not_fit_are_refused_before_training(change, options):
    with pytest.raises(InputError):
        check_study(
            Study(make(with_arms(dict(VESSELS, **change), v=dict(options={**T, **options})))), [0]
        )


@pytest.mark.parametrize(
    "arm,word",
    [
        (dict(teacher="shuffled"), "shuffled"),
        (dict(method="reconstruction", teacher="placebo"), "placebo"),
        (dict(method="reconstruction", start="teacher"), "start"),
        (dict(preset="released"), "preset"),
        (dict(options=[]), "options|dict"),
        (dict(options={"code": 3}), "code"),
        (dict(options={"codes": "many"}), "codes"),
    ],
    ids=lambda v: str(v),
)
def test_arms_that_mean_nothing(arm, word):
    with pytest.raises(InputError, match=word):
        check_study(Study(make(VESSELS, arms={**ONLY, "x": {"method": "vpbsd", **arm}})), [0])


def test_the_paper_preset_and_its_teacher():
    assert options_of("vpbsd", "paper", {}, 96).bce == 1.0 and select_teacher_options(
        VpbsdOptions()
    ) != select_teacher_options(options_of("vpbsd", "paper", {}, 96))
    assert set(select_teacher_options(VpbsdOptions())) == {
        "encoder",
        "encoder_config",
        "inner",
        "decoder",
        "codebook",
        "codes",
        "code_dim",
        "decay",
        "restart",
        "beta",
        "gradient",
        "mask",
        "pretrain",
        "teacher_rate",
        "encoder_rate",
        "quantise",
        "segment_skips",
        "bce",
    }
    m = make_method("vpbsd", light(), taught(light()), TINY, 2, 0)
    assert m.weights == {"seg": 1.0, "semi": 1.0, "dis": 1.0} and m.student.config["width"] == 2


@pytest.mark.parametrize("layout", ("folders", "manifest"))
def test_volumes_without_any_label_file_are_learned_from_and_never_tested_on(tmp_path, layout):
    from unpaired_kd.data.phantoms.vessels import vessels

    c = vessels("lightsheet", volumes=8, size=32)
    root = tmp_path / "data"
    rows = []
    for modality in ("a", "b"):
        for i, case in enumerate(c.cases):
            name = f"{modality}{i}"
            write_image(root / modality / "images" / f"{name}.tif", Image(case.image))
            if i < 5:
                write_label(root / modality / "labels" / f"{name}.tif", case.label)
            rows.append(
                dict(
                    modality=modality,
                    id=name,
                    image=f"{modality}/images/{name}.tif",
                    label=f"{modality}/labels/{name}.tif" if i < 5 else "",
                    group=name,
                )
            )
    if layout == "manifest":
        write_csv(root / "manifest.csv", rows)
    flat = dict(
        data=str(root),
        data_options={"labels": "some"},
        teacher="b",
        student="a",
        teacher_test=0,
        student_labels=2,
        label_unit="groups",
        test=2,
        dims=3,
        patch=16,
    )
    data = parts(make(flat), 0)
    assert (
        len(data.student_train) == len(data.student_test) == 2
        and data.student_train.has_labels
        and data.student_test.has_labels
    )
    assert {"a5", "a6", "a7"} <= set(data.student_rest.ids) and not any(
        x.label is not None for x in data.student_rest.cases
    )
    with pytest.raises(InputError, match="labels='some'"):
        parts(make(flat, data_options={}), 0)


def test_a_teacher_that_is_not_tested_has_no_rows(tmp_path):
    from unpaired_kd.study.rows import save_rows

    place = tmp_path / "checkpoints" / "teacher-0"
    place.mkdir(parents=True)
    save_rows(place / "metrics.csv", [])
    with pytest.raises(InputError, match="teacher-0 holds no finished training"):
        collect(tmp_path, [TeacherTask(seed=0)])
    keep_record(place, ["metrics.csv"], task=["teacher", "teacher", 0], cases=[])
    assert collect(tmp_path, [TeacherTask(seed=0)]) == []


def test_a_student_is_not_resumed_with_the_codebook_of_another_teacher(study, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(study[0], folder)
    path = folder / "checkpoints" / f"{first_name(make(ARMS), 'vpbsd')}-0" / "last.pt"
    saved = load_checkpoint(path)
    saved["networks"]["codebook"]["table"] = saved["networks"]["codebook"]["table"].flip(0)
    torch.save(saved, path)
    record = read_sealed(path.parent / DONE)
    keep_record(path.parent, record.pop("files"), **record)  # a whole training, of another teacher
    with pytest.raises(InputError, match="codebook of another teacher"):
        learner_of(folder, make(ARMS), "vpbsd", 0)
