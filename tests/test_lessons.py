"""Distillation losses: what their chapters do not show. Routing through real networks, volumes,
mixed precision, invariances, exact repetition.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from unpaired_kd.core import InputError, seeded, torch_rng
from unpaired_kd.distillation import variation
from unpaired_kd.distillation.class_means import class_mean_kl, class_mean_scores
from unpaired_kd.distillation.diffusion import (
    DiffusionBlock,
    NoiseAdapter,
    Phi,
    Projector,
    Schedule,
    blend,
    ddim,
    ddim_step,
    frozen_statistics,
    noise_like,
)
from unpaired_kd.distillation.soft_labels import DIRECTIONS, soft_label_kl
from unpaired_kd.distillation.variation import (
    class_ifv,
    inverse_length,
    label_to,
    one_hot,
    positional_ifv,
    prototypes,
    quantile_means,
    released_ifv,
    sorted_by_class,
    variation_map,
)
from unpaired_kd.networks.taps import Taps
from unpaired_kd.networks.unet import UNet

SHAPES = {2: (2, 16, 8, 10), 3: (2, 16, 4, 6, 8)}


def features(dims=2, seed=0, channels=16):
    return torch.randn(2, channels, *SHAPES[dims][2:], generator=torch_rng(seed, "features"))


def touched(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def block_of(**kw):
    with seeded(0, "block"):
        return DiffusionBlock(**kw)


# ---------------------------------------------------------------- diffusion


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_block_in_2d_and_3d(dims, norm):
    block = block_of(dims=dims, norm=norm)
    z = features(dims).requires_grad_()
    out, gamma = block.denoise(z, torch_rng(1))
    assert out.shape == z.shape and gamma.shape == (2,) and ((gamma > 0) & (gamma < 1)).all()
    (out.square().mean() + out.sum() * 0.1 + block.loss(z.detach(), torch_rng(2))).backward()
    assert z.grad.isfinite().all() and all(
        p.grad is None or p.grad.isfinite().all() for p in block.parameters()
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_narrow_features(channels):
    block = block_of(channels=channels)
    out, gamma = block.denoise(features(channels=channels), torch_rng(0))
    assert (
        out.shape[1] == channels
        and out.isfinite().all()
        and block.loss(features(channels=channels), torch_rng(0)).isfinite()
    )
    assert (
        NoiseAdapter(8).body.body[0].out_channels == 1 and Phi(8).body[0].body[0].out_channels == 2
    )


def test_student_narrower_than_teacher():
    P = Projector(4, 16)
    block = block_of()
    z = features(channels=4).requires_grad_()
    out = block.denoise(P(z), torch_rng(0))[0]
    (
        out * torch.randn(out.shape, generator=torch_rng(1))
    ).sum().backward()  # a plain sum over normalised channels has no gradient
    assert z.grad.abs().sum() > 0


def test_gradient_routing_through_real_networks():
    """L_diff reaches the noise predictor only. A KL on the denoised features reaches the student
    up to its tap, never its head, never the teacher."""
    with seeded(0, "nets"):
        teacher = UNet(3, 2, width=4).eval().requires_grad_(False)
        student = UNet(3, 2, width=4)
    P = Projector(4)
    block = block_of(channels=4)
    x = torch.rand(2, 3, 32, 32, generator=torch_rng(0, "x"))
    taps_t = Taps(teacher, ["conv9"])
    taps_s = Taps(student, ["conv9"])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        scores_t = teacher(x)
    student(x)
    z_t = taps_t["conv9"]
    z_s = taps_s["conv9"]

    block.loss(z_t, torch_rng(0)).backward()
    assert touched(block.phi) and not any(
        map(touched, (student, P, block.adapter, block.trans, block.proj))
    )

    block.zero_grad(set_to_none=True)
    z_hat, _ = block.denoise(P(z_s), torch_rng(1))
    soft_label_kl(teacher.conv10(z_hat), scores_t).backward()
    assert all(
        map(
            touched,
            (student.conv9, student.conv1, P, block.adapter, block.trans, block.proj, block.phi),
        )
    )
    assert not touched(student.conv10) and not touched(teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_equal_generators_equal_results_whatever_ran_before():
    block = block_of()
    z = features()
    first = block.loss(z, torch_rng(3, 17)).item(), block.denoise(z, torch_rng(3, 18))[0]
    torch.randn(1000)
    block = block_of()
    assert first[0] == block.loss(z, torch_rng(3, 17)).item() and torch.equal(
        first[1], block.denoise(z, torch_rng(3, 18))[0]
    )


def test_noise_does_not_depend_on_dtype_or_layout():
    z = features()
    a = noise_like(z, torch_rng(0))
    b = noise_like(z.bfloat16().to(memory_format=torch.channels_last), torch_rng(0))
    assert torch.equal(a, b) and b.dtype == torch.float32


@pytest.mark.gpu
def test_same_noise_and_near_equal_results_on_a_gpu():
    block = block_of().eval()
    z = features()
    assert torch.equal(noise_like(z.cuda(), torch_rng(0)).cpu(), noise_like(z, torch_rng(0)))
    a = block.denoise(z, torch_rng(0))[0]
    b = block.cuda().denoise(z.cuda(), torch_rng(0))[0].cpu()
    assert torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("phi_grad", [True, False])
def test_checkpointing_changes_neither_gradients_nor_buffers(statistics, phi_grad):
    runs = []
    for checkpoint in (False, True):
        block = block_of(statistics=statistics, phi_grad=phi_grad, checkpoint=checkpoint)
        z = features().requires_grad_()
        buffers = [b.clone() for b in block.phi.buffers()]
        (block.denoise(z, torch_rng(0))[0] - z.detach()).square().mean().backward()
        assert all(torch.equal(a, b) for a, b in zip(buffers, block.phi.buffers()))
        assert touched(block.phi) == phi_grad
        runs.append(z.grad)
    assert runs[0].abs().sum() > 0 and torch.allclose(*runs, atol=1e-7)


def test_checkpointing_keeps_less():
    def kept(checkpoint):
        total = 0
        block = block_of(checkpoint=checkpoint)
        z = features().requires_grad_()

        def note(t):
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            block.denoise(z, torch_rng(0))
        return total

    assert kept(True) < 0.6 * kept(False)


def test_frozen_statistics_gives_the_modes_back_also_after_an_error():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2).eval())
    for use in ("running", "batch"):
        with pytest.raises(RuntimeError), frozen_statistics(net, use):
            raise RuntimeError
        assert [(m.training, m.track_running_stats) for m in net] == [(True, True), (False, True)]


def test_evaluation_does_not_update_statistics():
    block = block_of().eval()
    before = [b.clone() for b in block.buffers()]
    block.loss(features(), torch_rng(0))
    block.denoise(features(), torch_rng(0))
    assert all(torch.equal(a, b) for a, b in zip(before, block.buffers()))


def test_state_dict_holds_no_schedule():
    """Another schedule may be tried with old weights: alpha_bar is not part of the checkpoint,
    but moves with the block."""
    assert not any("alpha_bar" in k for k in DiffusionBlock().state_dict())
    DiffusionBlock(schedule=Schedule(500)).load_state_dict(DiffusionBlock().state_dict())
    assert DiffusionBlock(schedule=Schedule(500)).timesteps == [200, 150, 100, 50, 0]


def test_ddim_with_full_noise_keeps_the_variance():
    "eta = 1 with the exact answer for white data: the variance stays 1 at every level."
    alpha_bar = Schedule().alpha_bar
    z = torch.randn(1, 1, 300, 300, generator=torch_rng(0, "z"))

    def exact(z, t):
        return z * (1 - alpha_bar[t]).sqrt().reshape(-1, 1, 1, 1)

    for a, b in ((400, 300), (300, 200), (200, 100)):
        out = ddim_step(
            z,
            exact(z, torch.tensor([a])),
            alpha_bar[a],
            alpha_bar[b],
            1.0,
            noise_like(z, torch_rng(0, a)),
        )
        sigma2 = (1 - alpha_bar[b]) / (1 - alpha_bar[a]) * (1 - alpha_bar[a] / alpha_bar[b])
        e2 = 1 - alpha_bar[a]  # variance of the predicted noise
        expected = (
            alpha_bar[b].sqrt() * ((1 - e2) / alpha_bar[a].sqrt())
            + (1 - alpha_bar[b] - sigma2).sqrt() * e2.sqrt()
        ) ** 2 + sigma2
        assert math.isclose(out.var(), expected, rel_tol=0.02)


@pytest.mark.slow
def test_denoising_beats_the_best_scalar_after_3000_steps():
    k = torch.exp(-(torch.arange(-6, 7.0) ** 2) / 8)
    k = k.outer(k) / k.outer(k).square().sum().sqrt()
    mixture = (
        torch.linalg.qr(torch.randn(16, 3, generator=torch_rng(0, "mixture")))[0] * (16 / 3) ** 0.5
    )

    def toy(n, *stream):
        u = torch.randn(3 * n, 1, 24, 24, generator=torch_rng(0, *stream))
        return torch.einsum(
            "bkhw,ck->bchw",
            F.conv2d(F.pad(u, (6,) * 4, mode="circular"), k[None, None]).reshape(n, 3, 24, 24),
            mixture,
        )

    block = block_of()
    optimiser = torch.optim.Adam(block.phi.parameters(), 1e-3, fused=True)
    for i in range(3000):
        optimiser.zero_grad()
        block.loss(toy(16, "train", i), torch_rng(0, "step", i)).backward()
        optimiser.step()
    held = toy(64, "held out")
    noisy = held + 1.596 * noise_like(held, torch_rng(0, "student"))
    with torch.no_grad():
        out = ddim(
            block.predict,
            blend(noisy, torch.full((64,), 0.43997), noise_like(held, torch_rng(0, "mix"))),
            block.timesteps,
            block.alpha_bar,
        )
    assert (out - held).square().mean() < 0.72 < (noisy - held).square().mean()


# ---------------------------------------------------------------- mixed precision, all lessons


def test_all_losses_are_float32_and_finite_under_autocast():
    block = block_of()
    P = Projector()
    z = (20 * features()).requires_grad_()
    y = torch.randint(3, (2, *z.shape[2:]), generator=torch_rng(0, "y"))
    with torch.autocast("cpu", torch.bfloat16):
        z_hat, gamma = block.denoise(P(z.bfloat16()), torch_rng(0))
        losses = dict(
            diff=block.loss(z.detach().bfloat16(), torch_rng(0)),
            kl=soft_label_kl(z_hat[:, :3], z.detach()[:, :3]),
            ifv=class_ifv(z_hat, y, z.detach(), y, 3),
            positional=positional_ifv(variation_map(z_hat, y, 3), variation_map(z.detach(), y, 3)),
            means=class_mean_kl(z_hat[:, :3], y, z.detach()[:, :3], y, 3),
        )
    assert gamma.dtype == z_hat.dtype == torch.float32
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite(), name
    sum(losses.values()).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0


def test_class_losses_are_computed_in_float32_under_autocast():
    "The matrix products must not be rounded to bfloat16 on the way."
    z = features(seed=1)
    t = features(seed=2)
    y = torch.randint(3, (2, 8, 10), generator=torch_rng(0, "y"))
    plain = class_ifv(z, y, t, y, 3), class_mean_kl(z, y, t, y, 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = class_ifv(z, y, t, y, 3), class_mean_kl(z, y, t, y, 3)
    assert plain == mixed


# ---------------------------------------------------------------- variation


def shuffle(seed, *tensors):
    "The same permutation of pixels within every image for all tensors (B,C,*s) or (B,*s)."
    out = []
    n = tensors[-1][0].numel()
    orders = [torch.randperm(n, generator=torch_rng(seed, b)) for b in range(len(tensors[-1]))]
    for t in tensors:
        flat = (
            t.reshape(*t.shape[: t.ndim - tensors[-1].ndim + 1], n)
            if t.ndim == tensors[-1].ndim
            else t.flatten(2)
        )
        out.append(torch.stack([f[..., o] for f, o in zip(flat, orders)]).reshape(t.shape))
    return out


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_class_losses_do_not_know_positions(dims, seed):
    f_s = features(dims, seed)
    f_t = features(dims, seed + 10)
    y_s, y_t = (torch.randint(3, f_s[:, 0].shape, generator=torch_rng(seed, s)) for s in ("s", "t"))
    f_x, y_x = shuffle(seed, f_t, y_t)
    assert torch.allclose(
        class_ifv(f_s, y_s, f_t, y_t, 3), class_ifv(f_s, y_s, f_x, y_x, 3), atol=1e-6
    )
    for per in ("batch", "image"):
        assert torch.allclose(
            class_mean_kl(f_s, y_s, f_t, y_t, 3, per=per),
            class_mean_kl(f_s, y_s, f_x, y_x, 3, per=per),
            atol=1e-6,
        )
    m_s, m_t, m_x = (variation_map(*v, 3) for v in ((f_s, y_s), (f_t, y_t), (f_x, y_x)))
    assert abs(positional_ifv(m_s, m_t) - positional_ifv(m_s, m_x)) > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_class_losses_vanish_between_a_network_and_itself_on_shuffled_images(seed):
    f = features(seed=seed).double()
    y = torch.randint(3, (2, 8, 10), generator=torch_rng(seed, "y"))
    f_x, y_x = shuffle(seed, f, y)
    assert class_ifv(f, y, f_x, y_x, 3) < 1e-10 and class_mean_kl(f, y, f_x, y_x, 3) < 1e-10
    assert positional_ifv(variation_map(f, y, 3), variation_map(f_x, y_x, 3)) > 0.01


def test_pixels_of_no_class_do_not_count():
    f = features()
    y = torch.randint(3, (2, 8, 10), generator=torch_rng(0, "y"))
    hole = y.clone()
    hole[:, :3] = -1
    hole[:, 3] = 255
    other = f.clone()
    other[:, :, :4] = 1e3
    m = variation_map(f, hole, 3)
    assert (m[:, :4] == 0).all() and torch.equal(m, variation_map(other, hole, 3))
    assert torch.equal(class_mean_scores(f, hole, 3)[0], class_mean_scores(other, hole, 3)[0])
    t = features(seed=5)
    assert class_ifv(f, hole, t, y, 3) == class_ifv(other, hole, t, y, 3)


def test_share_means_are_the_wasserstein_distance():
    """With one share a value, the loss is the mean squared difference of sorted values; with 32
    it is a lower bound that comes close."""
    a = torch.randn(640, generator=torch_rng(0, "a"))
    b = 1.5 * torch.randn(640, generator=torch_rng(0, "b")) + 0.3
    exact = (a.sort().values - b.sort().values).square().mean()
    assert torch.allclose(
        (quantile_means(a, 640) - quantile_means(b, 640)).square().mean(), exact, atol=1e-5
    )
    coarse = (quantile_means(a, 32) - quantile_means(b, 32)).square().mean()
    assert 0.95 * exact < coarse <= exact
    assert torch.allclose(quantile_means(a, 7).mean(), a.mean(), atol=1e-6)
    assert torch.equal(quantile_means(a[:1], 5), a[:1].expand(5))


def test_share_means_stay_exact_for_millions_of_values():
    x = torch.rand(2_000_000, generator=torch_rng(0, "many"))
    assert torch.allclose(
        quantile_means(x, 2000).double(),
        x.double().sort().values.reshape(2000, -1).mean(1),
        rtol=0,
        atol=1e-6,
    )


def test_gradients_are_finite_where_features_are_zero():
    f = features().relu().requires_grad_()
    y = torch.randint(3, (2, 8, 10), generator=torch_rng(0, "y"))
    y[0] = 0
    zero = f * (torch.arange(10) > 4)
    class_ifv(zero, y, torch.zeros_like(f), y, 4).backward()
    assert f.grad.isfinite().all()


def test_label_to_keeps_classes_and_types():
    y = torch.randint(0, 70_000, (1, 40, 60))
    small = label_to(torch.zeros(1, 4, 10, 15), y)
    assert small.dtype == y.dtype and set(small.unique().tolist()) <= set(y.unique().tolist())
    assert label_to(torch.zeros(1, 4, 40, 60), y) is y
    assert label_to(
        torch.zeros(1, 4, 2, 3, 4), torch.zeros(1, 4, 6, 8, dtype=torch.uint8)
    ).shape == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: variation_map(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4).long(), 2),
        lambda: class_ifv(
            torch.zeros(1, 2, 4, 4),
            torch.zeros(1, 4, 4).long(),
            torch.zeros(1, 1, 4, 4),
            torch.zeros(1, 4, 4).long(),
            2,
        ),
        lambda: variation_map(torch.zeros(1, 2, 4, 4), torch.zeros(2, 4, 4).long(), 2),
        lambda: variation_map(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4).long(), 0),
        lambda: positional_ifv(torch.zeros(1, 4, 4), torch.zeros(2, 4, 4)),
        lambda: positional_ifv(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), torch.ones(1, 4) > 0),
        lambda: released_ifv(
            torch.zeros(1, 2, 4, 4),
            torch.zeros(1, 4, 4).long(),
            torch.zeros(1, 2, 4, 4),
            torch.zeros(1, 4, 4).long(),
            (),
        ),
        lambda: released_ifv(
            torch.zeros(1, 1, 4, 4),
            torch.zeros(1, 2, 4).long(),
            torch.zeros(1, 1, 4, 4),
            torch.zeros(1, 4, 4).long(),
            (1,),
        ),
        lambda: class_ifv(
            torch.zeros(1, 2, 4, 4),
            torch.zeros(1, 4, 4).long(),
            torch.zeros(1, 2, 4, 4),
            torch.zeros(1, 4, 4).long(),
            2,
            only=(2,),
        ),
        lambda: Projector(kind="width3d"),
        lambda: DiffusionBlock(norm="none"),
        lambda: DiffusionBlock(statistics="none"),
        lambda: DiffusionBlock(evaluations=11),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(InputError):
        call()


def simple_map(f, y, classes):
    "The map by plain autograd: two matrix products."
    x = f.flatten(2)
    one = one_hot(y, classes).to(f.dtype)
    mu = one @ x.mT / one.sum(2, keepdim=True).clamp_min(1)
    return (
        ((mu * inverse_length(mu, 2)[..., None]) @ x * one).sum(1) * inverse_length(x, 1)
    ).reshape(y.shape)


def labels(f, classes, low=0, seed=0):
    return torch.randint(low, classes, (len(f), *f.shape[2:]), generator=torch_rng(seed, "labels"))


@pytest.mark.parametrize("block", [1, 40, 10**6])  # one pixel a block, some, all
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 3, 2), (1, 2, 7)])
def test_backward_by_hand_is_the_derivative(shape, block, monkeypatch):
    """Finite differences in float64, with pixels of no class (-1), a class that is absent (3),
    one of a single pixel, and a short vector."""
    monkeypatch.setattr(variation, "BLOCK", block)
    f = torch.randn(shape, dtype=torch.float64, generator=torch_rng(0, "f"))
    y = labels(f, 2, low=-1)
    y.view(-1)[5] = 2
    f.flatten(2)[0, :, 0] *= 1e-6
    y.view(-1)[0] = 0
    assert torch.autograd.gradcheck(
        lambda f: variation_map(f, y, 4), f.clone().requires_grad_(), eps=1e-9, atol=1e-4, rtol=1e-3
    )
    a = f.clone().requires_grad_()
    b = f.clone().requires_grad_()
    m = variation_map(a, y, 4)
    plain = simple_map(b, y, 4)
    weight = torch.randn(m.shape, dtype=m.dtype, generator=torch_rng(0, "w"))
    (m * weight).sum().backward()
    (plain * weight).sum().backward()
    assert (
        m.dtype == torch.float64
        and torch.allclose(m, plain, atol=1e-12)
        and torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    )


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "permuted", "sliced", "expanded"])
def test_every_layout_has_the_same_map_and_gradient(form):
    f = features()
    other = {
        "contiguous": f,
        "channels_last": f.to(memory_format=torch.channels_last),
        "permuted": f.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([f, f], 3)[..., :10],
        "expanded": f[:1].expand(2, -1, -1, -1),
    }[form]
    plain = other.clone(memory_format=torch.contiguous_format).requires_grad_()
    y = labels(f, 3)
    other = other.detach().requires_grad_()
    m = variation_map(other, y, 3)
    expected = simple_map(plain, y, 3)
    m.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(m, expected, atol=1e-6) and torch.allclose(
        other.grad, plain.grad, atol=1e-6
    )
    if form == "channels_last":
        assert other.grad.is_contiguous(memory_format=torch.channels_last)


def test_map_keeps_little_and_is_not_copied():
    f = torch.randn(1, 32, 40, 40, generator=torch_rng(0, "f"))
    y = torch.randint(4, (1, 40, 40))
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for x in (f, f.to(memory_format=torch.channels_last), f.bfloat16()):
        kept.clear()
        x = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            variation_map(x, y, 4)
        assert kept.pop(x.untyped_storage().data_ptr()) and sum(kept.values()) < 5 * 4 * 1600


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_are_read_in_float32_also_when_backward_runs_under_autocast(dtype):
    h = features().to(dtype).requires_grad_()
    y = labels(features(), 3)
    x = h.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        m = variation_map(h, y, 3)
        m.square().sum().backward()
    plain = variation_map(x, y, 3)
    plain.square().sum().backward()
    assert m.dtype == torch.float32 and h.grad.dtype == dtype
    assert torch.equal(m, plain) and torch.equal(h.grad, x.grad.to(dtype))


def test_map_refuses_a_second_derivative_and_accepts_inference_mode():
    f = features().requires_grad_()
    y = labels(features(), 3)
    (g,) = torch.autograd.grad(variation_map(f, y, 3).square().sum(), f, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with torch.inference_mode():
        assert torch.equal(variation_map(f, y, 3), variation_map(f.detach(), y, 3))


def test_absent_classes_and_unknown_labels_pass_no_gradient():
    f = features().requires_grad_()
    y = labels(features(), 2)
    y[0] = 1
    y[:, 0] = 255
    y[:, 1] = -1
    m = variation_map(f, y.to(torch.int16), 5)
    m.sum().backward()
    assert (
        (m[:, :2] == 0).all()
        and (f.grad[:, :, :2] == 0).all()
        and f.grad.isfinite().all()
        and (f.grad[:, :, 2:] != 0).any()
    )
    assert torch.equal(prototypes(f, y, 5)[0, [0, 2, 3, 4]], torch.zeros(4, 16))


@pytest.mark.parametrize("classes", [3, 200])
def test_sorting_all_classes_at_once(classes):
    m = torch.cat(
        [
            torch.rand(5000, generator=torch_rng(0, "m")) * 2 - 1,
            torch.tensor([-1.0, 1.0, 0.0, 1 + 1e-6]),
        ]
    )
    y = torch.randint(-2, classes + 2, m.shape, generator=torch_rng(0, "y"))
    parts = sorted_by_class(m, y, classes)
    assert len(parts) == classes
    for k, part in enumerate(parts):
        assert torch.allclose(part, m[y == k].sort().values, rtol=0, atol=3e-7)


def test_positional_loss_under_a_mask():
    a, b = (torch.rand(2, 6, 6, generator=torch_rng(0, s)).requires_grad_() for s in "ab")
    mask = torch.rand(2, 6, 6, generator=torch_rng(0, "mask")) > 0.5
    loss = positional_ifv(a, b, mask)
    loss.backward()
    assert (
        torch.allclose(loss, (a - b).square()[mask].mean())
        and (a.grad[~mask] == 0).all()
        and (a.grad[mask] != 0).all()
    )
    assert torch.allclose(positional_ifv(a, b, torch.ones_like(mask)), positional_ifv(a, b))
    none = positional_ifv(a, b, mask & ~mask)
    assert none == 0 and torch.autograd.grad(none, a)[0].abs().sum() == 0


@pytest.mark.parametrize("dims", [2, 3])
def test_released_loss(dims):
    x_s, x_t = (features(dims, seed, 3).requires_grad_() for seed in (0, 1))
    y_s = labels(x_s, 3, seed=0)
    y_t = labels(x_t, 3, seed=1)
    m_s, m_t = (torch.where(y > 0, simple_map(x, y, 3), 1) for x, y in ((x_s, y_s), (x_t, y_t)))
    assert torch.allclose(
        released_ifv(x_s, y_s, x_t, y_t, (1, 2)), (m_s - m_t).square().mean(), atol=1e-6
    )
    assert released_ifv(x_s, y_s, x_s, y_s, (1, 2)) == 0
    assert (
        released_ifv(x_s, y_s * 0, x_t, y_t * 0, (1, 2)) == 0
    )  # background everywhere: M = 1 on both sides
    one_s = x_s[:, :1].detach().requires_grad_()
    one_t = x_t[:, :1].detach()
    loss = released_ifv(one_s, y_s, one_t, y_t, (1,))
    loss.backward()
    assert 0 < loss <= 4 and (one_s.grad == 0).all()


# ---------------------------------------------------------------- soft labels and class means


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("channels", [1, 4])
def test_kl_is_smallest_at_the_teacher(direction, channels):
    t = features(channels=channels)
    s = t.clone().requires_grad_()
    soft_label_kl(s, t, 2.0, direction).backward()
    assert s.grad.abs().max() < 1e-6
    assert soft_label_kl(t + 0.5 * features(seed=9, channels=channels), t, 2.0, direction) > 1e-3


def test_kl_agrees_with_torch():
    s = features(seed=1)
    t = features(seed=2)
    theirs = (
        F.kl_div((s / 3).log_softmax(1), (t / 3).log_softmax(1), log_target=True, reduction="none")
        .sum(1)
        .mean()
        * 9
    )
    assert torch.allclose(soft_label_kl(s, t, 3.0), theirs, rtol=1e-5)


def test_class_mean_per_image_is_the_mean_over_images():
    s = features(seed=1)
    t = features(seed=2)
    y = torch.arange(80).remainder(4).reshape(1, 8, 10).expand(2, 8, 10)
    both = class_mean_kl(s, y, t, y, 4, per="image")
    one = [
        class_mean_kl(s[i : i + 1], y[i : i + 1], t[i : i + 1], y[i : i + 1], 4) for i in range(2)
    ]
    assert torch.allclose(both, sum(one) / 2, atol=1e-7)
    assert not torch.allclose(both, class_mean_kl(s, y, t, y, 4), atol=1e-4)


def test_class_means_accept_other_sizes_and_batches():
    s = features(seed=1, channels=3)
    t = torch.randn(5, 3, 7, 9, generator=torch_rng(0, "t"))
    y_s = torch.randint(3, (2, 8, 10), generator=torch_rng(0, "s"))
    y_t = torch.randint(2, (5, 7, 9), generator=torch_rng(0, "y"))
    whole = class_mean_kl(s, y_s, t, y_t, 3)
    rest = y_s.clone()
    rest[rest == 2] = -1  # class 2 is absent from the teacher's side, so it never counted
    assert torch.equal(whole, class_mean_kl(s, rest, t, y_t, 3)) and whole > 0
