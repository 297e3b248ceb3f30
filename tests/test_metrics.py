"""Metrics: properties, edge cases and parity with loops, MONAI and hand calculation."""

import warnings

import numpy as np
import pytest
import torch
from yardsticks import loop_instance_scores

from unpaired_kd.core import InputError, rng
from unpaired_kd.data.phantoms.nuclei import toy_nuclei
from unpaired_kd.metrics import segmentation as metrics
from unpaired_kd.metrics.released import (
    released_aji,
    released_dice,
    released_hd,
    released_metrics,
    released_pq,
)
from unpaired_kd.metrics.segmentation import (
    aji,
    aji_plus,
    case_metrics,
    components,
    dice,
    find_overlaps,
    find_surface,
    hausdorff,
    instance_scores,
    iou,
    panoptic_quality,
    surface_dice,
    surface_distances,
)
from unpaired_kd.metrics.topology import betti_errors, cl_dice, topology_scores


def scattered(seed, n=40, shape=(60, 60), size=9):
    """Random boxes, drawn over each other: objects that overlap in every way, some cut in two.
    Numbered in order of appearance."""
    r = rng(seed, "scattered")
    out = np.zeros(shape, np.int32)
    for k in range(1, n + 1):
        low = [r.integers(0, s) for s in shape]
        out[tuple(slice(a, a + r.integers(1, size)) for a in low)] = k
    names, first, which = np.unique(out, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(np.where(names > 0, first, -1)))
    return order[which].reshape(shape)


def blobs(seed, shape, share=0.1):
    "Smooth random blobs, and a disturbed version of them."
    from scipy.ndimage import gaussian_filter

    r = rng(seed, "blobs")
    x = gaussian_filter(r.normal(size=shape), 3)
    y = x + 0.4 * gaussian_filter(r.normal(size=shape), 2)
    return y > np.quantile(y, 1 - share), x > np.quantile(x, 1 - share)


def two_cells():
    target = np.zeros((14, 30), np.int32)
    target[2:12, 4:14] = 1
    target[2:12, 16:26] = 2
    pred = np.zeros_like(target)
    pred[2:12, 4:26] = 1
    return pred, target


# ---------------------------------------------------------------- objects
@pytest.mark.parametrize("shape", [(60, 60), (16, 20, 24)])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_loops(seed, shape):
    pred = scattered(seed, shape=shape, size=20)
    target = scattered(100 + seed, shape=shape, size=20)
    slow = loop_instance_scores(pred, target)
    fast = instance_scores(pred, target)
    for k, v in slow.items():
        assert fast[k] == pytest.approx(v, abs=1e-12), k


def test_equal_to_the_loops_on_nuclei():
    pred, target = toy_nuclei(60, 250, seed=3, jitter=4)
    slow = loop_instance_scores(pred, target)
    fast = instance_scores(pred, target)
    for k, v in slow.items():
        assert fast[k] == pytest.approx(v, abs=1e-12), k


def test_single_scores_are_the_scores_of_the_table():
    pred = scattered(0)
    target = scattered(1)
    s = instance_scores(pred, target)
    q = panoptic_quality(pred, target)
    assert (aji(pred, target), aji_plus(pred, target)) == (s["aji"], s["aji_plus"])
    assert q._asdict() == {k: s[k] for k in ("pq", "sq", "dq", "tp", "fp", "fn")}


def test_merged_cells():
    pred, target = two_cells()
    s = instance_scores(pred, target)
    assert s["aji"] == pytest.approx(0.4545, abs=5e-5) and s["pq"] == 0
    assert s["aji_plus"] == pytest.approx(100 / 320)
    assert (s["tp"], s["fp"], s["fn"]) == (0, 1, 2)


def test_greedy_is_not_optimal():
    """The best single pair must be given up when two others are worth more together; a pair above
    one half may be among the losers."""
    target, pred = np.zeros((2, 1, 300), int)
    target[0, 0:100] = 1
    target[0, 100:200] = 2
    pred[0, 40:140] = 1
    pred[0, 0:40] = 2  # pred 1 meets both targets, pred 2 only target 1
    slow = loop_instance_scores(pred, target)
    fast = instance_scores(pred, target)
    assert fast["aji_plus"] == pytest.approx(slow["aji_plus"])
    # by hand: target 1 keeps pred 2 (40/100), target 2 takes pred 1 (40/160)
    assert fast["aji_plus"] == pytest.approx(80 / 260)


@pytest.mark.parametrize("seed", range(4))
def test_relabelling_changes_nothing(seed):
    pred = scattered(seed)
    target = scattered(50 + seed)
    r = rng(seed, "names")

    def renamed(a, top):
        names = np.r_[0, r.permutation(np.arange(1, top))[: a.max()]]
        return names[a]

    first = instance_scores(pred, target)
    for top in (50, 5000, 2_000_000):  # dense table, and labels too large for one
        other = instance_scores(renamed(pred, top), renamed(target, top))
        assert other == pytest.approx(first, abs=1e-12)


def test_more_than_300_objects():
    _, target = toy_nuclei(400, 500)
    n = len(np.unique(target)) - 1
    assert n > 300
    order = np.r_[0, rng(0, "order").permutation(target.max()) + 1]
    s = instance_scores(order[target], target)
    assert (s["aji"], s["aji_plus"], s["pq"], s["tp"]) == (1, 1, 1, n)
    assert len(find_overlaps(target, target).target_area) == n
    # the wrap that this module does not have
    assert released_pq(order[target], target, min_size=0, binary=False) < 1


@pytest.mark.parametrize("seed", range(6))
def test_bounds(seed):
    pred = scattered(seed, n=8 * seed + 3)
    target = scattered(200 + seed, n=25)
    s = instance_scores(pred, target)
    assert s["aji"] <= iou(pred, target) + 1e-12
    assert s["pq"] == pytest.approx(s["sq"] * s["dq"])
    assert (
        s["tp"] + s["fp"] == len(np.unique(pred)) - 1
        and s["tp"] + s["fn"] == len(np.unique(target)) - 1
    )
    assert s["sq"] == 0 or s["sq"] > 0.5
    for k in ("aji", "aji_plus", "pq", "dq"):
        assert 0 <= s[k] <= 1
    back = instance_scores(target, pred)  # PQ and AJI+ have no sides
    assert back["pq"] == pytest.approx(s["pq"]) and back["aji_plus"] == pytest.approx(s["aji_plus"])


def test_perfect_disjoint_and_empty_objects():
    _, target = two_cells()
    none = np.zeros_like(target)
    elsewhere = none.copy()
    elsewhere[13, :3] = 7
    for pred, value in ((target, 1), (elsewhere, 0), (none, 0)):
        s = instance_scores(pred, target)
        assert (s["aji"], s["aji_plus"], s["pq"]) == (value,) * 3
    assert instance_scores(target, none)["aji"] == 0 and panoptic_quality(target, none).fp == 2
    assert aji(none, none) == aji_plus(none, none) == panoptic_quality(none, none).pq == 1
    for f in (aji, aji_plus):
        assert np.isnan(f(none, none, empty="nan"))
    assert np.isnan(list(panoptic_quality(none, none, empty="nan"))[:3]).all()


def test_tied_predictions():
    """A cell cut in two equal halves, one of which also serves a second cell: the half that appears
    first is taken."""
    target = np.array([[1, 1, 1, 1, 0, 0]])
    for pred in ([[1, 1, 2, 2, 0, 0]], [[9, 9, 3, 3, 0, 0]]):
        assert aji(np.array(pred), target) == pytest.approx(2 / (4 + 2))
    target = np.array([[1, 1, 1, 1, 0, 2, 2]])
    first = np.array([[1, 1, 2, 2, 0, 2, 0]])
    second = np.array([[2, 2, 1, 1, 0, 1, 0]])
    assert aji(first, target) == aji(second, target)


def test_half_is_not_above_half():
    a, b = np.zeros((2, 1, 12), int)
    a[0, :8] = 1
    b[0, :4] = 1
    assert panoptic_quality(b, a).tp == 0
    b[0, 4] = 1
    assert panoptic_quality(b, a).tp == 1
    with pytest.raises(InputError, match="0.5"):
        panoptic_quality(a, b, threshold=0.3)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint64", "float32"])
def test_dtypes_and_tensors(dtype):
    pred, target = two_cells()
    a = (pred > 0).astype(dtype)
    assert aji(a, target) == pytest.approx(aji(pred, target))
    if dtype != "uint64":
        assert dice(torch.from_numpy(a), torch.from_numpy(target)) == dice(pred, target)


# ---------------------------------------------------------------- overlap
def test_overlap_by_hand():
    p = np.array([0, 1, 1, 1, 1, 0, 0, 0])
    t = np.array([0, 0, 1, 1, 1, 1, 0, 0])
    assert dice(p, t) == 0.75 and iou(p, t) == 0.6
    assert dice(p, t) == dice(t, p)


def test_empty_masks():
    none = np.zeros((5, 9), bool)
    some = np.eye(5, 9, dtype=bool)
    assert dice(none, none) == iou(none, none) == surface_dice(none, none, 1) == 1
    assert dice(none, some) == iou(some, none) == surface_dice(none, some, 1) == 0
    assert all(np.isnan(f(none, none, empty="nan")) for f in (dice, iou))
    assert hausdorff(none, none) == 0
    assert hausdorff(none, some, 95) == hausdorff(some, none) == pytest.approx(np.hypot(4, 8))
    assert hausdorff(none, some, spacing=(3, 0.5)) == pytest.approx(np.hypot(12, 4))
    assert np.isnan(hausdorff(none, some, empty="nan")) and np.isnan(
        hausdorff(none, none, empty="nan")
    )
    assert hausdorff(none, some, empty="zero") == 0
    with pytest.raises(InputError, match="empty"):
        surface_distances(none, some)
    for f in (dice, hausdorff, aji):
        with pytest.raises(InputError, match="Known"):
            f(none, none, empty="perhaps")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: dice(np.array([0.3, 0.7]), np.array([0, 1])), "pred.*threshold"),
        (lambda: dice(np.array([0, 1]), np.array([np.nan, 1])), "target.*NaN"),
        (lambda: dice(np.array([0, -1]), np.array([0, 1])), "negative"),
        (lambda: dice(np.zeros((1, 4, 4)), np.zeros((4, 4))), "shape"),
        (lambda: dice(np.array(["a"]), np.array([1])), "dtype"),
        (lambda: hausdorff(np.ones((4, 4)), np.ones((4, 4)), spacing=(1, 2, 3)), "per axis"),
        (lambda: hausdorff(np.ones((4, 4)), np.ones((4, 4)), spacing=(1, 0)), "positive"),
        (lambda: hausdorff(np.ones((4, 4)), np.ones((4, 4)), percentile=0.0), "percentile"),
        (lambda: surface_dice(np.ones((4, 4)), np.ones((4, 4)), -1), "tolerance"),
        (
            lambda: case_metrics(
                np.full((4, 4), 3), np.ones((4, 4), int), classes=("background", "liver")
            ),
            "label 3",
        ),
        (
            lambda: case_metrics(np.ones((4, 4), int), np.ones((4, 4), int), np.ones((4, 4), int)),
            "neither",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call()


# ---------------------------------------------------------------- distance
@pytest.mark.parametrize("shape", [(30, 40), (12, 14, 16), (25,)])
def test_surface_is_mask_minus_erosion(shape):
    from scipy.ndimage import binary_erosion

    for mask in (rng(0, "mask").random(shape) > 0.2, np.ones(shape, bool)):
        assert (find_surface(mask) == (mask & ~binary_erosion(mask))).all()


@pytest.mark.parametrize("by", [(3, 0), (3, 4), (-5, 12)])
def test_shifted_square(by):
    a = np.zeros((64, 64), bool)
    a[20:34, 20:34] = True
    b = np.roll(a, by, (0, 1))
    assert hausdorff(a, b) == pytest.approx(np.hypot(*by))
    assert hausdorff(a, b, spacing=(2, 0.5)) == pytest.approx(np.hypot(2 * by[0], 0.5 * by[1]))
    assert hausdorff(a, b, 95) == hausdorff(b, a, 95) <= hausdorff(a, b)
    assert surface_dice(a, b, np.hypot(*by)) == 1


def test_a_frame_around_the_image_changes_nothing():
    a, b = blobs(0, (40, 40), 0.2)
    wide = [np.pad(m, 30) for m in (a, b)]
    assert hausdorff(*wide, 95) == pytest.approx(hausdorff(a, b, 95))
    assert surface_dice(*wide, 1) == surface_dice(a, b, 1)


@pytest.mark.parametrize(
    "shape, spacing",
    [
        ((64, 64), None),
        ((64, 64), (0.5, 2.0)),
        ((24, 32, 40), None),
        ((24, 32, 40), (3.0, 0.8, 0.8)),
    ],
)
def test_parity_with_monai(shape, spacing):
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    for seed in range(3):
        a, b = blobs(seed, shape)
        x, y = (torch.from_numpy(m)[None, None] for m in (a, b))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for q, theirs in ((95, 95), (100, None)):
                value = compute_hausdorff_distance(
                    x, y, include_background=True, percentile=theirs, spacing=spacing
                ).item()
                assert hausdorff(a, b, q, spacing) == pytest.approx(value, rel=1e-6, abs=1e-6)
            value = compute_surface_dice(
                x, y, class_thresholds=[1.2], include_background=True, spacing=spacing
            ).item()
        assert surface_dice(a, b, 1.2, spacing) == pytest.approx(value, rel=1e-6)


# ---------------------------------------------------------------- components and cases
def test_components():
    m = np.zeros((6, 6, 6), bool)
    m[0, 0, 0] = m[1, 1, 1] = True  # a corner connects
    m[4:6, 4:6, 4:6] = True
    out = components(m)
    assert out.max() == 2 and out.dtype == np.int32
    assert (components(m, 3) > 0).sum() == 8 and components(m, 3).max() == 1
    assert components(m, 8).max() == 1 and components(m, 9).max() == 0
    assert components(np.zeros((4, 4))).max() == 0


def test_case_of_one_class():
    pred, target = two_cells()
    r = case_metrics(pred > 0, target > 0, pred, target)
    assert list(r) == ["dsc", "hd95", "aji", "pq", "sdsc", "missed"]
    assert (
        r["dsc"] == dice(pred, target)
        and r["hd95"] == hausdorff(pred, target, 95)
        and r["aji"] == aji(pred, target)
        and r["pq"] == 0
    )
    none = target * 0
    assert case_metrics(none, none, none, none) == {
        "dsc": 1,
        "hd95": 0,
        "aji": 1,
        "pq": 1,
        "sdsc": 1,
        "missed": 0,
    }


def test_case_of_several_classes():
    names = ("background", "liver", "right kidney", "spleen")
    t, p = np.zeros((2, 20, 20), int)
    t[:8, :8] = 1
    t[12:18, 12:18] = 2
    p[:8, 1:9] = 1
    p[:2, 18:] = 3  # kidney missed, spleen invented
    r = case_metrics(torch.from_numpy(p), torch.from_numpy(t), spacing=(2, 1), classes=names)
    assert r["dsc_right kidney"] == r["dsc_spleen"] == 0 and r["dsc_liver"] == pytest.approx(7 / 8)
    assert r["dsc"] == pytest.approx(7 / 24)
    assert r["hd95"] == pytest.approx((1 + 2 * np.hypot(38, 19)) / 3)
    assert np.isnan(r["aji"]) and np.isnan(r["pq"])
    assert r["missed"] == 1  # an invented class is not a missed one
    assert r["sdsc"] == pytest.approx(1 / 3)
    absent = case_metrics(t, t, classes=names)
    assert absent["dsc"] == 1 and np.isnan(absent["dsc_spleen"]) and absent["missed"] == 0


def test_topology_adds_columns_and_changes_none():
    names = ("background", "artery", "vein")
    p, t = np.zeros((2, 6, 12, 20), int)
    t[2:4, 5:8] = 1
    t[2:4, 5:8, 10:] = 2  # one vessel, two classes: a single foreground
    p[2:4, 5:8, :9] = 1
    p[2:4, 5:8, 11:] = 2  # cut in two
    plain = case_metrics(p, t, classes=names)
    more = case_metrics(p, t, classes=names, topology=True)
    assert list(more) == [*plain, "cldice", "tprec", "tsens", "betti0", "betti1", "betti2"]
    assert repr({k: more[k] for k in plain}) == repr(plain)
    assert (more["betti0"], more["tprec"]) == (1, 1) and 0.8 < more["tsens"] < 1
    assert {k: more[k] for k in more if k not in plain} == topology_scores(p > 0, t > 0)
    assert cl_dice(p, t) == more["cldice"] and betti_errors(p, t)["b0"] == 1
    empty = case_metrics(t * 0, t * 0, topology=True)
    assert (empty["cldice"], empty["betti0"]) == (1, 0)


@pytest.mark.parametrize("spacing", [None, (3.0, 0.7)])
@pytest.mark.parametrize("tolerance", [0, 1.5, 3, 50])
def test_surface_scores_of_a_case_are_those_of_their_functions(spacing, tolerance):
    p, t = (b.astype(int) for b in blobs(4, (48, 48)))
    r = case_metrics(p, t, spacing=spacing, tolerance=tolerance)
    assert r["sdsc"] == surface_dice(p, t, tolerance, spacing) and r["hd95"] == hausdorff(
        p, t, 95, spacing
    )
    assert case_metrics(p, t, spacing=spacing)["sdsc"] == surface_dice(p, t, 3.0, spacing)


def test_a_case_searches_its_surfaces_once_per_class(monkeypatch):
    calls = []
    monkeypatch.setattr(
        metrics, "surface_distances", lambda *a, **k: calls.append(1) or surface_distances(*a, **k)
    )
    t = np.zeros((20, 20), int)
    t[:8, :8] = 1
    t[12:, 12:] = 2
    case_metrics(np.roll(t, 1, 1), t, classes=("background", "a", "b"))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "empty, hd", [("diagonal", np.hypot(19, 19)), ("zero", 0), ("nan", np.nan)]
)
def test_a_missed_class_keeps_the_policy_of_its_distance(empty, hd):
    t = np.zeros((20, 20), int)
    t[4:9, 4:9] = 1
    r = case_metrics(t * 0, t, empty=empty)
    assert r["hd95"] == pytest.approx(hd, nan_ok=True) and (r["sdsc"], r["missed"]) == (0, 1)
    assert case_metrics(t, t * 0, empty=empty)["missed"] == 0


@pytest.mark.parametrize("tolerance", [-1, float("nan")])
def test_a_case_refuses_a_tolerance(tolerance):
    some = np.zeros((8, 8), int)
    some[2:5, 2:5] = 1
    for pred in (some, some * 0):
        with pytest.raises(InputError, match="tolerance"):
            case_metrics(pred, some, tolerance=tolerance)


# ---------------------------------------------------------------- released definitions
def test_released_constants():
    pred, target = two_cells()
    r = released_metrics(pred, target)
    assert r["aji"] == pytest.approx(0.9091, abs=5e-5) and r["pq"] == pytest.approx(
        0.9091, abs=5e-5
    )
    assert r["dsc"] == pytest.approx(400 / 420)
    assert released_pq(pred, target, binary=False) == 0


def test_released_edge_cases():
    none = np.zeros((20, 20), int)
    some = np.zeros((20, 20), int)
    full = np.ones((20, 20), int)
    some[2:12, 2:12] = 1
    small = none.copy()
    small[:5, :5] = 1  # 25 px: removed from a prediction, kept in a target
    assert released_hd(none, some) == released_hd(some, none) == released_hd(none, none) == 0
    assert released_dice(none, none) == 1 and released_dice(none, some) == 0
    assert released_dice(small, none) == 1 and released_dice(small, small) == 0
    assert released_aji(none, none) == released_pq(none, none) == 0
    assert released_aji(full, full) == 0 and released_aji(some, some) == 1
    assert released_pq(some, some) == pytest.approx(1, abs=1e-5)
    half = some.copy()
    half[2:8] = 0  # IoU 0.4
    assert released_pq(half, some, min_size=0) == 0 and released_aji(
        half, some, min_size=0
    ) == pytest.approx(0.4)


def test_released_hd_pools_both_directions():
    a, b = blobs(1, (64, 64))
    d = np.concatenate(surface_distances(a, b))
    assert released_hd(a, b) == np.percentile(d, 95)
    assert (
        min(np.percentile(x, 95) for x in surface_distances(a, b))
        <= released_hd(a, b)
        <= hausdorff(a, b, 95)
    )


# ---------------------------------------------------------------- units
def surface_dice_in_steps(pred, target, reach, ratio):
    """Surface Dice counted in whole numbers: squared distances in steps of `ratio` per axis,
    `reach` steps allowed."""
    a, b = (np.argwhere(find_surface(m)) * np.array(ratio) for m in (pred, target))
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    near = (squares.min(1) <= reach**2).sum() + (squares.min(0) <= reach**2).sum()
    return near / (len(a) + len(b))


@pytest.mark.parametrize(
    "unit",
    [1.0, 0.1, 0.3, 0.7, 1e-3, 1e-6, 25.4, float(np.float32(0.1)), float(np.float32(6.5e-4))],
)
@pytest.mark.parametrize(
    "shape, ratio",
    [((40, 44), (1, 1)), ((40, 44), (3, 4)), ((12, 20, 24), (5, 2, 2)), ((12, 20, 24), (1, 1, 1))],
)
def test_surface_dice_is_the_same_in_every_unit(unit, shape, ratio):
    a, b = blobs(3, shape)
    spacing = tuple(unit * r for r in ratio)
    for reach in (0, 1, 2, 3, 4, 5, 10):  # (3, 4) and 5: a diagonal on the cliff
        want = surface_dice_in_steps(a, b, reach, ratio)
        assert surface_dice(a, b, reach * unit, spacing) == pytest.approx(want, abs=1e-12)
        assert case_metrics(a.astype(int), b.astype(int), spacing=spacing, tolerance=reach * unit)[
            "sdsc"
        ] == pytest.approx(want, abs=1e-12)
    for q in (50, 95, 100):
        assert hausdorff(a, b, q, spacing) == pytest.approx(
            unit * hausdorff(a, b, q, ratio), rel=1e-9
        )


@pytest.mark.parametrize(
    "voxels, mm", [(30, 0.1), (10, 0.3), (5, 0.6), (3, 0.7), (3, 1.1), (6, 0.65), (7, 0.15)]
)
@pytest.mark.parametrize("start", [0, 7, 5000])
def test_voxels_at_the_tolerance_are_within_wherever_they_lie(voxels, mm, start):
    a, b = np.zeros((2, 5060, 3), bool)
    a[start : start + 3] = True
    b[start + voxels : start + voxels + 3] = True
    for k in (1, 1000):  # mm and µm
        assert surface_dice(a, b, k * round(voxels * mm, 6), k * mm) == 1
        assert (
            surface_dice(a, b, 0.999 * k * voxels * mm, k * mm)
            == surface_dice(a, b, voxels - 0.001)
            < 1
        )


def test_the_slack_is_far_below_what_an_image_can_show():
    a, b = np.zeros((2, 20, 3), bool)
    a[2] = True
    b[5] = True
    assert surface_dice(a, b, 3 * (1 - 2e-6)) == 0 and surface_dice(a, b, 3 * (1 - 1e-7)) == 1


def test_surface_dice_is_monais_in_several_units():
    from monai.metrics import compute_surface_dice

    a, b = blobs(5, (48, 40))
    x, y = (torch.tensor(m)[None, None].float() for m in (a, b))
    for mm, tolerance in (
        (1.0, 2.5),
        (0.1, 0.25),
        (0.3, 1.0),
        (6.5e-4, 2e-3),
    ):  # not on a cliff, where MONAI follows the rounding
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = compute_surface_dice(
                x, y, class_thresholds=[tolerance], include_background=True, spacing=(mm, mm)
            ).item()
        assert surface_dice(a, b, tolerance, mm) == pytest.approx(theirs, rel=1e-6)


def test_an_iou_of_exactly_a_threshold_is_no_match():
    target, pred = np.zeros((2, 1, 10), int)
    target[0, :4] = 1
    pred[0, :2] = 1  # IoU 2/4
    assert panoptic_quality(pred, target).tp == 0
    target[0, :5] = 1
    pred[0, :3] = 1  # IoU 3/5
    assert (
        panoptic_quality(pred, target, threshold=0.6).tp == 0
        and panoptic_quality(pred, target).tp == 1
    )


@pytest.mark.parametrize("tolerance", [None, "3", float("nan"), -1])
def test_a_tolerance_is_a_number_of_at_least_zero(tolerance):
    with pytest.raises(InputError, match="tolerance is"):
        surface_dice(np.eye(4), np.eye(4), tolerance)


@pytest.mark.parametrize("spacing", ["a", [[1], [1, 2]], (1, 2, 3), 0, (1, float("inf"))])
def test_a_spacing_is_a_positive_number_an_axis(spacing):
    with pytest.raises(InputError, match="one positive number per axis"):
        hausdorff(np.eye(4), np.eye(4), 95, spacing)
