"""CMEDL by value: every term of every preset in every stage, and its gradient, against the same
written out by hand (`by_hand.py`) in float64."""

from dataclasses import replace

import by_hand
import pytest
import torch

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.methods.cmedl import CMEDL
from unpaired_kd.networks.registry import make_network
from unpaired_kd.training.method import set_trainable
from unpaired_kd.translation.contextual import FilterBank

SIDE = 32
SMALL = dict(side=SIDE, width=2, blocks=1, cx_on="teacher")
PAPER = replace(CMEDL.presets["paper"], **SMALL)
HINT_LAYERS = {"low": ("conv1.2", "conv1.5"), "mid": ("conv5",), "high": ("conv8", "conv9")}
ENCODER = ("conv3", "conv4")


def noise(purpose):
    return torch_rng(0, purpose)


def images(name, classes=2, number=2):
    "A body on one side of the image, air (0) on the other; blocks are the structures."
    g = torch_rng(0, "values", name)
    label = torch.zeros(number, SIDE, SIDE, dtype=torch.long)
    for i in range(number):
        label[i, 2 + i : 12, 3 : 9 + i] = 1 + i % (classes - 1)
    image = 0.2 + 0.5 * torch.rand(number, 1, SIDE, SIDE, generator=g).double()
    image = image + 0.2 * (label[:, None] > 0)
    image[..., 12:] = 0  # columns: the student's air
    image = image.transpose(2, 3) if name == "teacher" else image
    label = label.transpose(1, 2) if name == "teacher" else label
    return Batch(image.contiguous(), label.contiguous(), [""] * number, [""] * number)


def scene(options=PAPER, classes=2):
    names = ("student", "teacher") + (("unlabelled",) if options.unlabelled else ())
    batch = {n: images(n, classes) for n in names}
    if options.unlabelled:
        batch["unlabelled"] = replace(batch["unlabelled"], label=None)
    return batch


def method(options=PAPER, classes=2, **more):
    config = dict(in_channels=1, classes=1 if classes == 2 else classes, width=2)
    with seeded(0, "student"):
        student = make_network("unet", config)
    with seeded(0, "teacher"):
        teacher = make_network("unet", config)
    m = CMEDL(student, teacher, options, 2, seed=0, **more)
    with torch.no_grad():  # generators that draw something: their small weights give grey
        for name in ("g_st", "g_ts"):
            if name in m.networks:
                for p in m.networks[name].parameters():
                    p.mul_(10)
    for net in {**m.networks, **m.frozen}.values():
        net.double()
    for net in m.networks.values():
        net.train()
    return m


class ByHand:
    "The terms of CMEDL with two generators, from the paper's equations."

    def __init__(self, m, batch, options):
        self.o = options
        self.n = {**m.networks, **m.frozen}
        self.x_s = 2 * batch["student"].image - 1
        self.labelled = len(self.x_s)
        if options.unlabelled:
            self.x_s = torch.cat([self.x_s, 2 * batch["unlabelled"].image - 1])
        self.x_t = 2 * batch["teacher"].image - 1
        self.y_s = batch["student"].label
        self.y_t = batch["teacher"].label
        self.fake = self.n["g_st"](self.x_s)
        self.fake_s = self.n["g_ts"](self.x_t)

    def see(self, name, x, layers=()):
        return by_hand.taps(self.n[name], (x + 1) / 2, layers)

    def seg(self):
        logits, _ = self.see("student", self.x_s)
        return by_hand.segmentation(self.o.seg, logits[: self.labelled], self.y_s)

    def seg_teacher(self):
        return by_hand.segmentation(self.o.seg, self.see("teacher", self.x_t)[0], self.y_t)

    def seg_pseudo(self):
        logits, _ = self.see("teacher", self.fake)
        return by_hand.segmentation(self.o.seg, logits[: self.labelled], self.y_s)

    seg_g = seg_pseudo

    def seg_fake(self):
        return by_hand.segmentation(self.o.seg, self.see("student", self.fake_s)[0], self.y_t)

    def hint(self):
        layers = HINT_LAYERS[self.o.hint]
        _, f = self.see("student", self.x_s, layers)
        _, g = self.see("teacher", self.fake, layers)
        return by_hand.distance(f, g, self.o.hint_reduction)

    hint_g = hint

    def kd(self):
        student, _ = self.see("student", self.x_s)
        return by_hand.soft_labels(student, self.see("teacher", self.fake)[0], self.o.kd_tau)

    def adv(self):
        to_t = by_hand.generator_loss(self.n["d_t"](self.fake), self.o.gan)
        return to_t + by_hand.generator_loss(self.n["d_s"](self.fake_s), self.o.gan)

    def cyc(self):
        there = by_hand.gap(self.n["g_ts"](self.fake), self.x_s)
        return there + by_hand.gap(self.n["g_st"](self.fake_s), self.x_t)

    def idt(self):
        of_t = by_hand.gap(self.n["g_st"](self.x_t), self.x_t)
        return of_t + by_hand.gap(self.n["g_ts"](self.x_s), self.x_s)

    def discriminator(self):
        total = 0.0
        for d, real, fake in (("d_t", self.x_t, self.fake), ("d_s", self.x_s, self.fake_s)):
            d = self.n[d]
            total += by_hand.discriminator_loss(d(real), d(fake), self.o.gan, self.o.smooth)
        return total

    def cx(self):
        if self.o.cx_on == "filters":
            maps = list(zip(FilterBank().double()(self.fake), FilterBank().double()(self.x_t)))
        else:
            _, f = self.see("teacher", self.fake, ENCODER)
            maps = list(zip(f, self.see("teacher", self.x_t, ENCODER)[1]))
        total = 0.0
        for f, g in maps:
            of_images = []
            for i in range(min(len(f), len(g))):
                side = f.shape[-1]
                at = [torch.ones(side, side, dtype=torch.bool)] * 2
                if self.o.cx_mask == "body":
                    at = [by_hand.inside_body(x[i, 0], side) for x in (self.x_s, self.x_t)]
                a = f[i][:, at[0]]
                b = g[i][:, at[1]]
                of_images.append(by_hand.context(a, b, self.o.cx_h, self.o.cx_direction))
            total = total + sum(of_images) / len(of_images)
        return total


REACHES = {  # term -> networks that learn from it (the paper's words, see the chapter)
    "adv": ("g_st", "g_ts"),
    "cyc": ("g_st", "g_ts"),
    "idt": ("g_st", "g_ts"),
    "cx": ("g_st",),
    "hint_g": ("g_st",),
    "seg_g": ("g_st",),
    "discriminator": ("d_t", "d_s"),
    "seg": ("student",),
    "seg_fake": ("student",),
    "kd": ("student",),
    "seg_teacher": ("teacher",),
    "seg_pseudo": ("teacher",),
    "hint": ("student", "teacher"),
}


def expected_terms(stage, teacher_learns=True, first=False):
    generators = ["adv", "cyc", "idt", "cx"] + ([] if first else ["hint_g", "seg_g"])
    segmentors = ["hint", "kd", "seg", "seg_fake"]
    segmentors += ["seg_teacher", "seg_pseudo"] if teacher_learns else []
    return {"generators": generators, "discriminators": ["discriminator"], "segmentors": segmentors}


def gradients(net):
    return {k: p.grad for k, p in net.named_parameters()}


def compare(m, options, batch, update, term, reaches, formulas=ByHand):
    "The value of a term and its gradient in every network, beside those by hand."
    set_trainable(m.networks, update.changes)
    for net in m.networks.values():
        net.zero_grad(set_to_none=True)
    value = update.losses({**batch}, noise)[term]()
    value.backward()
    found = {n: gradients(net) for n, net in m.networks.items()}
    for net in m.networks.values():
        net.requires_grad_(True)
    by_formula = getattr(formulas(m, batch, options), term)()
    assert torch.isclose(value.double(), by_formula.double(), rtol=2e-5, atol=1e-7), term
    for name, net in m.networks.items():
        want = dict(net.named_parameters())
        grads = [None] * len(want)
        if name in reaches:
            grads = torch.autograd.grad(
                by_formula, want.values(), retain_graph=True, allow_unused=True
            )
        size = max([float(g.abs().max()) for g in grads if g is not None], default=0.0)
        assert (size > 0) == (name in reaches), (term, name)
        for (k, _), g in zip(want.items(), grads):
            have = found[name][k]
            g = torch.zeros_like(want[k]) if g is None else g
            have = torch.zeros_like(g) if have is None else have
            assert torch.allclose(have, g, rtol=1e-3, atol=2e-4 * size + 1e-12), (term, name, k)


CASES = {
    **{name: (replace(preset, **SMALL), {}) for name, preset in CMEDL.presets.items()},
    "bce, smoothed": (replace(PAPER, gan="bce", smooth=0.9), {}),
    "lsgan, smoothed": (replace(PAPER, smooth=0.9), {}),
    "hint low, sum": (replace(PAPER, hint="low", hint_reduction="sum"), {}),
    "hint mid, student": (replace(PAPER, hint="mid", hint_to="student"), {}),
    "three classes": (replace(PAPER, seg="dice_ce", kd_tau=2.0), {"classes": 3}),
    "three classes, common": (replace(PAPER, seg="common"), {"classes": 3}),
    "source": (replace(PAPER, cx_direction="source", cx_h=0.2), {}),
    "symmetric, no mask": (replace(PAPER, cx_direction="symmetric", cx_mask="none"), {}),
    "filters": (replace(PAPER, cx_on="filters"), {}),
    "unlabelled": (replace(PAPER, unlabelled=True), {}),
    "frozen teacher": (PAPER, {"teacher_learns": False}),
    "first the translation": (replace(PAPER, translate_first=True), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_of_every_term(name):
    options, more = CASES[name]
    m = method(options, **more)
    batch = scene(options, more.get("classes", 2))
    learns = more.get("teacher_learns", True)
    stages = m.stages()
    want = expected_terms(None, learns, options.translate_first)
    updates = [u for stage in stages for u in stage.updates]
    assert [u.name for u in updates] == ["generators", "discriminators", "segmentors"]
    for update in updates:
        assert set(update.losses({**batch}, noise)) == set(want[update.name])
        for term in want[update.name]:
            reaches = REACHES[term]
            if term == "hint" and (options.hint_to == "student" or not learns):
                reaches = ("student",)
            compare(m, options, batch, update, term, reaches)


# ----------------------------------------------------------------- CMEDL with DRIT

DRIT_REACHES = {  # term -> (update, networks that learn from it)
    "adv": ("generators", ("content", "style", "drit_generator")),
    "content": ("generators", ("content",)),
    "style_kl": ("generators", ("style",)),
    "self": ("generators", ("content", "style", "drit_generator")),
    "cross": ("generators", ("content", "style", "drit_generator")),
    "code": ("generators", ("content", "style", "drit_generator")),
    "hint_g": ("generators", ("content", "drit_generator")),
    "seg_g": ("generators", ("content", "drit_generator")),
    "latent": ("random style", ("content", "drit_generator")),
    "discriminator": ("discriminators", ("d_image",)),
    "content_discriminator": ("content discriminator", ("d_content",)),
    "seg_pseudo": ("segmentors", ("teacher",)),
    "seg_fake": ("segmentors", ("student",)),
}


class DritByHand(ByHand):
    "The terms of CMEDL with DRIT: content and style of both modalities, swapped."

    def __init__(self, m, batch, options):
        self.o = options
        self.n = {**m.networks}
        self.x = {"s": 2 * batch["student"].image - 1, "t": 2 * batch["teacher"].image - 1}
        self.x_s, self.x_t = self.x.values()
        self.y_s = batch["student"].label
        self.y_t = batch["teacher"].label
        self.labelled = len(self.x_s)
        self.clean = {d: self.n["content"](x, d) for d, x in self.x.items()}
        self.c = {d: self.noisy(c, f"drit content {d}") for d, c in self.clean.items()}
        self.style = {d: self.n["style"](x, d) for d, x in self.x.items()}
        z = {d: self.drawn(*self.style[d], f"drit style {d}") for d in "st"}
        self.z = z
        self.u = self.draw(self.c["s"], z["t"], "t")
        self.v = self.draw(self.c["t"], z["s"], "s")
        self.random = {d: self.normal(z[d], f"drit random {d}") for d in "st"}
        self.u_z = self.draw(self.c["s"], self.random["t"], "t")
        self.v_z = self.draw(self.c["t"], self.random["s"], "s")
        mean = self.style["t"][0].detach().mean(0, keepdim=True).expand(len(self.x_s), -1)
        self.fake = self.draw(self.c["s"], mean, "t")
        self.fake_s = self.v

    def normal(self, like, purpose):
        return torch.randn(like.shape, generator=noise(purpose)).double()

    def noisy(self, code, purpose):
        return code + self.normal(code, purpose)

    def drawn(self, mean, logvar, purpose):
        return mean + self.normal(mean, purpose) * torch.exp(logvar / 2)

    def draw(self, content, style, domain):
        return self.n["drit_generator"](content, style, domain)

    def judged(self):
        d = self.n["d_image"]
        yield d["t_encoded"], self.x_t, self.u
        yield d["t_random"], self.x_t, self.u_z
        yield d["s_encoded"], self.x_s, self.v
        yield d["s_random"], self.x_s, self.v_z

    def is_real(self, scales):
        return sum(torch.log(1 + torch.exp(-scale)).mean() for scale in scales)

    def is_fake(self, scales):
        return sum(torch.log(1 + torch.exp(scale)).mean() for scale in scales)

    def adv(self):
        return sum(self.is_real(d(fake)) / 2 for d, _, fake in self.judged())

    def discriminator(self):
        both = [self.is_real(d(real)) + self.is_fake(d(fake)) for d, real, fake in self.judged()]
        return sum(both) / 2

    def content(self):
        half = 0.0
        for d in "st":
            logits = [self.n["d_content"](self.c[d])]
            half = half + (self.is_real(logits) + self.is_fake(logits)) / 2
        return half

    def content_discriminator(self):
        judge = self.n["d_content"]
        return self.is_real([judge(self.c["t"])]) + self.is_fake([judge(self.c["s"])])

    def style_kl(self):
        total = 0.0
        for mean, logvar in self.style.values():
            total += ((mean**2 + torch.exp(logvar) - 1 - logvar) / 2).sum() / len(mean)
        return total

    def self(self):
        return sum(by_hand.gap(self.draw(self.c[d], self.z[d], d), self.x[d]) for d in "st")

    def cross(self):
        total = 0.0
        for image, own, back in ((self.u, "t", "s"), (self.v, "s", "t")):
            name = "u" if back == "s" else "v"
            other = self.v if back == "s" else self.u
            code = self.noisy(self.n["content"](image, own), f"drit content {name}")
            style = self.drawn(*self.n["style"](other, back), f"drit style {'vu'[back == 't']}")
            total += by_hand.gap(self.draw(code, style, back), self.x[back])
        return total

    def code(self):
        kept = by_hand.gap(self.n["content"](self.u, "t"), self.clean["s"].detach())
        return kept + by_hand.gap(self.n["content"](self.v, "s"), self.clean["t"].detach())

    def latent(self):
        read = by_hand.gap(self.n["style"](self.u_z, "t")[0], self.random["t"])
        return read + by_hand.gap(self.n["style"](self.v_z, "s")[0], self.random["s"])


def test_value_and_gradient_of_every_term_with_drit():
    options = replace(PAPER, i2i="drit", side=64)
    m = method(options)
    batch = {}
    for name, b in scene().items():  # three scales of discriminators want 64 px
        label = b.label.repeat_interleave(2, 1).repeat_interleave(2, 2)
        batch[name] = replace(b, image=torch.nn.Upsample(scale_factor=2)(b.image), label=label)
    updates = {u.name: u for u in m.stages()[0].updates}
    terms = {name: set(u.losses({**batch}, noise)) for name, u in updates.items()}
    assert set().union(*terms.values()) == set(m.weights)
    for term, (update, reaches) in DRIT_REACHES.items():
        assert term in terms[update]
        compare(m, options, batch, updates[update], term, reaches, DritByHand)


def test_the_style_that_is_kept_is_the_mean_of_what_the_teacher_was_shown():
    m = method(replace(PAPER, i2i="drit", side=64, infer="teacher_on_fake"))
    g = m.networks["drit_generator"]
    larger = torch.nn.Upsample(scale_factor=2)
    shown = []
    for k in range(13):
        batch = {"student": images("student"), "teacher": images(f"teacher {k}")}
        batch = {n: replace(b, image=larger(b.image)) for n, b in batch.items()}
        fakes = m.now(batch, noise).tr
        assert fakes.fake is fakes.fake  # asked for twice, followed once
        shown.append(m.networks["style"](2 * batch["teacher"].image - 1, "t")[0].mean(0).detach())
        with torch.no_grad():
            m.monitor(with_labels(batch), noise)  # looking moves nothing
    mean = torch.stack(shown[:10]).mean(0)
    for style in shown[10:]:
        mean = 0.9 * mean + 0.1 * style
    assert int(g.batches) == 13 and torch.allclose(g.mean_style.float(), mean, rtol=1e-5)
    image = larger(images("student").image.float())
    packed = m.student.float().eval()
    code = m.networks["content"](2 * image - 1, "s")
    kept = mean.float().expand(len(image), -1)
    by_style = [m.networks["teacher"]((g(code, z, "t") + 1) / 2) for z in (kept, 0 * kept)]
    assert torch.allclose(packed(image), by_style[0], atol=1e-5)
    assert not torch.allclose(packed(image), by_style[1], atol=1e-5)


def with_labels(batch):
    "The same batch with labels of the size of the images."
    size = batch["student"].image.shape[-1]
    label = torch.zeros(2, size, size, dtype=torch.long)
    return {n: replace(b, label=label) for n, b in batch.items()}


def test_the_teacher_is_calibrated_on_translations_of_24_batches():
    m = method(replace(PAPER, infer="teacher_on_fake", calibrate=True))
    teacher = m.networks["teacher"]
    batches = [{"student": images(f"calibration {i}")} for i in range(30)]
    first = teacher.conv1[0]
    wanted = []
    with torch.no_grad():
        m.finish(lambda i: batches[i])
        for batch in batches[:24]:
            fake = m.networks["g_st"].eval()(2 * batch["student"].image - 1)
            wanted.append(first((fake + 1) / 2).mean((0, 2, 3)))
    assert torch.allclose(teacher.conv1[1].running_mean, torch.stack(wanted).mean(0), rtol=1e-6)
