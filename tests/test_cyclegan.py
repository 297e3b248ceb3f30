"""Translation networks: what the chapter does not show. Counts, borders, ranges, the memory of the
discriminator, and alarms that must ring."""

import copy

import pytest
import torch

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.translation.cyclegan import (
    Generator,
    PatchDiscriminator,
    ReplayBuffer,
    contrast_sign,
    cycle_loss,
    describe_faults,
    discriminator_gan_loss,
    gan_loss,
    generator_gan_loss,
    high_frequency,
    identity_loss,
    mean_change,
    to_signed,
    to_unit,
)


def count(net):
    return sum(p.numel() for p in net.parameters())


def signed(*shape, seed=0):
    return 2 * torch.rand(*shape, generator=torch_rng(seed, "signed")) - 1


def small(**more):
    torch.manual_seed(0)
    return Generator(**dict(width=4, blocks=1) | more)


@pytest.mark.parametrize(
    "kind,options,expected",
    [
        (Generator, {}, 11_365_633),
        (Generator, dict(channels=3), 11_378_179),
        (Generator, dict(blocks=6), 7_825_153),
        (Generator, dict(upsample="resize_conv"), 11_365_633),
        (PatchDiscriminator, {}, 2_762_689),
        (PatchDiscriminator, dict(channels=3), 2_764_737),
    ],
)
def test_counts_and_shapes(kind, options, expected):
    with torch.device("meta"):
        net = kind(**options)
        x = torch.zeros(2, options.get("channels", 1), 256, 256)
        assert count(net) == expected
        assert net(x).shape == (x.shape if kind is Generator else (2, 1, 30, 30))


def test_weights_start_small_and_biases_at_zero():
    torch.manual_seed(0)
    for net in (Generator(width=32, blocks=1), PatchDiscriminator(width=32)):
        for m in net.modules():
            if hasattr(m, "weight") and m.weight is not None and m.weight.numel() > 5000:
                assert abs(m.weight.std() - 0.02) < 0.001 and (m.bias == 0).all()
        assert not [name for name, _ in net.named_buffers()]
        assert not any(isinstance(m, torch.nn.InstanceNorm2d) and m.affine for m in net.modules())


def test_receptive_field_is_70():
    torch.manual_seed(0)
    net = PatchDiscriminator(width=4).double()
    for (
        layer
    ) in net.layers:  # instance norm looks at the whole image: take it away, keep the convolutions
        if isinstance(layer, torch.nn.InstanceNorm2d):
            layer.forward = lambda x: x
    x = signed(1, 1, 256, 256).double().requires_grad_()
    net(x)[0, 0, 15, 15].backward()
    for axis in (2, 1):
        touched = x.grad[0, 0].abs().amax(axis - 1).nonzero()
        assert touched.max() - touched.min() + 1 == 70


@pytest.mark.parametrize("upsample", ["transposed", "resize_conv"])
@pytest.mark.parametrize("side", [(8, 8), (12, 20), (32, 32)])
def test_generator_keeps_shape_and_range_and_equals_itself_in_eval(upsample, side):
    net = small(upsample=upsample)
    for p in net.parameters():
        p.data *= 20  # far into the tanh
    x = signed(2, 1, *side)
    out = net(x)
    assert out.shape == x.shape and out.abs().max() <= 1
    assert torch.equal(out, net.eval()(x))
    torch.testing.assert_close(
        net(x[:1]), out[:1], atol=1e-3, rtol=0
    )  # no image looks at its neighbour in the batch


def test_every_weight_gets_a_gradient():
    for net in (small(), small(upsample="resize_conv"), PatchDiscriminator(width=4)):
        net(signed(2, 1, 64, 64)).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim == 4)


def test_discriminator_on_small_images():
    net = PatchDiscriminator(width=4)
    assert net(signed(1, 1, 64, 64)).shape == (1, 1, 6, 6)
    assert net(signed(1, 1, 24, 33)).shape == (1, 1, 1, 2)
    out = PatchDiscriminator(width=4)(signed(4, 1, 64, 64))
    assert out.min() < 0  # raw scores
    with pytest.raises(InputError, match="at least 24"):
        net(signed(1, 1, 23, 64))


def test_bad_images_are_refused():
    net = small()
    x = signed(1, 1, 16, 16)
    for bad in (1.01 * x / x.abs().max(), x - 0.5 - x.max(), 255 * to_unit(x)):
        with pytest.raises(
            InputError,
            match=r"images must be in \[-1,1\]; for images in \[0,1\] use `to_signed`",
        ):
            net(bad)
    with pytest.raises(InputError, match="to_signed"):
        PatchDiscriminator(width=4)(3 * signed(1, 1, 32, 32))
    net(x / x.abs().max() * 1.0005)  # within the tolerance
    net(to_signed(torch.rand(1, 1, 16, 16)))
    with pytest.raises(InputError, match="NaN"):
        net(x * float("nan"))
    for shape in ((1, 1, 18, 16), (1, 1, 16, 17), (1, 1, 4, 16)):
        with pytest.raises(InputError, match="multiple of 4 and at least 8"):
            net(signed(*shape))
    for shape in ((1, 3, 16, 16), (1, 16, 16)):
        with pytest.raises(InputError, match=r"\(B,1,H,W\)"):
            net(signed(*shape))
    with pytest.raises(InputError, match="resize_conv"):
        Generator(width=4, upsample="resizeconv")


def test_ranges_are_inverse():
    x = torch.linspace(0, 1, 11)
    torch.testing.assert_close(to_unit(to_signed(x)), x)
    assert to_signed(x).min() == -1 and to_signed(x).max() == 1


@pytest.mark.parametrize("kind,half", [("lsgan", 0.5), ("bce", torch.tensor(2.0).log().item())])
def test_gan_losses_at_known_places(kind, half):
    one = torch.ones(2, 1, 3, 3)
    zero = torch.zeros(2, 1, 3, 3)
    right, wrong = (one, zero) if kind == "lsgan" else (40 * one, -40 * one)
    assert generator_gan_loss(right, kind) < 1e-12
    assert discriminator_gan_loss(right, wrong, kind) < 1e-12
    assert discriminator_gan_loss(wrong, right, kind) > 0.9
    torch.testing.assert_close(discriminator_gan_loss(zero, zero, kind).item(), half)  # undecided
    torch.testing.assert_close(
        discriminator_gan_loss(one, zero, kind),
        0.5 * (gan_loss(one, True, kind) + gan_loss(zero, False, kind)),
    )
    assert gan_loss(one.half() * 200, False, kind).dtype == torch.float32


def test_label_is_one_sided():
    x = torch.full((1, 1, 2, 2), 0.9)
    assert gan_loss(x, True, "lsgan", 0.9) == 0
    assert gan_loss(x, False, "lsgan", 0.9) == gan_loss(x, False, "lsgan", 1.0)
    assert discriminator_gan_loss(x, 0 * x, "lsgan", 0.9) == 0
    with pytest.raises(InputError, match="lsgan"):
        gan_loss(x, True, "ls")


@pytest.mark.parametrize("loss", [cycle_loss, identity_loss])
def test_round_trip_losses(loss):
    x = signed(2, 1, 8, 8)
    assert loss(x, x) == 0
    torch.testing.assert_close(loss(x, x + 0.25).item(), 0.25)
    with pytest.raises(InputError):
        loss(x, x[:1])  # would broadcast


def test_cycle_is_blind_to_inversion_and_identity_is_not():
    invert = torch.neg
    x = signed(2, 1, 8, 8)
    assert cycle_loss(x, invert(invert(x))) == 0 and identity_loss(x, invert(x)) > 0.5


def numbered(first, n, shape=(1, 2, 2)):
    return (
        torch.arange(first, first + n, dtype=torch.float32)[:, None, None, None]
        .expand(n, *shape)
        .contiguous()
    )


def test_buffer_fills_then_swaps_half():
    pool = ReplayBuffer((1, 2, 2), 50)
    g = torch_rng(0, "pool")
    for i in range(0, 50, 5):
        assert torch.equal(pool.query(numbered(i, 5), g), numbered(i, 5))
    assert pool.count == 50 and torch.equal(pool.images, numbered(0, 50))
    given = torch.arange(50, 2050)
    got = torch.cat([pool.query(numbered(i, 5), g)[:, 0, 0, 0] for i in range(50, 2050, 5)])
    old = (got != given).float().mean()
    assert 0.45 < old < 0.55
    assert (got <= given).all()  # nothing from the future
    kept = pool.images[:, 0, 0, 0]  # every image is either given back once or still there
    assert sorted([*got.tolist(), *kept.tolist()]) == list(range(2050))
    assert (pool.images == pool.images[:, :, :1, :1]).all()


def test_buffer_half_way_and_size_zero_and_batches_larger_than_it():
    g = torch_rng(0, "pool")
    pool = ReplayBuffer((1, 2, 2), 3)
    out = pool.query(numbered(0, 8), g)
    assert torch.equal(out[:3], numbered(0, 3)) and pool.count == 3
    assert sorted([*out[:, 0, 0, 0].tolist(), *pool.images[:, 0, 0, 0].tolist()]) == sorted(
        [*range(8), 0, 1, 2]
    )  # one image after the other
    none = ReplayBuffer((1, 2, 2), 0)
    assert torch.equal(none.query(numbered(0, 8), g), numbered(0, 8)) and none.count == 0
    assert none.state_dict()["images"].shape == (0, 1, 2, 2)


@pytest.mark.parametrize("seen", [0, 7, 40])
def test_buffer_restored_from_state_dict_draws_the_same(seen):
    pool = ReplayBuffer((1, 2, 2), 10)
    g = torch_rng(0, "pool")
    if seen:
        pool.query(numbered(0, seen), g)
    other = ReplayBuffer((1, 2, 2), 10)
    state = copy.deepcopy(pool.state_dict())
    h = torch.Generator()
    h.set_state(g.get_state())
    other.load_state_dict(state, strict=True)
    for i in range(100, 160, 6):
        assert torch.equal(pool.query(numbered(i, 6), g), other.query(numbered(i, 6), h))
    assert torch.equal(pool.images, other.images) and pool.count == other.count
    with pytest.raises(RuntimeError):
        ReplayBuffer((1, 2, 2), 5).load_state_dict(state)


def test_buffer_is_outside_the_graph_and_independent_of_its_input():
    pool = ReplayBuffer((1, 2, 2), 2)
    g = torch_rng(0, "pool")
    x = numbered(0, 4).requires_grad_()
    out = pool.query(x * 1, g)
    assert (
        not out.requires_grad and not list(pool.parameters()) and ReplayBuffer.own_buffers is True
    )
    before = pool.images.clone()
    out += 99
    assert torch.equal(pool.images, before)
    half = pool.query(
        numbered(4, 6).bfloat16(), g
    )  # mixed precision: what goes in comes out, stored as float32
    assert half.dtype == torch.bfloat16 and pool.images.dtype == torch.float32
    for bad in ((1, 2, 3), (2, 2, 2)):
        with pytest.raises(InputError, match=r"B,1,2,2"):
            pool.query(torch.zeros(1, *bad), g)
    with pytest.raises(InputError):
        ReplayBuffer((1, 2, 2), -1)
    with pytest.raises(InputError):
        ReplayBuffer((2, 2))


def body(seed=0):
    "A smooth disc with structure, on air."
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    inside = (y**2 + x**2 < 0.6).float()
    return ((-0.3 + 0.5 * torch.sin(4 * x + seed) * torch.cos(3 * y)) * inside - (1 - inside))[
        None, None
    ]


def test_alarm_inversion():
    x = torch.cat([body(0), body(1)])
    inverted = torch.where(x > -0.95, -x, x)  # the air stays dark
    assert contrast_sign(x, x) > 0.999 and contrast_sign(x, 0.5 * x + 0.2) > 0.999
    assert contrast_sign(x, inverted) < -0.999
    assert contrast_sign(x, inverted, mask=torch.ones(2, 64, 64, dtype=torch.bool)) > contrast_sign(
        x, inverted
    )  # air hides it
    assert contrast_sign(x, torch.zeros_like(x)) == 0 and contrast_sign(-torch.ones_like(x), x) == 0
    with pytest.raises(InputError, match="mask"):
        contrast_sign(x, inverted, mask=torch.ones(64, 64, dtype=torch.bool))
    assert "inverted" in describe_faults(
        contrast_sign(x, inverted), mean_change(x, inverted), high_frequency(inverted)
    )


def test_alarm_no_change():
    x = body()
    assert mean_change(x, x) == 0
    torch.testing.assert_close(mean_change(x, x + 0.1).item(), 0.1, rtol=1e-4, atol=0)
    text = describe_faults(contrast_sign(x, x), mean_change(x, x), high_frequency(x))
    assert "does nothing" in text and "inverted" not in text and "\n" not in text


@pytest.mark.parametrize("channels", [1, 3])
def test_alarm_checkerboard(channels):
    x = body().expand(1, channels, 64, 64)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32)
    for pattern in (
        board,
        board[:1].expand(64, 64),
        board[:, :1].expand(64, 64),
    ):  # both axes, or one
        fake = 0.5 * x + 0.3 * pattern
        assert high_frequency(x) < 0.02 and high_frequency(fake) > 0.3
        assert "checkerboard" in describe_faults(
            contrast_sign(x, fake), mean_change(x, fake), high_frequency(fake), high_frequency(x)
        )
    assert abs(high_frequency(torch.randn(1, channels, 128, 128)) - 0.2) < 0.03  # white noise
    assert high_frequency(torch.ones(1, channels, 8, 8)) == 0


def test_no_alarm_for_a_good_translation_and_nan_is_named():
    x = body()
    fake = 0.6 * x - 0.1
    assert (
        describe_faults(
            contrast_sign(x, fake), mean_change(x, fake), high_frequency(fake), high_frequency(x)
        )
        == ""
    )
    assert "NaN" in describe_faults(float("nan"), 0.1, 0.0)
    assert describe_faults(0.9, 0.5, 0.22, 0.2) == ""  # noisy target images are no checkerboard


def test_networks_run_in_bfloat16_and_losses_stay_float32():
    x = signed(1, 1, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        fake = small()(x)
        loss = generator_gan_loss(PatchDiscriminator(width=4)(fake)) + cycle_loss(x, fake)
        noisy = high_frequency(fake)
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and 0 <= noisy <= 1
    loss.backward()


def test_alternating_updates_keep_to_their_own_weights():
    G = small()
    D = PatchDiscriminator(width=4)
    pool = ReplayBuffer((1, 32, 32), 4)
    x = signed(2, 1, 32, 32)
    real = signed(2, 1, 32, 32, seed=1)
    D.requires_grad_(False)
    fake = G(x)
    generator_gan_loss(D(fake)).backward()
    assert all(p.grad is None for p in D.parameters()) and all(
        p.grad is not None for p in G.parameters()
    )
    G.zero_grad()
    D.requires_grad_(True)
    discriminator_gan_loss(D(real), D(pool.query(fake, torch_rng(0, "pool")))).backward()
    assert all(p.grad is None for p in G.parameters()) and all(
        p.grad is not None for p in D.parameters()
    )
