"Networks for volumes: counts, reach, joined tiles, shapes, the slow path, the encoders' interface."

import copy
import json
import os

import pytest
import torch
from torch import nn

os.environ["KINETO_LOG_LEVEL"] = "99"
from unpaired_kd.core import InputError
from unpaired_kd.networks import volumes as V
from unpaired_kd.networks.registry import make_network, network_name
from unpaired_kd.networks.taps import Taps
from unpaired_kd.networks.unet import check_input
from unpaired_kd.networks.volumes import (
    ENCODERS,
    GridDecoder,
    HybridEncoder,
    LightUNet,
    TransformerBlock,
    UnetrEncoder,
    build_encoder,
    count_cost,
)

CUBE = (1, 1, 96, 96, 96)
TINY = {
    "hybrid": dict(width=4, dim=12, depth=2, heads=2, tokens=4),
    "swin": dict(feature_size=12),
    "unetr": dict(feature_size=2, size=32, hidden=24, heads=2),
}
TORCHS = {
    V.SplitConv2d: nn.Conv2d,
    V.SplitConv3d: nn.Conv3d,
    V.SplitUp2d: nn.ConvTranspose2d,
    V.SplitUp3d: nn.ConvTranspose3d,
}


def torchs(net):
    "The network with torch's own layers and equal weights."
    twin = copy.deepcopy(net)
    for m in twin.modules():
        m.__class__ = TORCHS.get(type(m), type(m))
    return twin


def kernels(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        f()
    return {e.key for e in p.key_averages() if "conv" in e.key}


# ---- cost ----


@pytest.mark.parametrize(
    "width, parameters, gflop",
    [
        (8, 350_809, 23.916),
        (12, 788_581, 53.514),
        (16, 1_401_265, 94.872),
        (32, 5_601_121, 377.903),
    ],
)
def test_cost_of_the_students(width, parameters, gflop):
    cost = count_cost(LightUNet(width=width), CUBE)
    assert cost["parameters"] == parameters
    assert cost["flop"] / 1e9 == pytest.approx(gflop, abs=1e-3)


def test_counter_agrees_with_a_run_on_real_numbers():
    from torch.utils.flop_counter import FlopCounterMode

    net = LightUNet(width=4, flat=1)
    shape = (2, 1, 8, 16, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.rand(shape))
    assert counter.get_total_flops() == count_cost(net, shape)["flop"]


@pytest.mark.parametrize(
    "config, parameters, gflop",
    [(dict(), 23_244_369, 174.0), (dict(dim=256, depth=8, heads=4), 8_028_881, 91.7)],
)
def test_cost_of_the_teachers(config, parameters, gflop):
    with torch.device("meta"):
        enc = HybridEncoder(**config)
        parts = [
            enc,
            V.build_conv(enc.channels, 16, kernel=1),
            V.build_conv(16, 128, kernel=1),
            GridDecoder(128, skips=enc.skips),
        ]

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x):
            z, skips = parts[0](x)
            return parts[3](parts[2](parts[1](z)), skips)

    cost = count_cost(Teacher(), CUBE)
    assert cost["parameters"] == parameters and cost["flop"] / 1e9 == pytest.approx(gflop, abs=0.06)


def test_attention_is_in_the_count_and_modes_survive():
    n = 27
    d = 24
    net = nn.Sequential(TransformerBlock(d, 2), nn.Dropout(0.5)).train()
    net[0].mlp.eval()
    assert count_cost(net, (1, n, d))["flop"] == 2 * n * 12 * d * d + 4 * n * n * d
    assert net.training and net[1].training and not net[0].mlp.training and net[0].training


# ---- reach ----


def positive(net):
    twin = make_network("light_unet", net.config).eval()
    for p in twin.parameters():
        p.data.abs_()
    for k in range(1, net.config["levels"]):
        pool = getattr(twin, f"pool{k}")
        setattr(
            twin,
            f"pool{k}",
            (nn.AvgPool3d if net.config["dims"] == 3 else nn.AvgPool2d)(pool.kernel_size),
        )
    return twin


def seen_from(net, first, last, axis, dims=3, size=208):
    x = torch.rand([1, 1] + [size if a == axis else 8 for a in range(dims)], requires_grad=True)
    net(x).movedim(2 + axis, 0)[first : last + 1].sum().backward()
    hit = x.grad[0, 0].movedim(axis, 0).flatten(1).abs().sum(1).nonzero().flatten()
    return first - int(hit[0]), int(hit[-1]) - last


@pytest.mark.parametrize(
    "config, reach",
    [
        (dict(), (46, 46, 46)),
        (dict(flat=1), (22, 46, 46)),
        (dict(flat=2), (8, 46, 46)),
        (dict(flat=3), (2, 46, 46)),
        (dict(levels=2), (8, 8, 8)),
        (dict(dims=2), (46, 46)),
    ],
)
def test_reach_is_what_a_gradient_sees(config, reach):
    net = LightUNet(width=1, **config)
    assert net.reach == reach
    for axis, r in enumerate(reach):
        assert seen_from(positive(net), 96, 103, axis, len(reach)) == (r, r)


def test_receptive_field_of_one_voxel():
    net = positive(LightUNet(width=1))
    left, right = seen_from(net, 96, 96, 0)
    assert left + 1 + right == 92
    assert [seen_from(net, 96 + i, 96 + i, 0)[0] for i in (5, 6)] == [51, 44]


@pytest.fixture(scope="module")
def settled():
    "A student whose running statistics are those of its volume."
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 176, 16, 16, generator=g)
    torch.manual_seed(0)
    net = LightUNet(width=4)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.momentum = None
    with torch.no_grad():
        net(x)
    return net.eval(), x


def seam(net, x, whole, halo, first=72, core=32):
    with torch.no_grad():
        tile = net(x[:, :, first - halo : first + core + halo])
    return float(
        (tile[:, :, halo : halo + core] - whole[:, :, first : first + core]).abs().max()
        / whole.std()
    )


def test_tiles_join_from_the_reach_on(settled):
    net, x = settled
    with torch.no_grad():
        whole = net(x)
    assert seam(net, x, whole, 48) < 1e-5 and seam(net, x, whole, 64) < 1e-5
    assert seam(net, x, whole, 40) > 1e-4 and seam(net, x, whole, 16) > 1e-2
    assert seam(net, x, whole, 52) > 1e-2  # a corner off the grid


def test_one_voxel_changes_nothing_beyond_the_reach(settled):
    net, x = settled
    y = x.clone()
    y[:, :, : 72 - 46] += 1
    with torch.no_grad():
        before = net(x)[:, :, 72:]
        assert torch.equal(before, net(y)[:, :, 72:])
        y[:, :, 72 - 46] += 1
        assert not torch.equal(before, net(y)[:, :, 72:])


# ---- the student ----


@pytest.mark.parametrize(
    "config, shape",
    [
        (dict(), (1, 1, 8, 8, 8)),
        (dict(), (1, 1, 40, 24, 8)),
        (dict(flat=2), (2, 1, 6, 24, 40)),
        (dict(flat=3), (1, 1, 5, 8, 16)),
        (dict(dims=2, classes=4, in_channels=3), (2, 3, 56, 8)),
        (dict(levels=2), (1, 1, 2, 6, 4)),
        (dict(levels=5), (1, 1, 16, 32, 16)),
    ],
)
def test_shapes(config, shape):
    net = LightUNet(**{"width": 2, **config}).eval()
    with torch.no_grad():
        assert net(torch.rand(shape)).shape == (shape[0], net.config["classes"], *shape[2:])
        features, skips = net.encode(torch.rand(shape))
    levels = net.config["levels"]
    assert features.shape == (
        shape[0],
        2 * 2 ** (levels - 1),
        *[s // k for s, k in zip(shape[2:], net.strides)],
    )
    assert len(skips) == levels - 1 and net.stride == 2 ** (levels - 1) == max(net.strides)
    assert len(net.reach) == len(net.strides) == len(shape) - 2


def test_every_skip_reaches_the_scores():
    net = LightUNet(width=2).eval()
    with torch.no_grad():
        features, skips = net.encode(torch.rand(1, 1, 16, 16, 16))
        out = net.decode(features, skips)
        for k in range(3):
            changed = [s + 1 if i == k else s for i, s in enumerate(skips)]
            assert (net.decode(features, changed) - out).abs().max() > 1e-4, k


def test_decode_leaves_the_skips_alone_and_is_the_forward_pass():
    net = LightUNet(width=2).eval()
    x = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        features, skips = net.encode(x)
        kept = [s.clone() for s in skips]
        assert torch.equal(
            net.decode(features, skips), net.decode(features, skips)
        ) and torch.equal(net(x), net.decode(features, skips))
    assert len(skips) == 3 and all(torch.equal(a, b) for a, b in zip(skips, kept))


@pytest.mark.parametrize(
    "config", [dict(), dict(flat=2, width=4, classes=2), dict(dims=2, levels=3)]
)
def test_name_arguments_state_and_tap(config):
    net = LightUNet(**config).eval()
    assert network_name(net) == "light_unet"
    twin = make_network("light_unet", json.loads(json.dumps(net.config))).eval()
    twin.load_state_dict(net.state_dict())
    x = torch.rand(1, net.config["in_channels"], *[16] * net.config["dims"])
    names = [n for level in net.hint_layers.values() for n in level]
    with Taps(net, names) as taps, torch.no_grad():
        assert torch.equal(net(x), twin(x))
        assert torch.equal(taps["bottom"], twin.encode(x)[0])
        assert taps["join1"].shape[1] == net.config["width"]


def test_every_weight_learns():
    net = LightUNet(width=2, flat=1)
    net(torch.rand(2, 1, 8, 16, 16)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    "f, words",
    [
        (
            lambda: LightUNet(width=1)(torch.rand(1, 1, 16, 20, 16)),
            "height 20 is not a multiple of 8",
        ),
        (
            lambda: LightUNet(width=1, flat=2)(torch.rand(1, 1, 5, 16, 16)),
            "depth 5 is not a multiple of 2",
        ),
        (lambda: LightUNet(width=1)(torch.rand(1, 1, 16, 16, 0)), "width 0"),
        (lambda: LightUNet(width=1)(torch.rand(1, 2, 16, 16, 16)), "in_channels=2"),
        (lambda: LightUNet(width=1)(torch.rand(1, 16, 16, 16)), "axes"),
        (lambda: LightUNet(width=1)(torch.rand(1, 1, 8, 8, 8)), "larger batch"),
        (lambda: LightUNet(dims=4), "dims=4"),
        (lambda: LightUNet(flat=4), "0 to 3"),
        (lambda: LightUNet(flat=-1), "flat=-1"),
        (lambda: LightUNet(dims=2, flat=1), "depth axis"),
        (lambda: LightUNet(levels=1), "2 levels"),
        (lambda: make_network("light_unet", dict(norm="batch")), "norm"),
        (lambda: HybridEncoder(dim=100), "heads=6"),
        (lambda: UnetrEncoder(size=40), "multiple of 16"),
        (lambda: UnetrEncoder(hidden=25), "heads=12"),
        (lambda: build_encoder("swin", dict(feature_size=10)), "multiple of 12"),
        (lambda: build_encoder("swim", {}), "Did you mean 'swin'"),
        (lambda: build_encoder("swin", dict(flat=2)), "flat"),
        (lambda: GridDecoder(skips={8: 4}), "skips at strides"),
        (lambda: GridDecoder(stride=6), "stride=6"),
        (lambda: GridDecoder(stride=1), "stride=1"),
        (lambda: GridDecoder(width=5), "even"),
        (lambda: GridDecoder(4, width=4, skips={2: 3})(torch.rand(1, 4, 2, 2, 2)), "give forward"),
    ],
)
def test_bad_input_is_named(f, words):
    with pytest.raises(InputError, match=words):
        f()


def test_check_input_keeps_its_old_words_for_one_stride():
    with pytest.raises(
        InputError, match=r"every side must be a multiple of 16 \(the network halves it 4 times\)"
    ):
        check_input(torch.zeros(1, 3, 32, 40), 3, 2, 16)
    check_input(torch.zeros(1, 3, 6, 40), 3, 2, (2, 8))
    with pytest.raises(InputError, match="width 40 is not a multiple of 16"):
        check_input(torch.zeros(1, 3, 32, 40), 3, 2, (16, 16))


# ---- the slow path ----


@pytest.mark.parametrize(
    "config, shape",
    [
        (dict(), (1, 1, 40, 24, 16)),
        (dict(flat=2), (1, 1, 10, 24, 24)),
        (dict(dims=2), (1, 1, 64, 40)),
    ],
)
def test_student_never_takes_the_slow_path(config, shape):
    net = LightUNet(**config)
    x = torch.rand(shape)
    twin = torchs(net)
    assert any(
        "slow" in k for k in kernels(lambda: twin(x).square().mean().backward())
    )  # what is avoided
    seen = kernels(lambda: net(x).square().mean().backward())
    assert "aten::mkldnn_convolution" in seen and not any("slow" in k for k in seen)
    net.eval()
    twin.eval()
    with torch.no_grad():
        assert not any("slow" in k for k in kernels(lambda: net(x)))


LAYERS = [
    V.build_conv(8, 6),
    V.build_conv(8, 6, bias=False),
    V.build_conv(8, 6, flat=True),
    V.build_conv(8, 6, kernel=1),
    V.build_conv(8, 6, kernel=5),
    V.build_conv(8, 6, step=2),
    V.build_conv(8, 6, step=(1, 2, 2), flat=True),
    V.build_up_conv(8, 6),
    V.build_up_conv(8, 6, flat=True),
]


@pytest.mark.parametrize("n", range(len(LAYERS)))
@pytest.mark.parametrize("depth", [1, 2, 3, 8, 13])
def test_halves_give_the_same_sums_and_gradients(n, depth):
    net = LAYERS[n]
    twin = torchs(net)
    x = torch.rand(1, 8, depth, 6, 10, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    a = net(x)
    b = twin(z)
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weight = torch.rand_like(a)
    net.zero_grad()
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-3)


def test_halves_leave_other_cases_to_torch(monkeypatch):
    net = V.build_conv(8, 6)
    monkeypatch.setattr(net, "_plain", lambda x: pytest.fail("cut in two"))
    with pytest.raises(pytest.fail.Exception):
        net(torch.rand(1, 8, 4, 4, 4))
    net(torch.rand(2, 8, 4, 4, 4))  # a batch
    net(torch.rand(1, 8, 52, 52, 4))  # a large map
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.rand(1, 8, 4, 4, 4))
    net.double()(torch.rand(1, 8, 4, 4, 4, dtype=torch.float64))


def test_half_precision_and_autocast_keep_their_dtype():
    net = LightUNet(width=2).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(torch.rand(1, 1, 16, 16, 16))
    assert y.shape == (1, 1, 16, 16, 16) and y.dtype == torch.bfloat16 and y.isfinite().all()
    with torch.no_grad():
        assert net.bfloat16()(torch.rand(1, 1, 16, 16, 16).bfloat16()).dtype == torch.bfloat16


# ---- encoders and the decoder ----


@pytest.mark.parametrize(
    "name, dims", [(n, d) for n in ("hybrid", "swin", "unetr") for d in (2, 3)]
)
def test_every_encoder_keeps_the_contract(name, dims):
    assert set(ENCODERS) == set(TINY)
    torch.manual_seed(0)
    enc = build_encoder(name, dict(TINY[name], dims=dims)).eval()
    twin = build_encoder(name, json.loads(json.dumps(enc.config))).eval()
    twin.load_state_dict(enc.state_dict())
    shape = [2 * enc.stride, enc.stride, 3 * enc.stride][-dims:]  # not the grid of the table
    x = torch.rand(2, 1, *shape)
    with torch.no_grad():
        z, skips = enc(x)
        assert torch.equal(z, twin(x)[0])
        assert torch.allclose(z[:1], enc(x[:1])[0], atol=1e-4)  # no sample looks at another
    assert max(enc.strides) == enc.stride and len(enc.strides) == dims
    assert z.shape == (2, enc.channels, *[s // k for s, k in zip(shape, enc.strides)])
    assert {s: tuple(k.shape) for s, k in skips.items()} == {
        s: (2, c, *[n // s for n in shape]) for s, c in enc.skips.items()
    }
    with torch.no_grad():
        assert GridDecoder(enc.channels, 3, enc.stride, enc.skips, width=4, dims=dims)(
            z, skips
        ).shape == (2, 3, *shape)
        assert GridDecoder(enc.channels, 1, enc.stride, None, width=4, dims=dims)(z).shape == (
            2,
            1,
            *shape,
        )
    with pytest.raises(
        InputError, match=f"width {3 * enc.stride + 2} is not a multiple of {enc.stride}"
    ):
        enc(torch.rand(1, 1, *shape[:-1], 3 * enc.stride + 2))


@pytest.mark.parametrize("name", list(TINY))
def test_every_weight_of_an_encoder_learns(name):
    enc = build_encoder(name, TINY[name])
    x = torch.rand(2, 1, *[32] * 3)
    z, skips = enc(x)
    (z.square().mean() + sum(s.square().mean() for s in skips.values())).backward()
    assert [n for n, p in enc.named_parameters() if p.grad is None] == []


def test_flat_hybrid_and_its_decoder():
    enc = HybridEncoder(**TINY["hybrid"], flat=2)
    z, skips = enc(torch.rand(1, 1, 8, 32, 24))
    assert z.shape == (1, 12, 4, 4, 3) and enc.strides == (2, 8, 8) == LightUNet(flat=2).strides
    assert GridDecoder(12, skips=enc.skips, width=4, flat=2)(z, skips).shape == (1, 1, 8, 32, 24)
    assert [level[i].kernel_size[0] for level in enc.stem for i in (0, 3)] == [1, 1, 1, 3, 3, 3]


def test_tokens_know_their_place():
    enc = HybridEncoder(**TINY["hybrid"]).eval()
    with torch.no_grad():
        enc.position.normal_()
        z = enc(torch.zeros(1, 1, 32, 32, 32))[0].flatten(2)[0].T
    assert torch.pdist(z).min() > 1e-4  # 64 tokens of an empty image, all different
    assert V.resize_table(enc.position, (4, 4, 4)) is enc.position
    assert V.resize_table(enc.position, (2, 3, 8)).shape == (1, 12, 2, 3, 8)


def test_decoder_config_survives_json():
    dec = GridDecoder(12, skips={2: 4, 4: 8}, width=4)
    twin = GridDecoder(**json.loads(json.dumps(dec.config)))
    twin.load_state_dict(dec.state_dict())
    assert twin.skips == {2: 4, 4: 8}
