"Looking into networks: pixels, their features, t-SNE, separation of held-out cases; feature maps."

import importlib.util

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unpaired_kd.analysis.feature_maps import (
    compare_features,
    correlate_channels,
    correlate_tied_channels,
    linear_cka,
    match_channels,
    plot_feature_maps,
    read_channel_maps,
    tile_maps,
)
from unpaired_kd.analysis.tsne import (
    browse_embedding,
    compare_separations,
    crop_window,
    embed_features,
    measure_separation,
    read_pixel_features,
    sample_pixels,
)
from unpaired_kd.core import InputError, rng
from unpaired_kd.networks.taps import Taps
from unpaired_kd.networks.unet import UNet


def blobs():
    "Labels of three cases: a blob in the middle, one in a corner, a volume with an empty slice."
    a = np.zeros((64, 80), int)
    b = np.zeros((64, 80), int)
    c = np.zeros((3, 64, 80), int)
    a[20:30, 30:44] = 1
    b[:6, 74:] = 2
    c[0, 40:50, 10:20] = 1
    c[2, 60:, :9] = 1
    return [a, b, c]


def net(seed=0, dims=2):
    torch.manual_seed(seed)
    return UNet(in_channels=1, width=2, dims=dims).eval()


# ---------------------------------------------------------------- pixels
def test_pixels_are_balanced_bounded_and_the_same_every_time():
    labels = blobs()
    p = sample_pixels(labels, most=300, crop=24, seed=3)
    for c in range(3):
        mine = p.case == c
        assert 0 < p.label[mine].sum() * 2 == mine.sum() <= 100
        assert np.array_equal(
            np.atleast_3d(labels[c].reshape(-1, 64, 80))[p.slice[mine], p.row[mine], p.column[mine]]
            > 0,
            p.label[mine],
        )
    assert all(np.array_equal(x, y) for x, y in zip(p, sample_pixels(labels, 300, 24, 3)))
    assert not np.array_equal(p.row, sample_pixels(labels, 300, 24, 4).row)
    assert len(np.unique(np.column_stack(p[:4]), axis=0)) == len(p.label)  # no pixel twice
    assert len(sample_pixels([np.tile([0, 1], (400, 200))] * 2, 35_000).label) <= 35_000


def test_background_comes_from_the_window_and_the_window_from_the_slice():
    p = sample_pixels(blobs(), most=10**6, crop=24)
    assert set(p.slice[p.case == 2].tolist()) == {0, 2}
    corner = p.case == 1
    assert p.row[corner].max() <= 23 and p.column[corner].min() >= 56
    assert p.label[corner].sum() == 36  # all of the blob


@pytest.mark.parametrize(
    "at,goal",
    [
        ((slice(20, 30), slice(30, 44)), ((13, 37), (25, 49))),
        ((slice(0, 3), slice(78, 80)), ((0, 24), (56, 80))),
        ((slice(60, 64), slice(0, 4)), ((40, 64), (0, 24))),
    ],
)
def test_window_is_clamped_at_borders(at, goal):
    y = np.zeros((64, 80), bool)
    y[at] = True
    assert tuple((w.start, w.stop) for w in crop_window(y, 24)) == goal
    assert tuple((w.start, w.stop) for w in crop_window(y, 70))[0] == (
        0,
        64,
    )  # smaller than the crop: all of it


def test_pixels_refuse_nothing_to_sample():
    for labels, most in (
        ([np.zeros((9, 9))], 100),
        ([np.ones((9, 9))], 100),
        (blobs(), 5),
        ([], 10),
        ([np.ones(9)], 10),
    ):
        with pytest.raises(InputError):
            sample_pixels(labels, most)


# ---------------------------------------------------------------- features
def test_features_equal_the_enlarged_maps_also_in_volumes_and_keep_the_mode():
    labels = blobs()
    n = net()
    r = torch.Generator().manual_seed(0)
    images = [
        torch.rand(1, 64, 80, generator=r),
        torch.rand(1, 64, 80, generator=r),
        torch.rand(1, 3, 64, 80, generator=r),
    ]
    p = sample_pixels(labels, 120, 24)
    names = ("conv8", "conv9", "conv5")
    n.train()
    before = {k: v.clone() for k, v in n.state_dict().items()}
    f = read_pixel_features(n, images, names, p)
    assert (
        n.training
        and all(torch.equal(v, before[k]) for k, v in n.state_dict().items())
        and f.shape == (len(p.label), 4 + 2 + 32)
    )
    n.eval()
    for i in (0, len(f) // 2, len(f) - 1):
        x = images[p.case[i]]
        with Taps(n, names) as taps, torch.no_grad():
            n((x if x.ndim == 3 else x[:, p.slice[i]])[None])
            full = torch.cat(
                [
                    F.interpolate(taps[k], (64, 80), mode="bilinear", align_corners=False)
                    for k in names
                ],
                1,
            )
        assert np.allclose(f[i], full[0, :, p.row[i], p.column[i]], atol=1e-5)
    assert not any(m._forward_hooks for m in n.modules())


def test_features_refuse_pixels_that_are_not_in_the_images():
    p = sample_pixels(blobs()[:2], 40, 24)
    with pytest.raises(InputError, match="there are 1 images"):
        read_pixel_features(net(), [torch.rand(1, 64, 80)], ("conv9",), p)
    with pytest.raises(InputError, match="outside"):
        read_pixel_features(net(), [torch.rand(1, 32, 32)] * 2, ("conv9",), p)
    with pytest.raises(InputError, match="conv99"):
        read_pixel_features(net(), [], ("conv99",), p)


# ---------------------------------------------------------------- t-SNE
def clouds(n=600, channels=12, gap=3.0):
    r = rng(0, "clouds")
    y = np.arange(n) % 2
    return (r.standard_normal((n, channels)) + gap * y[:, None] * (np.arange(channels) < 4)).astype(
        np.float32
    ), y


def test_embedding_is_repeatable_names_its_engine_and_keeps_neighbours():
    x, y = clouds()
    x[:, 0] = 7.0  # a constant channel does no harm
    a = embed_features(x, "sklearn", perplexity=30, iterations=250, seed=1, threads=1)
    assert a.engine == "sklearn" and np.isfinite(a.xy).all() and a.xy.shape == (600, 2)
    few, again = (
        embed_features(x[:90], "sklearn", perplexity=10, iterations=250, seed=1, threads=1).xy
        for _ in range(2)
    )
    assert np.array_equal(few, again)
    s = measure_separation(x, y, np.arange(600) // 100, a.xy)
    assert (
        s.trustworthiness > 0.63
        and measure_separation(
            x, y, np.arange(600) // 100, rng(0, "no map").random((600, 2))
        ).trustworthiness
        < 0.55
    )
    assert measure_separation(a.xy, y, np.arange(600) // 100).knn > 0.95


def test_the_fast_engine_agrees_about_neighbours():
    pytest.importorskip("openTSNE")
    x, y = clouds(300)
    a = embed_features(x, perplexity=20, iterations=400, threads=1)
    assert a.engine == "opentsne" and measure_separation(a.xy, y, np.arange(300) // 50).knn > 0.95


def test_scale_of_a_channel_does_not_matter():
    x, _ = clouds(120)
    scale = np.ones(12, np.float32)
    scale[5] = 1024.0
    a, b = (embed_features(v, "sklearn", perplexity=10, iterations=250).xy for v in (x, x * scale))
    assert np.allclose(a, b, atol=1e-3 * np.abs(a).max())


def test_embedding_refusals():
    x, _ = clouds(100)
    for kw, words in (
        (dict(), "too few"),
        (dict(engine="umap"), "unknown engine"),
        (dict(perplexity=5, iterations=100), "at least 250"),
    ):
        with pytest.raises(InputError, match=words):
            embed_features(x, **kw)
    with pytest.raises(InputError, match="NaN"):
        embed_features(x * np.nan, perplexity=5)
    if importlib.util.find_spec("openTSNE") is None:
        with pytest.raises(InputError, match="not installed"):
            embed_features(x, "opentsne", perplexity=5)


# ---------------------------------------------------------------- separation
def test_separation_holds_cases_out():
    r = rng(0, "leak")
    spot = r.standard_normal((16, 8, 6))
    mark = np.stack([r.permutation([0, 1] * 4) for _ in range(16)])
    case = np.repeat(np.arange(16), 80)
    cluster = np.tile(np.repeat(np.arange(8), 10), 16)
    x = spot[case, cluster] + 0.05 * r.standard_normal((1280, 6))
    y = mark[case, cluster]
    assert measure_separation(x, y, np.tile(np.arange(5), 256)).knn > 0.9  # folds that leak
    assert abs(measure_separation(x, y, case).knn - 0.5) < 0.15


def test_separation_at_both_ends_and_by_case():
    x, y = clouds(400, gap=6.0)
    g = np.arange(400) // 50
    s = measure_separation(x, y, g)
    none = measure_separation(rng(0, "noise").standard_normal(x.shape), y, g)
    assert s.knn > 0.99 and s.auc > 0.99 and 0.2 < s.silhouette < 1 and np.isnan(s.trustworthiness)
    assert abs(none.knn - 0.5) < 0.1 and abs(none.auc - 0.5) < 0.1 and abs(none.silhouette) < 0.05
    assert s.knn == pytest.approx(s.knn_case.mean()) and len(s.auc_case) == len(s.cases) == 8
    assert measure_separation(x * 100, y, g).knn == s.knn


def test_difference_is_paired_over_cases():
    x, y = clouds(400, gap=1.0)
    g = np.arange(400) // 50
    a = measure_separation(rng(0, "noise").standard_normal(x.shape), y, g)
    b = measure_separation(x, y, g)
    d, low, high = compare_separations(a, b)["knn"]
    assert d == pytest.approx(b.knn - a.knn) and 0 < low < d < high
    same = compare_separations(b, b)["auc"]
    assert same[0] == 0 and np.isnan(same[1:]).all()  # nothing varies: no interval
    with pytest.raises(InputError, match="other cases"):
        compare_separations(a, measure_separation(x, y, g + 1))


def test_separation_refusals():
    x, y = clouds(60)
    with pytest.raises(InputError, match="one group"):
        measure_separation(x, y, np.zeros(60))
    with pytest.raises(InputError, match="one class"):
        measure_separation(x, y, y)


def test_slider_changes_the_picture():
    import matplotlib

    matplotlib.use("agg")
    xy = rng(0, "xy").random((20, 2))
    colours = {"class": np.arange(20) % 2, "case": np.arange(20) // 5}
    shown = browse_embedding(xy, colours)
    (by_class, _), (by_case, _) = shown.frames
    assert shown.values == {"colour": ["class", "case"]} and by_class != by_case
    assert "data:image/png;base64," + by_case in shown._repr_html_()


# ---------------------------------------------------------------- feature maps
def some_maps(n=6, seed=0):
    return rng(seed, "maps").standard_normal((n, 9, 7)).astype(np.float32)


def test_channel_maps_are_the_tapped_ones_and_keep_the_mode():
    n = net().train()
    x = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in n.state_dict().items()}
    m = read_channel_maps(n, x, "conv8", 3)
    assert (
        n.training
        and all(torch.equal(v, before[k]) for k, v in n.state_dict().items())
        and not n.conv8._forward_hooks
    )
    with Taps(n.eval(), ("conv8",)) as taps, torch.no_grad():
        n(x[None])
        assert np.array_equal(m, taps["conv8"][0, :3].numpy())
    assert read_channel_maps(n, x, "conv8").shape == (4, 16, 24) and np.array_equal(
        read_channel_maps(n, x, "conv8", [2, 0]), m[[2, 0]]
    )
    for bad in (dict(channels=[4]), dict(channels=[-1]), dict(channels=0), dict(layer="conv99")):
        with pytest.raises(InputError):
            read_channel_maps(n, x, **dict(dict(layer="conv8"), **bad))
    with pytest.raises(InputError, match="one image"):
        read_channel_maps(n, x[None], "conv8")


def test_matching_undoes_any_shuffle_scale_and_shift():
    a = some_maps()
    p = rng(0, "p").permutation(6)
    order, r = match_channels(a, a[p] * np.arange(1, 7)[:, None, None] - 3)
    assert p[order].tolist() == list(range(6)) and np.allclose(r, 1)
    order, r = match_channels(
        a[:2], np.concatenate([some_maps(3, 1), a])
    )  # more channels to choose from
    assert order.tolist() == [3, 4] and np.allclose(r, 1)
    assert match_channels(a, -a)[1].max() < 0.9  # a negative is no match


def test_matching_is_one_to_one_and_never_worse_than_as_it_stands():
    a = some_maps()
    b = some_maps(8, 1)
    order, r = match_channels(a, b)
    assert len(set(order.tolist())) == 6 and r.sum() >= correlate_tied_channels(a, b)[1].sum()
    c = correlate_channels(a, b)
    assert c[1, 2] == pytest.approx(
        np.corrcoef(a[1].ravel(), b[2].ravel())[0, 1]
    ) and np.array_equal(r, c[np.arange(6), order])


def test_constant_maps_and_other_sizes():
    a = some_maps()
    a[2] = 5
    assert (correlate_channels(a, a)[2] == 0).all() and np.isfinite(match_channels(a, a)[1]).all()
    smooth = F.interpolate(torch.from_numpy(some_maps(3, 2)[None]), (36, 28), mode="bilinear")[
        0
    ].numpy()
    assert (
        correlate_channels(smooth, F.avg_pool2d(torch.from_numpy(smooth), 2).numpy())
        .diagonal()
        .min()
        > 0.97
    )
    with pytest.raises(InputError, match="fewer channels"):
        match_channels(a, a[:3])
    with pytest.raises(InputError, match="channels, height"):
        correlate_channels(a[0], a)


def test_cka_is_blind_to_rotation_only():
    a = some_maps()
    b = some_maps(4, 1)
    turn = np.linalg.qr(rng(0, "turn").standard_normal((6, 6)))[0]
    assert linear_cka(a, 3 * np.einsum("ij,jhw->ihw", turn, a) + 2) == pytest.approx(1)
    assert linear_cka(a, b) == pytest.approx(linear_cka(b, a)) and 0 < linear_cka(a, b) < 0.4
    assert linear_cka(np.stack([a, 2 * a]), np.stack([a, 2 * a])) == pytest.approx(1)
    assert np.isnan(linear_cka(a, a * 0))
    with pytest.raises(InputError, match="other positions"):
        linear_cka(a, b[:, 1:])
    s = compare_features(a, a[::-1])
    assert s["cka"] == pytest.approx(1) and s["matched"] == pytest.approx(1) and s["tied"] < 0.6


def test_grid_shows_matched_channels_and_says_how_well():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    a = some_maps()
    shots = {
        m: [
            (ax.images[0].get_array(), ax.get_title())
            for ax in plot_feature_maps({"t": a, "s": a[::-1]}, match=m, columns=4).axes
        ]
        for m in (True, False)
    }
    plt.close("all")
    assert np.array_equal(shots[True][0][0], shots[True][1][0]) and "1.00" in shots[True][1][1]
    assert (
        not np.array_equal(shots[False][0][0], shots[False][1][0])
        and "1.00" not in shots[False][1][1]
    )
    assert (
        tile_maps(a, 4).shape == (2 * 10, 4 * 8)
        and tile_maps(a, 4).min() == 0
        and tile_maps(a * 0, 4)[:9, :7].max() == 0
    )
