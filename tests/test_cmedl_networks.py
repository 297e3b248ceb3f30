"""The three networks of CMEDL: counts, shapes, taps, gradients, input checks, round trips."""

import pytest
import torch
from torch import nn

from unpaired_kd.core import InputError, seeded
from unpaired_kd.networks.densefcn import DenseBlock, DenseFCN
from unpaired_kd.networks.mrrn import MRRN, RCU
from unpaired_kd.networks.registry import load_weights, make_network, network_name
from unpaired_kd.networks.taps import Taps, tap_channels
from unpaired_kd.networks.unet import UNet
from unpaired_kd.networks.unet_bilinear import BilinearUNet

NAMES = {"unet_bilinear": BilinearUNet, "densefcn": DenseFCN, "mrrn": MRRN}
ALL = [BilinearUNet, DenseFCN, MRRN]


def small(cls, **more):
    with seeded(0, "networks"):
        return cls(width=8, **more)


def image(n=2, side=64, channels=1):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0))


def count(net):
    return sum(p.numel() for p in net.parameters())


def all_taps(net):
    return [n for level in ("low", "mid", "high") for n in net.hint_layers[level]]


@pytest.mark.parametrize(
    "cls, args, n",
    [
        (BilinearUNet, dict(classes=2), 13_394_242),
        (BilinearUNet, {}, 13_394_177),
        (DenseFCN, dict(classes=2), 1_374_194),
        (DenseFCN, {}, 1_374_001),
        (DenseFCN, dict(in_channels=3), 1_374_865),
        (MRRN, dict(classes=2), 38_916_418),
        (MRRN, {}, 38_916_385),
        (MRRN, dict(classes=2, link="connected"), 38_953_282),
        (UNet, {}, 1_944_529),
    ],
)
def test_counts(cls, args, n):
    with torch.device("meta"):
        assert count(cls(**args)) == n


SHAPES = {
    BilinearUNet: [(64, 256), (64, 256), (512, 16), (64, 128), (64, 256)],
    DenseFCN: [(48, 256), (60, 256), (48, 8), (228, 128), (192, 256)],
    MRRN: [(32, 256), (32, 256), (512, 16), (128, 128), (64, 256)],
}


@pytest.mark.parametrize("cls", ALL)
def test_shapes_at_256(cls):
    "One true forward pass at full width."
    net = cls(classes=2).eval()
    with Taps(net, all_taps(net)) as taps, torch.no_grad():
        out = net(image(1, 256))
        seen = taps.take()
    assert out.shape == (1, 2, 256, 256) and out.isfinite().all()
    assert [tuple(t.shape) for t in seen.values()] == [(1, c, s, s) for c, s in SHAPES[cls]]


def test_shapes_of_the_first_unet():
    net = UNet().eval()
    with Taps(net, all_taps(net)) as taps, torch.no_grad():
        net(image(1, 64, 3))
        assert [tuple(t.shape[1:]) for t in taps.take().values()] == [
            (16, 64, 64),
            (16, 64, 64),
            (256, 4, 4),
            (32, 32, 32),
            (16, 64, 64),
        ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", [UNet] + ALL)
def test_taps_are_not_changed_in_place(cls, training):
    net = small(cls, in_channels=1).train(training)
    layers = dict(net.named_modules())
    copies = {}
    for n in all_taps(net):
        layers[n].register_forward_hook(lambda m, i, o, n=n: copies.__setitem__(n, o.clone()))
    with Taps(net, all_taps(net)) as taps:
        net(image())
        seen = taps.take()
    for n in all_taps(net):
        assert torch.equal(seen[n], copies[n]), n
    sum(
        t.square().mean() for t in seen.values()
    ).backward()  # autograd refuses a tensor that was changed under it


@pytest.mark.parametrize("cls", [BilinearUNet, UNet])
def test_taps_after_relu(cls):
    net = small(cls, in_channels=1).eval()
    with Taps(net, all_taps(net)) as taps, torch.no_grad():
        net(image())
        for n, t in taps.take().items():
            assert t.min() == 0 and t.max() > 0, n


@pytest.mark.parametrize("cls, names", [(DenseFCN, ("low",)), (MRRN, ("low", "high", "mid"))])
def test_taps_not_negative(cls, names):
    net = small(cls).eval()
    with Taps(net, all_taps(net)) as taps, torch.no_grad():
        net(image())
        for level in names:
            for n in net.hint_layers[level]:
                assert taps[n].min() >= 0 and taps[n].max() > 0, n


def test_dense_tap_is_what_the_last_layer_reads():
    net = small(DenseFCN).eval()
    got = {}
    net.up2.layers[-1].register_forward_pre_hook(lambda m, i: got.update(x=i[0].clone()))
    with Taps(net, ("up2.before_last",)) as taps, torch.no_grad():
        net(image())
        assert torch.equal(taps["up2.before_last"], got["x"])


def test_dense_block_keeps_or_drops_what_it_read():
    block = DenseBlock(5, 4, 3, 0.2, keep=True).eval()
    x = image(1, 8, 5)
    with torch.no_grad():
        kept = block(x)
    block.skip = 5
    with torch.no_grad():
        new = block(x)
    assert torch.equal(kept[:, :5], x) and torch.equal(kept[:, 5:], new) and new.shape[1] == 12


def missing(net, loss):
    net.zero_grad(set_to_none=True)
    loss(net).backward()
    return {n for n, p in net.named_parameters() if p.grad is None}


def scores(net):
    return net(image()).square().mean()


@pytest.mark.parametrize("cls", [BilinearUNet, DenseFCN])
def test_gradient_reaches_every_parameter(cls):
    net = small(cls)
    assert not missing(net, scores)
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("link, lost", [("paper", 164_224), ("connected", 164_224 + 128 * 64 + 64)])
def test_mrrn_weights_without_gradient(link, lost):
    names = missing(small(MRRN, link=link), scores)
    lost_units = {"enc4.1.back", "dec3.1.back"} | (
        {"dec2.1.back"} if link == "connected" else set()
    )
    assert names == {f"{u}.{k}" for u in lost_units for k in ("weight", "bias")}
    with torch.device("meta"):
        full = dict(MRRN(link=link).named_parameters())
    assert sum(full[n].numel() for n in names) == lost


@pytest.mark.parametrize("cls", ALL)
def test_hint_gives_the_head_no_gradient(cls):
    net = small(cls)

    def hint(net):
        with Taps(net, net.hint_layers["high"]) as taps:
            net(image())
            return sum(t.square().mean() for t in taps.take().values())

    names = missing(net, hint)
    head = "conv10" if cls is BilinearUNet else "head"
    assert {f"{head}.weight", f"{head}.bias"} <= names
    first = next(iter(dict(net.named_parameters())))
    assert first not in names


def test_mrrn_scores_ignore_up2_only_with_the_papers_link():
    for link, same in (("paper", True), ("connected", False)):
        net = small(MRRN, link=link).eval()
        with torch.no_grad():
            before = net(image())
            net.up2.register_forward_hook(lambda m, i, o: torch.zeros_like(o))
            assert torch.equal(before, net(image())) is same, link


def test_rcu_leaves_its_input_alone():
    unit = RCU(4, 6, 3, 2).eval()
    p = image(1, 8, 4)
    r = image(1, 16, 3)
    p0 = p.clone()
    r0 = r.clone()
    with torch.no_grad():
        p2, r2 = unit(p, r)
    assert torch.equal(p, p0) and torch.equal(r, r0)
    assert p2.shape == (1, 6, 8, 8) and r2.shape == r.shape and not torch.equal(r2, r)


def test_mrrn_dropout():
    assert all(m.p == 0 for m in small(MRRN).modules() if isinstance(m, nn.Dropout2d))
    net = small(MRRN, dropout=0.5).train()
    with torch.no_grad(), seeded(0, "dropout"):
        assert not torch.equal(net(image()), net(image()))
        off = small(MRRN).train()
        assert torch.equal(off(image()), off(image()))


@pytest.mark.parametrize("cls", ALL)
def test_eval_repeats_itself_and_ignores_the_batch(cls):
    net = small(cls, classes=3).eval()
    x = image(3)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(y, net(x))
        assert torch.allclose(y[1:2], net(x[1:2]), atol=1e-5)


@pytest.mark.parametrize("cls", ALL)
def test_oblong_images(cls):
    with torch.no_grad():
        assert small(cls, classes=2).eval()(torch.rand(1, 1, 32, 96)).shape == (1, 2, 32, 96)


@pytest.mark.parametrize("cls", ALL)
def test_wrong_input(cls):
    net = small(cls).eval()
    for bad, words in (
        (torch.rand(1, 1, 64, 72), f"multiple of {net.stride}"),
        (torch.rand(1, 3, 64, 64), "in_channels=3"),
        (torch.rand(1, 64, 64), "axes"),
        (torch.rand(1, 1, 64, 64, 64), "axes"),
        (torch.rand(1, 1, 0, 64), "multiple"),
    ):
        with pytest.raises(InputError, match=words):
            net(bad)
    with pytest.raises(InputError, match="dims=3"):
        cls(dims=3)


def test_halvings_in_the_message():
    with pytest.raises(InputError, match="32 .the network halves it 5 times"):
        small(DenseFCN)(torch.rand(1, 1, 48, 64))
    with pytest.raises(InputError, match="16 .the network halves it 4 times"):
        small(MRRN)(torch.rand(1, 1, 40, 64))


def test_wrong_arguments():
    for width in (0, 6, 2):
        with pytest.raises(InputError, match="multiple of 4"):
            DenseFCN(width=width)
    with pytest.raises(InputError, match="connected"):
        MRRN(link="connect")


@pytest.mark.parametrize("name", NAMES)
def test_registry_round_trip(name):
    net = small(NAMES[name], classes=2).eval()
    assert network_name(net) == name and net.config["dims"] == 2 and net.config["in_channels"] == 1
    twin = make_network(name, net.config).eval()
    assert type(twin) is NAMES[name] and twin.config == net.config
    x = image(1)
    with torch.no_grad():
        assert not torch.equal(twin(x), net(x))
        load_weights(twin, net.state_dict(), "the twin")
        assert torch.equal(twin(x), net(x))
    with pytest.raises(InputError, match="widht"):
        make_network(name, dict(widht=8))


@pytest.mark.parametrize("cls", ALL)
def test_tap_channels_scale_with_width(cls):
    a, b = (tap_channels(cls(width=w), all_taps(cls)) for w in (4, 8))
    assert all(2 * a[n] == b[n] for n in a)


@pytest.mark.parametrize("cls", ALL)
def test_exported_network_says_the_same(cls):
    net = small(cls).eval()
    x = image(1)
    exported = torch.export.export(net, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), net(x), atol=1e-5)
