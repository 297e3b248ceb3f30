"""LOTUS's released scores by hand: only the target is cast to uint8; no background, no score."""

import numpy as np
import pytest

from unpaired_kd.metrics.released import (
    released_aji,
    released_dice,
    released_hd,
    released_metrics,
    released_pq,
)


def dots(n, side=3, gap=2):
    "n squares in a row-major grid, numbered from 1."
    columns = 20
    step = side + gap
    out = np.zeros((step * -(-n // columns), step * columns), np.int64)
    for i in range(n):
        y, x = divmod(i, columns)
        out[y * step : y * step + side, x * step : x * step + side] = i + 1
    return out


def pq_by_hand(pred, target):
    "Plain loops over all pairs of objects; found above an IoU of one half."
    p_ids = [k for k in np.unique(pred) if k]
    t_ids = [k for k in np.unique(target) if k]
    overlaps = []
    for t in t_ids:
        for p in p_ids:
            inter = np.sum((pred == p) & (target == t))
            union = np.sum((pred == p) | (target == t))
            if inter / union > 0.5:
                overlaps.append(inter / union)
    tp = len(overlaps)
    dq = tp / (tp + (len(p_ids) - tp) / 2 + (len(t_ids) - tp) / 2)
    return dq * sum(overlaps) / (tp + 1e-6)


@pytest.mark.parametrize("identical", [True, False])
def test_only_the_targets_labels_wrap(identical):
    target = dots(300)
    pred = target if identical else np.where(target, 301 - target, 0)
    wrapped = target.astype(np.uint8)  # 256 is lost, 257 to 300 join 1 to 44
    assert len(np.unique(wrapped)) == 256
    expected = pq_by_hand(pred, wrapped)
    assert 0.7 < expected < 0.95
    found = released_pq(pred, target, min_size=0, binary=False)
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_lost_object_is_lost_for_dice_and_iou_too():
    target = dots(256)
    mask = target > 0
    assert released_dice(mask, mask, 0) == pytest.approx(2 * 255 / (255 + 256))
    assert released_aji(mask, target, 0) == pytest.approx(255 / 256)
    assert released_pq(mask, target, 0) == pytest.approx(255 / 256, abs=1e-5)


@pytest.mark.parametrize("binary", [True, False])
def test_without_background_the_score_is_zero(binary):
    full = np.ones((20, 20), int)
    part = full.copy()
    part[:5] = 0
    for pred, target in ((full, full), (full, part), (part, full)):
        assert released_pq(pred, target, min_size=0, binary=binary) == 0
        assert released_aji(pred, target, min_size=0) == 0


def test_small_objects_leave_the_prediction_only():
    target = np.zeros((20, 30), int)
    target[2:10, 2:10] = 1
    target[15:17, 15:17] = 2
    pred = target > 0
    r = released_metrics(pred, target, min_size=50)
    assert r["dsc"] == pytest.approx(2 * 64 / (64 + 68))
    assert r["aji"] == pytest.approx(64 / 68)
    assert r["pq"] == pytest.approx(64 / 68, abs=1e-5)
    assert r["hd"] == 0  # taken before the removal
    by_instance = released_pq(target, target, min_size=50, binary=False)
    assert by_instance == pytest.approx(1 / 1.5, abs=1e-5)


def test_the_later_version_removes_components_and_not_instances():
    "Two touching objects of 32 px are one component of 64."
    pred = np.zeros((12, 12), int)
    pred[2:10, 2:6] = 1
    pred[2:10, 6:10] = 2
    assert released_pq(pred, pred > 0, min_size=50) == pytest.approx(1, abs=1e-5)
    assert released_pq(pred, pred, min_size=50, binary=False) == 0


def test_hd_is_a_percentile_of_both_lists_of_distances_together():
    "Twenty distances of 0 and one of 6: 95 % of them are 0. Of the target's eleven, not."
    pred = np.zeros((12, 12), bool)
    pred[2, :10] = True
    target = pred.copy()
    target[8, 0] = True
    assert released_hd(pred, target) == 0
    target[10, 5] = True  # now twenty, 6 and 8
    pooled = np.sort([0] * 20 + [6, 8])
    assert released_hd(pred, target) == pytest.approx(np.percentile(pooled, 95))
    assert released_hd(pred, np.zeros_like(pred)) == 0
