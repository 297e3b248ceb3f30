"""Networks for volumes against plain implementations of their own, with copied weights: LightUNet,
HybridEncoder and GridDecoder, in two and three dimensions, in training and in evaluation mode.
"""

import pytest
import torch
import torch.nn.functional as F

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.networks import volumes as V
from unpaired_kd.networks.volumes import GridDecoder, HybridEncoder, LightUNet, TransformerBlock


def conv(x, weight, bias=None, stride=1):
    "A convolution that keeps the size, with torch's plain function."
    pad = tuple(k // 2 for k in weight.shape[2:])
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    return convolve(x, weight, bias, stride=stride, padding=pad)


def up(x, weight, bias):
    "Every voxel becomes a block: the transposed convolution whose kernel is its stride."
    k = weight.shape[2:]
    sides = [n * m for n, m in zip(x.shape[2:], k)]
    out = x.new_zeros(len(x), weight.shape[1], *sides)
    for place in torch.cartesian_prod(*[torch.arange(m) for m in k]).reshape(-1, len(k)).tolist():
        at = (slice(None), slice(None), *[slice(p, None, m) for p, m in zip(place, k)])
        out[at] = torch.einsum("bi...,io->bo...", x, weight[(..., *place)])
    return out + bias.view(-1, *[1] * (x.ndim - 2))


def batch_norm(x, s, name, training):
    over = (0, *range(2, x.ndim))
    shape = (-1, *[1] * (x.ndim - 2))
    mean = x.mean(over) if training else s[name + ".running_mean"]
    var = x.var(over, correction=0) if training else s[name + ".running_var"]
    y = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return y * s[name + ".weight"].view(shape) + s[name + ".bias"].view(shape)


def group_norm(x, s, name, groups):
    y = x.reshape(len(x), groups, -1)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    return y.view_as(x) * s[name + ".weight"].view(shape) + s[name + ".bias"].view(shape)


def pool(x, flat):
    "The largest of each block of 2 an axis (1 along the depth if `flat`)."
    for axis in range(2, x.ndim):
        if axis == 2 and flat:
            continue
        x = x.unflatten(axis, (-1, 2)).amax(axis + 1)
    return x


def light_unet(s, x, levels, flat, training):
    "The whole student, from its state dict: logits and the features of the bottom."

    def double(x, name):
        for i in (0, 3):
            x = conv(x, s[f"{name}.{i}.weight"])
            x = batch_norm(x, s, f"{name}.{i + 1}", training).clamp_min(0)
        return x

    skips = []
    for k in range(1, levels):
        x = double(x, f"down{k}")
        skips.append(x)
        x = pool(x, k - 1 < flat)
    x = bottom = double(x, "bottom")
    for k in range(levels - 1, 0, -1):
        x = up(x, s[f"up{k}.weight"], s[f"up{k}.bias"])
        x = double(torch.cat([x, skips[k - 1]], 1), f"join{k}")
    return conv(x, s["head.weight"], s["head.bias"]), bottom


def shaken(net, seed=0):
    "The network with weights and statistics that are all different from their defaults."
    g = torch_rng(seed, "shaken")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
        for b in net.buffers():
            if b.dtype.is_floating_point:
                b.add_(0.2 * torch.rand(b.shape, generator=g) - 0.1)
    return net


def state(net):
    return {k: v.double() for k, v in net.state_dict().items()}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "dims,levels,flat,classes,sides",
    [
        (3, 4, 0, 1, (16, 8, 24)),
        (3, 3, 1, 3, (6, 8, 12)),
        (3, 3, 2, 1, (3, 12, 8)),
        (2, 4, 0, 2, (24, 16)),
        (2, 2, 0, 1, (6, 4)),
    ],
)
def test_light_unet(dims, levels, flat, classes, sides, training):
    with seeded(0, "net"):
        net = shaken(LightUNet(2, classes, 4, dims, levels, flat))
    before = state(net)
    net.train(training)
    x = torch.rand(2, 2, *sides, generator=torch_rng(0, "x"), requires_grad=True)
    y = x.detach().double().requires_grad_()
    logits, bottom = light_unet(before, y, levels, flat, training)
    ours = net(x)
    assert ours.shape == logits.shape
    assert torch.allclose(ours.double(), logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    if not training:  # one sample is convolved in two halves
        scale = logits.abs().max().item()
        assert torch.allclose(net(x[1:]).double(), logits[1:], rtol=1e-3, atol=1e-3 * scale)
    a = torch.autograd.grad(ours.sum(), x)[0]
    b = torch.autograd.grad(logits.sum(), y)[0]
    assert b.abs().max() > 0 and (a - b).abs().max() < 5e-3 * b.abs().max()
    net.load_state_dict(before)
    features, skips = net.encode(x.detach())
    scale = bottom.abs().max().item()
    assert torch.allclose(features.double(), bottom, atol=1e-4 * scale)
    assert [v.shape[1] for v in skips] == [4 * 2**k for k in range(levels - 1)]


def attend(t, s, name, heads):
    "Softmax attention, head by head, token by token."
    d = t.shape[2]
    h = layer_norm(t, s, f"{name}.norm1")
    qkv = h @ s[f"{name}.qkv.weight"].T + s[f"{name}.qkv.bias"]
    out = []
    for k in range(heads):
        part = slice(k * d // heads, (k + 1) * d // heads)
        q, key, v = (qkv[:, :, i * d : (i + 1) * d][:, :, part] for i in range(3))
        scores = q @ key.transpose(1, 2) / (d // heads) ** 0.5
        out.append((scores.exp() / scores.exp().sum(2, keepdim=True)) @ v)
    t = t + torch.cat(out, 2) @ s[f"{name}.proj.weight"].T + s[f"{name}.proj.bias"]
    h = layer_norm(t, s, f"{name}.norm2")
    h = h @ s[f"{name}.mlp.0.weight"].T + s[f"{name}.mlp.0.bias"]
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    return t + h @ s[f"{name}.mlp.2.weight"].T + s[f"{name}.mlp.2.bias"]


def layer_norm(t, s, name):
    y = (t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return y * s[name + ".weight"] + s[name + ".bias"]


def test_transformer_block():
    with seeded(0, "block"):
        block = shaken(TransformerBlock(12, 3))
    t = torch.randn(2, 5, 12, generator=torch_rng(0, "t"))
    s = {f"b.{k}": v for k, v in state(block).items()}
    assert torch.allclose(block(t).double(), attend(t.double(), s, "b", 3), atol=1e-4)


def hybrid(s, x, c):
    "The whole encoder, from its state dict."
    skips = {}
    for k in range(c["levels"]):
        flat = k < c["flat"]
        step = tuple(1 if flat and a == 0 and c["dims"] == 3 else 2 for a in range(c["dims"]))
        for i, stride in ((0, step), (3, 1)):
            weight = s[f"stem.{k}.{i}.weight"]
            x = conv(x, weight, stride=stride)
            groups = next(n for n in (8, 4, 2, 1) if len(weight) % n == 0)
            x = group_norm(x, s, f"stem.{k}.{i + 1}", groups).clamp_min(0)
        skips[2 ** (k + 1)] = x
    skips.pop(2 ** c["levels"])
    x = conv(x, s["embed.weight"], s["embed.bias"])
    grid = x.shape[2:]
    t = x.flatten(2).transpose(1, 2) + s["position"].flatten(2).transpose(1, 2)
    for n in range(c["depth"]):
        t = attend(t, s, f"blocks.{n}", c["heads"])
    return layer_norm(t, s, "norm").transpose(1, 2).reshape(len(x), -1, *grid), skips


@pytest.mark.parametrize(
    "change,sides",
    [
        (dict(), (16, 16, 16)),
        (dict(flat=2, dim=6), (4, 16, 16)),
        (dict(levels=2, width=2, depth=1), (8, 8, 8)),
        (dict(dims=2), (16, 16)),
    ],
    ids=str,
)
def test_hybrid_encoder(change, sides):
    config = dict(in_channels=2, width=4, dim=12, depth=2, heads=3, tokens=2) | change
    with seeded(0, "net"):
        net = shaken(HybridEncoder(**config))
    x = torch.rand(2, 2, *sides, generator=torch_rng(0, "x"))
    z, skips = net(x)
    expected, others = hybrid(state(net), x.double(), net.config)
    assert torch.allclose(z.double(), expected, atol=1e-3)
    assert torch.allclose(net(x[1:])[0].double(), expected[1:], atol=1e-3)  # cut in two halves
    assert skips.keys() == others.keys() == net.skips.keys()
    for stride, skip in skips.items():
        assert skip.shape[1] == net.skips[stride]
        assert torch.allclose(skip.double(), others[stride], atol=1e-4)


def test_the_position_table_is_interpolated():
    table = torch.rand(1, 3, 2, 2, generator=torch_rng(0, "t"))
    assert V.resize_table(table, (2, 2)) is table
    wide = V.resize_table(table, (2, 4))
    a = table[..., 0]
    b = table[..., 1]
    expected = torch.stack([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b], -1)
    assert torch.allclose(wide, expected, atol=1e-6)


def grid_decoder(s, z, skips, width, flat):
    "The whole decoder, from its state dict."
    steps = len([k for k in s if k.startswith("ups.") and k.endswith("weight")])
    for n, k in enumerate(reversed(range(steps))):
        z = up(z, s[f"ups.{n}.weight"], s[f"ups.{n}.bias"])
        if 2**k in skips:
            z = torch.cat([z, skips[2**k]], 1)
        weight = s[f"joins.{n}.0.weight"]
        groups = next(g for g in (8, 4, 2, 1) if len(weight) % g == 0)
        z = group_norm(conv(z, weight), s, f"joins.{n}.1", groups).clamp_min(0)
    return conv(z, s["head.weight"], s["head.bias"])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("joined", [{}, {2: 3}, {2: 3, 4: 5}], ids=str)
@pytest.mark.parametrize("flat", [0, 1])
def test_grid_decoder(dims, joined, flat):
    if dims == 2 and flat:
        return
    with seeded(0, "net"):
        net = shaken(GridDecoder(6, 2, 8, joined, 4, dims, flat))
    z = torch.rand(2, 6, *[2] * dims, generator=torch_rng(0, "z"))
    skips = {}
    for stride, channels in joined.items():
        sides = [16 // stride] * dims
        skips[stride] = torch.rand(2, channels, *sides, generator=torch_rng(0, "s", stride))
    expected = grid_decoder(
        state(net), z.double(), {k: v.double() for k, v in skips.items()}, 4, flat
    )
    ours = net(z, {**skips, 16: None})
    assert ours.shape[1] == 2 and ours.shape == expected.shape
    assert torch.allclose(ours.double(), expected, atol=1e-3)
    widths = [len(m.weight) for m in net.head.modules() if hasattr(m, "weight")]
    assert widths == [2] and [u.weight.shape[1] for u in net.ups] == [8, 4, 2]


@pytest.mark.parametrize("flat", [0, 1, 2, 3])
def test_strides_and_reach(flat):
    "By hand: halvings an axis, and the margin of the chapter's table."
    net = LightUNet(width=1, flat=flat)
    assert net.strides == (2 ** (3 - flat), 8, 8)
    assert HybridEncoder(dim=6, depth=1, flat=flat).strides == (2 ** (3 - flat), 8, 8)

    def margin(flats):
        r = 0
        for k in (0, 1, 2):
            r = r + (0 if k < flats else 2)
            r = r if k < flats else -(-r // 2)
        r = r + (0 if flats > 3 else 2)
        for k in (2, 1, 0):
            r = (r if k < flats else 2 * r) + (0 if k < flats else 2)
        return r

    assert net.reach == (margin(flat), 46, 46)
    assert margin(0) == 46
