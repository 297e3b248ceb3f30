"""16-bit convolutions of short maps on the CPU: torch's gradient of the weights is wrong there
and must never be asked for. The values are those of float32."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.networks.registry import make_network
from unpaired_kd.networks.unet import Conv3d, ConvTranspose3d, use_own_convolutions
from unpaired_kd.networks.volumes import SplitConv3d, build_encoder
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.method import Method, Stage, Update
from unpaired_kd.training.settings import Settings

SIDES = [
    (1, 4, 4),
    (2, 4, 4),
    (3, 4, 4),
    (4, 4, 4),
    (4, 2, 4),
    (4, 4, 2),
    (2, 2, 2),
    (1, 1, 1),
    (2, 8, 8),
    (8, 2, 8),
    (2, 3, 5),
]
KERNELS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=1),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=5, padding=2),
    dict(kernel_size=(1, 3, 3), padding=(0, 1, 1)),
    dict(kernel_size=(3, 1, 1), padding=(1, 0, 0)),
    dict(kernel_size=3, padding=2, dilation=2),
]


class Watch(TorchDispatchMode):
    "Notes every 16-bit 3-D convolution whose map is smaller than its kernel, forward and backward."

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.bad = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):  # plain and transposed
            x, w = args[:2] if name == "convolution" else args[1:3]
            if x.ndim == 5:
                self.calls += 1
                short = any(side < k for side, k in zip(x.shape[2:], w.shape[2:]))
                if short and x.dtype != torch.float32:
                    self.bad.append((name, x.dtype, tuple(x.shape), tuple(w.shape)))
        return func(*args, **(kwargs or {}))


def gradients(conv, x, half):
    """Output, and gradients of the weights, the bias and the map, with an output gradient that
    16 bits hold exactly."""
    conv.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = conv(x)
    y.backward(torch.ones_like(y))
    return [y.detach().float(), conv.weight.grad.clone(), conv.bias.grad.clone(), x.grad]


@pytest.mark.parametrize("kind", [Conv3d, SplitConv3d])
@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_gradients_are_those_of_float32(kind, shape):
    if kind is SplitConv3d and "dilation" in shape:
        pytest.skip("built without dilation")
    with seeded(0, "short"):
        conv = kind(16, 32, **shape)
    with torch.no_grad():  # numbers that 16 bits hold exactly: only sums can differ
        for p in conv.parameters():
            p.copy_(p.bfloat16())
    for side, batch in itertools.product(SIDES, (1, 2)):
        x = torch.randn(batch, 16, *side, generator=torch_rng(0, *side)).bfloat16().float()
        expected = gradients(conv, x, False)
        for _ in range(3):
            lost = [
                torch.full((n,), float("nan")) for n in (512, 4096, 65536)
            ]  # what a kernel finds that reads what nobody wrote
            del lost
            found = gradients(conv, x, True)
            for a, b in zip(found, expected):
                assert (a - b).abs().max() <= 0.01 * b.abs().max().clamp_min(1e-6), (side, batch)


UP = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=2, stride=2),
    dict(kernel_size=4, stride=2, padding=1),
    dict(kernel_size=3, stride=2, padding=1, output_padding=1),
    dict(kernel_size=3, padding=1, groups=4),
]


@pytest.mark.parametrize("shape", UP, ids=str)
def test_transposed_gradients_are_those_of_float32(shape):
    with seeded(0, "short"):
        conv = use_own_convolutions(nn.ConvTranspose3d(16, 16, **shape))
    assert type(conv) is ConvTranspose3d
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(p.bfloat16())
    for side in SIDES:
        x = torch.randn(2, 16, *side, generator=torch_rng(0, *side)).bfloat16().float()
        expected = gradients(conv, x, False)
        with Watch() as watch:
            found = gradients(conv, x, True)
        assert watch.calls and not watch.bad, side
        for a, b in zip(found, expected):
            assert (a - b).abs().max() <= 0.01 * b.abs().max().clamp_min(1e-6), side


def test_a_transposed_layer_keeps_its_size_and_number_format():
    plain = nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1)
    ours = use_own_convolutions(copy.deepcopy(plain))
    x = torch.randn(1, 4, 2, 4, 4, generator=torch_rng(0, "x"))
    for size in ((3, 7, 7), (4, 8, 8)):
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x, output_size=size)
        assert y.dtype == torch.bfloat16 and y.shape[2:] == size
        assert torch.allclose(y.float(), plain(x, output_size=size), atol=0.02)
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["UNet", "DynUNet", "AttentionUnet"])
def test_no_network_of_monai_takes_the_broken_path(name):
    import monai.networks.nets as nets

    options = {
        "UNet": ((4, 8, 16), (2, 2)),
        "DynUNet": ((3, 3, 3), (1, 2, 2), (2, 2)),
        "AttentionUnet": ((4, 8, 16), (2, 2)),
    }
    with seeded(0, name):
        net = use_own_convolutions(getattr(nets, name)(3, 1, 2, *options[name]))
    for depth in (4, 8, 12):  # the bottom is 1, 2 and 3 deep
        with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
            net(
                torch.rand(2, 1, depth, 8, 8, generator=torch_rng(0, depth))
            ).float().square().mean().backward()
        assert watch.calls and not watch.bad, depth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_number_format_is_that_of_torch(dtype):
    conv = Conv3d(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 2, 4, 4, generator=torch_rng(0, "x"))
    with torch.autocast("cpu", dtype):
        assert conv(x).dtype == nn.Conv3d(4, 4, 3, padding=1)(x).dtype == dtype
    assert (
        conv.to(dtype)(x.to(dtype)).dtype == dtype
    )  # a network of 16-bit weights, without autocast
    assert conv.float()(x).dtype == torch.float32


def test_padding_modes_survive():
    with seeded(0, "mode"):
        conv = Conv3d(4, 4, 3, padding=1, padding_mode="replicate")
    x = torch.randn(1, 4, 2, 4, 4, generator=torch_rng(0, "x"))
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert torch.allclose(y.float(), conv(x), atol=0.02)


NETS = {
    "light_unet": (dict(levels=4), 16),
    "light_unet flat": (dict(flat=1), (8, 16, 16)),
    "unet": (dict(in_channels=1, width=4, dims=3), 32),
    "unet instance": (dict(in_channels=1, width=4, dims=3, norm="instance"), 32),
}
ENCODERS = {
    "hybrid": (dict(width=8, dim=16, depth=1, heads=2, tokens=2), 16),
    "swin": (dict(feature_size=12), 16),
    "unetr": (dict(feature_size=8, size=32, hidden=24, heads=2), 32),
}


@pytest.mark.parametrize("name", [*NETS, *ENCODERS])
def test_no_network_of_the_house_takes_the_broken_path(name):
    with seeded(0, name):
        net = (
            make_network(name.split()[0], NETS[name][0])
            if name in NETS
            else build_encoder(name, ENCODERS[name][0])
        )
    side = (NETS | ENCODERS)[name][1]
    x = torch.rand(
        1, 1, *((side,) * 3 if isinstance(side, int) else side), generator=torch_rng(0, "x")
    )
    with Watch() as watch:
        with torch.autocast("cpu", torch.bfloat16):
            out = net.train()(x.repeat(2, 1, 1, 1, 1))
        sum(
            o.float().square().mean()
            for o in ([out] if isinstance(out, torch.Tensor) else [out[0], *out[1].values()])
        ).backward()
    assert watch.calls and not watch.bad
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_the_watch_sees_it():
    "torch's own layer does take it."
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        nn.Conv3d(8, 8, 3, padding=1)(torch.rand(1, 8, 2, 4, 4)).float().sum().backward()
    assert {b[0] for b in watch.bad} == {"convolution", "convolution_backward"}


def test_steady_changes_nothing_else():
    net = nn.Sequential(
        nn.Conv3d(4, 8, 3, padding=1),
        nn.Sequential(nn.Conv3d(8, 4, 1)),
        nn.Conv2d(1, 1, 1),
        SplitConv3d(4, 4, 3, padding=1),
    )
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert use_own_convolutions(net) is net and [
        type(m) for m in (net[0], net[1][0], net[2], net[3])
    ] == [
        Conv3d,
        Conv3d,
        nn.Conv2d,
        SplitConv3d,
    ]
    assert before.keys() == net.state_dict().keys() and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )


class Foreign(Method):
    "A network with torch's own layers, as a user may register one."

    def __init__(self):
        with seeded(0, "foreign"):
            self.networks = {
                "student": nn.Sequential(
                    nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 3, padding=1)
                )
            }
        self.weights = {"seg": 1.0}

    def stages(self):
        return [Stage("train", [Update("student", ("student",), self.losses)])]

    def losses(self, batch, noise):
        b = batch["student"]
        return {
            "seg": lambda: nn.functional.binary_cross_entropy_with_logits(
                self.student(b.image).float()[:, 0], b.label.float()
            )
        }


class Short:
    "Volumes of two slices."

    def batch(self, step, names=None, rank=0):
        x = torch.rand(2, 1, 2, 8, 8, generator=torch_rng(0, step))
        return {
            "student": Batch(
                image=x, label=(x[:, 0] > 0.5).long(), ids=[""] * 2, label_groups=[""] * 2
            )
        }


def test_a_run_with_somebody_elses_network_is_repeatable(tmp_path):
    found = []
    for k in range(3):
        run = Learner(
            Foreign(),
            Short(),
            tmp_path / str(k),
            settings=Settings(epochs=2, steps=6, bars=False, device="cpu", precision="bf16"),
        )
        with Watch() as watch:
            run.fit()
        assert watch.calls and not watch.bad
        found.append(run.method.student.state_dict())
    for other in found[1:]:
        assert all(torch.equal(v, found[0][k]) for k, v in other.items())
