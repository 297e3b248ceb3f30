"""Every network beside a plain implementation of it with copied weights, in float64: outputs, taps,
gradients and BatchNorm statistics. The plain layers below use sums, products and indexing only."""

import math

import pytest
import torch

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.networks.densefcn import DenseFCN
from unpaired_kd.networks.mrrn import MRRN
from unpaired_kd.networks.registry import weights_digest
from unpaired_kd.networks.taps import Taps, tap_channels
from unpaired_kd.networks.unet import UNet, best_layout
from unpaired_kd.networks.unet_bilinear import BilinearUNet

EPS = 1e-5  # of every normalisation
MOMENTUM = 0.1


def shifts(size, dims):
    "All offsets of a cube of this side."
    return torch.cartesian_prod(*[torch.arange(size)] * dims).reshape(-1, dims).tolist()


def convolution(x, w, b):
    "Correlation with a kernel of odd side, the image framed by zeros."
    size = w.shape[2]
    dims = x.ndim - 2
    framed = x.new_zeros(*x.shape[:2], *[s + size - 1 for s in x.shape[2:]])
    inner = [slice(size // 2, size // 2 + s) for s in x.shape[2:]]
    framed[(..., *inner)] = x
    out = b.reshape(-1, *[1] * dims)
    for at in shifts(size, dims):
        seen = framed[(..., *[slice(a, a + s) for a, s in zip(at, x.shape[2:])])]
        out = out + torch.einsum("bi...,oi->bo...", seen, w[(..., *at)])
    return out


def spread(x, w, b):
    "Transposed convolution of stride 2: every pixel adds its kernel at twice its place."
    size = w.shape[2]
    dims = x.ndim - 2
    out = x.new_zeros(len(x), w.shape[1], *[2 * (s - 1) + size for s in x.shape[2:]])
    for at in shifts(size, dims):
        into = [slice(a, a + 2 * s - 1, 2) for a, s in zip(at, x.shape[2:])]
        out[(..., *into)] += torch.einsum("bi...,io->bo...", x, w[(..., *at)])
    return out + b.reshape(-1, *[1] * dims)


def halve(x, factor=2):
    "The largest value of every block."
    for axis in range(2, x.ndim):
        x = x.unflatten(axis, (-1, factor)).amax(axis + 1)
    return x


def stretch(x, factor=2):
    "Bilinear: pixel centres at (i + 1/2) / factor - 1/2 of the small image, its border repeated."
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        table = x.new_zeros(factor * n, n)
        for i in range(factor * n):
            at = min(max((i + 0.5) / factor - 0.5, 0), n - 1)
            low = math.floor(at)
            table[i, low] += 1 - (at - low)
            table[i, min(low + 1, n - 1)] += at - low
        x = torch.einsum("...n,mn->...m", x.movedim(axis, -1), table).movedim(-1, axis)
    return x


class Plain:
    "The layers of a network by name: weights copied from it, statistics renewed as BatchNorm does."

    def __init__(self, net, training):
        self.state = {k: v.detach().clone() for k, v in net.state_dict().items()}
        self.training = training
        self.said = {}
        for name, p in net.named_parameters():
            self.state[name].requires_grad_(p.requires_grad)

    def say(self, name, x):
        self.said[name] = x
        return x

    def conv(self, name, x):
        return convolution(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def up(self, name, x):
        return spread(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, kind="batch"):
        shape = (-1, *[1] * (x.ndim - 2))
        if kind == "instance":
            mean, var = self.moments(x, tuple(range(2, x.ndim)))
        elif self.training:
            over = (0, *range(2, x.ndim))
            mean, var = self.moments(x, over)
            n = x.numel() // x.shape[1]
            self.remember(f"{name}.running_mean", mean.flatten())
            self.remember(f"{name}.running_var", var.flatten() * n / (n - 1))
        else:
            mean = self.state[f"{name}.running_mean"].reshape(shape)
            var = self.state[f"{name}.running_var"].reshape(shape)
        scale, move = (self.state[f"{name}.{k}"].reshape(shape) for k in ("weight", "bias"))
        return scale * (x - mean) / (var + EPS).sqrt() + move

    def moments(self, x, over):
        mean = x.mean(over, keepdim=True)
        return mean, ((x - mean) ** 2).mean(over, keepdim=True)

    def remember(self, name, value):
        self.state[name] = (1 - MOMENTUM) * self.state[name] + MOMENTUM * value.detach()

    def relu(self, x):
        return x * (x > 0)

    def drop(self, x, share, whole_channels=False):
        if not self.training or not share:
            return x
        shape = x.shape[:2] + (1,) * (x.ndim - 2) if whole_channels else x.shape
        return x * x.new_empty(shape).bernoulli_(1 - share) / (1 - share)


def double(p, name, x, kind="batch"):
    x = p.say(f"{name}.2", p.relu(p.norm(f"{name}.1", p.conv(f"{name}.0", x), kind)))
    x = p.say(f"{name}.5", p.relu(p.norm(f"{name}.4", p.conv(f"{name}.3", x), kind)))
    return p.say(name, x)


def plain_unet(p, x, kind="batch"):
    "LOTUS: four levels down, the decoder's own features before the skip."
    c1 = double(p, "conv1", x, kind)
    c2 = double(p, "conv2", halve(c1), kind)
    c3 = double(p, "conv3", halve(c2), kind)
    c4 = double(p, "conv4", halve(c3), kind)
    x = double(p, "conv5", halve(c4), kind)
    for n, skip in ((6, c4), (7, c3), (8, c2), (9, c1)):
        u = p.say(f"up{n}", p.relu(p.norm(f"up{n}.1", p.up(f"up{n}.0", x), kind)))
        x = double(p, f"conv{n}", torch.cat([u, skip], 1), kind)
    return p.conv("conv10", x)


def plain_bilinear(p, x):
    "CMEDL's U-Net: the skip before what was stretched, no layer between."
    c1 = double(p, "conv1", x)
    c2 = double(p, "conv2", halve(c1))
    c3 = double(p, "conv3", halve(c2))
    c4 = double(p, "conv4", halve(c3))
    x = double(p, "conv5", halve(c4))
    for n, skip in ((6, c4), (7, c3), (8, c2), (9, c1)):
        x = double(p, f"conv{n}", torch.cat([skip, stretch(x)], 1))
    return p.conv("conv10", x)


def dense_block(p, name, x, share, keep):
    came = x.shape[1]
    for n in range(4):
        if n == 3:
            p.say(f"{name}.before_last", x)
        layer = f"{name}.layers.{n}"
        r = p.say(f"{layer}.relu", p.relu(p.norm(f"{layer}.norm", x)))
        x = torch.cat([x, p.drop(p.conv(f"{layer}.conv", r), share)], 1)
    return p.say(name, x if keep else x[:, came:])


def plain_dense(p, x, share=0.0):
    "CMEDL's DenseFCN: blocks down keep what they read, those up only what they made."
    x = p.conv("stem", x)
    skips = []
    for n in (1, 2, 3, 4, 5):
        x = dense_block(p, f"down{n}", x, share, keep=True)
        skips.append(x)
        r = p.relu(p.norm(f"pool{n}.0", x))
        x = halve(p.drop(p.conv(f"pool{n}.2", r), share))
    x = dense_block(p, "bottom", x, share, keep=False)
    for n in (5, 4, 3, 2, 1):
        skip = skips[n - 1]
        u = p.up(f"expand{n}.conv", x)[..., : skip.shape[2], : skip.shape[3]]
        x = dense_block(p, f"up{n}", torch.cat([u, skip], 1), share, keep=n == 1)
    return p.conv("head", x)


def unit(p, name, x):
    return p.say(name, p.relu(p.norm(f"{name}.1", p.conv(f"{name}.0", x))))


def chain(p, name, x):
    "A convolution unit and three residual ones."
    x = unit(p, f"{name}.0", x)
    for n in (1, 2, 3):
        x = x + unit(p, f"{name}.{n}.body", x)
    return x


def visit(p, name, v, stream, factor, share):
    "Read the stream, renew the pooled path, add to the stream."
    read = p.drop(halve(stream, factor), share, whole_channels=True)
    v = unit(p, f"{name}.body.1", unit(p, f"{name}.body.0", torch.cat([read, v], 1)))
    return v, stream + stretch(p.conv(f"{name}.back", v), factor)


def plain_mrrn(p, x, link, share=0.0):
    "CMEDL's MRRN, every visit in its order: stage, number of halvings, streams."
    x = chain(p, "stem", x)
    r = [p.relu(p.conv("start.0", x))]

    def stage(name, v, streams):
        level = int(name[-1])
        for n, s in enumerate(streams):
            v, r[s] = visit(p, f"{name}.{n}", v, r[s], 2 ** (level - s), share)
        return p.say(name, v)

    r.append(stage("enc1", halve(x), (0, 0, 0)))
    r.append(stage("enc2", halve(r[1]), (0, 1, 0)))
    r.append(stage("enc3", halve(r[2]), (0, 2, 1, 0)))
    v = stage("enc4", halve(r[3]), (0, 3, 2, 1, 0))
    v = stage("dec3", p.say("up4", stretch(v)), (0, 2, 1, 0))
    v = stage("dec2", p.say("up3", stretch(v)), (0, 1, 0))
    v = p.say("up2", stretch(v))
    v = stage("dec1", r[1] if link == "paper" else v, (0, 0, 0))
    v = p.say("up1", stretch(v))
    return p.conv("head", chain(p, "merge", torch.cat([r[0], v], 1)))


CASES = {
    "unet": (UNet, dict(classes=1), 32, plain_unet, {}),
    "unet instance": (UNet, dict(classes=3, norm="instance"), 32, plain_unet, {"kind": "instance"}),
    "unet volumes": (UNet, dict(classes=2, dims=3, in_channels=1), 16, plain_unet, {}),
    "bilinear": (BilinearUNet, dict(classes=2), 32, plain_bilinear, {}),
    "dense": (DenseFCN, dict(classes=2, dropout=0.0), 32, plain_dense, {}),
    "dense dropout": (DenseFCN, dict(classes=1), 64, plain_dense, {"share": 0.2}),
    "mrrn": (MRRN, dict(classes=2), 32, plain_mrrn, {"link": "paper"}),
    "mrrn connected": (MRRN, dict(link="connected"), 32, plain_mrrn, {"link": "connected"}),
    "mrrn dropout": (MRRN, dict(dropout=0.4), 32, plain_mrrn, {"link": "paper", "share": 0.4}),
}


def scene(case, training):
    "A network whose scales and statistics are no longer 0 and 1, and two images."
    cls, args, side, plain, more = CASES[case]
    with seeded(0, "values"):
        net = cls(width=4, **args).double().train(training)
        for name, v in net.state_dict().items():
            if v.is_floating_point() and v.ndim == 1:
                low = 0.5 if name.endswith(("running_var", "weight")) else -0.3
                v.uniform_(low, low + 0.8)
    shape = (2, net.config["in_channels"], *[side] * net.config["dims"])
    x = torch.rand(shape, generator=torch_rng(0, "image"), dtype=torch.float64)
    return net, x, lambda p: plain(p, x, **more)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=atol)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_network_is_its_plain_form(case, training):
    net, x, plain = scene(case, training)
    names = [n for level in net.hint_layers.values() for n in level]
    p = Plain(net, training)
    torch.manual_seed(0)
    wanted = plain(p)
    torch.manual_seed(0)
    with Taps(net, names) as taps:
        found = net(x)
        heard = taps.take()
    close(found, wanted)
    for name in names:
        close(heard[name], p.said[name])
    for name, v in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            close(v, p.state[name])


@pytest.mark.parametrize("case", ["unet", "bilinear", "dense", "mrrn", "mrrn connected"])
def test_a_gradient_is_that_of_the_plain_form(case):
    net, x, plain = scene(case, training=False)
    p = Plain(net, training=False)
    towards = torch.randn(net(x).shape, generator=torch_rng(0, "way"), dtype=x.dtype)
    (plain(p) * towards).sum().backward()
    (net(x) * towards).sum().backward()
    for name, v in net.named_parameters():
        twin = p.state[name].grad
        assert (v.grad is None) == (twin is None), name
        if twin is not None:
            close(v.grad, twin, atol=1e-8)


def test_taps_see_the_newest_pass_and_an_overwritten_layer_as_it_was():
    "`conv1.1` is followed by a ReLU in place: the tap keeps what the normalisation gave."
    net, x, plain = scene("unet", training=False)
    p = Plain(net, training=False)
    with Taps(net, ["conv1.1", "up6"]) as taps:
        net(x)
        net(1 - x)
        before_relu = p.norm("conv1.1", p.conv("conv1.0", 1 - x))
        assert before_relu.min() < 0
        close(taps["conv1.1"], before_relu)
        assert list(taps.take()) == ["conv1.1", "up6"] and not taps.seen
        handles = len(net.conv1[1]._forward_hooks)
    assert handles == 1 and not net.conv1[1]._forward_hooks


def test_channels_of_taps_are_counted_without_a_trace():
    net, _, _ = scene("mrrn", training=True)
    before = weights_digest(net)
    names = ["stem.0", "enc4", "up2"]
    assert tap_channels(net, names) == {"stem.0": 4, "enc4": 64, "up2": 16}
    assert net.training and weights_digest(net) == before


def test_a_fingerprint_covers_weights_and_statistics():
    "One number of each kind changed at a time; the layout in memory does not matter."
    net, _, _ = scene("unet", training=False)
    whole = weights_digest(net)
    assert weights_digest(net.to(memory_format=torch.channels_last)) == whole
    for name in ("conv1.0.weight", "conv1.1.running_mean", "conv1.1.num_batches_tracked"):
        value = net.state_dict()[name]
        old = value.clone()
        value[(0,) * value.ndim] += 1
        assert weights_digest(net) != whole, name
        value.copy_(old)


def test_layouts():
    "channels_last helps BatchNorm in 2-D only."
    pairs = [
        (UNet(width=2), torch.channels_last),
        (UNet(width=2, norm="instance"), torch.contiguous_format),
        (UNet(width=2, dims=3), torch.contiguous_format),
    ]
    for net, wanted in pairs:
        assert best_layout(net) == wanted


@pytest.mark.parametrize("case", ["unet", "bilinear", "dense", "mrrn"])
def test_sides_and_hints_as_tables(case):
    cls = CASES[case][0]
    strides = {UNet: 16, BilinearUNet: 16, DenseFCN: 32, MRRN: 16}
    unet = {"low": ("conv1.2", "conv1.5"), "mid": ("conv5",), "high": ("conv8", "conv9")}
    dense = {
        "low": ("down1.layers.0.relu", "down1.layers.1.relu"),
        "mid": ("bottom",),
        "high": ("up2.before_last", "up1"),
    }
    mrrn = {"low": ("stem.0", "stem.1.body"), "mid": ("enc4",), "high": ("up2", "up1")}
    assert cls.stride == strides[cls]
    assert cls.hint_layers == {UNet: unet, BilinearUNet: unet, DenseFCN: dense, MRRN: mrrn}[cls]


def test_defaults_as_a_table():
    wanted = {
        UNet: dict(in_channels=3, classes=1, width=16, dims=2, norm="batch"),
        BilinearUNet: dict(in_channels=1, classes=1, width=64, dims=2),
        DenseFCN: dict(in_channels=1, classes=1, width=48, dropout=0.2, dims=2),
        MRRN: dict(in_channels=1, classes=1, width=32, link="paper", dropout=0.0, dims=2),
    }
    with torch.device("meta"):
        for cls, config in wanted.items():
            assert cls().config == config
