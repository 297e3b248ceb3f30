"""Translation by value: networks beside plain ones with the same weights, losses and monitors
beside the same written out in loops."""

import math

import by_hand
import pytest
import torch
import torch.nn.functional as F

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.networks.registry import make_network
from unpaired_kd.translation.contextual import (
    FilterBank,
    VGG19Features,
    body_mask,
    contextual_loss,
    encoder_layers,
)
from unpaired_kd.translation.cyclegan import (
    Generator,
    PatchDiscriminator,
    ReplayBuffer,
    contrast_sign,
    cycle_loss,
    describe_faults,
    discriminator_gan_loss,
    generator_gan_loss,
    high_frequency,
    identity_loss,
    mean_change,
    to_signed,
    to_unit,
)
from unpaired_kd.translation.drit import (
    DRIT_UPDATES,
    DRIT_WEIGHTS,
    ContentDiscriminator,
    ContentEncoder,
    ImageDiscriminator,
    StyleEncoder,
    StyleGenerator,
    build_drit,
)
from unpaired_kd.translation.translated import (
    AlphaNet,
    Ensemble,
    Translated,
    fuse_images,
    pack_ensemble,
    pack_translator,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch_rng(seed, "values"), dtype=torch.float64)


def image(side=32, number=2, channels=1, seed=0):
    return drawn(number, channels, side, side, seed=seed).tanh()


def redrawn(net, scale=0.2):
    "The network in float64, all of its weights and biases drawn anew: none is 0 or 1 by chance."
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.normal_(0, scale, generator=torch_rng(k, "weights"))
    return net.double()


# ----------------------------------------------------------------- plain layers


class Weights:
    "The weights of a network in the order in which they were registered."

    def __init__(self, net):
        self.left = list(net.parameters())

    def take(self, number=2):
        taken = self.left[:number]
        self.left = self.left[number:]
        return taken


def mirror(x, n):
    "Mirror images of n pixels at each border, without the border itself."
    rows = [*range(n, 0, -1), *range(x.shape[2]), *range(x.shape[2] - 2, x.shape[2] - 2 - n, -1)]
    columns = [*range(n, 0, -1), *range(x.shape[3])]
    columns += range(x.shape[3] - 2, x.shape[3] - 2 - n, -1)
    return x[:, :, rows][..., columns]


def conv(x, w, stride=1, border=0):
    "A convolution with mirrored borders."
    return F.conv2d(mirror(x, border) if border else x, *w, stride=stride)


def conv_zero(x, w, stride=1, border=1):
    "A convolution with zeros at its borders."
    return F.conv2d(F.pad(x, (border,) * 4), *w, stride=stride)


def norm(x):
    "Every channel of every image to mean 0 and variance 1."
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean((2, 3), keepdim=True) + 1e-5)


def relu(x, slope=0.0):
    return torch.where(x > 0, x, slope * x)


def residual(x, w):
    y = relu(norm(conv(x, w.take(), border=1)))
    return x + norm(conv(y, w.take(), border=1))


def generator(x, net, blocks, upsample):
    "CycleGAN's generator from its description (Zhu et al. 2017, appendix)."
    w = Weights(net)
    x = relu(norm(conv(x, w.take(), border=3)))
    for _ in range(2):
        x = relu(norm(conv_zero(x, w.take(), stride=2)))
    for _ in range(blocks):
        x = residual(x, w)
    for _ in range(2):
        if upsample == "transposed":
            x = F.conv_transpose2d(x, *w.take(), stride=2, padding=1, output_padding=1)
        else:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), w.take(), border=1)
        x = relu(norm(x))
    return torch.tanh(conv(x, w.take(), border=3))


def patch_discriminator(x, net):
    "Five 4x4 convolutions, instance norm in the middle three."
    w = Weights(net)
    x = relu(conv_zero(x, w.take(), 2), 0.2)
    for stride in (2, 2, 1):
        x = relu(norm(conv_zero(x, w.take(), stride)), 0.2)
    return conv_zero(x, w.take())


@pytest.mark.parametrize("upsample", ["transposed", "resize_conv"])
def test_a_generator_is_the_plain_one(upsample):
    net = redrawn(Generator(2, 3, 2, upsample))
    x = image(channels=2)
    assert torch.allclose(net(x), generator(x, net, 2, upsample), atol=1e-12)


def test_a_patch_discriminator_is_the_plain_one():
    net = redrawn(PatchDiscriminator(1, 3))
    x = image(48)
    assert net(x).shape == (2, 1, 4, 4)
    assert torch.allclose(net(x), patch_discriminator(x, net), atol=1e-12)


def test_first_weights_are_small():
    with seeded(0, "small"):
        nets = [Generator(1, 16, 2), PatchDiscriminator(1, 16), build_drit(1, 8)["content"]]
    for net in nets:
        kernels = torch.cat([p.flatten() for p in net.parameters() if p.ndim > 1])
        assert abs(kernels.std() - 0.02) < 5e-4 and abs(kernels.mean()) < 5e-4
        assert all(not p.any() for p in net.parameters() if p.ndim == 1)


def test_a_content_encoder_is_the_plain_one():
    net = redrawn(ContentEncoder(1, 2))
    x = image()
    for domain in "st":
        w = Weights(net.branches[domain])
        y = relu(conv(x, w.take(), border=3), 0.01)
        for _ in range(2):
            y = relu(norm(conv(y, w.take(), stride=2, border=1)))
        for _ in range(3):
            y = residual(y, w)
        y = residual(y, Weights(net.shared))
        assert torch.allclose(net(x, domain), y, atol=1e-12)
        g = torch_rng(1, "n")
        noise = torch.randn(y.shape, generator=torch_rng(1, "n")).to(y)
        assert torch.allclose(net(x, domain, g), y + noise, atol=1e-12)
        assert torch.equal(net.eval()(x, domain, torch_rng(1, "n")), net(x, domain))
        net.train()


def test_a_style_encoder_is_the_plain_one():
    net = redrawn(StyleEncoder(1, 2, 3))
    x = image()
    for domain in "st":
        w = Weights(net.branches[domain])
        y = conv(x, w.take(), stride=2, border=1)
        for _ in range(3):
            a = conv(relu(y, 0.2), w.take(), border=1)
            b = conv(relu(a, 0.2), w.take(), border=1)
            y = F.avg_pool2d(b, 2) + conv(F.avg_pool2d(y, 2), w.take())
        weight, bias = w.take()
        y = relu(y, 0.2).mean((2, 3)) @ weight.T + bias
        mean, logvar = net(x, domain)
        assert torch.allclose(torch.cat([mean, logvar], 1).double(), y, atol=1e-6)


def test_a_style_generator_is_the_plain_one():
    net = redrawn(StyleGenerator(1, 2, 3, 1))
    content = drawn(2, 8, 6, 6)
    style = drawn(2, 3, seed=1)

    def joined(x):
        maps = style[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return torch.cat([x, maps], 1)

    for domain in "st":
        x = joined(residual(content, Weights(net.shared)))
        w = Weights(net.heads[domain])
        x = residual(x, w)
        for _ in range(2):
            weight, bias, scale, shift = w.take(4)
            x = F.conv_transpose2d(joined(x), weight, bias, stride=2, padding=1, output_padding=1)
            mean = x.mean((1, 2, 3), keepdim=True)
            spread = ((x - mean) ** 2).mean((1, 2, 3), keepdim=True) + 1e-5
            x = (x - mean) / torch.sqrt(spread)
            x = relu(x * scale[:, None, None] + shift[:, None, None])
        x = torch.tanh(conv(joined(x), w.take()))
        assert torch.allclose(net(content, style, domain), x, atol=1e-12)


def test_an_image_discriminator_is_the_plain_one():
    net = redrawn(ImageDiscriminator(1, 2, 2))
    x = image(32)
    found = net(x)
    for k, scale in enumerate(net.scales):
        w = Weights(scale)
        y = x
        for _ in range(4):
            y = relu(conv(y, w.take(), stride=2, border=1), 0.01)
        assert torch.allclose(found[k], conv(y, w.take()), atol=1e-12)
        inside = F.avg_pool2d(F.pad(torch.ones_like(x), (1,) * 4), 3, 2)
        x = F.avg_pool2d(F.pad(x, (1,) * 4), 3, 2) / inside  # the mean of the pixels inside
    assert len(found) == 2


@pytest.mark.parametrize("side,strides", [(16, (2, 1, 1)), (32, (2, 2, 1)), (8, (1, 1, 1))])
def test_a_content_discriminator_is_the_plain_one(side, strides):
    net = redrawn(ContentDiscriminator(3), 0.1)
    x = drawn(2, 3, side, side)
    y = x
    for layer, stride in zip(net.layers, strides):
        y = relu(norm(conv(y, (layer.weight, layer.bias), stride, border=3)), 0.01)
    w = Weights(net.last)
    y = relu(conv(y, w.take()), 0.01)
    assert torch.allclose(net(x), conv(y, w.take()), atol=1e-12)


# ----------------------------------------------------------------- losses and monitors of CycleGAN


@pytest.mark.parametrize("kind,label", [("lsgan", 1.0), ("bce", 1.0), ("lsgan", 0.9), ("bce", 0.9)])
def test_gan_losses(kind, label):
    real = drawn(2, 1, 3, 3)
    fake = drawn(2, 1, 3, 3, seed=1)
    found = discriminator_gan_loss(real, fake, kind, label)
    wanted = by_hand.discriminator_loss(real, fake, kind, label)
    assert torch.isclose(found.double(), wanted, rtol=1e-6)
    found = generator_gan_loss(fake, kind)
    assert torch.isclose(found.double(), by_hand.generator_loss(fake, kind), rtol=1e-6)


def test_cycle_and_identity_and_ranges():
    x = image()
    y = image(seed=1)
    wanted = sum(abs(float(a - b)) for a, b in zip(x.flatten(), y.flatten())) / x.numel()
    for f in (cycle_loss, identity_loss, mean_change):
        assert abs(float(f(x, y)) - wanted) < 1e-6
    assert to_signed(torch.tensor([0.0, 0.25, 1.0])).tolist() == [-1.0, -0.5, 1.0]
    assert to_unit(torch.tensor([-1.0, -0.5, 1.0])).tolist() == [0.0, 0.25, 1.0]


def correlation(a, b):
    a = [v - sum(a) / len(a) for v in a]
    b = [v - sum(b) / len(b) for v in b]
    spread = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b)) / spread


def test_the_sign_of_the_contrast_is_a_correlation_in_the_body():
    x = image(16)
    x[:, :, :5] = -1
    fake = 0.5 * x + 0.3 * image(16, seed=1)
    values = []
    for a, b in zip(x[:, 0], fake[:, 0]):
        body = [(float(v), float(w)) for v, w in zip(a.flatten(), b.flatten()) if v > -0.95]
        values.append(correlation(*zip(*body)))
    assert abs(float(contrast_sign(x, fake)) - sum(values) / 2) < 1e-5
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 2:9, 3:8] = True
    values = [correlation(a[m].tolist(), b[m].tolist()) for a, b, m in zip(x, fake, mask)]
    assert abs(float(contrast_sign(x, fake, mask)) - sum(values) / 2) < 1e-5


def test_high_frequencies_are_a_part_of_the_energy():
    n = 20
    t = torch.arange(n).double()
    slow = torch.cos(2 * math.pi * 2 * t / n)  # 0.1 cycles a pixel
    edge = torch.cos(2 * math.pi * 9 * t / n)  # 0.45, the first that counts
    below = torch.cos(2 * math.pi * 8 * t / n)  # 0.4
    for other, wanted in ((edge, 0.8), (below, 0.0)):
        x = (3 + slow[None, None, None] + 2 * other[None, None, :, None]).expand(1, 1, n, n)
        assert abs(float(high_frequency(x)) - wanted) < 1e-6
    assert float(high_frequency(torch.full((1, 1, n, n), 7.0))) == 0


def test_the_thresholds_of_the_alarms():
    fine = dict(sign=-0.2, moved=0.02, high=0.15, high_real=0.1)
    assert describe_faults(**fine) == ""
    for name, value, words in [
        ("sign", -0.21, "inverted"),
        ("moved", 0.019, "does nothing"),
        ("high", 0.151, "checkerboard"),
        ("high", math.nan, "NaN"),
    ]:
        assert words in describe_faults(**fine | {name: value})


def test_a_full_memory_gives_an_old_image_for_a_new_one():
    memory = ReplayBuffer((1, 1, 1), 2)
    history = []
    kept = []
    for k in range(60):
        given = torch.full((1, 1, 1, 1), float(k))
        g = torch_rng(k, "memory")
        swap = bool(torch.rand(1, generator=g) < 0.5)
        slot = int(torch.randint(2, (1,), generator=g))
        wanted = float(k)
        if len(kept) < 2:
            kept.append(float(k))
        elif swap:
            wanted = kept[slot]
            kept[slot] = float(k)
        history.append(float(memory.query(given, torch_rng(k, "memory"))) == wanted)
        assert memory.images.flatten().tolist()[: len(kept)] == kept
    assert all(history)


# ----------------------------------------------------------------- contextual loss


@pytest.mark.parametrize("direction", ["target", "source", "symmetric"])
@pytest.mark.parametrize("h", [0.1, 0.5])
def test_the_contextual_loss_in_loops(direction, h):
    f = drawn(2, 4, 3, 5).requires_grad_()
    g = drawn(2, 4, 4, 4, seed=1)
    inside = (drawn(2, 3, 5, seed=2) > -0.5, drawn(2, 4, 4, seed=3) > -0.5)
    wanted = 0.0
    for i in range(2):
        a = f[i][:, inside[0][i]]
        b = g[i][:, inside[1][i]]
        wanted = wanted + by_hand.context(a, b, h, direction) / 2
    found = contextual_loss(f, g, h, direction, *inside)
    assert torch.isclose(found, wanted, rtol=1e-9)
    grads = [torch.autograd.grad(v, f, retain_graph=True)[0] for v in (found, wanted)]
    assert torch.allclose(*grads, rtol=1e-6, atol=1e-10)


def test_a_collapsed_image_pays_in_the_direction_of_the_target_only():
    g = drawn(1, 6, 5, 5)
    collapsed = g[:, :, :1, :1].expand(-1, -1, 5, 5)  # one feature of the target everywhere
    assert contextual_loss(collapsed, g, 0.1, "target") > 2.5
    assert contextual_loss(collapsed, g, 0.1, "source") < 0.1


@pytest.mark.parametrize("side", [16, 8])
def test_the_body_of_each_image_is_its_own(side):
    x = torch.full((2, 1, 64, 64), -1.0)
    x[0, :, 20:40, 8:30] = 0
    x[1, :, :9] = -0.94
    x[1, :, 50:60, 50:60] = -0.96  # still air
    found = body_mask(x, (side, side))
    assert torch.equal(found, torch.stack([by_hand.inside_body(im[0], side) for im in x]))
    assert found[0].any() and not found[0].all() and not torch.equal(found[0], found[1])


def test_filters_in_loops():
    bank = FilterBank(3, (4,), seed=1).double()
    x = image(16)
    (found,) = bank(x)
    small = F.avg_pool2d(x, 2)
    rows = [0, 0, *range(8), 7, 7]  # the border repeated
    padded = small[:, :, rows][..., rows]
    for k, filter_ in enumerate(bank.filters4):
        assert abs(float(filter_.sum())) < 1e-6
        for i in range(4):
            for j in range(4):
                v = (padded[:, 0, 2 * i : 2 * i + 5, 2 * j : 2 * j + 5] * filter_[0]).sum((1, 2))
                assert torch.allclose(found[:, k, i, j], v.clamp_min(0))
                assert torch.allclose(found[:, 3 + k, i, j], (-v).clamp_min(0))


def test_vgg_reads_colours_and_gives_three_maps():
    with pytest.warns(UserWarning, match="random weights"), seeded(0, "vgg"):
        net = VGG19Features(random=True)
    x = image(16).float()
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    y = ((x + 1) / 2 - mean) / std
    wanted = []
    convolutions = [m for m in net.features if isinstance(m, torch.nn.Conv2d)]
    for k, layer in enumerate(convolutions):
        if k in (2, 4, 8):
            y = F.max_pool2d(y, 2)
        y = F.conv2d(F.pad(y, (1,) * 4), layer.weight, layer.bias).clamp_min(0)
        wanted += [y] if k in (6, 7, 8) else []
    for a, b in zip(net(x), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_features_of_an_encoder_are_those_at_a_quarter_and_an_eighth():
    names = {
        "unet": ("conv3", "conv4"),
        "unet_bilinear": ("conv3", "conv4"),
        "densefcn": ("down3", "down4"),
        "mrrn": ("enc2.2.body", "enc3.3.body"),
    }
    for network, layers in names.items():
        net = make_network(
            network, dict(in_channels=1, classes=1, width=8 if network == "densefcn" else 4)
        )
        assert encoder_layers(net) == layers


# ----------------------------------------------------------------- DRIT and what is shipped


def test_weights_and_updates_of_drit():
    terms = ("adv", "content", "kl", "self", "cross", "code", "latent")
    assert DRIT_WEIGHTS == {
        "drit": dict(zip(terms, (1.0, 1.0, 0.01, 10.0, 10.0, 0.0, 10.0))),
        "paper": dict(zip(terms, (1.0, 1.0, 1.0, 1.0, 0.0, 10.0, 10.0))),
    }
    assert DRIT_UPDATES == {
        "d_content": (("d_content",), ("d_content",)),
        "d_image": (("d_image",), ("d_image",)),
        "translation": (("content", "style", "drit_generator"), terms[:-1]),
        "latent": (("content", "drit_generator"), ("latent",)),
    }


def test_how_image_and_translation_meet():
    x = torch.full((1, 1, 2, 2), 0.8)
    fake = torch.full((1, 1, 2, 2), 0.4)

    def alpha(both):
        assert both[0, :, 0, 0].tolist() == pytest.approx([0.8, 0.4])
        return torch.full((1, 1, 1, 1), 0.25)

    assert torch.equal(fuse_images(x, fake, "replace"), fake)
    assert fuse_images(x, fake, "concat")[0, :, 0, 0].tolist() == pytest.approx([0.8, 0.4])
    weighted = fuse_images(x, fake, "weighted", alpha)[0, :, 0, 0]
    assert weighted.tolist() == pytest.approx([0.6, 0.1])


def test_a_packed_translator_reads_the_unit_range():
    with seeded(0, "pack"):
        segmentor = make_network("unet", dict(in_channels=1, classes=1, width=2)).eval()
        packed = pack_translator(segmentor, Generator(1, 2, 1))
    assert type(packed) is Translated and packed.stride == segmentor.stride
    x = torch.rand(1, 1, 32, 32, generator=torch_rng(0, "x"))
    wanted = segmentor((packed.generator(2 * x - 1) + 1) / 2)
    assert torch.allclose(packed(x), wanted, atol=1e-6)


@pytest.mark.parametrize("classes", [1, 3])
def test_an_ensemble_is_the_mean_probability(classes):
    with seeded(0, "ensemble"):
        nets = [
            make_network("unet", dict(in_channels=1, classes=classes, width=2)).eval()
            for _ in "abc"
        ]
    packed = pack_ensemble(*nets)
    assert type(packed) is Ensemble
    x = torch.rand(2, 1, 32, 32, generator=torch_rng(0, "x"))
    each = torch.stack([by_hand.probabilities(net(x), 1.0) for net in nets])
    assert torch.allclose(by_hand.probabilities(packed(x), 1.0), each.mean(0), atol=1e-6)


def test_a_share_is_a_number_of_an_image_and_starts_at_one_half():
    with seeded(0, "alpha"):
        net = AlphaNet(2, 2).eval()
    both = torch.rand(3, 2, 32, 32, generator=torch_rng(0, "both"))
    assert net(both).flatten().tolist() == [0.5] * 3
    first, last = net.head[0], net.head[2]
    with torch.no_grad():
        last.weight.normal_(0, 1, generator=torch_rng(1, "w"))
        last.bias.fill_(0.3)
        hidden = (net.body(both) @ first.weight.T + first.bias).clamp_min(0)
        logit = hidden @ last.weight.T + last.bias
        assert torch.allclose(net(both), (1 / (1 + torch.exp(-logit)))[..., None, None])
