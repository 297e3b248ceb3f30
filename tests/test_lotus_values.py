"""LOTUS by value: each term of each preset in each stage and its gradient against float64 by hand;
each option changes what it should; presets and weights as tables.
"""

import zlib
from dataclasses import fields, replace

import by_hand_lotus as hand
import pytest
import torch
from torch import nn

from unpaired_kd.data.patches import Batch
from unpaired_kd.methods.lotus import LOTUS, RULES, LotusOptions, Scene
from unpaired_kd.methods.published import TABLES
from unpaired_kd.training.method import set_modes

STAGES = {"denoise": 0, "distil": 1}


class Net(nn.Module):
    "Two layers of features and a head; `other` is a second head that the network does not use."

    stride = 1

    def __init__(self, classes, seed):
        super().__init__()
        self.config = dict(in_channels=1, classes=classes, dims=2)
        self.conv8 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv9 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.conv10 = nn.Conv2d(4, classes, 1)
        self.other = nn.Conv2d(4, classes, 1)
        fill(self, seed)

    def forward(self, x):
        return self.conv10(self.conv9(self.conv8(x)))


def fill(net, seed):
    "Weights and statistics that leave nothing at 0 or 1."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, v in [*net.named_parameters(), *net.named_buffers()]:
            if not v.is_floating_point() or name.endswith("alpha_bar"):
                continue
            v.copy_(torch.randn(v.shape, generator=g) * 0.5)
            if name.endswith(("var", "std")) or name.endswith("weight") and v.ndim == 1:
                v.copy_(v.abs() + 0.5)


def noise(purpose):
    return torch.Generator().manual_seed(zlib.crc32(purpose.encode()))


def scene_batch(classes):
    "Two images a side, 8 x 8, labels in blocks that differ between the sides."
    batch = {}
    for seed, name in enumerate(("student", "teacher")):
        g = torch.Generator().manual_seed(seed)
        label = torch.zeros(2, 8, 8, dtype=torch.long)
        label[:, 1:6, 1 + seed : 5 + seed] = 1
        if classes > 2:
            label[:, 3:8, 4 + seed :] = 2
        label[1] = label[1].T.clone()
        image = torch.randn(2, 1, 8, 8, generator=g) + 0.7 * label[:, None]
        batch[name] = Batch(image=image, label=label, ids=["", ""], label_groups=["", ""])
    return batch


def method(options, classes=3, epochs=4):
    channels = 1 if classes == 2 else classes
    m = LOTUS(Net(channels, 1), Net(channels, 2), options, epochs=epochs)
    for seed, name in enumerate(m.networks):
        if name != "student":
            fill(m.networks[name], 10 + seed)
    return m


def losses(m, stage, classes=3):
    "{term: function} of a stage, with the networks in the modes of that stage."
    set_modes(m, m.stages()[STAGES[stage]])
    make = m.denoise_losses if stage == "denoise" else m.distil_losses
    return make(scene_batch(classes), noise)


# ---------------------------------------------------------------- by hand
class ByHand:
    "The parts of a scene, in float64."

    def __init__(self, m, stage, classes):
        self.o = m.options
        self.classes = classes
        self.train = stage == "denoise"  # projector and diffusion block learn in the first stage
        self.P = hand.doubles(**m.networks, teacher=m.frozen["teacher"])
        batch = scene_batch(classes)
        self.x_s, self.y_s = batch["student"].image.double(), batch["student"].label
        self.x_t, self.y_t = batch["teacher"].image.double(), batch["teacher"].label
        self.z_s, self.logits_s = self.run("student", self.x_s, True)
        self.z_t, self.logits_t = self.run("teacher", self.x_t, False)
        self.z_t, self.logits_t = self.z_t.detach(), self.logits_t.detach()

    def run(self, name, x, train):
        z = hand.conv(self.P, f"{name}.conv9.0", hand.conv(self.P, f"{name}.conv8", x))
        z = hand.norm(self.P, f"{name}.conv9.1", z, train)
        logits = hand.conv(self.P, f"{name}.conv10", z)
        s = self.o.stride
        if s > 1:
            B, C, H, W = z.shape
            z = z.reshape(B, C, H // s, s, W // s, s).mean((3, 5))
        return z, logits

    def small(self, y):
        "Labels at the size of the features: of the pixel at each centre."
        s = self.o.stride
        return y[:, s // 2 :: s, s // 2 :: s]

    def scale(self, which):
        return self.P[f"scale.conv9.{which}"].view(1, -1, 1, 1)

    @property
    def z_teacher(self):
        if self.o.feature_norm == "none":
            return self.z_t
        return (self.z_t - self.scale("mean")) / self.scale("std")

    @property
    def bare(self):
        if self.o.feature_norm == "none":
            return self.z_s
        var, mean = torch.var_mean(self.z_s, (0, 2, 3), keepdim=True)  # divided by n - 1
        return (self.z_s - mean) / (var + 1e-5).sqrt()

    def project(self, z):
        if self.o.projector == "channel":
            h = hand.conv(self.P, "projector.conv9.body.0", z).clamp_min(0)
            z = hand.conv(self.P, "projector.conv9.body.2", h)
        else:
            w = {
                k: self.P[f"projector.conv9.body.body.{k}"]
                for k in ("0.weight", "0.bias", "2.weight", "2.bias")
            }
            h = (z @ w["0.weight"].T + w["0.bias"]).clamp_min(0)
            z = h @ w["2.weight"].T + w["2.bias"]
        return z / z.square().sum(1, keepdim=True).sqrt() if self.o.unit else z

    def denoised(self, z):
        eps = torch.randn(z.shape, generator=noise("denoise conv9")).double()
        by_batch = self.train and self.o.statistics == "all"
        P = dict(self.P)
        if not self.o.phi_grad:
            P = {k: v.detach() if ".phi." in k else v for k, v in P.items()}
        return hand.denoise(P, "diffusion.conv9", self.project(z), eps, self.train, by_batch)

    def seg(self):
        loss = hand.segmentation if self.o.dice == "soft" else hand.released_segmentation
        return loss(self.logits_s, self.y_s)

    def diff(self):
        g = noise("diff conv9")
        t = torch.randint(1000, (2,), generator=g)
        z = self.z_teacher
        eps = torch.randn(z.shape, generator=g).double()
        a = hand.ALPHA_BAR[t][:, None, None, None]
        noisy = a.sqrt() * z + (1 - a).sqrt() * eps
        return (eps - hand.phi(self.P, "diffusion.conv9.phi", noisy, t, self.train)).square().mean()

    def head(self, z):
        "What the teacher's head says about features on the teacher's scale."
        if self.o.feature_norm == "channel":
            z = z * self.scale("std") + self.scale("mean")
        return hand.conv(self.P, "teacher.conv10", z)

    def position_kl(self, s, t):
        p_s, p_t = hand.probabilities(s, self.o.tau), hand.probabilities(t, self.o.tau)
        return hand.directed(p_s, p_t, "forward")

    def projection(self):
        z = self.denoised(self.bare.detach())
        y_s, y_t = self.small(self.y_s), self.small(self.y_t)
        t = hand.conv(self.P, "teacher.conv10", self.z_t)
        return hand.class_mean_kl(self.head(z), y_s, t, y_t, self.classes, self.o.tau)


def recommended(h):
    y_s, y_t = h.small(h.y_s), h.small(h.y_t)
    terms = dict(
        kl=lambda: hand.class_mean_kl(h.logits_s, h.y_s, h.logits_t, h.y_t, h.classes, 2.0),
        projection=h.projection,
        ifv=lambda: hand.class_ifv(h.denoised(h.bare), y_s, h.z_teacher, y_t, h.classes),
    )
    return terms


def paper(h):
    def kl():
        t = hand.conv(h.P, "teacher.conv10", h.z_t)
        return h.position_kl(h.head(h.denoised(h.bare)), t).mean()

    def ifv():
        m_s = hand.variation(h.denoised(h.bare), h.y_s, h.classes)
        m_t = hand.variation(h.z_teacher, h.y_t, h.classes)
        return (m_s - m_t).square().mean()

    return dict(kl=kl, ifv=ifv)


def released(h):
    def kl():
        z = h.denoised(h.bare) if h.train else h.bare
        p_t = (h.z_t / 10).softmax(1)
        p_s = (z / 10).softmax(1)
        terms = p_t * (p_t.log() - p_s.log())  # (B,C,H,W)
        return terms.sum(3).mean()

    def ifv():
        only = tuple(range(1, h.classes))
        return hand.released_ifv(h.logits_s, h.y_s, h.logits_t, h.y_t, only)

    return dict(kl=kl, ifv=ifv)


HAND = dict(recommended=recommended, paper=paper, released=released)
TERMS = {
    "recommended": {"denoise": ["seg", "diff", "kl", "projection"], "distil": ["seg", "kl", "ifv"]},
    "paper": {"denoise": ["seg", "diff", "kl"], "distil": ["seg", "kl", "ifv"]},
    "released": {"denoise": ["seg", "diff", "kl"], "distil": ["seg", "kl", "ifv"]},
}
CASES = [(p, s, t, k) for p, v in TERMS.items() for s, ts in v.items() for t in ts for k in (2, 3)]


def compare_gradients(m, P):
    "Every weight of every network has the gradient of the float64 computation."
    largest = max(v.grad.abs().max().item() for v in P.values() if v.grad is not None)
    for name, net in m.networks.items():
        for k, p in net.named_parameters():
            expected = P[f"{name}.{k}"].grad
            expected = torch.zeros_like(p) if expected is None else expected.float()
            found = torch.zeros_like(p) if p.grad is None else p.grad
            close = torch.allclose(found, expected, rtol=5e-3, atol=1e-4 * largest + 1e-9)
            assert close, (name, k, (found - expected).abs().max())
    assert all(p.grad is None for p in m.frozen["teacher"].parameters())


@pytest.mark.parametrize("preset,stage,term,classes", CASES)
def test_a_term_has_the_value_and_gradient_of_its_formula(preset, stage, term, classes):
    options = replace(LOTUS.presets[preset], side=8)
    m = method(options, classes)
    terms = losses(m, stage, classes)
    assert list(terms) == TERMS[preset][stage]
    value = terms[term]()
    h = ByHand(m, stage, classes)
    expected = (HAND[preset](h) | dict(seg=h.seg, diff=h.diff))[term]()
    assert value.item() == pytest.approx(expected.item(), rel=2e-4)
    if preset == "released" and term == "ifv" and classes == 2:
        value.backward()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in m.student.parameters())
        return
    assert abs(expected) > 1e-3  # a term that says something on this scene
    value.backward()
    expected.backward()
    compare_gradients(m, h.P)


def test_gamma_is_read_from_projected_features():
    m = method(LotusOptions())
    set_modes(m, m.stages()[1])
    m.networks["diffusion"].eval()
    h = ByHand(m, "distil", 3)
    z = hand.conv(h.P, "diffusion.conv9.trans", h.project(h.bare))
    expected = hand.gamma(h.P, "diffusion.conv9", z, False).mean()
    assert m.monitor(scene_batch(3), noise)["gamma"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_scale_is_that_of_eight_batches_of_pooled_teachers_features():
    m = method(LotusOptions())
    asked = []

    def batches(i):
        asked.append(i)
        batch = scene_batch(3)
        return {k: replace(b, image=b.image + 0.3 * i) for k, b in batch.items()}

    m.begin(m.stages()[1], batches)  # the second stage measures nothing
    assert not asked
    m.begin(m.stages()[0], batches)
    assert sorted(set(asked)) == list(range(8))
    h = ByHand(m, "denoise", 3)
    x = torch.cat([scene_batch(3)["teacher"].image.double() + 0.3 * i for i in range(8)])
    z, _ = h.run("teacher", x, False)
    flat = z.movedim(1, 0).flatten(1)
    assert torch.allclose(m.scale("conv9").mean.double(), flat.mean(1), atol=1e-5)
    assert torch.allclose(m.scale("conv9").std.double(), flat.std(1), atol=1e-5)


# ---------------------------------------------------------------- tables
PRESETS = {  # what differs from `recommended`
    "recommended": {},
    "paper": dict(
        stride=1,
        feature_norm="none",
        correspondence="positional",
        kl_on="head",
        kl_direction="forward",
        tau=1.0,
        phi_grad=False,
    ),
    "released": dict(
        stride=1,
        projector="width",
        unit=True,
        feature_norm="none",
        correspondence="positional",
        kl_on="features",
        kl_direction="forward",
        kl_reduction="row",
        tau=10.0,
        ifv_on="logits",
        distill_from="denoised_then_raw",
        statistics="all",
        rule="improvements",
        patience=24,
        denoise_share=1.0,
        dice="hard",
    ),
}
RECOMMENDED = dict(
    taps=("conv9",),
    head="conv10",
    stride=2,
    projector="channel",
    side=512,
    unit=False,
    feature_norm="channel",
    teacher_input="own",
    adabn=False,
    correspondence="class",
    kl_on="student",
    kl_direction="symmetric",
    kl_reduction="pixel",
    tau=2.0,
    tau_squared=False,
    ifv_on="features",
    ifv_classes=(),
    quantiles=32,
    distill_from="denoised",
    phi_grad=True,
    statistics="running",
    eta=0.0,
    checkpoint=False,
    rule="plateau",
    patience=30,
    delta=0.01,
    denoise_share=0.5,
    joint=False,
    dice="soft",
    bce=0.5,
)


def test_the_presets_are_these():
    assert LOTUS.presets.keys() == PRESETS.keys()
    for name, changes in PRESETS.items():
        preset = LOTUS.presets[name]
        found = {f.name: getattr(preset, f.name) for f in fields(preset)}
        assert found == RECOMMENDED | changes, name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_default_weights_are_these(preset):
    expected = dict(seg=1.0, seg_teacher=0.0, diff=1.0, projection=1.0, kl=1.0, ifv=1.0)
    assert LOTUS.default_weights(LOTUS.presets[preset], preset) == expected
    assert method(replace(LOTUS.presets[preset], side=8)).weights == expected
    joint = LOTUS.default_weights(LotusOptions(joint=True))
    assert joint == expected | {"seg_teacher": 0.3}


def test_the_rows_of_table_2_are_these():
    def row(options, *off):
        weights = dict.fromkeys(off, 0.0)
        arm = dict(method="lotus", start="scratch")
        return arm | ({"options": options} if options else {}) | dict(weights=weights)

    raw = {"distill_from": "raw"}
    head = {"kl_on": "head"}
    expected = {
        "kl": row(raw | head, "diff", "ifv"),
        "ifv": row(raw, "diff", "projection", "kl"),
        "diff ifv": row({}, "kl"),
        "diff kl": row(head, "ifv"),
        "diff kl ifv": row(head),
    }
    found = {r.name: r.arm for r in TABLES["lotus"]}
    assert found.pop("none") == dict(method="single", start="scratch")
    for name, arm in found.items():
        found[name] = {k: v for k, v in arm.items() if v or k != "weights"}
        expected[name] = {k: v for k, v in expected[name].items() if v or k != "weights"}
    assert found == expected


def test_each_rule_reads_gamma_in_its_own_way():
    "A gamma that rises, rests for three epochs, rises and falls."
    curve = [0.1, 0.2, 0.3, 0.301, 0.302, 0.5, 0.4, 0.45, 0.42, 0.2]

    def end(rule, **k):
        r = RULES[rule](LotusOptions(rule=rule, **k))
        return next((i for i, g in enumerate(curve) if r.settled(g)), None)

    assert end("plateau", patience=3, delta=0.01) == 4
    assert end("plateau", patience=3, delta=0.0015) is None
    assert end("no_better", patience=3) == 8
    assert end("improvements", patience=3) == 2
    assert end("improvements", patience=6) == 5
    stage = method(LotusOptions(rule="no_better", patience=7)).stages()[0]
    assert (type(stage.until).__name__, stage.until.patience) == ("NoBetter", 7)


# ---------------------------------------------------------------- every option does something
POSITION = dict(correspondence="positional")


def terms_of(options, classes=3):
    "All terms of both stages, as numbers."
    m = method(options, classes)
    found = {}
    for stage in STAGES:
        for term, f in losses(m, stage, classes).items():
            found[stage, term] = f().item()
    return found


def structure(options):
    m = method(options)
    return {n: [(k, v.shape) for k, v in net.state_dict().items()] for n, net in m.networks.items()}


def phi_passes(options):
    "How often Phi is run for one step of the KL on denoised features."
    m = method(options)
    calls = []
    m.part("diffusion", "conv9").phi.register_forward_pre_hook(lambda *_: calls.append(1))
    losses(m, "denoise")["kl"]().backward()
    return len(calls)


def phi_learns(options):
    m = method(options)
    losses(m, "denoise")["kl"]().backward()
    p = m.part("diffusion", "conv9").phi.step.weight
    return p.grad is not None and bool(p.grad.abs().sum() > 0)


def first_stage(options):
    stage = method(options, epochs=8).stages()[0]
    return stage.epochs, repr(stage.until)


def learning(options):
    return [u.changes for s in method(options).stages() for u in s.updates]


ON_HEAD = dict(kl_on="head")
CHANGES = [  # option, base, change, what shows it, terms that must change (others must not)
    (
        "taps",
        {},
        dict(taps=("conv8", "conv9")),
        terms_of,
        "denoise diff, denoise projection, distil ifv",
    ),
    ("head", {}, dict(head="other"), terms_of, "denoise projection"),
    ("stride", {}, dict(stride=4), terms_of, "denoise diff, denoise projection, distil ifv"),
    ("projector", {}, dict(projector="none"), terms_of, "denoise projection, distil ifv"),
    ("side", dict(projector="width", side=4), dict(side=8), structure, None),
    ("unit", {}, dict(unit=True), terms_of, "denoise projection, distil ifv"),
    (
        "feature_norm",
        {},
        dict(feature_norm="none"),
        terms_of,
        "denoise diff, denoise projection, distil ifv",
    ),
    (
        "teacher_input",
        {},
        dict(teacher_input="student"),
        terms_of,
        "denoise kl, denoise projection, distil kl, distil ifv",
    ),
    (
        "correspondence",
        {},
        POSITION,
        terms_of,
        "denoise kl, denoise projection, distil kl, distil ifv",
    ),
    (
        "correspondence",
        POSITION,
        dict(correspondence="random"),
        terms_of,
        "denoise kl, denoise projection, distil kl, distil ifv",
    ),
    ("kl_on", ON_HEAD, dict(kl_on="features"), terms_of, "denoise kl, distil kl"),
    (
        "kl_direction",
        {},
        dict(kl_direction="forward"),
        terms_of,
        "denoise kl, denoise projection, distil kl",
    ),
    (
        "kl_direction",
        {},
        dict(kl_direction="reverse"),
        terms_of,
        "denoise kl, denoise projection, distil kl",
    ),
    (
        "kl_reduction",
        POSITION,
        dict(kl_reduction="row"),
        terms_of,
        "denoise kl, denoise projection, distil kl",
    ),
    ("tau", {}, dict(tau=4.0), terms_of, "denoise kl, denoise projection, distil kl"),
    (
        "tau_squared",
        {},
        dict(tau_squared=True),
        terms_of,
        "denoise kl, denoise projection, distil kl",
    ),
    ("ifv_on", POSITION, dict(ifv_on="logits"), terms_of, "distil ifv"),
    ("ifv_classes", {}, dict(ifv_classes=(1,)), terms_of, "distil ifv"),
    ("ifv_classes", POSITION, dict(ifv_classes=(1,)), terms_of, "distil ifv"),
    (
        "ifv_classes",
        POSITION | dict(ifv_on="logits"),
        dict(ifv_classes=(1,)),
        terms_of,
        "distil ifv",
    ),
    ("quantiles", {}, dict(quantiles=3), terms_of, "distil ifv"),
    (
        "distill_from",
        ON_HEAD,
        dict(distill_from="raw"),
        terms_of,
        "denoise kl, distil kl, distil ifv",
    ),
    (
        "distill_from",
        ON_HEAD,
        dict(distill_from="denoised_then_raw"),
        terms_of,
        "distil kl, distil ifv",
    ),
    ("phi_grad", ON_HEAD, dict(phi_grad=False), phi_learns, None),
    ("statistics", {}, dict(statistics="batch"), terms_of, "denoise projection, distil ifv"),
    ("eta", {}, dict(eta=1.0), terms_of, "denoise projection, distil ifv"),
    ("checkpoint", ON_HEAD, dict(checkpoint=True), phi_passes, None),
    ("rule", {}, dict(rule="no_better"), first_stage, None),
    ("patience", {}, dict(patience=3), first_stage, None),
    ("delta", {}, dict(delta=0.2), first_stage, None),
    ("denoise_share", {}, dict(denoise_share=0.25), first_stage, None),
    ("joint", {}, dict(joint=True), learning, None),
    ("dice", {}, dict(dice="hard"), terms_of, "denoise seg, distil seg"),
    ("bce", {}, dict(bce=2.0), terms_of, "denoise seg, distil seg"),
    ("bce", dict(joint=True), dict(bce=2.0), terms_of, None),
]


@pytest.mark.parametrize("option,base,change,probe,expected", CHANGES)
def test_an_option_changes_what_it_should_and_nothing_else(option, base, change, probe, expected):
    before = probe(LotusOptions(**base))
    after = probe(LotusOptions(**base | change))
    assert before != after
    if expected:
        changed = [f"{s} {t}" for (s, t), v in before.items() if v != after[s, t]]
        assert ", ".join(changed) == expected


def test_every_option_is_in_the_table():
    others = {"adabn"}  # below
    assert {f.name for f in fields(LotusOptions)} == {c[0] for c in CHANGES} | others


def test_adabn_changes_what_the_teacher_says_of_the_students_images():
    said = []
    for adabn in (False, True):
        m = method(LotusOptions(teacher_input="student", adabn=adabn))
        m.begin(m.stages()[0], lambda i: scene_batch(3))
        said.append(Scene(m, scene_batch(3), noise).reference[0])
    assert not torch.allclose(*said, atol=1e-3)
    h = ByHand(method(LotusOptions()), "denoise", 3)
    x = hand.conv(h.P, "teacher.conv9.0", hand.conv(h.P, "teacher.conv8", h.x_s))
    mean = x.mean((0, 2, 3))  # eight times the same batch; the running variance divides by n - 1
    P = h.P | {"teacher.conv9.1.running_mean": mean}
    P["teacher.conv9.1.running_var"] = x.var((0, 2, 3))
    expected = hand.conv(P, "teacher.conv10", hand.norm(P, "teacher.conv9.1", x, False))
    assert torch.allclose(said[1].double(), expected, atol=1e-4)


def test_the_joint_term_is_the_segmentation_of_the_teachers_images_with_norms_of_its_own():
    m = method(LotusOptions(joint=True, bce=0.7))
    value = losses(m, "denoise")["seg_teacher"]()
    P = hand.doubles(**m.networks)
    batch = scene_batch(3)["teacher"]
    x = hand.conv(P, "student.conv8", batch.image.double())
    x = hand.conv(P, "student.conv9.0", x)
    x = hand.norm({k.replace("norms.layers.conv9/1", "n"): v for k, v in P.items()}, "n", x, True)
    expected = hand.segmentation(hand.conv(P, "student.conv10", x), batch.label, 0.7)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("correspondence", ["class", "positional"])
def test_the_direction_of_the_kl_is_from_teacher_to_student_or_back(direction, correspondence):
    m = method(LotusOptions(kl_direction=direction, correspondence=correspondence, tau=3.0))
    found = losses(m, "distil")["kl"]()
    h = ByHand(m, "distil", 3)
    p_s, p_t = hand.probabilities(h.logits_s, 3.0), hand.probabilities(h.logits_t, 3.0)
    expected = hand.directed(p_s, p_t, direction).mean()
    if correspondence == "class":
        x_s, x_t = h.logits_s, h.logits_t
        expected = hand.class_mean_kl(x_s, h.y_s, x_t, h.y_t, 3, 3.0, direction)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("tau", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("correspondence", ["class", "positional"])
def test_tau_squared_is_a_factor(tau, correspondence):
    values = []
    for squared in (False, True):
        o = LotusOptions(tau=tau, tau_squared=squared, correspondence=correspondence)
        values.append(losses(method(o), "distil")["kl"]().item())
    assert values[1] == pytest.approx(tau**2 * values[0], rel=1e-5)


def test_the_release_weighs_its_kl_by_width_over_channels():
    values = []
    for reduction in ("pixel", "row"):
        o = LotusOptions(kl_reduction=reduction, kl_on="features", stride=2, **POSITION)
        values.append(losses(method(o), "distil")["kl"]().item())
    assert values[1] == pytest.approx(values[0] * 4 / 4, rel=1e-5)
    o = [LotusOptions(kl_reduction=r, kl_on="student", **POSITION) for r in ("pixel", "row")]
    values = [losses(method(x), "distil")["kl"]().item() for x in o]
    assert values[1] == pytest.approx(values[0] * 8 / 3, rel=1e-5)
