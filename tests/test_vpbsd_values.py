"""VpbSD and its controls by value: every loss term and its gradient, in every stage, against a
computation written out here in float64; every option shown to change what it should; presets and
weights as tables; every control shown to be what it says, in the very batch a student learns from.
"""

import copy
import math
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.distillation.codebook import shuffle_codes
from unpaired_kd.methods import vpbsd as module
from unpaired_kd.methods.registry import METHODS
from unpaired_kd.methods.vpbsd import (
    VPBSD,
    PatternTeacherTraining,
    Recalibrated,
    RecalibrateOptions,
    Reconstruction,
    ReconstructionOptions,
    VpbsdOptions,
    build_teacher_training,
    gather_tokens,
    mask_blocks,
    pattern_health,
    reconstruction_error,
    segmentation_error,
)
from unpaired_kd.networks.volumes import LightUNet
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.method import set_modes
from unpaired_kd.training.settings import Settings

ENCODER = dict(width=4, dim=8, depth=1, heads=2, tokens=2)
TINY = VpbsdOptions(
    encoder_config=ENCODER, inner=4, decoder=4, codes=6, code_dim=3, restart=0.5, strong={}
)
SIDE = 24  # a grid of 3 x 3 tokens


class Scene:
    "Two labelled and three unlabelled patches a step, in two dimensions."

    def batch(self, step, names=None, rank=0):
        return {n: self.one(n, step) for n in names or ("student", "unlabelled")}

    def one(self, name, step):
        count = 2 if name == "student" else 3
        g = torch_rng(0, name, step)
        label = (torch.rand(count, SIDE // 4, SIDE // 4, generator=g) > 0.6).long()
        label = label.repeat_interleave(4, 1).repeat_interleave(4, 2)
        noise = 0.1 * torch.randn(count, 1, SIDE, SIDE, generator=g)
        shift = 0.3 if name == "student" else 0.45  # the two kinds differ in brightness
        image = (0.25 * label[:, None] + shift + noise).clamp(0, 1)
        kept = label if name == "student" else None
        return Batch(image=image, label=kept, ids=[""] * count, label_groups=[""] * count)


def light(classes=1, width=2):
    with seeded(0, "student"):
        return LightUNet(classes=classes, width=width, dims=2)


def noise(purpose):
    return torch_rng(0, purpose)


def learning_of(options=TINY, classes=1, epochs=4):
    "A fresh teacher before its first step, its codes set by k-means."
    m = build_teacher_training(light(classes), options, epochs, 0)
    m.begin(m.stages()[0], Scene().batch)
    return m


def method_of(options=TINY, classes=1, seed=0):
    "Stage 3 with a teacher whose decoder and codes have moved a little from their start."
    learning = learning_of(options, classes)
    return VPBSD(light(classes), learning.student.eval(), options, seed=seed)


def train(folder, m, epochs=1, steps=2, **k):
    "A short run of the learner."
    settings = Settings(
        epochs=epochs, steps=steps, bars=False, device="cpu", precision="fp32", lr=5e-3, **k
    )
    learner = Learner(m, Scene(), folder, settings=settings, tell=lambda row: None)
    learner.fit()
    return learner


# ---------------------------------------------------------------- the computation by hand


def double(net):
    return copy.deepcopy(net).double()


def unit(v):
    "Rows or features (n,D,...) of length 1."
    return v / v.norm(dim=1, keepdim=True)


def tokens_by_hand(t, x, training):
    "Tokens (B,D,g,g) and skips of an encoder `t` in double precision."
    x = (x.double() - t.mean.view(1, -1, 1, 1)) / t.std.view(1, -1, 1, 1)
    features, skips = t.encoder(x)
    weight = t.pi_in.weight[:, :, 0, 0]
    z = torch.einsum("dc,bcij->bdij", weight, features) + t.pi_in.bias.view(1, -1, 1, 1)
    mean = z.mean((0, 2, 3)) if training else t.spread.running_mean
    var = z.var((0, 2, 3), correction=0) if training else t.spread.running_var
    z = (z - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return z, skips, features


def nearest_by_hand(z, table):
    "Number of the row with the largest cosine for every token (B,D,g,g), one by one."
    index = torch.zeros(len(z), *z.shape[2:], dtype=torch.long)
    for b in range(len(z)):
        for i in range(z.shape[2]):
            for j in range(z.shape[3]):
                v = z[b, :, i, j].detach()
                cos = [float(v @ e / v.norm() / e.norm()) for e in table]
                index[b, i, j] = max(range(len(table)), key=cos.__getitem__)
    return index


def quantised_by_hand(z, table):
    "(values with a straight-through gradient, codes, numbers, commitment) of cosine codes."
    rows = unit(z)
    index = nearest_by_hand(z, table)
    codes = table.double()[index].movedim(-1, 1)
    return codes + rows - rows.detach(), codes, index, 0.25 * (rows - codes).square().mean()


def dice_by_hand(p, y):
    "Dice of probabilities and a target (B,K,H,W), over the batch, mean over K."
    terms = []
    for k in range(p.shape[1]):
        shared = torch.minimum(p[:, k], y[:, k]).sum()
        terms.append(1 - (2 * shared + 1) / (p[:, k].sum() + y[:, k].sum() + 1))
    return sum(terms) / len(terms)


def segmentation_by_hand(logits, label, w):
    "Dice and w times cross-entropy against labels (B,H,W)."
    if logits.shape[1] == 1:
        p = 1 / (1 + (-logits).exp())
        y = label[:, None].double()
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        return dice - w * (y * p.log() + (1 - y) * (1 - p).log()).mean()
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    y = torch.stack([(label == k).double() for k in range(p.shape[1])], 1)
    dice = []
    for k in range(1, p.shape[1]):
        shared = (p[:, k] * y[:, k]).sum()
        dice.append(1 - (2 * shared + 1) / (p[:, k].sum() + y[:, k].sum() + 1))
    return sum(dice) / len(dice) - w * (y * p.log()).sum(1).mean()


def agree(term, hand, net, twin, names):
    "Value and gradients of a term are those of the computation by hand."
    assert term.item() == pytest.approx(hand.item(), rel=2e-5, abs=1e-7)
    ours = dict(net.named_parameters())
    theirs = dict(twin.named_parameters())
    a = torch.autograd.grad(term, [ours[n] for n in names], retain_graph=True)
    b = torch.autograd.grad(hand, [theirs[n] for n in names], retain_graph=True)
    for name, x, y in zip(names, a, b):
        scale = y.abs().max().item()
        assert scale > 0, name
        assert (x - y).abs().max().item() < 2e-3 * scale, name


# ---------------------------------------------------------------- stages 1 and 2


ENCODER_WEIGHTS = ("encoder.stem.0.0.weight", "pi_in.weight", "encoder.norm.weight")


@pytest.mark.parametrize("mask", [0.0, 0.5])
def test_stage_1_by_hand(mask):
    "The target is the standardised image, whole also where the input is masked."
    m = learning_of(replace(TINY, mask=mask))
    set_modes(m, m.stages()[0])
    batch = Scene().batch(5, ("unlabelled",))
    x = batch["unlabelled"].image
    t = double(m.networks["tokens"])
    decoder = double(m.networks["reconstruct"])
    table = m.codebook.table.double().clone()

    keep = (torch.rand(3, 1, 3, 3, generator=noise("mask")) >= mask).double()
    keep = keep.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert mask == 0 or 0 < keep.mean() < 1
    z, _, _ = tokens_by_hand(t, x * keep + x.mean() * (1 - keep), training=True)
    values, _, _, commitment = quantised_by_hand(z, table)
    target = (x.double() - t.mean) / t.std
    again = decoder.decoder(decoder.pi_out(values))
    error = (again - target).square().mean()

    terms = m.pretrain_losses(batch, noise)
    assert set(terms) == {"rec", "cb"}
    rec = terms["rec"]()
    agree(rec, error, m.networks["tokens"], t, ENCODER_WEIGHTS)
    agree(rec, error, m.networks["reconstruct"], decoder, ("pi_out.weight", "decoder.head.weight"))
    agree(terms["cb"](), commitment, m.networks["tokens"], t, ENCODER_WEIGHTS)


@pytest.mark.parametrize("skips", [True, False], ids=["with skips", "without skips"])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("quantise", [True, False], ids=["codes", "no codes"])
def test_stage_2_by_hand(quantise, classes, skips):
    options = replace(TINY, quantise=quantise, bce=0.7, segment_skips=skips)
    m = learning_of(options, classes)
    set_modes(m, m.stages()[1])
    batch = Scene().batch(5, ("student",))
    b = batch["student"]
    label = b.label if classes == 1 else b.label * (1 + (torch.arange(SIDE) % 2))
    batch["student"] = replace(b, label=label)
    t = double(m.networks["tokens"])
    decoder = double(m.networks["segment"])
    before = m.codebook.table.clone()
    z, stem, _ = tokens_by_hand(t, b.image, training=True)
    values, _, _, commitment = quantised_by_hand(z, before.double())
    logits = decoder.decoder(decoder.pi_out(values if quantise else z), stem if skips else None)

    terms = m.finetune_losses(batch, noise)
    assert set(terms) == {"seg", "cb"}
    seg = terms["seg"]()
    hand = segmentation_by_hand(logits, label, 0.7)
    agree(seg, hand, m.networks["tokens"], t, ENCODER_WEIGHTS[:2])
    agree(seg, hand, m.networks["segment"], decoder, ("pi_out.weight", "decoder.head.weight"))
    agree(terms["cb"](), commitment, m.networks["tokens"], t, ENCODER_WEIGHTS)
    assert torch.equal(m.codebook.table, before)


def test_skips_are_for_segmentation_only():
    for skips in (True, False):
        m = learning_of(replace(TINY, segment_skips=skips))
        assert bool(m.networks["segment"].decoder.skips) is skips
        assert not m.networks["reconstruct"].decoder.skips


def test_masked_blocks_by_hand():
    x = torch.rand(2, 2, 6, 4, generator=torch_rng(0, "x"))
    out = mask_blocks(x, (3, 2), 0.5, -1.0, torch_rng(0, "m"))
    drawn = torch.rand(2, 1, 2, 2, generator=torch_rng(0, "m"))
    for b in range(2):
        for i in range(6):
            for j in range(4):
                seen = drawn[b, 0, i // 3, j // 2] >= 0.5
                assert torch.equal(out[b, :, i, j], x[b, :, i, j] if seen else -torch.ones(2))


def test_the_first_codes_and_the_first_averages():
    "k-means on normalised tokens; running averages are those of the batches that were gathered."
    m = learning_of(replace(TINY, codes=4))
    fresh = build_teacher_training(light(), replace(TINY, codes=4), 4, 0)
    old = double(fresh.networks["tokens"])
    seen = torch.cat([Scene().one("unlabelled", i).image.flatten() for i in range(8)])
    assert torch.allclose(m.pattern_teacher.tokens.mean, seen.mean(), atol=1e-6)
    assert torch.allclose(m.pattern_teacher.tokens.std, seen.std(), atol=1e-6)
    old.mean.fill_(seen.mean())
    old.std.fill_(seen.std())
    means = []
    variances = []
    tokens = []
    for i in range(2):  # 3 x 9 tokens a batch, 40 wanted
        z = tokens_by_hand(old, Scene().one("unlabelled", i).image, training=True)[0]
        tokens.append(unit(z).movedim(1, -1).reshape(-1, 3))
        raw = old.pi_in(
            old.encoder((Scene().one("unlabelled", i).image.double() - old.mean) / old.std)[0]
        )
        means.append(raw.mean((0, 2, 3)))
        variances.append(raw.var((0, 2, 3)))
    spread = m.pattern_teacher.tokens.spread
    assert torch.allclose(spread.running_mean.double(), sum(means) / 2, atol=1e-5)
    assert torch.allclose(spread.running_var.double(), sum(variances) / 2, rtol=1e-3)
    assert spread.momentum == 0.1 and spread.training
    tokens = torch.cat(tokens)
    table = m.codebook.table.double()
    owner = (tokens @ table.T).argmax(1)
    for j in range(4):  # a fixed point of k-means: each code is the direction of its tokens
        own = tokens[owner == j].sum(0)
        assert torch.allclose(table[j], own / own.norm(), atol=1e-4)
    sizes = torch.bincount(owner, minlength=4).double()
    assert torch.allclose(m.codebook.counts.double(), 10 * 4 * sizes / sizes.sum(), atol=1e-4)


def test_gathered_tokens_are_normalised():
    m = learning_of()
    t = m.pattern_teacher.tokens
    z = gather_tokens(t, lambda i: Scene().one("unlabelled", i).image, 27)
    assert z.shape == (27, 3)
    assert z.mean(0).abs().max() < 1e-4 and (z.var(0, correction=0) - 1).abs().max() < 1e-2


def test_a_placebo_teacher_has_settled_tokens():
    "A teacher that only began: tokens have length 1 a channel in evaluation mode, too."
    m = learning_of(replace(TINY, codes=32))
    t = m.student.eval().tokens
    with torch.no_grad():
        z = torch.cat([t(Scene().one("unlabelled", i).image)[0] for i in range(12)])
    assert 0.8 < z.square().mean() < 1.2


def test_codes_rest_after_stage_1_and_the_teacher_after_stage_2(tmp_path):
    m = build_teacher_training(light(), replace(TINY, pretrain=0.5), 4, 0)
    tables = []
    finetune = m.finetune_losses

    def watched(batch, noise):
        tables.append(m.codebook.table.clone())
        return finetune(batch, noise)

    m.finetune_losses = watched
    spread = m.pattern_teacher.tokens.spread
    learner = train(tmp_path / "t", m, epochs=4)
    assert len(tables) == 4 and all(torch.equal(t, tables[0]) for t in tables)
    assert torch.equal(m.codebook.table, tables[0])
    assert not torch.equal(tables[0], learning_of(replace(TINY, pretrain=0.5)).codebook.table)
    assert int(spread.num_batches_tracked) > 0
    teacher = {k: v.clone() for k, v in m.student.state_dict().items()}
    s = VPBSD(light(), m.student, replace(TINY, pretrain=0.5))
    before = {k: v.clone() for k, v in s.student.state_dict().items()}
    train(tmp_path / "s", s, epochs=2)
    assert all(torch.equal(v, teacher[k]) for k, v in m.student.state_dict().items())
    moved = [n for n, p in s.student.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(list(s.student.parameters()))
    assert learner.position["epoch"] >= 0


def test_stage_2_normalises_by_its_own_batch_and_follows_it(tmp_path):
    m = learning_of()
    set_modes(m, m.stages()[1])
    spread = m.pattern_teacher.tokens.spread
    old = spread.running_mean.clone()
    t = double(m.networks["tokens"])
    image = Scene().one("student", 3).image
    raw = t.pi_in(t.encoder((image.double() - t.mean) / t.std)[0])
    terms = m.finetune_losses({"student": Scene().one("student", 3)}, noise)
    terms["seg"]()
    expected = 0.9 * old.double() + 0.1 * raw.mean((0, 2, 3))
    assert torch.allclose(spread.running_mean.double(), expected, atol=1e-5)
    assert m.pattern_teacher.tokens.training and spread.training


# ---------------------------------------------------------------- stage 3

STUDENT_WEIGHTS = ("down1.0.weight", "bottom.3.weight")


def student_by_hand(net, x):
    "Logits, and the features of the bottom."
    features, skips = net.encode(x.double())
    return net.decode(features, skips), features


def stage_3(options, classes=1):
    "Method, batch, and twins in double precision."
    m = method_of(options, classes)
    batch = Scene().batch(7)
    teacher = double(m.pattern_teacher)
    z = {n: tokens_by_hand(teacher.tokens, batch[n].image, training=False) for n in batch}
    return m, batch, double(m.student).train(), teacher, z


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("pseudo", ["hard", "soft"])
@pytest.mark.parametrize("doubt", [0.0, 0.04])
def test_labels_and_pseudo_labels_by_hand(classes, pseudo, doubt):
    if classes == 3 and doubt:
        doubt = 0.01
    options = replace(TINY, pseudo=pseudo, doubt=doubt, bce=0.3)
    m, batch, student, teacher, z = stage_3(options, classes)
    values, _, _, _ = quantised_by_hand(z["unlabelled"][0], teacher.codebook.table)
    decoder = teacher.segment
    taught = decoder.decoder(decoder.pi_out(values), z["unlabelled"][1]).detach()
    q = taught.softmax(1) if classes == 3 else taught.sigmoid()
    largest = q.amax(1, keepdim=True) if classes == 3 else torch.maximum(q, 1 - q)
    certain = (largest >= 0.5 + doubt).double() if doubt else torch.ones_like(largest)
    assert bool(certain.all()) == (doubt == 0) and certain.any()
    y = q
    if pseudo == "hard":
        y = (
            (q > 0.5).double()
            if classes == 1
            else F.one_hot(q.argmax(1), 3).movedim(-1, 1).double()
        )
    logits, _ = student_by_hand(student, batch["unlabelled"].image)
    if classes == 1:
        p = logits.sigmoid()
        ce = -(y * p.log() + (1 - y) * (1 - p).log())
        dice = dice_by_hand(p * certain, y * certain)
    else:
        p = logits.softmax(1)
        ce = -(y * p.log()).sum(1, keepdim=True)
        dice = dice_by_hand((p * certain)[:, 1:], (y * certain)[:, 1:])
    hand = dice + 0.3 * (ce * certain).sum() / certain.sum()

    terms = m.losses(batch, noise)
    assert set(terms) == {"seg", "semi", "dis"}
    m.student.train()
    agree(terms["semi"](), hand, m.student, student, STUDENT_WEIGHTS)
    logits, _ = student_by_hand(student, batch["student"].image)
    seg = segmentation_by_hand(logits, batch["student"].label, 0.3)
    agree(terms["seg"](), seg, m.student, student, STUDENT_WEIGHTS)


def target_by_hand(target, z, teacher, seed=0):
    "Codes (B,D,g,g), numbers and table of a target, from tokens."
    table = teacher.codebook.table.double()
    if target == "unquantised":
        return unit(z), None, table
    if target == "random":
        rows = torch.randn(table.shape, generator=torch_rng(seed, "random codebook")).double()
        table = rows / rows.norm(dim=1, keepdim=True) * table.norm(dim=1).mean()
    index = nearest_by_hand(z, table)
    return table[index].movedim(-1, 1), index, table


def pattern_by_hand(kind, u, codes, index, table):
    "One of the three losses, token by token."
    u = unit(u)
    total = 0.0
    for b in range(len(u)):
        us = u[b].flatten(1)
        zs = unit(codes)[b].flatten(1)
        M = us.shape[1]
        if kind == "channel":
            for c in range(len(us)):
                p = (zs[c] / 4).softmax(0)
                total = total + 16 / len(us) * (p * (p.log() - (us[c] / 4).softmax(0).log())).sum()
        for i in range(M):
            if kind == "cosine":
                total = total + (1 - us[:, i] @ zs[:, i]) / M
            if kind == "code_ce":
                scores = unit(table) @ us[:, i] / 0.1
                total = total - (scores - scores.logsumexp(0))[index[b].flatten()[i]] / M
    return total / len(u)


CASES = [
    (kind, target)
    for kind in ("cosine", "code_ce", "channel", "hint")
    for target in ("quantised", "unquantised", "random")
    if (kind, target) != ("code_ce", "unquantised")
]


@pytest.mark.parametrize("kind,target", CASES)
def test_patterns_by_hand(kind, target):
    "Three unlabelled and two labelled patches: the mean over all five."
    m, batch, student, teacher, z = stage_3(replace(TINY, pattern_loss=kind, target=target))
    projector = double(m.networks["projector"])
    weight = (projector if kind == "hint" else projector.phi).weight
    total = 0.0
    for name, count in (("student", 2), ("unlabelled", 3)):
        _, features = student_by_hand(student, batch[name].image)
        u = torch.einsum("dc,bcij->bdij", weight[:, :, 0, 0], features)
        if kind == "hint":
            u = u + projector.bias.view(1, -1, 1, 1)
            value = (u - z[name][2].detach()).square().mean()
        else:
            codes, index, table = target_by_hand(target, z[name][0].detach(), teacher)
            value = pattern_by_hand(kind, u, codes, index, table)
        total = total + count * value
    m.student.train()
    term = m.losses(batch, noise)["dis"]()
    agree(term, total / 5, m.student, student, STUDENT_WEIGHTS)
    names = ("weight",) if kind == "hint" else ("phi.weight",)
    agree(term, total / 5, m.networks["projector"], projector, names)
    assert all(p.grad is None and not p.requires_grad for p in m.pattern_teacher.parameters())


# ---------------------------------------------------------------- the control without a teacher


def test_reconstruction_by_hand():
    m = Reconstruction(light(), ReconstructionOptions(bce=0.2), epochs=4)
    batch = Scene().batch(2)
    student = double(m.student).train()
    decoder = double(m.networks["decoder"])
    m.student.train()
    x = batch["unlabelled"].image
    again = decoder(student.encode(x.double())[0])
    terms = m.reconstruction_losses({"unlabelled": batch["unlabelled"]}, noise)
    hand = (again - x.double()).square().mean()
    agree(terms["rec"](), hand, m.student, student, STUDENT_WEIGHTS)
    agree(terms["rec"](), hand, m.networks["decoder"], decoder, ("head.weight",))
    logits, _ = student_by_hand(student, batch["student"].image)
    hand = segmentation_by_hand(logits, batch["student"].label, 0.2)
    terms = m.losses({"student": batch["student"]}, noise)
    agree(terms["seg"](), hand, m.student, student, STUDENT_WEIGHTS)
    first, second = m.stages()
    assert (first.name, first.epochs, first.draws) == ("reconstruct", 2, ("unlabelled",))
    assert (second.name, second.epochs, second.draws) == ("train", None, ("student",))
    assert first.updates[0].changes == ("student", "decoder")
    assert second.updates[0].changes == ("student",)


# ---------------------------------------------------------------- controls in the batch


@pytest.fixture
def watched(monkeypatch):
    "Every call of the pattern loss: codes, numbers, table."
    calls = []
    inner = module.pattern_loss

    def spy(u, codes, kind, index=None, table=None):
        calls.append((codes.clone(), index, table))
        return inner(u, codes, kind, index=index, table=table)

    monkeypatch.setattr(module, "pattern_loss", spy)
    return calls


@pytest.mark.parametrize("kind", ["cosine", "code_ce"])
@pytest.mark.parametrize("target", ["quantised", "unquantised", "random"])
def test_what_a_student_learns_from_is_what_the_option_says(tmp_path, watched, kind, target):
    "In the very batches of a run: first labelled, then unlabelled patches of every step."
    if (kind, target) == ("code_ce", "unquantised"):
        return
    m = method_of(replace(TINY, pattern_loss=kind, target=target), seed=3)
    teacher = double(m.pattern_teacher)
    learned = teacher.codebook.table
    train(tmp_path, m, steps=2)
    assert len(watched) == 4
    batches = [Scene().one(name, step) for step in (0, 1) for name in ("student", "unlabelled")]
    for (codes, index, table), b in zip(watched, batches):
        z = tokens_by_hand(teacher.tokens, b.image, training=False)[0].detach()
        expected, numbers, rows = target_by_hand(target, z, teacher, seed=3)
        assert torch.allclose(codes.double(), expected, atol=1e-4)
        flat = codes.double().movedim(1, -1).reshape(-1, 3)
        among = (flat[:, None] - learned).norm(dim=2).amin(1) < 1e-4  # is it a learned code?
        assert bool(among.all()) == (target == "quantised")
        assert target == "quantised" or among.float().mean() < 0.2
        if kind == "code_ce":
            assert torch.equal(index, numbers) and torch.allclose(table.double(), rows, atol=1e-5)
    if target == "random":
        assert (m.random_codes.double() - learned).abs().max() > 0.1
        assert torch.allclose(m.random_codes.norm(dim=1), torch.ones(6), atol=1e-5)


def test_the_strong_change_is_the_students_alone(tmp_path):
    m = method_of(replace(TINY, strong={"brightness": 0.3}))
    seen = {"student": [], "teacher": []}
    m.student.register_forward_pre_hook(lambda net, x: seen["student"].append(x[0].clone()))
    hook = m.pattern_teacher.tokens.register_forward_pre_hook
    hook(lambda net, x: seen["teacher"].append(x[0].clone()))
    train(tmp_path, m, steps=1)
    batch = Scene().batch(0)
    assert torch.equal(seen["student"][0], batch["student"].image)
    shift = seen["student"][1] - batch["unlabelled"].image
    inside = (seen["student"][1] > 0) & (seen["student"][1] < 1)
    each = [s[i].unique() for s, i in zip(shift, inside)]
    assert all(e.max() - e.min() < 1e-5 for e in each)  # one number a patch
    assert 0 < max(e.abs().max() for e in each) <= 0.3 + 1e-6
    for image in seen["teacher"]:
        assert any(torch.equal(image, batch[n].image) for n in batch)
    assert len(seen["teacher"]) == 2


def first_statistics(net, images):
    "Mean over batches of mean and variance of what the first BatchNorm of the student sees."
    w = net.down1[0].weight.double()
    maps = [F.conv2d(x.double(), w, padding=1) for x in images]
    mean = sum(v.mean((0, 2, 3)) for v in maps) / len(maps)
    return mean, sum(v.var((0, 2, 3)) for v in maps) / len(maps)


def test_recalibration_moves_statistics_on_unlabelled_images_and_nothing_else(tmp_path):
    m = Recalibrated(light(), RecalibrateOptions(batches=3))
    before = light().state_dict()
    train(tmp_path, m, steps=2)
    trained = {n: p.clone() for n, p in m.student.named_parameters()}
    old = m.student.down1[1].running_mean.clone()
    counted = []

    def batches(i):
        counted.append(i)
        return Scene().batch(100 + i)

    m.finish(batches)
    assert counted == [0, 1, 2] and not m.student.training
    for name, p in m.student.named_parameters():
        assert torch.equal(p, trained[name])
    images = [Scene().one("unlabelled", 100 + i).image for i in range(3)]
    mean, var = first_statistics(m.student, images)
    norm = m.student.down1[1]
    assert torch.allclose(norm.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(norm.running_var.double(), var, rtol=1e-3, atol=1e-6)
    assert (norm.running_mean - old).abs().max() > 1e-3 and norm.momentum == 0.1
    wrong, _ = first_statistics(
        m.student, [Scene().one("student", 100 + i).image for i in range(3)]
    )
    assert (wrong - mean).abs().max() > 1e-2
    assert any(not torch.equal(trained[n], before[n]) for n in trained)


def test_a_run_ends_with_the_recalibration(tmp_path):
    "The learner gives `finish` fixed batches that hold unlabelled images."
    m = Recalibrated(light(), RecalibrateOptions(batches=2))
    train(tmp_path, m, steps=1)
    m.finish(lambda i: Scene().batch(10**9 + i))
    images = [Scene().one("unlabelled", 10**9 + i).image for i in range(2)]
    mean, _ = first_statistics(m.student, images)
    assert torch.allclose(m.student.down1[1].running_mean.double(), mean, atol=1e-5)
    assert Recalibrated.draws(RecalibrateOptions()) == ("student", "unlabelled")


# ---------------------------------------------------------------- measures


def test_errors_by_hand_with_own_and_with_permuted_codes():
    m = learning_of()
    for net in m.networks.values():
        net.eval()
    teacher = m.student
    twin = double(teacher)
    decoder = double(m.networks["reconstruct"])
    held = [Scene().one("student", i) for i in range(2)]
    table = twin.codebook.table
    order = torch.randperm(6, generator=torch_rng(0, "shuffled"))
    for rows, book in ((table, None), (table[order], shuffle_codes(teacher.codebook))):
        error = variance = loss = 0.0
        for b in held:
            z, skips, _ = tokens_by_hand(twin.tokens, b.image, training=False)
            codes = rows[nearest_by_hand(z, table)].movedim(-1, 1)
            x = (b.image.double() - twin.tokens.mean) / twin.tokens.std
            again = decoder.decoder(decoder.pi_out(codes))
            error += (again - x).square().mean().item()
            variance += x.var().item()
            logits = twin.segment.decoder(twin.segment.pi_out(codes), skips)
            loss += segmentation_by_hand(logits, b.label, 0.5).item()
        assert reconstruction_error(m, held, book) == pytest.approx(error / variance, rel=1e-4)
        assert segmentation_error(teacher, held, book) == pytest.approx(loss / 2, rel=1e-4)


def test_monitor_and_health_by_hand():
    m = learning_of()
    for net in m.networks.values():
        net.eval()
    twin = double(m.student)
    decoder = double(m.networks["reconstruct"])
    b = Scene().one("unlabelled", 4)
    z = tokens_by_hand(twin.tokens, b.image, training=False)[0]
    index = nearest_by_hand(z, twin.codebook.table)
    p = torch.bincount(index.flatten(), minlength=6) / index.numel()
    entropy = -sum(v * math.log(v) for v in p.tolist() if v)
    x = (b.image.double() - twin.tokens.mean) / twin.tokens.std
    again = decoder.decoder(decoder.pi_out(twin.codebook.table[index].movedim(-1, 1)))
    found = m.monitor({"unlabelled": b}, noise)
    assert found["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert found["active"] == pytest.approx((p > 0).double().mean().item())
    error = (again - x).square().mean() / x.var()
    assert found["rec_over_var"] == pytest.approx(error.item(), rel=1e-4)
    assert found["restarted"] == 0
    held = Scene().one("student", 4)
    health = pattern_health(m.student, [held])
    z = tokens_by_hand(twin.tokens, held.image, training=False)[0]
    index = nearest_by_hand(z, twin.codebook.table)
    filled = held.label.double().reshape(2, 3, 8, 3, 8).mean((2, 4))
    assert health["tokens"] == 18
    assert health["active"] == pytest.approx(len(index.unique()) / 6)
    assert health["active_vessel"] == pytest.approx(len(index[filled > 0].unique()) / 6)


# ---------------------------------------------------------------- every option does something


def run_teacher_stages(options, seen):
    "What stages 1 and 2 show of the options."
    m = build_teacher_training(light(), options, 10, 0)
    seen["sizes"] = {n: sum(p.numel() for p in net.parameters()) for n, net in m.networks.items()}
    first, second = m.stages()
    seen["length"] = first.epochs
    seen["rate"] = m.adam["segment"]["rate"]
    seen["slow"] = second.updates[0].rates["tokens"]
    m.begin(first, Scene().batch)
    seen["start"] = m.codebook.lookup(torch.arange(3)[None]).flatten().tolist()
    set_modes(m, first)
    for step in range(3):
        terms = m.pretrain_losses(Scene().batch(step), noise)
        rec = terms["rec"]()
        seen[f"rec {step}"] = rec.item()
        seen[f"cb {step}"] = terms["cb"]().item()
    weight = m.pattern_teacher.tokens.pi_in.weight
    seen["gradient"] = torch.autograd.grad(rec, weight)[0].flatten().tolist()
    seen["table"] = m.codebook.lookup(torch.arange(3)[None]).flatten().tolist()
    set_modes(m, second)
    terms = m.finetune_losses(Scene().batch(0), noise)
    seen["seg 2"] = terms["seg"]().item()
    seen["cb 2"] = terms["cb"]().item()
    return m


def observe(options):
    "Everything that an option may change, as plain numbers."
    seen = {}
    learning = run_teacher_stages(options, seen)
    m = VPBSD(light(), learning.student.eval(), options)
    m.student.train()
    seen["weights"] = m.weights
    seen["projector"] = {n: tuple(p.shape) for n, p in m.networks["projector"].named_parameters()}
    for name, term in m.losses(Scene().batch(1), noise).items():
        seen[name] = term().item()
    return seen


BASE = replace(TINY, pseudo="soft")  # hard labels of an untrained decoder are all alike
OPTIONS = {  # option -> another value, what must change, what must not
    "codebook": ("euclidean", {"start", "rec 0", "seg 2", "dis"}, {"sizes", "seg", "length"}),
    "codes": (4, {"rec 0", "cb 0", "seg 2", "dis"}, {"sizes", "seg", "length"}),
    "code_dim": (4, {"sizes", "projector", "rec 0", "seg 2", "dis"}, {"seg", "length"}),
    "decay": (0.5, {"table", "rec 1"}, {"rec 0", "start", "seg", "sizes"}),
    "restart": (50.0, {"table", "rec 1"}, {"rec 0", "start", "seg", "sizes"}),
    "beta": (0.5, {"cb 0", "cb 2"}, {"rec 0", "seg 2", "table", "dis"}),
    "gradient": ("rotate", {"gradient"}, {"rec 0", "cb 0", "seg 2", "dis"}),
    "encoder": ("swin", {"sizes", "rec 0", "semi", "dis"}, {"seg", "length"}),
    "encoder_config": ({**ENCODER, "width": 8}, {"sizes", "rec 0", "dis"}, {"seg", "length"}),
    "inner": (8, {"sizes", "rec 0", "seg 2", "semi"}, {"seg", "dis", "cb 0"}),
    "decoder": (8, {"sizes", "rec 0", "seg 2", "semi"}, {"seg", "dis", "cb 0"}),
    "segment_skips": (False, {"sizes", "seg 2", "semi"}, {"rec 0", "cb 0", "seg", "dis"}),
    "mask": (0.5, {"rec 0", "cb 0", "table"}, {"start", "seg", "sizes"}),
    "pretrain": (0.2, {"length"}, {"rec 0", "seg 2", "seg", "semi", "dis", "sizes"}),
    "teacher_rate": (0.5, {"rate", "slow"}, {"rec 0", "seg 2", "seg", "dis"}),
    "encoder_rate": (0.5, {"slow"}, {"rate", "rec 0", "seg 2", "seg", "dis"}),
    "quantise": (False, {"seg 2", "semi"}, {"rec 0", "cb 0", "dis", "seg"}),
    "bce": (0.9, {"seg 2", "seg", "semi"}, {"rec 0", "cb 0", "dis"}),
    "pattern_loss": ("channel", {"dis", "weights"}, {"rec 0", "seg 2", "seg", "semi"}),
    "target": ("random", {"dis"}, {"rec 0", "seg 2", "seg", "semi", "weights"}),
    "tap": ("join2", {"dis", "projector"}, {"rec 0", "seg 2", "seg", "semi"}),
    "pseudo": ("hard", {"semi"}, {"rec 0", "seg 2", "seg", "dis"}),
    "doubt": (0.04, {"semi"}, {"rec 0", "seg 2", "seg", "dis"}),
    "strong": ({"gamma": 0.5}, {"semi", "dis"}, {"rec 0", "seg 2", "seg"}),
}
SWIN = dict(encoder_config=dict(feature_size=12, window=2))


@pytest.fixture(scope="module")
def plain():
    return observe(BASE)


def test_no_option_is_missing():
    assert set(OPTIONS) == {f.name for f in fields(VpbsdOptions)}
    assert {f.name for f in fields(ReconstructionOptions)} == {"tap", "decoder", "bce"}
    assert {f.name for f in fields(RecalibrateOptions)} == {"batches"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_what_it_should(plain, option):
    value, changes, stays = OPTIONS[option]
    assert value != getattr(BASE, option)
    seen = observe(replace(BASE, **{option: value}, **(SWIN if option == "encoder" else {})))
    changed = {name for name in plain if seen.get(name) != plain[name]}
    assert changes <= changed, changes - changed
    assert not stays & changed, stays & changed


def test_options_of_the_reconstruction():
    x = {"unlabelled": Scene().one("unlabelled", 0)}
    s = {"student": Scene().one("student", 0)}

    def values(**k):
        m = Reconstruction(light(), ReconstructionOptions(**k), epochs=4)
        size = sum(p.numel() for p in m.networks["decoder"].parameters())
        rec = m.reconstruction_losses(x, noise)["rec"]().item() if k.get("tap", "") == "" else None
        return size, rec, m.losses(s, noise)["seg"]().item()

    size, rec, seg = values()
    assert values(decoder=4)[0] < size and values(decoder=4)[1] != rec
    assert values(bce=0.1)[:2] == (size, rec) and values(bce=0.1)[2] < seg
    assert values(tap="down3.5")[0] != size


# ---------------------------------------------------------------- presets and weights

DEFAULTS = {
    "codebook": "cosine",
    "codes": 512,
    "code_dim": 16,
    "decay": 0.99,
    "restart": 2.0,
    "beta": 0.25,
    "gradient": "straight",
    "encoder": "hybrid",
    "encoder_config": {},
    "inner": 128,
    "decoder": 32,
    "segment_skips": True,
    "mask": 0.0,
    "pretrain": 0.7,
    "teacher_rate": 1.0,
    "encoder_rate": 0.1,
    "quantise": True,
    "bce": 0.5,
    "pattern_loss": "cosine",
    "target": "quantised",
    "tap": "",
    "pseudo": "hard",
    "doubt": 0.0,
    "strong": {"brightness": 0.08, "contrast": 0.4, "gamma": 0.4, "noise": 0.05, "blur": 0.8},
}


def test_presets_as_tables():
    presets = {name: asdict(options) for name, options in VPBSD.presets.items()}
    assert presets == {"recommended": DEFAULTS, "paper": {**DEFAULTS, "bce": 1.0}}
    presets = {name: asdict(options) for name, options in Reconstruction.presets.items()}
    assert presets == {"recommended": {"tap": "", "decoder": 8, "bce": 0.5}}
    presets = {name: asdict(options) for name, options in Recalibrated.presets.items()}
    assert presets == {"recommended": {"batches": 32}}


def test_weights_as_tables():
    of = {"cosine": 1.0, "code_ce": 0.1, "channel": 16.0, "hint": 1.0}
    for preset in ("recommended", "paper"):
        for kind, dis in of.items():
            options = replace(TINY, pattern_loss=kind)
            expected = {"seg": 1.0, "semi": 1.0, "dis": dis}
            assert VPBSD.default_weights(options, preset) == expected
            assert method_of(options).weights == expected
    assert PatternTeacherTraining.default_weights(TINY) == {"rec": 1.0, "cb": 1.0, "seg": 1.0}
    assert Reconstruction.default_weights(ReconstructionOptions()) == {"rec": 1.0, "seg": 1.0}
    assert Recalibrated.default_weights(RecalibrateOptions()) == {"seg": 1.0}
    assert {"vpbsd", "reconstruction", "recalibrated"} <= set(METHODS)


def test_what_each_method_declares():
    for cls in (VPBSD, Reconstruction, Recalibrated):
        assert cls.draws(None) == ("student", "unlabelled") and cls.moves_only
    assert VPBSD.teachers == ("true", "placebo") and Reconstruction.teachers == ("true",)
    assert Reconstruction.starts == ("scratch",) and Reconstruction.length(None, 5) == 10
    (stage,) = method_of().stages()
    assert (stage.name, stage.draws) == ("distil", ("student", "unlabelled"))
    assert stage.updates[0].changes == ("student", "projector") and not stage.epochs
    assert isinstance(method_of().networks["projector"], nn.Module)
