"""Losses and scores on scenes of a few pixels, beside sums written out with Python's numbers."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from unpaired_kd.core import InputError, rng, torch_rng
from unpaired_kd.losses.segmentation import (
    cross_entropy_loss,
    hard_dice_loss,
    released_segmentation_loss,
    segmentation_loss,
    soft_dice_loss,
)
from unpaired_kd.metrics import agreement, image_quality
from unpaired_kd.metrics import segmentation as metrics
from unpaired_kd.metrics.masks import as_labels, as_mask, axis_lengths

NAN = pytest.approx(float("nan"), nan_ok=True)

# ---------------------------------------------------------------- losses


def scene(classes):
    "Logits (2,K,2,3) and labels (2,2,3); the second image lacks the last class."
    x = 2 * torch.randn(2, classes, 2, 3, generator=torch_rng(0, "x"), dtype=torch.float64)
    y = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[0, 0, 1], [0, 0, 0]]])
    if classes == 3:
        y[0, 1] = torch.tensor([2, 2, 0])
    return x, y


def pixels(x, y):
    "(image, scores of all classes, label) of every pixel, as Python's numbers."
    return [
        (b, x[b, :, i, j].tolist(), y[b, i, j].item())
        for b, i, j in product(range(2), range(2), range(3))
    ]


def shares(scores):
    "Probabilities of all classes; of one logit, that of the foreground."
    if len(scores) == 1:
        return [1 / (1 + math.exp(-scores[0]))]
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def masks(scores):
    "1 for the class that wins; of one logit, whether it is above 0."
    if len(scores) == 1:
        return [float(scores[0] > 0)]
    return [float(k == scores.index(max(scores))) for k in range(len(scores))]


def dice_by_hand(x, y, smooth, per_image, background, said=shares):
    one = x.shape[1] == 1
    classes = [0] if one else range(0 if background else 1, x.shape[1])
    groups = [(0,), (1,)] if per_image else [(0, 1)]
    losses = []
    for k, images in product(classes, groups):
        both = pred = true = 0.0
        for b, scores, label in pixels(x, y):
            if b in images:
                p = said(scores)[k]
                t = float(label == (1 if one else k))
                both, pred, true = both + p * t, pred + p, true + t
        losses.append(1 - (2 * both + smooth) / (pred + true + smooth))
    return sum(losses) / len(losses)


def cross_entropy_by_hand(x, y, twice=False):
    parts = []
    for _, scores, label in pixels(x, y):
        p = shares(shares(scores) if twice else scores)
        parts.append(-math.log((1 - p[0], p[0])[label] if len(p) == 1 else p[label]))
    return sum(parts) / len(parts)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes, background", [(1, False), (3, False), (3, True)])
def test_dice_losses_by_hand(classes, background, per_image):
    x, y = scene(classes)
    for smooth in (1.0, 0.25):
        args = (smooth, per_image, background)
        assert soft_dice_loss(x, y, *args).item() == pytest.approx(dice_by_hand(x, y, *args))
        hard = dice_by_hand(x, y, *args, said=masks)
        assert hard_dice_loss(x, y, *args).item() == pytest.approx(hard)


@pytest.mark.parametrize("classes", [1, 3])
def test_segmentation_losses_by_hand(classes):
    x, y = scene(classes)
    ce = cross_entropy_by_hand(x, y)
    assert cross_entropy_loss(x, y).item() == pytest.approx(ce)
    dice = dice_by_hand(x, y, 1.0, False, False)
    assert segmentation_loss(x, y).item() == pytest.approx(dice + 0.5 * ce)
    more = segmentation_loss(x, y, bce=2.0, smooth=0.5, per_image=True).item()
    assert more == pytest.approx(dice_by_hand(x, y, 0.5, True, False) + 2 * ce)
    hard = dice_by_hand(x, y, 1.0, False, False, masks)
    twice = cross_entropy_by_hand(x, y, twice=classes > 1)
    assert released_segmentation_loss(x, y).item() == pytest.approx(hard + 0.5 * twice)
    hard = dice_by_hand(x, y, 3.0, False, False, masks)
    found = released_segmentation_loss(x, y, bce=0.1, smooth=3.0).item()
    assert found == pytest.approx(hard + 0.1 * twice)


# ---------------------------------------------------------------- overlap and surfaces

PRED = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
TRUE = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]])
NONE = np.zeros((3, 4), int)


def test_overlap():
    assert metrics.dice(PRED, TRUE) == pytest.approx(2 * 2 / (4 + 5))
    assert metrics.iou(PRED, TRUE) == pytest.approx(2 / 7)
    for score in (metrics.dice, metrics.iou):
        assert score(NONE, TRUE) == 0 and score(NONE, NONE) == 1
        assert score(NONE, NONE, empty="nan") == NAN


def is_surface(mask, at):
    "Whether a pixel of the mask has a neighbour along an axis that is outside it or the image."
    if not mask[at]:
        return False
    for axis, step in product(range(mask.ndim), (-1, 1)):
        near = [a + step * (i == axis) for i, a in enumerate(at)]
        within = all(0 <= a < s for a, s in zip(near, mask.shape))
        if not within or not mask[tuple(near)]:
            return True
    return False


def surface_points(mask):
    return [at for at in np.ndindex(mask.shape) if is_surface(mask, at)]


def distances(a, b, steps):
    "From every surface pixel of a mask to the nearest one of another; a step a row."
    steps = np.array(steps, float)

    def length(p, q):
        at = sum((x - y) * step for x, y, step in zip(p, q, steps))
        return math.sqrt(sum(at**2))

    return [min(length(p, q) for q in surface_points(b)) for p in surface_points(a)]


def percentile(values, q):
    "With straight lines between the sorted values."
    values = sorted(values)
    at = q / 100 * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def bodies(seed, shape=(7, 8, 9)):
    "Two bodies that overlap, one of them hollow."
    r = rng(seed, "bodies")
    a = np.zeros(shape, bool)
    b = np.zeros(shape, bool)
    a[1:6, 1:6, 1:6] = True
    b[2:7, 2:7, 2:9] = True
    b[4, 4, 4] = False
    return a & (r.random(shape) < 0.95), b


def test_surface():
    for mask in bodies(0):
        assert [tuple(p) for p in np.argwhere(metrics.find_surface(mask))] == surface_points(mask)


class Oblique(tuple):
    "Lengths along the axes, and the steps themselves where they are not at right angles."

    steps = np.array([[2.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3, 0.5]])


@pytest.mark.parametrize("spacing", [None, 2.0, (2.0, 1.0, 0.5), Oblique((2.0, 1.0, 0.5))])
def test_surface_distances_by_hand(spacing):
    a, b = bodies(0)
    steps = getattr(spacing, "steps", np.diag(np.ones(3) * (1 if spacing is None else spacing)))
    there, back = distances(a, b, steps), distances(b, a, steps)
    found = metrics.surface_distances(a, b, spacing)
    assert found[0] == pytest.approx(there) and found[1] == pytest.approx(back)
    for q in (50, 95, 100):
        wanted = max(percentile(there, q), percentile(back, q))
        assert metrics.hausdorff(a, b, q, spacing) == pytest.approx(wanted)
    for tolerance in (0, 0.5, 1.0, 1.9):
        near = sum(d <= tolerance + 1e-9 for d in there + back) / len(there + back)
        found = metrics.surface_dice(a, b, tolerance, spacing)
        assert found == pytest.approx(near) and 0 < near < 1


def test_distances_of_empty_masks():
    "The diagonal of 3 x 4 pixels joins the centres of two corners."
    diagonal = math.sqrt((2 * 2.0) ** 2 + (3 * 1.0) ** 2)
    for pair in ((NONE, TRUE), (TRUE, NONE)):
        assert metrics.hausdorff(*pair, 95, (2.0, 1.0)) == pytest.approx(diagonal)
        assert metrics.hausdorff(*pair, empty="zero") == 0
        assert metrics.hausdorff(*pair, empty="nan") == NAN
        assert metrics.surface_dice(*pair, 100.0) == 0
    assert metrics.hausdorff(NONE, NONE) == 0 and metrics.surface_dice(NONE, NONE, 1) == 1
    assert metrics.surface_dice(NONE, NONE, 1, empty="nan") == NAN


# ---------------------------------------------------------------- objects

# target 1: 4 pixels, 2: 3, 3: 2, 4: 1; predictions 7: 3, 5: 4, 6: 2, 9: 1
OBJECTS_TRUE = np.array([1, 1, 1, 1, 0, 2, 2, 2, 0, 3, 3, 0, 4, 0])
OBJECTS_PRED = np.array([0, 7, 7, 7, 0, 5, 5, 0, 0, 5, 5, 0, 0, 9])


def test_objects_by_hand():
    """IoU: 1 with 7 is 3/4, 2 with 5 is 2/5, 3 with 5 is 2/4. AJI takes prediction 5 for both 2
    and 3, AJI+ only for the better one, 3."""
    o = metrics.find_overlaps(OBJECTS_PRED, OBJECTS_TRUE)
    pairs = [(o.target_label[i], o.pred_label[j]) for i, j in zip(o.target, o.pred)]
    assert pairs == [(1, 7), (2, 5), (3, 5)]
    assert o.inter.tolist() == [3, 2, 2] and o.union.tolist() == [4, 5, 4]
    assert o.iou.tolist() == [3 / 4, 2 / 5, 2 / 4]
    assert o.target_area.tolist() == [4, 3, 2, 1] and o.pred_area.tolist() == [3, 4, 1]
    scores = metrics.instance_scores(OBJECTS_PRED, OBJECTS_TRUE)
    assert scores["aji"] == pytest.approx((3 + 2 + 2) / (4 + 5 + 4 + 1 + 1))
    assert scores["aji_plus"] == pytest.approx((3 + 2) / (4 + 4 + 3 + 1 + 1))
    assert (scores["tp"], scores["fp"], scores["fn"]) == (1, 2, 3)  # an IoU of 1/2 is no match
    assert scores["sq"] == 3 / 4 and scores["dq"] == pytest.approx(1 / (1 + 2 / 2 + 3 / 2))
    assert scores["pq"] == pytest.approx(scores["sq"] * scores["dq"])
    assert metrics.aji(OBJECTS_PRED, OBJECTS_TRUE) == scores["aji"]
    assert metrics.aji_plus(OBJECTS_PRED, OBJECTS_TRUE) == scores["aji_plus"]
    strict = metrics.panoptic_quality(OBJECTS_PRED, OBJECTS_TRUE, threshold=0.75)
    assert (strict.tp, strict.fp, strict.fn, strict.pq) == (0, 3, 4, 0)


def test_a_tie_goes_to_the_prediction_that_appears_first():
    "IoU 1/4 with prediction 8 (1 pixel) and 2/8 with 3 (6 pixels): 8 is taken, 3 is left over."
    target = np.repeat([1, 0], [4, 4])
    pred = np.array([8, 3, 3, 0, 3, 3, 3, 3])
    assert metrics.aji(pred, target) == pytest.approx(1 / (4 + 6))


def test_the_best_partner_has_the_largest_iou_not_the_largest_intersection():
    "IoU 1/4 with prediction 8 (1 pixel) and 2/12 with 3 (10 pixels)."
    target = np.repeat([1, 0], [4, 8])
    pred = np.array([3, 3, 8, 0] + [3] * 8)
    assert metrics.aji(pred, target) == pytest.approx(1 / (4 + 10))
    assert metrics.aji_plus(pred, target) == pytest.approx(1 / (4 + 10))


def test_the_best_pairs_together():
    """Target 1 (8 pixels) shares 4 with prediction 1 (7 pixels) and 4 with 2 (4 pixels); target 2
    (3 pixels) lies in 1. So 1 goes with 2 and 2 with 1: IoU 4/8 and 3/7."""
    target = np.repeat([1, 2, 0], [8, 3, 3])
    pred = np.repeat([2, 1, 0], [4, 7, 3])
    assert metrics.aji_plus(pred, target) == pytest.approx((4 + 3) / (8 + 7))
    pred = np.repeat([1, 2, 1, 0], [5, 3, 3, 3])  # 5/11, 3/8 and 3/8: 3/8 + 3/8 > 5/11
    assert metrics.aji_plus(pred, target) == pytest.approx((3 + 3) / (8 + 8))


def test_components_touch_at_corners():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert metrics.components(mask).tolist() == [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 0, 3]]
    large = metrics.components(mask, min_size=2)
    assert large.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert metrics.components(mask, min_size=1).max() == 3


def test_a_case_of_three_classes_by_hand():
    "Class 1 overlaps, class 2 is missed, class 3 is on neither side."
    target = TRUE.copy()
    target[2, 0] = 2
    names = ("background", "one", "two", "three")
    found = metrics.case_metrics(PRED, target, spacing=(2.0, 1.0), classes=names, tolerance=1.0)
    steps = np.diag([2.0, 1.0])
    there, back = distances(PRED, TRUE, steps), distances(TRUE, PRED, steps)
    hd = max(percentile(there, 95), percentile(back, 95))
    near = sum(d <= 1 for d in there + back) / len(there + back)
    assert found["dsc_one"] == pytest.approx(4 / 9) and found["dsc_two"] == 0
    assert found["dsc_three"] == NAN and found["dsc"] == pytest.approx(2 / 9)
    assert found["hd95"] == pytest.approx((hd + 5.0) / 2)  # the diagonal is 5 mm
    assert found["sdsc"] == pytest.approx(near / 2) and found["missed"] == 1
    assert found["aji"] == NAN and found["pq"] == NAN
    invented = metrics.case_metrics(PRED, NONE, spacing=(2.0, 1.0))
    assert [invented[k] for k in ("dsc", "hd95", "sdsc", "missed")] == [0, 5, 0, 0]
    nothing = metrics.case_metrics(NONE, NONE)
    assert [nothing[k] for k in ("dsc", "hd95", "sdsc", "missed")] == [1, 0, 1, 0]
    objects = metrics.case_metrics(PRED, TRUE, OBJECTS_PRED[:12], OBJECTS_TRUE[:12])
    assert objects["aji"] == pytest.approx(7 / 13)
    assert objects["pq"] == pytest.approx(3 / 4 * 1 / (1 + 1 / 2 + 2 / 2))


def test_masks():
    assert as_mask(np.array([0, 2, 1])).tolist() == [False, True, True]
    assert as_labels(torch.tensor([0.0, 3.0])).tolist() == [0, 3]
    for bad in ([0.5], [float("nan")], [-1], ["x"]):
        with pytest.raises(InputError):
            as_labels(np.array(bad))
    assert axis_lengths(None, 2).tolist() == [1, 1] and axis_lengths(3, 2).tolist() == [3, 3]
    assert axis_lengths((2, 0.5), 2).tolist() == [2, 0.5]
    for bad in ((1, 0), (1, -1), (1, 2, 3), "x", (1, float("nan"))):
        with pytest.raises(InputError):
            axis_lengths(bad, 2)


# ---------------------------------------------------------------- made images


def test_grey_shares_and_their_divergence_by_hand():
    "Four bins of [-1,1]; the largest value belongs to the last."
    real = np.array([-1.0, -0.6, -0.2, 0.1, 1.0])
    fake = np.array([-0.9, 0.6, 0.7, 0.9])
    eps = 1e-3

    def by_hand(counts):
        total = sum(counts)
        shares = [c / total + eps for c in counts]
        return [s / sum(shares) for s in shares]

    p, q = by_hand([2, 1, 1, 1]), by_hand([1, 0, 0, 3])
    assert image_quality.grey_histogram(real, bins=4, eps=eps) == pytest.approx(p)
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert image_quality.histogram_kl(real, fake, bins=4, eps=eps) == pytest.approx(wanted)
    p, q = by_hand([1, 1, 1, 1]), by_hand([1, 0, 0, 2])
    found = image_quality.histogram_kl(
        real, fake, [0, 1, 1, 1, 1], torch.tensor([1, 0, 1, 1]), bins=4, eps=eps
    )
    assert found == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))
    found = image_quality.grey_histogram(real, bins=2, range=(-1, 3), eps=0)
    assert found == pytest.approx([0.8, 0.2])


def pair_of_images():
    r = rng(0, "pair")
    a = r.uniform(-1, 1, (13, 12))
    return a, np.clip(a + 0.2 * r.normal(size=a.shape), -1, 1)


def test_psnr_by_hand():
    a, b = pair_of_images()
    error = sum((x - y) ** 2 for x, y in zip(a.flat, b.flat)) / a.size
    for full in (2.0, 5.0):
        found = image_quality.psnr(a, b, paired=True, data_range=full)
        assert found == pytest.approx(10 * math.log10(full**2 / error))
    assert image_quality.psnr(a, a, paired=True) == math.inf


@pytest.mark.parametrize("full", [2.0, 5.0])
def test_ssim_by_hand(full):
    "Windows of 11 px that fit into the image, weights of a Gaussian of 1.5 px."
    a, b = pair_of_images()
    line = [math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-5, 6)]
    weight = np.outer(line, line) / sum(line) ** 2
    c1, c2 = (0.01 * full) ** 2, (0.03 * full) ** 2
    values = []
    for i, j in product(range(13 - 10), range(12 - 10)):
        x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        both = (weight * (x - mx) * (y - my)).sum()
        likeness = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        values.append(likeness * (2 * both + c2) / (vx + vy + c2))
    found = image_quality.ssim(a, b, paired=True, data_range=full)
    assert found == pytest.approx(sum(values) / len(values))


def pairs_won(foreground, background):
    "Share of pairs in which the foreground scores higher; a tie is half a pair."
    wins = [(f > b) + (f == b) / 2 for f in foreground for b in background]
    return sum(wins) / len(wins)


def test_roc_by_hand():
    scores = np.array([0.9, 0.8, 0.8, 0.4, 0.2, 0.2])
    labels = np.array([1, 1, 0, 3, 0, 0])
    found = image_quality.roc(scores, labels)
    assert found.auc == pytest.approx(pairs_won([0.9, 0.8, 0.4], [0.8, 0.2, 0.2]))
    assert (found.foreground, found.background, found.used) == (3, 3, 3)
    at = dict(zip(found.thresholds.tolist(), zip(found.fpr.tolist(), found.tpr.tolist())))
    assert at[0.8] == pytest.approx((1 / 3, 2 / 3)) and at[0.2] == (1, 1)


def test_a_kept_voxel_stands_for_those_left_out():
    "Case 0 keeps 2 of 8 background voxels, case 1 both: a weight of 4 and of 1."
    cases = [np.array([0.5] * 8 + [0.6]), np.array([0.7, 0.1, 0.9])]
    labels = [np.array([0] * 8 + [1]), np.array([0, 0, 1])]
    found = image_quality.roc(cases, labels, most=2)
    assert found.auc == pytest.approx(pairs_won([0.6, 0.9], [0.5] * 8 + [0.7, 0.1]))
    assert (found.foreground, found.background, found.used) == (2, 10, 4)


# ---------------------------------------------------------------- readers


def line(*at, length=12):
    "A mask (1,n) with these pixels."
    out = np.zeros((1, length), bool)
    out[0, list(at)] = True
    return out


CASES = [
    np.stack([line(2, 3), line(3, 4), line(2, 3, 4)]),
    np.stack([line(5), line(), line(9)]),
]
MODEL = [line(3), line(5)]


def test_scores_of_a_pair_by_hand():
    found = agreement.pair_scores(line(2, 3), line(3, 4), 2.0, 1.0)
    # distances 2 0 and 0 2; their 95th percentile is 1.9
    wanted = dict(dsc=0.5, sdsc=0.5, hd95=1.9, hd95_worst=1.9, missed=0, both_empty=0)
    assert found == pytest.approx(wanted)
    missed = agreement.pair_scores(line(2), line(), (1.0, 0.5), 1.0)
    wanted = dict(dsc=0, sdsc=0, hd95=float("nan"), hd95_worst=5.5, missed=1, both_empty=0)
    assert missed == pytest.approx(wanted, nan_ok=True)
    nothing = agreement.pair_scores(line(), line(), 1.0, 1.0)
    nan = float("nan")
    wanted = dict(dsc=nan, sdsc=nan, hd95=nan, hd95_worst=nan, missed=0, both_empty=1)
    assert nothing == pytest.approx(wanted, nan_ok=True)


def test_a_tolerance_by_hand():
    "Distances in mm: 1-2: 2 0 0 2; 1-3: 0 0 0 0 2; 2-3: 0 0 2 0 0; of case 2: 1-3: 4 4 (1 mm)."
    every = [2, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 2, 0, 0, 4, 4]
    for q in (50, 95):
        found = agreement.tolerance_from_raters(CASES, 2.0, q)
        doubled = [x if x < 4 else 8 for x in every]
        assert found == pytest.approx(percentile(doubled, q))
    found = agreement.tolerance_from_raters(CASES, [(1, 2.0), (1, 1.0)])
    assert found == pytest.approx(percentile(every, 95))
    long = [np.stack([line(*range(20), length=24), line(*range(21), length=24)])]
    assert agreement.tolerance_from_raters(long) == 0  # 40 distances of 0, one of 1
    assert agreement.tolerance_from_raters(long, percentile=100) == 1
    assert agreement.tolerance_from_raters(None) == 3.0
    assert agreement.tolerance_from_raters([c[:1] for c in CASES], default=2.5) == 2.5


def test_rows_of_readers_and_model():
    rows = agreement.agreement_rows(CASES, 1.0, MODEL, tolerance=0.5)
    who = [(r["case"], r["reference"], r["other"]) for r in rows]
    pairs = [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)]
    wanted = [(c, *p) for c in (0, 1) for p in [*pairs, *[(n, "model") for n in (1, 2, 3)]]]
    assert who == wanted
    dsc = {w: r["dsc"] for w, r in zip(who, rows)}
    assert dsc[0, 1, 2] == dsc[0, 2, 1] == 0.5 and dsc[0, 1, 3] == pytest.approx(4 / 5)
    assert dsc[0, 3, "model"] == 0.5 and dsc[1, 1, "model"] == 1 and dsc[1, 2, "model"] == 0


def test_the_table_of_readers_by_hand():
    "Reader 1: case 0 has 1/2 and 4/5, case 1 has 0 and 0. Model: case 0 has 2/3 2/3 1/2."
    table = agreement.rater_table(CASES, 1.0, MODEL, tolerance=0.5)
    at = {(r["who"], r["reference"]): r for r in table}
    assert list(at) == [(w, r) for w in ("readers", "model") for r in (1, 2, 3, "all")]
    first = at["readers", 1]
    cases = [(0.5 + 0.8) / 2, 0.0]
    mean = sum(cases) / 2
    sd = math.sqrt(sum((c - mean) ** 2 for c in cases) / (2 - 1))
    assert first["dsc"] == pytest.approx(mean) and first["dsc_sd"] == pytest.approx(sd)
    assert first["dsc_cv"] == pytest.approx(sd / mean)
    assert [first["n"], first["missed"]] == [2, 1]
    assert [at["readers", r]["missed"] for r in (2, 3, "all")] == [2, 1, 2]
    assert [at["model", r]["missed"] for r in (1, 2, 3, "all")] == [0, 1, 0, 1]
    model = at["model", "all"]
    cases = [(2 / 3 + 2 / 3 + 1 / 2) / 3, (1 + 0 + 0) / 3]
    mean = sum(cases) / 2
    assert model["dsc"] == pytest.approx(mean)
    sd = math.sqrt(sum((c - mean) ** 2 for c in cases) / 2)
    lines = agreement.rater_table(CASES, 1.0, MODEL, tolerance=0.5, ddof=0)
    assert lines[-1]["dsc_sd"] == pytest.approx(sd)


def test_arms_of_readers_and_model_by_hand():
    rows = agreement.agreement_rows(CASES, 1.0, MODEL, tolerance=0.5)
    found = agreement.make_arm_rows(rows, "net", groups=["p", "q"])
    assert [(r["arm"], r["seed"], r["case"], r["group"]) for r in found] == [
        ("readers", 0, "0", "p"),
        ("readers", 0, "1", "q"),
        ("net", 0, "0", "p"),
        ("net", 0, "1", "q"),
    ]
    assert found[0]["dsc"] == pytest.approx((0.5 + 0.8 + 0.8) / 3)
    assert found[3]["dsc"] == pytest.approx(1 / 3) and found[3]["hd95"] == pytest.approx(2)
