"""Topology: Betti numbers against homology computed from scratch, skeletons, clDice, and the two
losses."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import euler_number
from skimage.morphology import skeletonize

from unpaired_kd.core import InputError, rng, torch_rng
from unpaired_kd.losses.topology import (
    count_erosions,
    make_tube,
    skeleton_recall_loss,
    soft_cl_dice_loss,
    soft_skeleton,
)
from unpaired_kd.metrics import topology
from unpaired_kd.metrics.segmentation import dice, hausdorff
from unpaired_kd.metrics.topology import (
    betti_errors,
    betti_numbers,
    cl_dice,
    skeletonise,
    topology_precision,
    topology_scores,
    topology_sensitivity,
)


def ball(radius, centre, shape=(20, 20, 20)):
    return (
        sum((g - c) ** 2 for g, c in zip(np.ogrid[tuple(map(slice, shape))], centre)) <= radius**2
    )


def torus(shape=(15, 27, 27)):
    z, y, x = (g - n // 2 for g, n in zip(np.ogrid[tuple(map(slice, shape))], shape))
    return (np.hypot(y, x) - 8) ** 2 + z**2 <= 9


def tubes(seed, n=3, size=32):
    "Straight tubes from the first slice to the last."
    r = rng(seed, "test tubes")
    out = np.zeros((size,) * 3, bool)
    z, y, x = np.ogrid[:size, :size, :size]
    for _ in range(n):
        a, b = r.uniform(5, size - 5, (2, 2))
        c = a[:, None, None, None] + (b - a)[:, None, None, None] * z / (size - 1)
        out |= (y - c[0]) ** 2 + (x - c[1]) ** 2 <= r.uniform(1.5, 3.5) ** 2
    return out


BODIES = {
    "torus": (torus(), (1, 1, 0)),
    "shell": (ball(8, (9.5,) * 3) & ~ball(5, (9.5,) * 3), (1, 0, 1)),
    "two balls": (ball(4, (5, 5, 5)) | ball(5, (14, 14, 14)), (2, 0, 0)),
    "empty": (np.zeros((6, 6, 6), bool), (0, 0, 0)),
    "full": (np.ones((4, 5, 6), bool), (1, 0, 0)),
    "corner contact": (np.eye(4, dtype=bool)[:, :, None] & np.eye(4, dtype=bool), (1, 0, 0)),
}


# ---------------------------------------------------------------- Betti numbers
@pytest.mark.parametrize("name", BODIES)
def test_betti_numbers_of_known_bodies(name):
    mask, expected = BODIES[name]
    assert betti_numbers(mask) == expected
    assert betti_numbers(np.pad(mask, 3)) == expected
    assert betti_numbers(mask.transpose(2, 0, 1)) == expected
    assert betti_numbers(torch.tensor(mask).long() * 7) == expected


def homology(mask):
    "Betti numbers over GF(2) from ranks of boundary matrices; cells in doubled coordinates."
    cells = {
        tuple(2 * v + 1 + o)
        for v in np.argwhere(mask)
        for o in itertools.product((-1, 0, 1), repeat=mask.ndim)
    }
    level = [sorted(c for c in cells if sum(x % 2 for x in c) == d) for d in range(mask.ndim + 1)]
    ranks = [0]
    for d in range(1, mask.ndim + 1):
        index = {c: i for i, c in enumerate(level[d - 1])}
        pivots = {}
        for c in level[d]:
            row = 0
            for axis, x in enumerate(c):
                if x % 2:
                    for step in (-1, 1):
                        row ^= 1 << index[c[:axis] + (x + step,) + c[axis + 1 :]]
            while row and row.bit_length() in pivots:
                row ^= pivots[row.bit_length()]
            if row:
                pivots[row.bit_length()] = row
        ranks.append(len(pivots))
    b = [
        len(level[d]) - ranks[d] - (ranks[d + 1] if d < mask.ndim else 0)
        for d in range(mask.ndim + 1)
    ]
    return tuple((b + [0])[:3])


@pytest.mark.parametrize("seed", range(12))
def test_betti_numbers_are_homology(seed):
    shape = [(5, 5, 5), (4, 6, 5), (9, 11)][seed % 3]
    mask = rng(seed, "noise").random(shape) < 0.25 + 0.05 * seed
    assert betti_numbers(mask) == homology(mask)


def test_homology_finds_a_cavity():
    m = np.ones((3, 3, 3), bool)
    m[1, 1, 1] = False
    assert homology(m) == betti_numbers(m) == (1, 0, 1)
    m[1, 1, 0] = False  # the bubble is open to one side
    assert homology(m) == betti_numbers(m) == (1, 0, 0)


@pytest.mark.parametrize("shape", [(12, 13, 14), (30, 31), (1, 9, 9), (3, 20, 20)])
def test_euler_is_scikit_images(shape):
    for k in range(3):
        m = rng(k, "euler").random(shape) < 0.4
        b = betti_numbers(m)
        assert b[0] - b[1] + b[2] == euler_number(m, connectivity=m.ndim)


def test_betti_numbers_are_gudhis():
    import gudhi

    for k in range(20):
        m = tubes(k)
        field = gudhi.CubicalComplex(top_dimensional_cells=np.where(m, 0.0, 1.0))
        field.compute_persistence(homology_coeff_field=2, min_persistence=0)
        assert tuple(field.persistent_betti_numbers(0, 0.5)[:3]) == betti_numbers(m), k


def test_two_dimensions():
    y, x = np.ogrid[:30, :30]
    ring = abs(np.hypot(y - 15, x - 15) - 9) < 2
    assert betti_numbers(ring) == (1, 1, 0)
    assert betti_numbers(ring | (np.hypot(y - 15, x - 15) < 3)) == (2, 1, 0)
    assert betti_numbers(np.eye(5)) == (1, 0, 0)  # corners hold together


def test_errors_do_not_cancel_between_cubes():
    p, t = np.zeros((2, 16, 16, 32), bool)
    p[4:6, 4:6, 4:6] = True
    t[4:6, 4:6, 24:26] = True  # one too many on the left, one missing on the right
    assert betti_errors(p, t, cube=64)["b0"] == 0
    assert betti_errors(p, t, cube=16) == dict(b0=1, b1=0, b2=0)
    p[4:6, 4:6, 24:26] = True
    assert betti_errors(p, t, cube=16)["b0"] == 0.5  # a mean over two cubes


def test_cubes_are_equal_parts(monkeypatch):
    seen = []
    monkeypatch.setattr(topology, "betti_numbers", lambda m: seen.append(m.shape) or (0, 0, 0))
    betti_errors(np.zeros((16, 65, 128), bool), np.zeros((16, 65, 128), bool))
    assert (
        {s[0] for s in seen} == {16}
        and {s[1] for s in seen} == {32, 33}
        and {s[2] for s in seen} == {64}
        and len(seen) == 8
    )


# ---------------------------------------------------------------- skeletons and clDice
@pytest.mark.parametrize("width", range(1, 7))
def test_no_bar_vanishes(width):
    m = np.pad(np.ones((width, width, 20), bool), 2)
    s = skeletonise(m)
    assert s.sum() >= 19 - width and (s <= m).all()
    assert betti_numbers(s)[0] == 1


@pytest.mark.parametrize("shape", [(14, 14, 14), (40, 40)])
def test_every_piece_has_a_skeleton(shape):
    for k in range(4):
        m = ndimage.gaussian_filter(rng(k, "pieces").normal(size=shape), 1) > 0.35
        s = skeletonise(m)
        (names, n) = ndimage.label(m, np.ones((3,) * m.ndim))
        assert (s <= m).all() and len(np.unique(names[s])) == n > 3


@pytest.mark.parametrize("seed", range(3))
def test_skeleton_keeps_the_topology_and_is_near_the_librarys(seed):
    m = tubes(seed)
    s = skeletonise(m)
    assert betti_numbers(s) == betti_numbers(m)
    theirs = skeletonize(m)  # most of it within a voxel; what they lose is kept here
    assert (
        np.median(ndimage.distance_transform_edt(~theirs)[s]) <= 1
        and abs(int(s.sum()) - int(theirs.sum())) < 0.2 * theirs.sum()
    )
    assert np.array_equal(
        skeletonise(np.pad(m, ((5, 0), (0, 9), (3, 3)))), np.pad(s, ((5, 0), (0, 9), (3, 3)))
    )


def simple(n):
    """Whether the middle of a 3x3x3 (or 3x3) neighbourhood may go without a change of the
    topology: by Betti numbers, of mask and background."""
    with_it = n.copy()
    without = n.copy()
    middle = (1,) * n.ndim
    with_it[middle] = True
    without[middle] = False
    return betti_numbers(with_it) == betti_numbers(without)


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 3)])
def test_what_may_go_is_what_changes_no_betti_number(shape):
    r = rng(0, "simple")
    masks = (
        [r.random(shape) < p for p in np.linspace(0.05, 0.95, 600)]
        if len(shape) == 3
        else [(np.array(list(f"{k:09b}")) == "1").reshape(3, 3) for k in range(512)]
    )
    codes = np.array([sum(int(v) << i for i, v in enumerate(m.ravel())) for m in masks], np.int32)
    found = topology._removable(codes) if len(shape) == 3 else topology._PLANE[codes]
    for m, may in zip(masks, found):
        around = int(m.sum() - m[(1,) * m.ndim])
        assert may == (around > 1 and simple(m)), m


@pytest.mark.parametrize("shape", [(16, 17, 18), (50, 51)])
def test_every_topology_is_kept_and_the_skeleton_is_thin(shape):
    for k in range(6):
        m = ndimage.gaussian_filter(rng(k, "any topology").normal(size=shape), 0.6) > 0.1 * k
        s = skeletonise(m)
        assert (s <= m).all() and betti_numbers(s) == betti_numbers(m)
        assert np.array_equal(skeletonise(s), s)  # nothing is left that may go


AXES = np.eye(3, dtype=int)
ARMS = {
    "cross": [(0, 1), (0, -1), (1, 0), (-1, 0)],
    "turned cross": [(1, 1), (1, -1), (-1, -1), (-1, 1)],
    "T": [(0, 1), (0, -1), (1, 0)],
    "Y": [(1, 0), (-0.5, 0.866), (-0.5, -0.866)],
    "cross zx": [(0, 0, 1), (0, 0, -1), (1, 0, 0), (-1, 0, 0)],
    "cross zy": [(0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0)],
    "cross yx": [(0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)],
    "turned cross yx": [(0, 1, 1), (0, 1, -1), (0, -1, -1), (0, -1, 1)],
    "turned cross zy": [(1, 1, 0), (1, -1, 0), (-1, -1, 0), (-1, 1, 0)],
    "diagonals": [(1, 1, 1), (-1, -1, -1), (1, -1, 1), (-1, 1, -1)],
    "star": [*map(tuple, AXES), *map(tuple, -AXES)],
    "T zx": [(0, 0, 1), (0, 0, -1), (1, 0, 0)],
    "Y zy": [(1, 0, 0), (-0.5, 0.866, 0), (-0.5, -0.866, 0)],
    "Y zx": [(0, 0, 1), (0.866, 0, -0.5), (-0.866, 0, -0.5)],
}


def bars(directions, width, length=16):
    """Bars from one point: square ones along the axes, round ones in other directions; each bar
    as a mask, and the directions as unit vectors."""
    dims = len(directions[0])
    n = 2 * (length + 4) + width
    at = np.moveaxis(np.indices((n,) * dims), 0, -1) - (n - 1) / 2
    arms = []
    units = []
    for d in directions:
        u = np.array(d) / np.linalg.norm(d)
        along = at @ u
        square = np.count_nonzero(d) == 1
        off = at - along[..., None] * u
        thick = (
            np.abs(off).max(-1) < width / 2
            if square
            else np.linalg.norm(off, axis=-1) < width / 2 + 0.25
        )
        arms.append(thick & (along >= -width / 2) & (along <= length + width / 2))
        units.append(u)
    return arms, units


@pytest.mark.parametrize("width", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_a_thick_tree_has_a_skeleton_to_its_end(name, width):
    arms, units = bars(ARMS[name], width)
    whole = np.any(arms, 0)
    s = skeletonise(whole)
    assert betti_numbers(s) == betti_numbers(whole) == (1, 0, 0)
    shares = []
    for k, (arm, u) in enumerate(zip(arms, units)):
        others = np.any(arms[:k] + arms[k + 1 :], 0)
        own = arm & ~others
        gap = (np.argwhere(own) @ u).max() - (np.argwhere(own & s) @ u).max()
        assert gap <= width / 2 + 1.5  # half the width, and one step along the bar
        shares.append(np.count_nonzero(s & others) / np.count_nonzero(s))
        assert cl_dice(others, whole) < 1 - 0.4 / len(arms)  # without the arm
    assert topology_sensitivity(others, whole) == shares[-1]
    equal = 1 - 1 / len(arms)  # an arm is a fair share of the skeleton
    assert max(shares) - min(shares) < 0.08 and abs(np.mean(shares) - equal) < 0.08


@pytest.mark.parametrize("slope", [(1, 1), (1, 2), (2, 1), (1, 3), (1, -1), (-2, 1)])
def test_thin_diagonals_keep_their_length(slope):
    "Two pixels wide: the 2-D thinning of scikit-image leaves 2 pixels of some."
    t = np.linspace(0, 1, 400)[:, None]
    line = np.round(40 + 15 * t * slope * np.array([1, 1])).astype(int)
    for more in ((0, 1), (1, 0)):
        m = np.zeros((90, 90), bool)
        m[tuple(line.T)] = m[tuple((line + more).T)] = True
        s = skeletonise(m)
        assert s.sum() >= 15 * max(map(abs, slope)) - 1 and betti_numbers(s) == (1, 0, 0)


def test_cl_dice_is_the_harmonic_mean():
    """A line of ten, of which six are found, and three wrong ones: precision 2/3, sensitivity
    6/10, harmonic mean 12/19."""
    t, p = np.zeros((2, 9, 30), bool)
    t[1, 2:12] = True
    p[1, 2:8] = True
    p[6, 10:13] = True  # one voxel wide: every voxel is skeleton
    assert topology_precision(p, t) == pytest.approx(6 / 9) and topology_sensitivity(
        p, t
    ) == pytest.approx(0.6)
    assert cl_dice(p, t) == pytest.approx(12 / 19) and topology_scores(p, t)[
        "cldice"
    ] == pytest.approx(12 / 19)


def test_skeleton_of_odd_inputs():
    assert skeletonise(np.ones((1, 1))).sum() == 1 and skeletonise(np.ones((2, 2, 2))).sum() >= 1
    assert skeletonise(np.zeros((3, 4, 5))).shape == (3, 4, 5)
    m = tubes(0)
    assert np.array_equal(skeletonise(np.asfortranarray(m)), skeletonise(m))
    assert np.array_equal(skeletonise(torch.tensor(m)), skeletonise(m.astype(np.uint8) * 3))


def test_cl_dice_of_identical_masks_is_one():
    for m in (tubes(1), torus(), ball(3, (9.5,) * 3), np.eye(6)):
        assert cl_dice(m, m) == 1


@pytest.mark.parametrize("score", [cl_dice, topology_precision, topology_sensitivity])
def test_empty_masks(score):
    m = tubes(0)
    none = np.zeros((32, 32, 32), bool)
    assert [score(none, none), score(none, m), score(m, none)] == [1, 0, 0]


def test_empty_masks_in_the_table():
    none = np.zeros((32, 32, 32), bool)
    m = tubes(0)
    assert topology_scores(none, none) == dict(
        cldice=1, tprec=1, tsens=1, betti0=0, betti1=0, betti2=0
    )
    missed = topology_scores(none, m)
    assert (
        missed["cldice"] == 0
        and missed["betti0"] == betti_numbers(m)[0]
        and all(np.isfinite(list(missed.values())))
    )


def test_precision_and_sensitivity_change_places():
    a = tubes(1)
    b = tubes(1) | tubes(2)
    assert topology_precision(a, b) == topology_sensitivity(b, a) == 1
    assert topology_sensitivity(a, b) < 1 and cl_dice(a, b) == cl_dice(b, a)


def test_table_is_the_single_scores_with_each_skeleton_once(monkeypatch):
    p = tubes(1)
    t = tubes(2)
    expected = dict(
        cldice=cl_dice(p, t),
        tprec=topology_precision(p, t),
        tsens=topology_sensitivity(p, t),
        **{"betti" + k[1]: v for k, v in betti_errors(p, t, 16).items()},
    )
    calls = []
    real = topology.skeletonise
    monkeypatch.setattr(topology, "skeletonise", lambda m: calls.append(1) or real(m))
    assert topology_scores(p, t, 16) == expected and len(calls) == 2


def test_planar_cuts_move_pieces_and_not_dice():
    target = tubes(4, n=4, size=64)
    cut = target.copy()
    thin = ndimage.binary_erosion(target, border_value=1)
    cut[[16, 32, 48]] = False
    assert dice(cut, target) > 0.95 and cl_dice(cut, target) > 0.95
    assert betti_errors(cut, target)["b0"] >= 3 * betti_numbers(target)[0]
    assert dice(thin, target) < 0.8 < 0.9 < cl_dice(thin, target)


def test_shift_in_depth_costs_more_with_thick_slices():
    m = ball(8, (11.0,) * 3, (24, 24, 24))
    shifted = np.roll(m, 1, 0)
    assert hausdorff(shifted, m, 95) == 1 and hausdorff(
        shifted, m, 95, spacing=(3, 1, 1)
    ) == pytest.approx(8**0.5)
    t = tubes(3).transpose(1, 0, 2)  # tubes across the slices' normal
    assert (
        hausdorff(np.roll(t, 1, 0), t, 95)
        == 1
        < 2
        < hausdorff(np.roll(t, 1, 0), t, 95, spacing=(3, 1, 1))
        <= 3
    )
    none = np.zeros_like(m)
    for s in (None, (3, 1, 1)):
        penalty = hausdorff(none, m, 95, spacing=s)
        assert np.isfinite(penalty) and penalty == pytest.approx(
            np.linalg.norm(23 * np.array(s or (1, 1, 1)))
        )


@pytest.mark.parametrize("score", [cl_dice, betti_errors, topology_scores])
@pytest.mark.parametrize(
    "bad, word",
    [
        ((np.zeros((4, 4)), np.zeros((4, 5))), "shape"),
        ((np.full((4, 4), 0.5), np.zeros((4, 4))), "threshold"),
        ((np.full((4, 4), np.nan), np.zeros((4, 4))), "NaN"),
        ((np.full((4, 4), -1), np.zeros((4, 4))), "negative"),
        ((np.zeros((1, 4, 4, 4)),) * 2, "channel"),
        ((np.array([["a"]]), np.zeros((1, 1))), "dtype"),
    ],
)
def test_faults(score, bad, word):
    with pytest.raises(InputError, match=word):
        score(*bad)


def test_cube_must_be_a_length():
    for bad in (0, 1, -4, 2.5):
        with pytest.raises(InputError, match="cube"):
            betti_errors(tubes(0), tubes(0), bad)


# ---------------------------------------------------------------- losses
LOSSES = [soft_cl_dice_loss, skeleton_recall_loss]


def batch(dims):
    "Labels (2,*s) of tubes or of lines."
    v = torch.tensor(
        np.stack([tubes(k, size=16) if dims == 3 else tubes(k, size=24).any(2) for k in (0, 1)])
    ).long()
    return v


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dims", [2, 3])
def test_perfect_is_zero_and_wrong_is_not(loss, dims):
    y = batch(dims)
    sure = (y[:, None] * 2.0 - 1) * 50
    assert loss(sure, y).item() == pytest.approx(0, abs=1e-6)
    assert loss(-sure, y).item() > 0.8
    assert loss((sure / 50), y) > loss(sure / 10, y)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("low", [-80.0, 0.0, None])
def test_gradients_are_finite_on_empty_patches(loss, dims, low):
    y = batch(dims) * 0
    x = (
        torch.randn(2, 1, *y.shape[1:], generator=torch_rng(0, "x"))
        if low is None
        else torch.full((2, 1, *y.shape[1:]), low)
    )
    x.requires_grad_()
    value = loss(x, y)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(x.grad).all()
    assert 0 <= value < 1


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_patch_beside_a_full_one_changes_little(loss):
    y = batch(3)[:1]
    x = torch.where(y[:, None] > 0, 3.0, -9.0)
    both = loss(torch.cat([x, torch.full_like(x, -9.0)]), torch.cat([y, 0 * y]))
    assert both.item() == pytest.approx(loss(x, y).item(), abs=0.01)


@pytest.mark.parametrize("loss", LOSSES)
def test_several_classes_are_one_foreground(loss):
    y = batch(3)
    y[:, 8:] *= 2  # labels 0, 1, 2
    x = torch.randn(2, 3, *y.shape[1:], generator=torch_rng(0, "classes"))
    p = x.softmax(1)
    one = torch.log(p[:, 1:].sum(1, keepdim=True) / p[:, :1])
    assert loss(x, y).item() == pytest.approx(loss(one, (y > 0).long()).item(), abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_faults(loss):
    y = batch(3)
    x = torch.zeros(2, 1, *y.shape[1:])
    with pytest.raises(InputError, match="do not fit"):
        loss(x, y[:, 1:])
    with pytest.raises(InputError, match="instance map"):
        loss(x, y * 3)
    with pytest.raises(InputError, match="no labels"):
        loss(x, None)
    with pytest.raises(InputError, match="B,K,H,W"):
        loss(x[:, :, 0, 0], y[:, 0, 0])
    with pytest.raises(InputError, match="smooth"):
        loss(x, y, smooth=0)
    assert torch.isnan(loss(x * float("nan"), y))  # a broken network shows


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss):
    y = batch(3)
    x = torch.randn(2, 1, *y.shape[1:], generator=torch_rng(0, "half")).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, y)
    assert value.dtype == torch.float32 and value.item() == loss(x.float(), y).item()


@pytest.mark.parametrize("dims", [2, 3])
def test_soft_cl_dice_is_monais(dims):
    monai = pytest.importorskip("monai.losses.cldice")
    y = batch(dims)[:1]
    x = torch.randn(1, 1, *y.shape[1:], generator=torch_rng(1, "monai"))
    assert torch.allclose(
        soft_skeleton(torch.sigmoid(x), 4), monai.soft_skel(torch.sigmoid(x), 4), atol=1e-6
    )
    a = x.clone().requires_grad_()
    b = x.clone().requires_grad_()
    ours = soft_cl_dice_loss(a, y, 4)
    theirs = monai.SoftclDiceLoss(iter_=4, sigmoid=True, smooth=1e-12)(b, y[:, None].float())
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert torch.allclose(a.grad, b.grad, atol=1e-7)


def test_iterations_reach_the_radius():
    y = torch.zeros(1, 31, 40).long()
    y[:, 9:22] = 1  # a band of half-width 6
    m = y[:, None].float()
    assert soft_skeleton(m, 3).sum() == 0 and soft_skeleton(m, 6).sum() >= 25
    assert count_erosions(m) == 7 and count_erosions(torch.ones(1, 1, 8, 8)) == 16
    x = torch.where(m > 0, 50.0, -50.0)
    assert soft_cl_dice_loss(x, y).item() == soft_cl_dice_loss(x, y, 7).item()
    with pytest.raises(InputError, match="iterations"):
        soft_cl_dice_loss(x, y, -1)


def test_tube():
    y = batch(3)
    tube = make_tube(y)
    assert tube.dtype == torch.bool and tube.shape == y.shape and (tube <= (y > 0)).all()
    cross = ndimage.generate_binary_structure(3, 1)
    for u, m in zip(tube.numpy(), y.numpy() > 0):
        assert np.array_equal(
            u, ndimage.binary_dilation(ndimage.binary_dilation(skeletonise(m), cross), cross) & m
        )
    assert np.array_equal(make_tube(y.numpy() * 2), tube.numpy())
    assert np.array_equal(make_tube(y, 0)[0], skeletonise(y[0]))
    x = torch.randn(2, 1, *y.shape[1:], generator=torch_rng(0, "tube"))
    assert skeleton_recall_loss(x, y, tube) == skeleton_recall_loss(x, y)
    with pytest.raises(InputError, match="tube"):
        skeleton_recall_loss(x, y, tube[:1])
    with pytest.raises(InputError, match="batch"):
        make_tube(y[0, 0])


def test_recall_sees_misses_and_not_additions():
    y = batch(3)
    assert skeleton_recall_loss(torch.full((2, 1, *y.shape[1:]), 50.0), y).item() == pytest.approx(
        0, abs=1e-6
    )
    half = torch.where(y[:, None] > 0, 50.0, -50.0)
    half[:, :, 8:] = -50
    assert 0.3 < skeleton_recall_loss(half, y) < 0.7


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize(
    "lay",
    [
        np.asfortranarray,
        lambda m: m.copy().T,
        lambda m: m[::-1],
        lambda m: np.stack([m, m])[1],
        lambda m: np.repeat(m, 2, -1)[..., ::2],
    ],
    ids=["columns", "transposed", "backwards", "view", "steps"],
)
@pytest.mark.parametrize("shape", [(17, 24), (9, 12, 14)])
def test_how_an_array_lies_in_memory_does_not_matter(shape, lay):
    "Masks of NIfTI files lie in columns. Each function equals itself on a copy that lies in rows."
    noise = np.random.default_rng(1).random(shape)
    mask = lay((noise > 0.3).astype(np.uint8))
    other = lay((noise > 0.4).astype(np.uint8))
    rows = np.array(mask, order="C")
    others = np.array(other, order="C")
    assert np.array_equal(skeletonise(mask), skeletonise(rows))
    assert topology_scores(mask, other) == topology_scores(rows, others)
    assert betti_numbers(mask) == betti_numbers(rows)


@pytest.mark.parametrize("what", [skeletonise, betti_numbers])
def test_an_array_without_pixels_is_refused(what):
    with pytest.raises(InputError, match=r"shape \(0, 5\): it holds no pixel"):
        what(np.zeros((0, 5)))
