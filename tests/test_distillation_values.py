"""Distillation losses and the diffusion block by value, against float64 written out by hand."""

import by_hand_lotus as hand
import pytest
import torch
from torch.nn import functional as F

from unpaired_kd.distillation.class_means import class_mean_kl, class_mean_scores
from unpaired_kd.distillation.correspondence import random_same_class
from unpaired_kd.distillation.diffusion import (
    Bottleneck,
    DiffusionBlock,
    NoiseAdapter,
    Phi,
    Projector,
    Schedule,
    blend,
    ddim_step,
    ddim_timesteps,
    q_sample,
)
from unpaired_kd.distillation.soft_labels import directed_kl, log_probs, soft_label_kl
from unpaired_kd.distillation.variation import (
    class_ifv,
    label_to,
    positional_ifv,
    prototypes,
    quantile_means,
    released_ifv,
    variation_map,
)

DIRECTIONS = ("forward", "reverse", "symmetric")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes_of(*shape, k=3, seed=0):
    return torch.randint(k, shape, generator=torch.Generator().manual_seed(seed))


def filled(net, seed=0):
    "Float64 weights and statistics that leave nothing at 0 or 1."
    net = net.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, v in [*net.named_parameters(), *net.named_buffers()]:
            if not v.is_floating_point() or name.endswith("alpha_bar"):
                continue
            v.copy_(torch.randn(v.shape, generator=g) * 0.5)
            if name.endswith("var") or name.endswith("weight") and v.ndim == 1:
                v.copy_(v.abs() + 0.5)
    return net


def same(found, expected, tolerance=1e-9):
    close = torch.allclose(
        found.double(), expected.double(), rtol=0, atol=torch.as_tensor(tolerance).item()
    )
    assert close, (found, expected)


# ---------------------------------------------------------------- diffusion
def test_the_schedule_is_a_product_of_a_thousand_rising_betas():
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    left = []
    share = 1.0
    for b in beta:
        share *= 1 - b
        left.append(share)
    same(Schedule().alpha_bar, torch.tensor(left, dtype=torch.float64), 1e-7)
    assert Schedule().alpha_bar[400].item() == pytest.approx(0.193572, abs=1e-6)
    assert ddim_timesteps() == [400, 300, 200, 100, 0]
    assert ddim_timesteps(1000, 20, 9) == [400, 350, 300, 250, 200, 150, 100, 50, 0]


def test_noising_and_blending():
    z, eps = numbers(2, 4, 3, 3), numbers(2, 4, 3, 3, seed=1)
    alpha_bar = torch.tensor([0.9, 0.3], dtype=torch.float64)
    found = q_sample(z, torch.tensor([1, 0]), eps, alpha_bar)
    same(found[0], 0.3**0.5 * z[0] + 0.7**0.5 * eps[0])
    same(found[1], 0.9**0.5 * z[1] + 0.1**0.5 * eps[1])
    mixed = blend(z, torch.tensor([0.2, 0.6], dtype=torch.float64), eps)
    same(mixed[0], 0.2 * z[0] + 0.8 * eps[0])
    same(mixed[1], 0.6 * z[1] + 0.4 * eps[1])


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_a_step_of_ddim(eta):
    z, e, fresh = numbers(1, 2, 2, 2), numbers(1, 2, 2, 2, seed=1), numbers(1, 2, 2, 2, seed=2)
    a, b = 0.2, 0.4
    sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    clean = (z - (1 - a) ** 0.5 * e) / a**0.5
    expected = b**0.5 * clean + (1 - b - sigma**2) ** 0.5 * e + sigma * fresh
    same(ddim_step(z, e, torch.tensor(a), torch.tensor(b), eta, fresh), expected, 1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels,reduction,inner", [(8, 4, 2), (8, 8, 1), (3, 4, 1)])
def test_a_bottleneck(channels, reduction, inner, train):
    net = filled(Bottleneck(channels, reduction)).train(train)
    assert net.body[0].out_channels == inner
    x = numbers(2, channels, 4, 4)
    same(net(x), hand.bottleneck(hand.doubles(n=net), "n", x, train))


def test_phi_adds_the_vector_of_each_step():
    net = filled(Phi(4)).eval()
    z, t = numbers(2, 4, 5, 5), torch.tensor([3, 999])
    expected = hand.phi(hand.doubles(n=net), "n", z, t, False)
    same(net(z, t), expected)
    assert (net(z, t) - net(z, t.flip(0))).abs().max() > 1e-3


def test_the_noise_adapter_is_a_softmax_over_the_mean_of_a_bottleneck():
    net = filled(NoiseAdapter(8)).eval()
    z = numbers(2, 8, 4, 4)
    P = {k.replace("n.", "n.adapter.", 1): v for k, v in hand.doubles(n=net).items()}
    same(net(z), hand.gamma(P, "n", z, False), 1e-6)


@pytest.mark.parametrize("kind,unit", [("channel", False), ("channel", True), ("width", True)])
def test_the_projector(kind, unit):
    net = filled(Projector(4, 4, kind=kind, unit=unit, side=5))
    P, z = hand.doubles(n=net), numbers(2, 4, 3, 5)
    if kind == "channel":
        out = hand.conv(P, "n.body.2", hand.conv(P, "n.body.0", z).clamp_min(0))
    else:
        h = (z @ P["n.body.body.0.weight"].T + P["n.body.body.0.bias"]).clamp_min(0)
        out = h @ P["n.body.body.2.weight"].T + P["n.body.body.2.bias"]
    if unit:
        out = out / out.square().sum(1, keepdim=True).sqrt()
    same(net(z), out, 1e-6)


def test_the_diffusion_loss_is_a_mean_of_squares_over_all_steps():
    "With a schedule of two steps both must be drawn, and each image has its own."
    block = filled(DiffusionBlock(4, schedule=Schedule(2, 0.3, 0.6), uniform=2, evaluations=2))
    block = block.float().eval()
    P = hand.doubles(n=block)
    alpha_bar = torch.tensor([0.7, 0.7 * 0.4], dtype=torch.float64)
    z = numbers(6, 4, 3, 3)
    drawn = set()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        t = torch.randint(2, (6,), generator=g)
        eps = torch.randn(z.shape, generator=g).double()
        drawn |= set(t.tolist())
        a = alpha_bar[t][:, None, None, None]
        said = hand.phi(P, "n.phi", a.sqrt() * z + (1 - a).sqrt() * eps, t, False)
        found = block.loss(z, torch.Generator().manual_seed(seed))
        assert found.item() == pytest.approx((eps - said).square().mean().item(), rel=1e-4)
    assert drawn == {0, 1}


def test_the_loss_asks_at_the_first_and_at_the_last_step():
    block = DiffusionBlock(2)
    asked = []
    block.phi.register_forward_pre_hook(lambda _, x: asked.append(x[1]))
    for seed in range(20):
        block.loss(torch.zeros(1000, 2, 1, 1), torch.Generator().manual_seed(seed))
    t = torch.cat(asked)
    assert t.min() == 0 and t.max() == 999


@pytest.mark.parametrize("statistics", ["running", "batch", "all"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_denoising_and_where_its_gradient_goes(statistics, eta):
    block = filled(DiffusionBlock(4, eta=eta, statistics=statistics)).float()
    block.train()
    P, z = hand.doubles(n=block), numbers(2, 4, 4, 4).requires_grad_()
    g = torch.Generator().manual_seed(1)
    eps = torch.randn(z.shape, generator=g).double()
    fresh = [torch.randn(z.shape, generator=g).double() for _ in range(5)] if eta else None
    by_batch = statistics != "running"
    expected = hand.denoise(P, "n", z, eps, True, by_batch, fresh, eta)
    found, _ = block.denoise(z.float(), torch.Generator().manual_seed(1))
    same(found, expected, 2e-4 * expected.abs().max())
    weight = numbers(*expected.shape, seed=5)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    scale = max(v.grad.abs().max() for v in P.values() if v.grad is not None)
    for k, p in block.named_parameters():
        assert p.grad is not None and P[f"n.{k}"].grad.abs().max() > 0, k
        same(p.grad, P[f"n.{k}"].grad, 2e-3 * scale)


@pytest.mark.parametrize("statistics,moved", [("running", 1), ("batch", 1), ("all", 6)])
def test_who_moves_the_statistics_of_phi(statistics, moved):
    block = DiffusionBlock(4, statistics=statistics)
    z = numbers(2, 4, 4, 4).float()
    block.loss(z)
    block.denoise(z)
    assert block.phi.body[3].num_batches_tracked == moved


def test_the_default_block_trains_phi_and_normalises_by_running_statistics():
    block = DiffusionBlock(4)
    assert (block.phi_grad, block.statistics, block.eta) == (True, "running", 0.0)


# ---------------------------------------------------------------- soft labels
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tau,squared", [(1.0, True), (3.0, True), (3.0, False)])
def test_soft_labels(channels, direction, tau, squared):
    s, t = numbers(2, channels, 3, 3).requires_grad_(), numbers(2, channels, 3, 3, seed=1)
    p_s, p_t = hand.probabilities(s, tau), hand.probabilities(t, tau)
    expected = hand.directed(p_s, p_t, direction).mean() * (tau**2 if squared else 1)
    found = soft_label_kl(s, t, tau, direction, squared)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    same(
        torch.autograd.grad(found, s)[0],
        torch.autograd.grad(expected, s)[0],
        1e-5,
    )


def test_the_default_of_the_soft_labels():
    s, t = numbers(1, 3, 2, 2), numbers(1, 3, 2, 2, seed=1)
    p_s, p_t = hand.probabilities(s), hand.probabilities(t)
    same(soft_label_kl(s, t), hand.divergence(p_t, p_s).mean(), 1e-6)
    same(directed_kl(log_probs(s), log_probs(t)), hand.divergence(p_t, p_s), 1e-6)


# ---------------------------------------------------------------- class means
@pytest.mark.parametrize("per", ["batch", "image"])
def test_class_means(per):
    x, y = numbers(2, 3, 4, 4), classes_of(2, 4, 4, k=2)
    found, there = class_mean_scores(x, y, 3, per)
    groups = [[0, 1]] if per == "batch" else [[0], [1]]
    for r, images in enumerate(groups):
        for k in range(3):
            own = x[images].movedim(1, -1)[y[images] == k]
            assert there[r, k] == bool(len(own))
            same(found[r, k], own.mean(0) if len(own) else torch.zeros(3), 1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tau,squared", [(2.0, False), (3.0, True)])
def test_class_mean_kl(channels, direction, tau, squared):
    "Class 2 is missing on the teacher's side."
    classes = max(2, channels)
    s, t = numbers(2, channels, 4, 4).requires_grad_(), numbers(3, channels, 5, 5, seed=1)
    y_s, y_t = classes_of(2, 4, 4, k=classes), classes_of(3, 5, 5, k=2, seed=1)
    expected = hand.class_mean_kl(s, y_s, t, y_t, classes, tau, direction)
    expected = expected * (tau**2 if squared else 1)
    found = class_mean_kl(s, y_s, t, y_t, classes, tau, direction, tau_squared=squared)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    same(torch.autograd.grad(found, s)[0], torch.autograd.grad(expected, s)[0], 1e-6)


# ---------------------------------------------------------------- variation
def test_a_label_at_the_size_of_the_features_is_that_at_the_centre():
    y = torch.arange(64).reshape(1, 8, 8)
    assert label_to(torch.zeros(1, 2, 4, 4), y)[0].tolist() == y[0, 1::2, 1::2].tolist()
    assert label_to(torch.zeros(1, 2, 2, 2), y)[0].tolist() == y[0, 2::4, 2::4].tolist()


def test_prototypes():
    f, y = numbers(2, 4, 3, 3), classes_of(2, 3, 3)
    found = prototypes(f, y, 4)
    for b in range(2):
        for k in range(4):
            own = f[b][:, y[b] == k]
            same(found[b, k], own.mean(1) if own.shape[1] else torch.zeros(4))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_map_and_its_gradient(dims):
    f, y = numbers(2, 4, *[4] * dims).requires_grad_(), classes_of(2, *[4] * dims) - 1
    expected = hand.variation(f, y, 2)
    found = variation_map(f, y, 2)
    same(found, expected)
    weight = numbers(*expected.shape, seed=3)
    same(
        torch.autograd.grad((found * weight).sum(), f)[0],
        torch.autograd.grad((expected * weight).sum(), f)[0],
    )
    assert (found[y < 0] == 0).all()


def test_short_vectors_and_short_prototypes_have_the_gradient_of_a_constant_length():
    "Lengths below 1e-4 count as 1e-4, in the map and in its derivative."
    x = torch.tensor([[3.0, 1.0], [1e-5, 2e-5], [-3.0, -1.0], [2e-5, 1e-5]], dtype=torch.float64)
    f = x.T.reshape(1, 2, 2, 2).requires_grad_()
    y = torch.tensor([[[0, 0], [0, 1]]])  # prototype of 0 is short, of 1 too

    def length(v):
        return v.square().sum(0).clamp_min(1e-8).sqrt()

    flat = f.flatten(2)[0]
    mu = {0: flat[:, :3].mean(1), 1: flat[:, 3]}
    cosines = [
        flat[:, i] @ mu[k] / (length(flat[:, i]) * length(mu[k]))
        for i, k in enumerate((0, 0, 0, 1))
    ]
    expected = torch.stack(cosines)
    found = variation_map(f, y, 2).flatten()
    same(found, expected, 1e-12)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), f)[0]
    plain = torch.autograd.grad((expected * weight).sum(), f)[0]
    assert torch.allclose(ours, plain, rtol=1e-6)


def test_positional_variation():
    a, b = numbers(1, 3, 3), numbers(1, 3, 3, seed=1)
    same(positional_ifv(a, b), (a - b).square().mean())
    mask = classes_of(1, 3, 3, k=2).bool()
    same(positional_ifv(a, b, mask), (a - b).square()[mask].mean())


@pytest.mark.parametrize("n", [1, 3, 32])
def test_means_of_shares(n):
    x = numbers(10)
    same(quantile_means(x, n), hand.share_means(x, n))


@pytest.mark.parametrize("only", [None, (1,), (0, 2)])
@pytest.mark.parametrize("quantiles", [4, 32])
def test_variation_by_class_is_a_mean_over_the_classes(only, quantiles):
    f_s, y_s = numbers(2, 4, 5, 5).requires_grad_(), classes_of(2, 5, 5)
    f_t, y_t = numbers(3, 4, 4, 4, seed=1) + 0.5, classes_of(3, 4, 4, seed=1)
    expected = hand.class_ifv(f_s, y_s, f_t, y_t, 3, quantiles, only)
    found = class_ifv(f_s, y_s, f_t, y_t, 3, quantiles, only)
    assert expected > 1e-3
    same(found, expected, 1e-9)
    same(torch.autograd.grad(found, f_s)[0], torch.autograd.grad(expected, f_s)[0], 1e-9)


@pytest.mark.parametrize("channels,only", [(3, (1, 2)), (3, (1,)), (1, (1,))])
def test_variation_as_released(channels, only):
    x_s, x_t = numbers(2, channels, 4, 4).requires_grad_(), numbers(2, channels, 4, 4, seed=1)
    y_s, y_t = classes_of(2, 4, 4), classes_of(2, 4, 4, seed=1)
    expected = hand.released_ifv(x_s, y_s, x_t, y_t, only)
    found = released_ifv(x_s, y_s, x_t, y_t, only)
    same(found, expected, 1e-6)
    if channels > 1:
        same(torch.autograd.grad(found, x_s)[0], torch.autograd.grad(expected, x_s)[0], 1e-6)
    else:
        assert not found.requires_grad or (torch.autograd.grad(found, x_s)[0] == 0).all()


# ---------------------------------------------------------------- correspondence
def test_each_pixel_has_a_partner_of_its_class_wherever_one_is():
    "Values name their pixel, so that a partner can be looked up; class 2 has none."
    y_s, y_t = classes_of(2, 6, 6), classes_of(3, 5, 5, k=2, seed=1)
    values = torch.arange(75.0).reshape(3, 1, 5, 5) + 1
    g = torch.Generator().manual_seed(0)
    out, found = random_same_class(values, y_t, y_s, 3, g)
    assert (found == (y_s < 2)).all()
    partner = y_t.flatten()[(out[:, 0][found] - 1).long()]
    assert (partner == y_s[found]).all() and (out[:, 0][~found] == 0).all()
    draws = [random_same_class(values, y_t, y_s, 3, g)[0] for _ in range(60)]
    for k in (0, 1):
        seen = torch.cat([d[:, 0][y_s == k] for d in draws]).unique()
        assert len(seen) == (y_t == k).sum()  # every member of the class is drawn


def test_partners_are_drawn_with_equal_chance():
    y_t = torch.zeros(1, 1, 4, dtype=torch.long)
    y_s = torch.zeros(1, 100, 100, dtype=torch.long)
    values = torch.arange(4.0).reshape(1, 1, 1, 4)
    out, _ = random_same_class(values, y_t, y_s, 1, torch.Generator().manual_seed(0))
    share = F.one_hot(out.flatten().long(), 4).double().mean(0)
    assert (share - 0.25).abs().max() < 0.02
