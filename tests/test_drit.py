"""The two-domain translation DRIT: shapes, which loss reaches which network, noise, bad input,
mixed precision."""

import math

import pytest
import torch
from torch import nn

from unpaired_kd.core import InputError, seeded, torch_rng
from unpaired_kd.translation.drit import (
    DRIT_UPDATES,
    DRIT_WEIGHTS,
    ContentDiscriminator,
    ContentEncoder,
    ImageDiscriminator,
    StyleEncoder,
    StyleGenerator,
    Translation,
    build_drit,
    style_kl,
)

NETWORKS = ("content", "style", "drit_generator", "d_image", "d_content")


def build(**kw):
    with seeded(0, "drit"):
        return build_drit(**{"width": 4, **kw})


def images(n=2, seed=0, side=64, channels=1):
    g = torch_rng(seed, "images")
    return [torch.rand(n, channels, side, side, generator=g) * 2 - 1 for _ in range(2)]


def batch_of(networks, n=2, seed=0, **kw):
    return Translation(networks, *images(n, seed, **kw), lambda purpose: torch_rng(seed, purpose))


def reached(networks):
    return {
        n
        for n, net in networks.items()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    }


def count(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


# ---------------------------------------------------------------- networks


def test_counts():
    with torch.device("meta"):
        nets = build_drit()
    assert [count(nets[n]) for n in NETWORKS] == [
        9_005_568,
        2_684_064,
        9_564_386,
        33_060_108,
        10_683_649,
    ]
    with torch.device("meta"):
        assert count(build_drit(res_blocks=6)["drit_generator"]) - 9_564_386 == 2 * 3 * 2 * (
            264 * 264 * 9 + 264
        )


@pytest.mark.parametrize("domain", ["s", "t"])
@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 64, 96), (2, 16, 20)])
def test_shapes(domain, shape):
    n, h, w = shape
    x = torch.rand(n, 1, h, w)
    nets = build()
    c = nets["content"](x, domain)
    (mu, logvar) = nets["style"](x, domain)
    assert c.shape == (n, 16, h // 4, w // 4) and mu.shape == logvar.shape == (n, 8)
    image = nets["drit_generator"](c, mu, domain)
    assert image.shape == x.shape and image.abs().max() <= 1
    assert nets["d_content"](c).shape[:2] == (n, 1)


@pytest.mark.parametrize(
    "kw", [dict(channels=3), dict(style=5), dict(res_blocks=0), dict(res_blocks=6), dict(width=1)]
)
def test_options(kw):
    nets = build(**kw)
    batch = batch_of(nets, channels=kw.get("channels", 1))
    assert batch.u.shape == batch.x_s.shape and sum(f() for f in batch.terms.values()).isfinite()


def test_image_discriminator_scales():
    d = ImageDiscriminator(width=4)
    assert [scale.shape[-1] for scale in d(torch.zeros(1, 1, 256, 256))] == [16, 8, 4]
    with pytest.raises(InputError, match="at least 64"):
        d(torch.zeros(1, 1, 32, 32))
    assert len(ImageDiscriminator(width=4, scales=1)(torch.zeros(1, 1, 16, 16))) == 1


@pytest.mark.parametrize("side", [4, 5, 8, 16, 17, 64])
def test_content_discriminator_accepts_small_maps(side):
    out = ContentDiscriminator(8)(torch.randn(1, 8, side, side))
    assert out.shape[2] == out.shape[3] >= 1 and out.isfinite().all()


def test_content_discriminator_normalises():
    "Codes that differ by a factor only must look nearly alike: the instance norm is really there."
    d = ContentDiscriminator(8)
    c = torch.randn(1, 8, 16, 16, generator=torch_rng(0)) * 10
    assert torch.allclose(d(c), d(c * 5), atol=1e-2)


def test_domains_have_their_own_branches_and_share_the_last_block():
    nets = build()
    x = images()[0]
    assert not torch.allclose(nets["content"](x, "s"), nets["content"](x, "t"))
    nets["content"](x, "s").sum().backward()
    assert all(p.grad is None for p in nets["content"].branches["t"].parameters())
    assert all(p.grad is not None for p in nets["content"].shared.parameters())


def test_style_keeps_brightness_and_reaches_the_image():
    nets = build()
    (x, _) = images()
    assert not torch.allclose(nets["style"](x, "s")[0], nets["style"](x * 0.5, "s")[0], atol=1e-4)
    c = nets["content"](x, "s")
    assert not torch.allclose(
        *[nets["drit_generator"](c, torch.full((2, 8), v), "t") for v in (0.0, 1.0)], atol=1e-4
    )


# ---------------------------------------------------------------- losses


def test_undecided_discriminators():
    nets = build()
    for n in ("d_content", "d_image"):
        for p in nets[n].parameters():
            nn.init.zeros_(p)
    batch = batch_of(nets)
    ln2 = math.log(2)
    for term, value in (("d_content", 2), ("content", 2), ("d_image", 3 * 4), ("adv", 3 * 2)):
        assert batch.terms[term]().item() == pytest.approx(value * ln2, abs=1e-5)


def test_discriminators_learn_the_right_answer():
    "Trained on their own loss: codes of t score above those of s, real images above translations."
    nets = build()
    nets["content"].noise = 0.0
    optimiser = torch.optim.Adam(
        [*nets["d_content"].parameters(), *nets["d_image"].parameters()], 5e-3
    )
    for _ in range(12):
        batch = batch_of(nets)
        optimiser.zero_grad()
        (batch.content_discriminator() + batch.image_discriminator()).backward()
        optimiser.step()
    with torch.no_grad():
        assert nets["d_content"](batch.c_t).mean() > nets["d_content"](batch.c_s).mean() + 0.5
        for d, real, fake in (
            ("t_encoded", batch.x_t, batch.u),
            ("t_random", batch.x_t, batch.u_z),
            ("s_encoded", batch.x_s, batch.v),
            ("s_random", batch.x_s, batch.v_z),
        ):
            assert nets["d_image"][d](real)[0].mean() > nets["d_image"][d](fake)[0].mean()


def test_kl():
    assert style_kl(torch.zeros(2, 8), torch.zeros(2, 8)) == 0
    assert style_kl(torch.ones(5, 8), torch.zeros(5, 8)).item() == pytest.approx(
        4
    )  # sum over dims, mean over batch
    assert style_kl(torch.zeros(1, 8), torch.full((1, 8), 2.0)).item() == pytest.approx(
        8 * 0.5 * (math.exp(2) - 3), rel=1e-5
    )


def test_reconstructions_vanish_for_a_perfect_translator():
    """Content = the image itself, style = nothing: self-reconstruction, cross-cycle and content
    code are 0."""

    class Content(nn.Module):
        def forward(self, x, domain):
            return x

        def noisy(self, code, generator):
            return code

    class StyleOf(nn.Module):
        size = 8

        def forward(self, x, domain):
            return torch.zeros(len(x), 8), torch.zeros(len(x), 8)

    class Draw(nn.Module):
        def forward(self, c, z, domain):
            return c

    batch = batch_of(dict(content=Content(), style=StyleOf(), drit_generator=Draw()))
    assert batch.self_reconstruction() == batch.cross_cycle() == batch.content_code() == 0


def test_cross_cycle_uses_the_other_domains_encoders():
    seen = []

    class Spy(nn.Module):
        def __init__(self, net, name):
            super().__init__()
            self.net = net
            self.name = name
            self.size = 8

        def forward(self, x, domain):
            seen.append((self.name, id(x), domain))
            return self.net(x, domain)

        def noisy(self, code, generator):
            return self.net.noisy(code, generator)

    nets = build()
    batch = batch_of(
        {**nets, "content": Spy(nets["content"], "content"), "style": Spy(nets["style"], "style")}
    )
    batch.cross_cycle()
    for name in ("content", "style"):
        assert (name, id(batch.u), "t") in seen and (name, id(batch.v), "s") in seen
        assert (name, id(batch.u), "s") not in seen and (name, id(batch.v), "t") not in seen
    assert len(seen) == 8  # each pass once


# ---------------------------------------------------------------- gradient flow

E_G = {"content", "style", "drit_generator"}
FLOW = {
    "d_content": {"d_content"},
    "d_image": {"d_image"},
    "content": {"content"},
    "kl": {"style"},
    "self": E_G,
    "cross": E_G,
    "code": E_G,
    "adv": E_G,
    "latent": {"content", "drit_generator"},
}


@pytest.mark.parametrize("term", FLOW)
@pytest.mark.parametrize("n", [1, 3])
def test_gradient_flow(term, n):
    "In its update, a term reaches these networks and no other."
    nets = build()
    changes = next(c for c, terms in DRIT_UPDATES.values() if term in terms)
    for name, net in nets.items():
        net.requires_grad_(name in changes)
    loss = batch_of(nets, n).terms[term]()
    assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert reached(nets) == FLOW[term] <= set(changes)


@pytest.mark.parametrize("term", ["latent", "d_content", "d_image", "content", "kl"])
def test_gradient_flow_without_freezing(term):
    "Even if everything wants gradients, encoders and generator are shielded where they must be."
    nets = build()
    batch_of(nets).terms[term]().backward()
    extra = {"content": {"d_content"}}.get(term, set())
    assert reached(nets) == FLOW[term] | extra


def test_latent_leaves_no_trace_on_the_style_encoder():
    nets = build()
    before = {k: v.clone() for k, v in nets["style"].state_dict().items()}
    batch = batch_of(nets)
    batch.kl().backward(retain_graph=True)
    grads = [None if p.grad is None else p.grad.clone() for p in nets["style"].parameters()]
    batch.latent().backward()
    for p, g in zip(nets["style"].parameters(), grads):
        assert p.requires_grad and torch.equal(p.grad, g)
    assert all(torch.equal(v, before[k]) for k, v in nets["style"].state_dict().items())


def test_hint_image():
    nets = build()
    batch = batch_of(nets, 3)
    assert batch.hint_image.shape == batch.x_s.shape
    mean = batch.a_t.mu.mean(0).expand(3, -1)
    assert torch.equal(batch.hint_image, nets["drit_generator"](batch.c_s, mean, "t"))
    batch.hint_image.square().mean().backward()
    assert reached(nets) == {"content", "drit_generator"}


def test_four_updates_in_order_change_what_they_may():
    nets = build()
    weights = {**DRIT_WEIGHTS["drit"], "d_content": 1.0, "d_image": 1.0}
    for changes, terms in DRIT_UPDATES.values():
        before = {n: [p.detach().clone() for p in net.parameters()] for n, net in nets.items()}
        for name, net in nets.items():
            net.requires_grad_(name in changes)
        parameters = [p for n in changes for p in nets[n].parameters()]
        optimiser = torch.optim.Adam(parameters, 1e-3)
        batch = batch_of(nets)
        sum(weights[t] * batch.terms[t]() for t in terms if weights[t]).backward()
        optimiser.step()
        changed = {
            n
            for n, net in nets.items()
            if any(not torch.equal(a, b) for a, b in zip(before[n], net.parameters()))
        }
        assert changed == set(changes)


def test_presets_name_terms_that_exist():
    names = set(batch_of(build()).terms)
    assert all(set(w) | {"d_content", "d_image"} == names for w in DRIT_WEIGHTS.values())
    assert sorted(t for _, terms in DRIT_UPDATES.values() for t in terms) == sorted(names)


# ---------------------------------------------------------------- noise, laziness, precision


def test_same_generators_same_numbers():
    nets = build()
    a = batch_of(nets)
    b = batch_of(nets)
    other = Translation(nets, *images(), lambda purpose: torch_rng(1, purpose))
    for name in ("u", "v", "u_z", "v_z", "hint_image"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.u, other.u) and not torch.equal(a.z_s, a.z_t)


def test_global_generator_is_not_touched():
    nets = build()
    state = torch.get_rng_state()
    batch = batch_of(nets)
    for f in batch.terms.values():
        f()
    assert torch.equal(state, torch.get_rng_state())


def test_content_noise_only_in_training():
    encoder = ContentEncoder(width=4)
    x = images()[0]
    clean = encoder(x, "s")
    noisy = encoder(x, "s", torch_rng(0))
    assert (noisy - clean).std().item() == pytest.approx(1, abs=0.05) and torch.equal(
        noisy, encoder(x, "s", torch_rng(0))
    )
    assert torch.equal(encoder.eval()(x, "s", torch_rng(0)), clean)
    quiet = ContentEncoder(width=4, noise=0.0)
    assert torch.equal(quiet(x, "s", torch_rng(0)), quiet(x, "s"))


def test_only_what_is_asked_for_is_computed():
    batch = batch_of(build())
    batch.content_discriminator()
    assert {"clean_s", "clean_t", "c_s", "c_t"} == set(vars(batch)) - {
        "networks",
        "x_s",
        "x_t",
        "noise",
    }


@pytest.mark.parametrize("n", [1, 2])
def test_mixed_precision(n):
    nets = build()
    with torch.autocast("cpu", torch.bfloat16):
        batch = batch_of(nets, n)
        loss = sum(f() for f in batch.terms.values())
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(
        p.grad is None or p.grad.isfinite().all() for net in nets.values() for p in net.parameters()
    )


def test_constant_images_are_finite():
    nets = build()
    flat = torch.full((1, 1, 64, 64), -1.0)
    loss = sum(
        f()
        for f in Translation(nets, flat, flat, lambda purpose: torch_rng(0, purpose)).terms.values()
    )
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is None or p.grad.isfinite().all() for net in nets.values() for p in net.parameters()
    )


@pytest.mark.gpu
def test_on_a_gpu():
    nets = {k: v.cuda() for k, v in build().items()}
    batch = Translation(nets, *(x.cuda() for x in images()), lambda purpose: torch_rng(0, purpose))
    values = {k: f() for k, f in batch.terms.items()}
    sum(values.values()).backward()
    reference = batch_of(build())
    for k, v in values.items():
        assert v.item() == pytest.approx(reference.terms[k]().item(), rel=2e-2)


# ---------------------------------------------------------------- bad input

GOOD = torch.zeros(2, 1, 64, 64)


@pytest.mark.parametrize(
    "x_s, x_t, says",
    [
        (GOOD + 1.5, GOOD, "x_s has values"),
        (GOOD, GOOD * float("nan"), "x_t has values"),
        (GOOD, GOOD - 2, r"\[-1,1\]"),
        (GOOD[:0], GOOD[:0], "at least one image"),
        (GOOD, GOOD[:1], "equal numbers"),
    ],
)
def test_bad_batches(x_s, x_t, says):
    with pytest.raises(InputError, match=says):
        Translation({}, x_s, x_t, None)


@pytest.mark.parametrize(
    "x, domain, says",
    [
        (torch.zeros(1, 3, 64, 64), "s", r"\(B,1,H,W\)"),
        (torch.zeros(1, 64, 64), "s", r"\(B,1,H,W\)"),
        (torch.zeros(1, 1, 62, 64), "t", "multiple of 4"),
        (torch.zeros(1, 1, 12, 12), "t", "at least 16"),
        (GOOD, "ct", "unknown domain"),
    ],
)
def test_bad_images(x, domain, says):
    for encoder in (ContentEncoder(width=4), StyleEncoder(width=4)):
        with pytest.raises(InputError, match=says):
            encoder(x, domain)


def test_bad_codes():
    g = StyleGenerator(width=4)
    c = torch.zeros(2, 16, 16, 16)
    z = torch.zeros(2, 8)
    for args, says in (
        ((c[:, :8], z, "s"), "content has shape"),
        ((c, z[:1], "s"), "style has shape"),
        ((c, z, "x"), "unknown domain"),
    ):
        with pytest.raises(InputError, match=says):
            g(*args)
    with pytest.raises(InputError, match="too small"):
        ContentDiscriminator(16)(c[..., :3, :3])
    for kw in (dict(width=0), dict(channels=0), dict(res_blocks=-1), dict(style=2.5)):
        with pytest.raises(InputError, match=next(iter(kw))):
            build_drit(**kw)
