"""Micro-CT slices: invariances, edge cases, and the way back, on small random slices."""

import numpy as np
import pytest
from skimage.morphology import closing, disk, footprint_rectangle, opening

from unpaired_kd.core import InputError
from unpaired_kd.data.sets.microct import (
    EDGES,
    cluster_greys,
    cut,
    find_bone,
    find_tissue,
    lay_tiles,
    paste,
    patch_side,
    preprocess_microct,
    select_tiles,
    stretch,
    tissue_shares,
    view_windows,
)

R = np.random.default_rng(0)
HOLES = np.kron(
    np.random.default_rng(1).random((30, 30)) > 0.08, np.ones((4, 4))
)  # what the closing has to bridge
PLATE = np.where(np.hypot(*np.mgrid[-60:60, -60:60]) < 40, 200.0, 40.0) + R.normal(0, 5, (120, 120))


@pytest.mark.parametrize("a, b", [(1, 0), (-1, 0), (3.0, -500), (1e-3, 7), (1, 1e5)])
def test_stretch_does_not_see_units(a, b):
    want = stretch(PLATE) if a > 0 else 1 - stretch(PLATE)
    assert np.allclose(stretch(a * PLATE + b), want, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_stretch_saturates_the_share_and_keeps_the_order(dtype):
    a = (PLATE * 1).astype(dtype)
    for share in (0, 0.01, 0.1):
        x = stretch(a, share)
        assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1
        assert (np.diff(x.ravel()[np.argsort(a.ravel(), kind="stable")]) >= 0).all()
        for end in ((x == 0).mean(), (x == 1).mean()):
            assert (
                share - 0.001 <= end < share + (0.02 if a.dtype.kind == "f" else 0.06)
            )  # whole numbers have ties


def test_broken_pixels_do_not_matter():
    hot = PLATE.copy()
    hot[0, :5] = 1e6
    assert np.abs(stretch(hot) - stretch(PLATE))[1:].max() < 0.02


def test_constant_negative_and_nearly_constant():
    for a in (np.zeros((9, 9)), np.full((9, 9), -7.0), np.full((9, 9), 255, np.uint8)):
        image, mask = preprocess_microct(a)
        assert (
            not image.any()
            and not mask.any()
            and not find_tissue(a).any()
            and not len(select_tiles(a, 3))
        )
    assert preprocess_microct(PLATE - 1000)[1].any()
    one = np.zeros((50, 50))
    one[3, 3] = 1
    assert stretch(one)[3, 3] == 1 and stretch(one).sum() == 1


@pytest.mark.parametrize(
    "bad, says",
    [
        (np.where(PLATE > 200, np.nan, PLATE), "NaN"),
        (np.where(PLATE > 200, np.inf, PLATE), "infinity"),
        (np.zeros((3, 9, 9)), "one grey slice"),
        (np.zeros((0, 9)), "one grey slice"),
        (np.zeros((9, 9), complex), "type"),
        (np.array([["a"]]), "type"),
    ],
)
def test_faulty_slices(bad, says):
    for function in (stretch, find_bone, preprocess_microct, find_tissue):
        if function is find_tissue and says == "one grey slice" and bad.ndim == 3:
            continue
        with pytest.raises(InputError, match=says):
            function(bad)


def test_faulty_arguments():
    for call in (
        lambda: stretch(PLATE, 0.5),
        lambda: stretch(PLATE, -0.1),
        lambda: find_bone(PLATE, "otzu"),
        lambda: find_bone(PLATE, "kmeans", "largest"),
        lambda: find_bone(PLATE, sigma=-1),
        lambda: cluster_greys(np.zeros((4, 4))),
        lambda: cluster_greys(PLATE),
        lambda: paste(np.zeros((9, 3, 4)), lay_tiles((9, 9), 3)),
        lambda: lay_tiles((9, 9), 3, "wrap"),
        lambda: lay_tiles((9, 9), 10),
        lambda: lay_tiles((9, 9), 0),
        lambda: lay_tiles((9, 9), 2.5),
        lambda: lay_tiles((3, 9, 9), 3),
        lambda: patch_side((9, 9), 0),
        lambda: patch_side((9, 9), 10),
        lambda: cut(np.zeros((9, 8)), lay_tiles((9, 9), 3)),
        lambda: paste(np.zeros((8, 3, 3)), lay_tiles((9, 9), 3)),
        lambda: select_tiles(PLATE, 10, mask=np.ones((9, 9), bool)),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("side, radius", [(3, 2), (8, 5), (20, 7)])
def test_morphology_is_the_textbook_one(side, radius):
    plate = PLATE * HOLES
    rough = find_bone(plate, open_px=0, close_px=0, sigma=1)
    ours = find_bone(plate, open_px=side, close_px=0, sigma=1)
    assert (ours <= rough).all()
    if side % 2:
        assert np.array_equal(
            ours, opening(rough, footprint_rectangle((side, side)), mode="ignore")
        )
    both = find_bone(plate, open_px=side, close_px=radius, sigma=1)
    assert (both >= ours).all() and np.array_equal(both, closing(ours, disk(radius), mode="ignore"))
    shut = find_bone(plate, open_px=0, close_px=radius, sigma=1)
    assert (
        (shut > rough).any()
        and (shut >= rough).all()
        and np.array_equal(shut, closing(rough, disk(radius), mode="ignore"))
    )


def test_closing_fills_a_lacuna_and_the_image_keeps_it():
    hole = PLATE.copy()
    hole[57:63, 55:65] = 40
    image, mask = preprocess_microct(hole, open_px=8, close_px=10)
    assert mask[57:63, 55:65].all() and image[57:63, 55:65].mean() < 0.2 and not image[~mask].any()
    assert not preprocess_microct(hole, open_px=8, close_px=0)[1][58:62, 57:63].any()


def test_cluster_choice_and_the_released_road():
    three = np.full((90, 90), 100.0) + R.normal(0, 2, (90, 90))
    three[:, :30] -= 60
    three[40:50, 40:50] += 80  # dark third, bright 1 %
    few = find_bone(three, "kmeans", "brightest", open_px=0, close_px=0)
    assert (
        few[42:48, 42:48].all()
        and few.mean() < 0.03
        and np.array_equal(few, find_bone(three, "kmeans", "smallest", open_px=0, close_px=0))
    )
    dense = 300 - three  # now the rare cluster is the darkest
    assert (
        find_bone(dense, "kmeans", "brightest", open_px=0, close_px=0)[:, :25].all()
        and not find_bone(dense, "kmeans", "smallest", open_px=0, close_px=0)[:, :25].any()
    )
    shifted = three - np.median(three) - 1
    for a, road in ((three, "otsu"), (shifted, "kmeans")):
        assert np.array_equal(find_bone(a, "released", "smallest"), find_bone(a, road, "smallest"))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    "shape, side", [((12, 12), 4), ((13, 17), 4), ((5, 40), 5), ((7, 7), 7), ((9, 6), 1)]
)
def test_back_is_the_inverse(shape, side, edge):
    t = lay_tiles(shape, side, edge)
    covered = paste(np.ones((len(t), side, side), np.uint8), t)
    assert edge == "drop" or covered.all()
    assert covered.sum() >= (shape[0] // side) * (shape[1] // side) * side**2
    for a in (
        R.random(shape),
        R.random((2, *shape), np.float32),
        R.integers(0, 9, shape),
        R.random(shape) > 0.5,
    ):
        b = paste(cut(a, t), t)
        assert b.dtype == a.dtype and np.array_equal(
            np.where(covered, b, 0), np.where(covered, a, 0)
        )


def test_tiles_without_overlap_are_views_and_pieces_add_up():
    a = R.random((66, 99))
    assert np.shares_memory(view_windows(a, 33), a) and np.array_equal(
        view_windows(a, 33)[::33, ::33].reshape(-1, 33, 33), cut(a, lay_tiles(a.shape, 33))
    )
    t = lay_tiles(a.shape, 33)
    assert np.array_equal(
        np.concatenate([cut(a, t[i : i + 4]) for i in range(0, len(t), 4)]), cut(a, t)
    )
    assert (
        len(t[[]]) == 0
        and cut(a, t[[]], size=64).shape[0] == 0
        and np.isnan(paste(cut(a, t[[]]), t[[]], fill=np.nan)).all()
    )


def test_overlaps_are_averaged_and_labels_are_not():
    t = lay_tiles((4, 6), 4, "shift")  # columns 2..3 are seen twice
    parts = np.stack([np.zeros((4, 4)), np.ones((4, 4))])
    assert paste(parts, t)[0].tolist() == [0, 0, 0.5, 0.5, 1, 1] and paste(
        (parts * 2).astype(int), t
    )[0].tolist() == [0, 0, 2, 2, 2, 2]


def test_resized_labels_stay_labels_and_come_back():
    a = np.kron(R.integers(0, 5, (6, 6)), np.ones((4, 4), int))
    t = lay_tiles(a.shape, 12)
    big = cut(a, t, size=36, label=True)
    assert (
        big.shape == (4, 36, 36)
        and set(np.unique(big)) <= set(np.unique(a))
        and np.array_equal(paste(big, t), a)
    )
    assert cut(a.astype(float), t, size=36).shape == (4, 36, 36)


def test_tissue_by_green_and_threshold_is_strict():
    rgb = np.stack(
        [R.random((40, 40)), np.repeat([1.0, 0], 20)[:, None] * np.ones(40), R.random((40, 40))]
    )
    assert (
        find_tissue(rgb)[:20].all()
        and not find_tissue(rgb)[20:].any()
        and find_tissue(rgb, bright=False)[20:].all()
    )
    mask = np.zeros((10, 30), bool)
    mask[:, :10] = True
    mask[:9, 10:20] = True
    t = lay_tiles(mask.shape, 10)
    assert np.allclose(tissue_shares(mask, t), [1, 0.9, 0])
    assert (
        len(select_tiles(mask * 1.0, 10, 0.9, mask)) == 1
        and len(select_tiles(mask * 1.0, 10, 0.89, mask)) == 2
    )


def test_the_released_method_is_chosen_by_the_slice_as_it_was_read():
    "Values in [-1, 0] are clustered as in the release; stretched, they would take Otsu's."
    g = np.random.default_rng(0)
    x = np.where(g.random((60, 60)) < 0.3, 0.8, 0.2) + 0.05 * g.standard_normal((60, 60))
    raw = (x - x.max()) / np.ptp(x)
    sizes = dict(open_px=0, close_px=0)
    chosen = preprocess_microct(raw, method="released", cluster="smallest", **sizes)[1]
    kmeans = preprocess_microct(raw, method="kmeans", cluster="smallest", **sizes)[1]
    otsu = preprocess_microct(raw, method="otsu", **sizes)[1]
    assert (chosen == kmeans).all() and (kmeans != otsu).any()
    counts = preprocess_microct(raw + 1, method="released", cluster="smallest", **sizes)[1]
    assert (counts == otsu).all()
    assert (find_bone(raw, "released", "smallest", **sizes) == kmeans).mean() > 0.9


def test_a_tile_needs_more_than_nine_tenths_of_tissue():
    mask = np.zeros((10, 30), bool)
    mask[:, :8] = True  # 80 % of the first tile,
    mask[:, 10:19] = True  # 90 % of the second,
    mask[:, 20:30] = True
    mask[0, 20:25] = False  # 95 % of the third
    at = select_tiles(np.zeros((10, 30)), 10, mask=mask)
    assert at.cols.tolist() == [20]
    assert select_tiles(np.zeros((10, 30)), 10, 0.7, mask=mask).cols.tolist() == [0, 10, 20]


def test_one_per_cent_saturates_at_each_end():
    x = stretch(np.arange(10_000.0).reshape(100, 100))
    assert 99 <= (x == 0).sum() <= 101 and 99 <= (x == 1).sum() <= 101
    low, high = np.quantile(np.arange(10_000.0), (0.01, 0.99))
    assert x[50, 0] == pytest.approx((5000 - low) / (high - low), abs=1e-6)
