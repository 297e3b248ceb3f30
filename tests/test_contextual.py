"""The contextual loss and its feature extractors: what the chapter does not show. Loops for a
batch, exact derivatives, ties, precision, broken files."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpaired_kd.core import InputError, file_sha256, torch_rng
from unpaired_kd.networks.densefcn import DenseFCN
from unpaired_kd.networks.mrrn import MRRN
from unpaired_kd.networks.unet import UNet
from unpaired_kd.networks.unet_bilinear import BilinearUNet
from unpaired_kd.translation import contextual
from unpaired_kd.translation.contextual import (
    CONTEXT_DIRECTIONS,
    EncoderFeatures,
    FilterBank,
    VGG19Features,
    body_mask,
    build_vgg19_body,
    contextual_loss,
    encoder_layers,
    feature_extractor,
    load_vgg19,
    naive_contextual,
)


def features(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch_rng(seed, "features"), dtype=torch.float64).to(dtype)


def both(loss, f, g, **options):
    f, g = (v.detach().clone().requires_grad_() for v in (f, g))
    value = loss(f, g, **options)
    return value.detach(), *torch.autograd.grad(value, (f, g))


def loops(f, g, h, direction):
    "Entry by entry; the first of equal values wins. f (C,N), g (C,M)."
    C, N, M = len(f), f.shape[1], g.shape[1]
    mu = [sum(g[c, j] for j in range(M)) / M for c in range(C)]

    def unit(v, k):
        return [
            (v[c, k] - mu[c]) / max(math.sqrt(sum((v[c, k] - mu[c]) ** 2 for c in range(C))), 1e-8)
            for c in range(C)
        ]

    x, y = [unit(f, i) for i in range(N)], [unit(g, j) for j in range(M)]
    d = [[max(0, 1 - sum(a * b for a, b in zip(u, v))) for v in y] for u in x]
    w = [[math.exp((1 - v / (min(row) + 1e-5)) / h) for v in row] for row in d]
    cx = [[v / sum(row) for v in row] for row in w]
    target = -math.log(sum(max(cx[i][j] for i in range(N)) for j in range(M)) / M)
    source = -math.log(sum(max(row) for row in cx) / N)
    return {"target": target, "source": source, "symmetric": (target + source) / 2}[direction]


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("direction", CONTEXT_DIRECTIONS)
@pytest.mark.parametrize("h", [0.1, 0.5])
def test_a_batch_of_two_against_loops(direction, h):
    f, g = (
        features(0, 2, 3, 3, 5, dtype=torch.float64),
        features(1, 2, 3, 2, 4, dtype=torch.float64),
    )
    wanted = (
        sum(loops(a.flatten(1).numpy(), b.flatten(1).numpy(), h, direction) for a, b in zip(f, g))
        / 2
    )
    assert abs(contextual_loss(f, g, h, direction, rows=4).item() - wanted) < 1e-12
    assert abs(naive_contextual(f, g, h, direction).item() - wanted) < 1e-12


@pytest.mark.parametrize("direction", CONTEXT_DIRECTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_exact_derivatives(direction, masked):
    f, g = (
        features(s, 2, 4, *size, dtype=torch.float64).requires_grad_()
        for s, size in ((0, (3, 5)), (1, (4, 3)))
    )
    masks = (
        dict(mask_f=features(2, 2, 3, 5) > -0.5, mask_g=features(3, 2, 4, 3) > -0.5)
        if masked
        else {}
    )
    assert torch.autograd.gradcheck(
        lambda a, b: contextual_loss(a, b, 0.5, direction, rows=4, **masks), (f, g)
    )


@pytest.mark.parametrize("direction", CONTEXT_DIRECTIONS)
@pytest.mark.parametrize(
    "sizes,rows",
    [
        (((7, 9), (7, 9)), 10),
        (((5, 5), (3, 7)), 1),
        (((3, 3), (9, 9)), 1000),
        (((6, 8), (6, 8)), 16),
    ],
)
def test_blocks_equal_the_whole_matrix(direction, sizes, rows):
    f, g = (
        features(0, 2, 8, *sizes[0], dtype=torch.float64),
        features(1, 2, 8, *sizes[1], dtype=torch.float64),
    )
    for a, b in zip(
        both(contextual_loss, f, g, direction=direction, rows=rows),
        both(naive_contextual, f, g, direction=direction),
    ):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()
    exact = both(naive_contextual, f.float().double(), g.float().double(), direction=direction)
    for a, b in zip(
        both(contextual_loss, f.float(), g.float(), direction=direction, rows=rows), exact
    ):  # single precision, both forms: about 1e-6
        assert (a - b).abs().max() <= 4e-6 * b.abs().max()


@pytest.mark.parametrize("direction", CONTEXT_DIRECTIONS)
@pytest.mark.parametrize("rows", [2, 3, 100])
def test_ties_go_to_the_first(direction, rows):
    "Vectors of whole numbers about a mean of zero: all products are exact, so equal positions tie."
    g = (
        torch.tensor(
            [
                [1.0, 0, 0, 0],
                [-1, 0, 0, 0],
                [0, 1, 0, 0],
                [0, -1, 0, 0],
                [1, 0, 0, 0],
                [-1, 0, 0, 0],
            ]
        )
        .T[None, :, :, None]
        .double()
    )
    f = (
        torch.tensor(
            [
                [0.0, 0, 1, 1],
                [1, 0, 1, 1],
                [1, 0, 1, 1],
                [0, 1, 1, 1],
                [1, 0, 1, 1],
                [0, 0, 1, 1],
                [-1, 1, 1, 1],
            ]
        )
        .T[None, :, :, None]
        .double()
    )
    ours, naive = (
        both(contextual_loss, f, g, direction=direction, rows=rows),
        both(naive_contextual, f, g, direction=direction),
    )
    for a, b in zip(ours, naive):
        assert (a - b).abs().max() <= 1e-12
    assert (
        direction != "target"
        or (ours[1][0, :, 1] != 0).any()
        and (ours[1][0, :, [2, 4]] == 0).all()
    )


@pytest.mark.parametrize("direction", CONTEXT_DIRECTIONS)
def test_a_distance_of_zero_has_no_slope(direction):
    """Exact matches with exact ties: the similarity is shared, and the gradient of a distance that
    cannot fall is 0, as in the naive form."""
    eye = torch.eye(4, dtype=torch.float64)
    g = torch.cat([eye, -eye, eye[:2], -eye[:2]]).T[None, :, :, None]
    f = torch.cat([eye, eye[:1] + eye[1:2]]).T[None, :, :, None]
    ours, naive = (
        both(contextual_loss, f, g, direction=direction, rows=2),
        both(naive_contextual, f, g, direction=direction),
    )
    for a, b in zip(ours, naive):
        assert (a - b).abs().max() <= 1e-12
    assert (ours[1][0, :, :4] == 0).all()
    row = contextual._similarity_gradient(
        torch.tensor([[1.0, 1.0, 0.3]]),
        torch.ones(1, 1),
        torch.full((1, 1), 2.0),
        0.5,
        torch.tensor([0]),
        torch.tensor([0]),
        torch.ones(1),
        torch.zeros(1, 1),
    )
    assert (row[0, :2] == 0).all(), "rounding times a slope of 1e5 remains"


def test_rounding_above_one_is_a_distance_of_zero():
    x = F.normalize(features(0, 6, 4), dim=1) * 1.0001
    best, _, top, total = contextual._scan_rows(x, x.clone(), 0.5, 4)
    assert top.max() <= 1 and total.isfinite().all() and (best <= 1).all() and (total >= 1).all()


def test_equal_positions_leave_finite_gradients():
    """Flat background, an image against itself, and single precision: which of the equal positions
    wins is free, the sum over them is not."""
    g = features(0, 1, 6, 8, 8)
    g[..., :4, :] = g[..., :1, :1]
    for h in (0.1, 0.5):
        value, df, dg = both(contextual_loss, g, g, h=h, rows=10)
        assert value.isfinite() and df.isfinite().all() and dg.isfinite().all()
        assert abs(value + math.log(1 - 32 / 64 + 1 / 64)) < 1e-3


@pytest.mark.parametrize("h", [0.1, 0.2, 0.5, 1.0])
def test_identity_order_and_scale(h):
    g = features(0, 2, 16, 10, 10)
    assert contextual_loss(g, g, h).abs() < 1e-6
    f, order = features(1, 2, 16, 10, 10), torch.randperm(100, generator=torch_rng(0))

    def shuffled(v):
        return v.flatten(2)[..., order].reshape(v.shape)

    wanted = contextual_loss(f, g, h)
    for a, b in ((shuffled(f), g), (f, shuffled(g)), (3 * f, 3 * g)):
        assert abs(contextual_loss(a, b, h) - wanted) < 2e-5


def test_bounds_and_collapse():
    g = features(0, 1, 16, 16, 16)
    constant = g[..., 3:4, 5:6].expand_as(g)
    assert (
        abs(contextual_loss(constant, g) - math.log(256)) < 1e-3
        and contextual_loss(constant, g, direction="source").abs() < 1e-5
    )
    for seed in range(4):
        for d in CONTEXT_DIRECTIONS:
            assert (
                -1e-6
                <= contextual_loss(features(seed + 1, 1, 16, 16, 16) * 9, g, direction=d)
                <= math.log(256) + 1e-5
            )


@pytest.mark.parametrize("which", ["f", "g", "both", "one position"])
def test_vectors_without_length(which):
    f, g = features(0, 1, 4, 5, 5), features(1, 1, 4, 5, 5)
    if which in ("f", "both"):
        f = torch.full_like(f, 2.5)
    if which in ("g", "both"):
        g = torch.full_like(g, 2.5)
    if which == "one position":
        f[..., 0, 0] = g.mean((2, 3))
    for d in CONTEXT_DIRECTIONS:
        value, df, dg = both(contextual_loss, f, g, direction=d)
        assert (
            value.isfinite()
            and df.isfinite().all()
            and dg.isfinite().all()
            and df.abs().max() < 1e3
        )
    if which == "both":
        assert abs(contextual_loss(f, g) - math.log(25)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    f, g = features(0, 1, 16, 12, 12), features(1, 1, 16, 12, 12)
    halves = [v.to(dtype).requires_grad_() for v in (f, g)]
    with torch.autocast("cpu", torch.bfloat16):
        value = contextual_loss(*halves)
        value.backward()
        inside = contextual_loss(f, g)
    assert (
        value.dtype == torch.float32
        and abs(value - contextual_loss(*(v.detach().float() for v in halves))) < 1e-6
    )
    assert all(v.grad.dtype == dtype and v.grad.isfinite().all() for v in halves)
    assert torch.equal(inside, contextual_loss(f, g)), "products under autocast are not float32"
    if dtype == torch.float16:
        assert abs(value - inside) < 1e-3
    exact = g.to(dtype)
    assert contextual_loss(exact, exact, 0.1).abs() < 1e-6


def test_backward_under_autocast_is_float32():
    f, g = features(0, 1, 16, 8, 8), features(1, 1, 16, 8, 8)
    wanted = both(contextual_loss, f, g)
    with torch.autocast("cpu", torch.bfloat16):
        got = both(contextual_loss, f, g)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_layouts_give_the_same():
    f, g = features(0, 2, 8, 6, 10), features(1, 2, 8, 6, 10)
    wanted = both(contextual_loss, f, g)
    for change in (
        lambda v: v.to(memory_format=torch.channels_last),
        lambda v: v.transpose(2, 3).contiguous().transpose(2, 3),
        lambda v: torch.cat([v, v], 1)[:, :8],
    ):
        got = both(contextual_loss, change(f), change(g))
        for a, b in zip(got, wanted):
            assert (a - b).abs().max() < 1e-6
    volumes = both(contextual_loss, f.reshape(2, 8, 3, 4, 5), g.reshape(2, 8, 3, 4, 5))
    assert torch.equal(volumes[0], wanted[0]) and torch.equal(
        volumes[1].flatten(2), wanted[1].flatten(2)
    )


def test_one_argument_may_need_no_gradient():
    f, g = features(0, 1, 8, 6, 6), features(1, 1, 8, 6, 6)
    _, df, dg = both(contextual_loss, f, g)
    a, b = f.clone().requires_grad_(), g.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(contextual_loss(a, g), a)[0], df)
    assert (torch.autograd.grad(contextual_loss(f, b), b)[0] - dg).abs().max() < 1e-7
    assert not contextual_loss(f, g).requires_grad


def test_nothing_of_matrix_size_is_kept():
    f, g = features(0, 1, 8, 40, 40).requires_grad_(), features(1, 1, 8, 40, 40).requires_grad_()
    kept = []

    def note(t):
        kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        contextual_loss(f, g)
    assert max(kept) <= 1600 * 8 * 8 and sum(kept) < 1600**2, kept
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        naive_contextual(f, g)
    assert max(kept) >= 1600**2 * 4


def test_only_rows_that_won_have_a_gradient():
    f, g = features(0, 1, 8, 12, 12), features(1, 1, 8, 12, 12)

    def rows(d):
        return (both(contextual_loss, f, g, direction=d)[1].abs().sum(1) > 0).sum().item()

    assert rows("target") < 110 and rows("source") == 144


def test_not_a_number_stays_visible():
    f = features(0, 1, 8, 4, 4)
    f[0, 0, 0, 0] = math.nan
    value, df, _ = both(contextual_loss, f, features(1, 1, 8, 4, 4), rows=3)
    assert value.isnan() and df.isnan().any()


# ---------------------------------------------------------------- masks and samples


def test_masks_restrict_the_positions():
    f, g = features(0, 2, 8, 6, 6), features(1, 2, 8, 6, 6)
    mask_f, mask_g = features(2, 2, 6, 6) > 0, features(3, 2, 6, 6) > 0
    wanted = (
        sum(
            contextual_loss(
                f[b][:, mask_f[b]][None, :, :, None], g[b][:, mask_g[b]][None, :, :, None]
            )
            for b in range(2)
        )
        / 2
    )
    assert torch.equal(contextual_loss(f, g, mask_f=mask_f, mask_g=mask_g), wanted)
    _, df, dg = both(contextual_loss, f, g, mask_f=mask_f, mask_g=mask_g)
    assert (df[(~mask_f)[:, None].expand_as(df)] == 0).all() and (
        dg[(~mask_g)[:, None].expand_as(dg)] == 0
    ).all()


def test_samples():
    f, g = features(0, 2, 8, 10, 10), features(1, 2, 8, 10, 10)

    def draw(seed, n=30):
        return contextual_loss(f, g, sample=n, generator=torch_rng(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    r = torch_rng(0)
    assert not torch.equal(
        contextual_loss(f, g, sample=30, generator=r), contextual_loss(f, g, sample=30, generator=r)
    ), "the same positions in every call"
    assert (
        abs(draw(0, 100) - contextual_loss(f, g)) < 1e-5
        and abs(draw(0, 10_000) - contextual_loss(f, g)) < 1e-5
    )
    assert (
        draw(0) < math.log(30) + 1e-5 and contextual_loss(g, g, sample=30).abs() < 1e-5
    )  # equal positions of both
    _, df, dg = both(contextual_loss, f, g, sample=30, generator=torch_rng(0))
    assert (df.abs().sum(1) > 0).flatten(1).sum(1).max() <= 30
    unequal = contextual_loss(f, g[..., :4], sample=50, generator=torch_rng(0))
    assert unequal.isfinite() and unequal <= math.log(40) + 1e-5


BAD = [
    (dict(direction="both"), "direction"),
    (dict(h=0), "h=0"),
    (dict(h=math.nan), "h=nan"),
    (dict(rows=0), "rows=0"),
    (dict(sample=-1), "sample=-1"),
    (dict(g=torch.zeros(1, 4, 5, 5)), "equal B"),
    (dict(g=torch.zeros(2, 3, 5, 5)), "equal C"),
    (dict(f=torch.zeros(2, 4)), "(B,C,*s)"),
    (dict(f=torch.zeros(2, 1, 5, 5), g=torch.zeros(2, 1, 5, 5)), "at least 2"),
    (dict(f=torch.zeros(0, 4, 5, 5), g=torch.zeros(0, 4, 5, 5)), "at least 1"),
    (dict(mask_f=torch.ones(2, 10, 10).bool()), "mask_f"),
    (dict(mask_g=torch.ones(5, 5).bool()), "mask_g"),
    (dict(mask_g=torch.zeros(2, 5, 5).bool()), "image 0"),
    (dict(mask_f=torch.zeros(2, 5, 5).bool()), "image 0"),
    (dict(g=torch.zeros(2, 4, 1, 1)), "target positions"),
]


@pytest.mark.parametrize("change,word", BAD)
def test_bad_arguments(change, word):
    with pytest.raises(InputError) as e:
        contextual_loss(**{"f": torch.zeros(2, 4, 5, 5), "g": torch.zeros(2, 4, 5, 5), **change})
    assert word in str(e.value)


def test_body_mask():
    x = torch.full((2, 1, 64, 64), -1.0)
    x[0, 0, 16:48, 16:48] = 0.5
    x[1, 0, 20, 20] = 1
    with pytest.warns(UserWarning, match="1 of 2 images have fewer than 16 of 256"):
        mask = body_mask(x, (16, 16))
    inside = torch.zeros(16, 16).bool()
    inside[3:13, 3:13] = True  # 4..11, grown by one
    assert torch.equal(mask[0], inside) and mask[1].all() and mask.dtype == torch.bool
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert body_mask(x, (16, 16), least=9)[1].sum() == 9  # 9 of 256 is more than 9 * 256 / 4096
        assert body_mask(torch.full((1, 3, 64, 64), -0.9), torch.Size((64, 64))).all()
        assert torch.equal(
            body_mask(torch.cat([x[:1] * 0 - 1, x[:1]], 1), (16, 16))[0], inside
        )  # any channel
    with pytest.warns(UserWarning):
        assert body_mask(
            torch.full((1, 1, 256, 256), -0.95), (64, 64)
        ).all()  # not above the threshold
    with pytest.raises(InputError):
        body_mask(x[0], (16, 16))


# ---------------------------------------------------------------- extractors


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A file as torchvision's, with random weights, a classifier that nobody needs, and its
    checksum in its name."""
    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in build_vgg19_body().state_dict().items()} | {
        "classifier.6.bias": torch.zeros(1000)
    }
    raw = tmp_path_factory.mktemp("vgg") / "raw.pth"
    torch.save(state, raw)
    return raw.rename(raw.with_name(f"vgg19-{file_sha256(raw)[:8]}.pth")), state


def silent_vgg():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VGG19Features(random=True)


EXTRACTORS = {
    "vgg19": silent_vgg,
    "filters": FilterBank,
    "teacher": lambda: EncoderFeatures(UNet(1, 2, width=4)),
}


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_extractors_share_one_behaviour(kind):
    extract = EXTRACTORS[kind]().train()
    x = (torch.rand(2, 1, 64, 64, generator=torch_rng(0)) * 2 - 1).requires_grad_()
    maps = extract(x)
    assert (
        isinstance(maps, list)
        and all(v.ndim == 4 and len(v) == 2 for v in maps)
        and maps[0].shape[2:] == (16, 16)
        and maps[-1].shape[2:] == (8, 8)
    )
    assert not any(m.training for m in extract.modules()) and not any(
        p.requires_grad for p in extract.parameters()
    )
    sum(contextual_loss(v, v.detach().flip(0)) for v in maps).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    again = extract(x[:1].detach())
    assert all((a[:1] - b).abs().max() < 1e-4 * a.abs().max() for a, b in zip(maps, again)), (
        "a map depends on the other images of the batch"
    )
    for bad in (x * 1.1, x + 2, (x + 1) * 127, x[0], x.expand(-1, 2, -1, -1), x * math.nan):
        with pytest.raises(InputError):
            extract(bad)
    assert all(torch.equal(a, b) for a, b in zip(extract(x.detach()), extract(x.detach())))


def test_vgg_is_torchvisions(vgg_file):
    path, state = vgg_file
    net = VGG19Features(path)
    assert sum(p.numel() for p in net.parameters()) == 3_505_728 and set(net.state_dict()) == {
        k for k in state if k.startswith("features")
    }
    assert [n for n, m in net.features.named_children() if isinstance(m, nn.Conv2d)] == [
        "0",
        "2",
        "5",
        "7",
        "10",
        "12",
        "14",
        "16",
        "19",
    ]
    x = torch.rand(1, 1, 32, 48, generator=torch_rng(0)) * 2 - 1
    v, wanted = (
        ((x + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None],
        [],
    )
    for n, layer in enumerate(net.features):  # out of place, one layer at a time
        v = F.relu(v) if isinstance(layer, nn.ReLU) else layer(v)
        if n in (15, 17, 20):
            wanted.append(v)
    got = net(x)
    assert [tuple(v.shape) for v in got] == [
        (1, 256, 8, 12),
        (1, 256, 8, 12),
        (1, 512, 4, 6),
    ] and all(torch.equal(a, b) for a, b in zip(got, wanted))
    assert all(torch.equal(a, b) for a, b in zip(net(x.expand(-1, 3, -1, -1)), got)) and all(
        (v >= 0).all() for v in got
    )
    assert all(torch.equal(a, b) for a, b in zip(VGG19Features(load_vgg19(path))(x), got))
    with pytest.raises(InputError, match="too small"):
        net(x[..., :4, :])
    with pytest.raises(InputError, match="random=True"):
        VGG19Features()
    with pytest.warns(UserWarning, match="random weights"):
        VGG19Features(random=True)


def test_missing_damaged_and_foreign_files(vgg_file, tmp_path):
    path, state = vgg_file
    data = path.read_bytes()
    with pytest.raises(InputError, match="none.pth does not exist.*download=True"):
        load_vgg19(tmp_path / "none.pth")
    for name, content in {
        path.name: data[:-1000],
        "plain.pth": data[:100_000],
        "vgg19-00000000.pth": data,
        "text.pth": b"no weights",
        "empty.pth": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name.replace(".", "[.]")):
            load_vgg19(tmp_path / name)
    foreign = {
        "list.pth": [1],
        "resnet.pth": {"conv1.weight": torch.zeros(3)},
        "half.pth": {k: v for k, v in state.items() if "19" not in k},
        "bn.pth": state | {"features.5.weight": torch.zeros(64)},
    }
    for name, content in foreign.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=f"{name[:-4]}.*holds no features"):
            load_vgg19(tmp_path / name)
    with pytest.raises(InputError, match="SHA-256"):
        load_vgg19(path, checksum="0" * 64)
    torch.save(
        state, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )  # the format of torchvision's file
    assert set(load_vgg19(tmp_path / "old.pth")) == {k for k in state if k.startswith("features")}


def test_a_file_cannot_run_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"features.0.weight": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_vgg19(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_download(vgg_file, tmp_path, monkeypatch):
    path, _ = vgg_file
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    here = tmp_path / "cache" / "checkpoints"
    with pytest.raises(InputError, match="could not be fetched"):
        load_vgg19(download=True, url=path.as_uri(), checksum="0" * 64)
    assert list(here.iterdir()) == [], "something half-written stays"
    with pytest.raises(InputError, match="could not be fetched"):
        load_vgg19(download=True, url=(tmp_path / "none-01234567.pth").as_uri())
    cut = tmp_path / path.name
    cut.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="could not be fetched"):
        load_vgg19(download=True, url=cut.as_uri())
    assert list(here.iterdir()) == []
    weights = load_vgg19(download=True, url=path.as_uri())
    assert [p.name for p in here.iterdir()] == [path.name]
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda *a, **k: pytest.fail("fetched although it is there"),
    )
    again = load_vgg19(download=True, url=path.as_uri())
    assert all(torch.equal(v, again[k]) for k, v in weights.items())
    assert contextual._checksum_in_name(contextual._VGG19_URL) == "dcbb9e9d"


def test_filter_bank():
    x = torch.rand(1, 1, 64, 48, generator=torch_rng(0)) * 2 - 1
    assert [tuple(v.shape) for v in FilterBank(8, (2, 4, 8))(x)] == [
        (1, 16, 32, 24),
        (1, 16, 16, 12),
        (1, 16, 8, 6),
    ]
    assert all(v.abs().max() < 1e-5 for v in FilterBank()(torch.full((1, 1, 64, 64), 0.3))), (
        "a filter has a mean"
    )
    a, b, c = FilterBank()(x), FilterBank()(x), FilterBank(seed=1)(x)
    assert all(torch.equal(u, v) for u, v in zip(a, b)) and not torch.equal(a[0], c[0])
    for bad in (
        dict(channels=0),
        dict(channels=25),
        dict(scales=()),
        dict(scales=(3,)),
        dict(scales=(0, 4)),
    ):
        with pytest.raises(InputError):
            FilterBank(**bad)
    with pytest.raises(InputError, match="too small"):
        FilterBank()(x[..., :12])


class Dropping(UNet):
    "A network with dropout in its encoder."

    def __init__(self):
        super().__init__(3, 2, width=4)
        self.conv3.append(nn.Dropout(0.5))


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_does_not_notice(statistics, training):
    net = Dropping().train(training)
    net.conv2.eval()
    net.conv10.requires_grad_(False)
    modes, flags, state = (
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        {k: v.clone() for k, v in net.state_dict().items()},
    )
    tracked = [m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    extract, x = (
        EncoderFeatures(net, statistics=statistics),
        (torch.rand(2, 1, 32, 32) * 2 - 1).requires_grad_(),
    )
    first = extract(x)
    sum(v.square().mean() for v in first).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    assert modes == [m.training for m in net.modules()] and flags == [
        p.requires_grad for p in net.parameters()
    ]
    assert tracked == [
        m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d)
    ] and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert (
        all(torch.equal(a, b) for a, b in zip(first, extract(x)))
        and not extract.state_dict()
        and not list(extract.parameters())
    )
    with pytest.raises(InputError):
        extract(torch.zeros(1, 1, 30, 30))  # refused by the network, in the middle
    assert modes == [m.training for m in net.modules()] and flags == [
        p.requires_grad for p in net.parameters()
    ]
    assert not any(m._forward_hooks for m in net.modules())
    extract.train()
    assert net.conv1.training == training


def test_the_teacher_reads_zero_to_one():
    seen = []
    net = UNet(1, 2, width=4)
    net.conv1.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    x = torch.rand(1, 1, 32, 32) * 2 - 1
    EncoderFeatures(net)(x)
    assert torch.equal(seen[0], (x + 1) / 2)
    with torch.no_grad():
        before = EncoderFeatures(net)(x)[0]
    with torch.no_grad():
        net.conv1[0].weight.mul_(-1)
    assert not torch.equal(EncoderFeatures(net)(x)[0], before), (
        "the extractor does not follow the teacher"
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(1, 2, width=4),
        lambda: BilinearUNet(1, 2, width=4),
        lambda: DenseFCN(1, 2, width=8),
        lambda: MRRN(1, 2, width=4),
    ],
)
def test_default_layers_of_our_networks(make):
    net = make()
    maps = EncoderFeatures(net)(torch.zeros(1, 1, 64, 64))
    assert [v.shape[2:] for v in maps] == [(16, 16), (8, 8)] and len(encoder_layers(net)) == 2


def test_choose(vgg_file):
    net = UNet(1, 2, width=4)
    with pytest.warns(UserWarning, match="features of the teacher"):
        assert isinstance(feature_extractor("auto", net), EncoderFeatures)
    assert feature_extractor("teacher", net, names=("conv2",)).names == ("conv2",)
    assert isinstance(
        feature_extractor("auto", net, weights=vgg_file[0]), VGG19Features
    ) and isinstance(feature_extractor("vgg19", weights=str(vgg_file[0])), VGG19Features)
    assert feature_extractor("filters", channels=4, scales=(2,)).filters2.shape == (4, 1, 5, 5)
    with pytest.warns(UserWarning, match="random weights"):
        feature_extractor("vgg19", random=True)
    with pytest.raises(InputError, match="Did you mean 'vgg19'"):
        feature_extractor("vgg")
    with pytest.raises(InputError, match="teacher=network"):
        feature_extractor("teacher")
    with pytest.raises(InputError, match="does not exist"):
        feature_extractor("vgg19", weights="none.pth")
    with pytest.raises(InputError, match="conv99"):
        feature_extractor("teacher", net, names=("conv99",))
    with pytest.raises(InputError, match="statistics"):
        EncoderFeatures(net, statistics="none")
    with pytest.raises(InputError, match="names="):
        EncoderFeatures(nn.Conv2d(1, 1, 1))
