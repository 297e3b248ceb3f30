"""Topology by value: clDice as a harmonic mean, precision and sensitivity by their own masks, soft
skeletons and both losses in float64, tubes, and Betti errors over equal parts.
"""

import numpy as np
import pytest
import torch
from scipy import ndimage

from unpaired_kd.core import torch_rng
from unpaired_kd.losses.topology import (
    count_erosions,
    make_tube,
    skeleton_recall_loss,
    soft_cl_dice_loss,
    soft_skeleton,
)
from unpaired_kd.metrics.topology import (
    betti_errors,
    betti_numbers,
    cl_dice,
    skeletonise,
    topology_precision,
    topology_scores,
    topology_sensitivity,
)


@pytest.fixture
def lines():
    "A target of twelve pixels; of the prediction's ten, four lie in it."
    target = np.zeros((9, 20), bool)
    pred = np.zeros((9, 20), bool)
    target[2, 2:14] = True
    pred[2, 2:6] = True
    pred[6, 2:8] = True
    return pred, target


def test_cl_dice_is_the_harmonic_mean(lines):
    pred, target = lines
    precision = 4 / 10
    sensitivity = 4 / 12
    assert topology_precision(pred, target) == pytest.approx(precision)
    assert topology_sensitivity(pred, target) == pytest.approx(sensitivity)
    harmonic = 2 / (1 / precision + 1 / sensitivity)
    assert cl_dice(pred, target) == pytest.approx(harmonic)
    assert abs(harmonic - (precision + sensitivity) / 2) > 1e-3
    scores = topology_scores(pred, target)
    assert scores["cldice"] == pytest.approx(harmonic)
    assert scores["tprec"] == pytest.approx(precision)
    assert scores["tsens"] == pytest.approx(sensitivity)
    assert (scores["betti0"], scores["betti1"], scores["betti2"]) == (1, 0, 0)


def test_a_skeleton_is_compared_with_a_mask():
    "A tube that is wider than the other's centre line is inside it, not the other way round."
    thick = np.zeros((11, 30), bool)
    thick[3:8, 3:27] = True
    off = np.zeros((11, 30), bool)
    off[3, 3:27] = True  # along the rim
    assert topology_precision(off, thick) == 1
    assert topology_sensitivity(off, thick) == 0
    assert topology_precision(thick, off) == 0 and topology_sensitivity(thick, off) == 1


def test_one_arm_missing_is_heard():
    whole = np.zeros((6, 34, 34), bool)
    whole[1:5, 15:19, :] = True
    whole[1:5, :, 15:19] = True
    for part in (np.s_[:, :15], np.s_[:, 19:], np.s_[:, :, :15], np.s_[:, :, 19:]):
        lost = whole.copy()
        lost[part] = False
        assert topology_sensitivity(lost, whole) < 0.9


def around(p, corners):
    "Every neighbour's value (inf and -inf where there is none), as a list of shifted arrays."
    n = p.ndim
    offsets = np.stack(np.meshgrid(*[[-1, 0, 1]] * n, indexing="ij"), -1).reshape(-1, n)
    return [o for o in offsets if corners or abs(o).sum() <= 1]


def filtered(p, corners, largest):
    "Minimum over the cross, or maximum over the block."
    fill = -np.inf if largest else np.inf
    padded = np.pad(p, 1, constant_values=fill)
    shifted = []
    for o in around(p, corners):
        shifted.append(padded[tuple(slice(1 + k, 1 + k + n) for k, n in zip(o, p.shape))])
    return np.max(shifted, 0) if largest else np.min(shifted, 0)


def soft_skeleton_by_hand(p, n):
    thin = np.zeros_like(p)
    for _ in range(n + 1):
        less = filtered(p, False, False)
        ridge = np.maximum(0, p - filtered(less, True, True))
        thin = thin + (1 - thin) * ridge
        p = less
    return thin


@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 7)])
@pytest.mark.parametrize("n", [0, 2])
def test_soft_skeletons_by_hand(shape, n):
    p = torch.rand(1, 1, *shape, generator=torch_rng(0, "p")).double()
    expected = soft_skeleton_by_hand(p[0, 0].numpy(), n)
    assert np.allclose(soft_skeleton(p, n)[0, 0].numpy(), expected)


@pytest.mark.parametrize("K", [1, 3])
def test_soft_cl_dice_by_hand(K):
    x = torch.randn(2, K, 8, 9, generator=torch_rng(0, "x")).double()
    label = torch.zeros(2, 8, 9, dtype=torch.long)
    label[0, 2:5, 1:8] = 1
    label[1, 4, 2:7] = min(2, K - 1) or 1
    p = x.sigmoid()[:, 0] if K == 1 else x.softmax(1)[:, 1:].sum(1)
    y = (label > 0).double()
    n = 2  # a band of three rows is gone after two erosions
    assert count_erosions(y[:, None]) == n
    thin_p = np.stack([soft_skeleton_by_hand(v.numpy(), n) for v in p])
    thin_y = np.stack([soft_skeleton_by_hand(v.numpy(), n) for v in y])
    tprec = ((thin_p * y.numpy()).sum() + 1) / (thin_p.sum() + 1)
    tsens = ((thin_y * p.numpy()).sum() + 1) / (thin_y.sum() + 1)
    expected = 1 - 2 / (1 / tprec + 1 / tsens)
    assert soft_cl_dice_loss(x, label).item() == pytest.approx(expected)
    tighter = soft_cl_dice_loss(x, label, smooth=0.1).item()
    assert tighter != pytest.approx(expected)
    assert soft_cl_dice_loss(x, label, 0).item() != pytest.approx(expected)


def test_skeleton_recall_by_hand():
    x = torch.randn(2, 1, 12, 14, generator=torch_rng(0, "x")).double()
    label = torch.zeros(2, 12, 14, dtype=torch.long)
    label[0, 3:8, 2:12] = 1
    label[1, 9, 1:12] = label[1, 1:10, 2] = 1  # two thin arms: a corner that is not a box
    tube = np.zeros((2, 12, 14), bool)
    for b in range(2):
        m = label[b].numpy() > 0
        tube[b] = ndimage.binary_dilation(skeletonise(m), iterations=2) & m
    assert np.array_equal(make_tube(label.numpy()), tube)
    thin = np.stack([skeletonise(m.numpy()) for m in label])
    assert np.array_equal(make_tube(label.numpy(), 0), thin)
    p = x.sigmoid()[:, 0].numpy()
    expected = 1 - ((p * tube).sum() + 1) / (tube.sum() + 1)
    assert skeleton_recall_loss(x, label).item() == pytest.approx(expected)
    given = torch.from_numpy(thin)
    expected = 1 - ((p * thin).sum() + 0.5) / (thin.sum() + 0.5)
    assert skeleton_recall_loss(x, label, given, 0.5).item() == pytest.approx(expected)


def test_betti_errors_are_means_over_equal_parts():
    pred = np.zeros((4, 10, 4), bool)
    target = np.zeros((4, 10, 4), bool)
    pred[1, 1, 1] = True  # in the first part one piece too many
    target[1, 8, 1] = target[1, 8, 3] = True  # in the last two that are missing
    assert betti_errors(pred, target, 4) == {"b0": pytest.approx(1.0), "b1": 0, "b2": 0}
    assert betti_errors(pred, target, 64)["b0"] == 1  # they cancel in part
    assert betti_errors(pred, target, 5)["b0"] == pytest.approx(1.5)


def test_betti_numbers_of_plain_bodies():
    ring = np.zeros((3, 5, 5), bool)
    ring[1, 1:4, 1:4] = True
    ring[1, 2, 2] = False
    shell = np.zeros((5, 5, 5), bool)
    shell[1:4, 1:4, 1:4] = True
    shell[2, 2, 2] = False
    corner = np.zeros((2, 2, 2), bool)
    corner[0, 0, 0] = corner[1, 1, 1] = True  # they share a corner: one piece
    assert betti_numbers(ring) == (1, 1, 0)
    assert betti_numbers(shell) == (1, 0, 1)
    assert betti_numbers(corner) == (1, 0, 0)
    assert betti_numbers(ring[1]) == (1, 1, 0)
