"Quality of made images: hand values, refusals, and the subsampled ROC against the full one."

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from unpaired_kd.core import InputError, rng
from unpaired_kd.metrics.image_quality import (
    check_registered,
    grey_histogram,
    histogram_kl,
    psnr,
    roc,
    ssim,
)

A = rng(0, "quality").uniform(-1, 1, (24, 20))


# ---------------------------------------------------------------- KL
def test_kl_has_the_direction_it_states():
    p = np.array([-0.5] * 3 + [0.5])
    q = np.array([-0.5, 0.5])
    assert histogram_kl(p, q, bins=2) == pytest.approx(
        0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6
    )
    assert histogram_kl(q, p, bins=2) == pytest.approx(
        0.5 * np.log(2 / 3) + 0.5 * np.log(2), abs=1e-6
    )


def test_kl_is_scipys_is_zero_for_itself_and_never_negative():
    b = np.clip(A * 0.7 + 0.1, -1, 1)
    assert histogram_kl(A, b) == pytest.approx(entropy(grey_histogram(A), grey_histogram(b)))
    assert histogram_kl(A, A[::-1]) == 0
    assert min(histogram_kl(x, y) for x in (A, b) for y in (A, b)) >= 0


def test_missing_grey_values_cost_more_than_made_up_ones():
    wide = np.linspace(-1, 1, 1000)
    narrow = np.linspace(-0.5, 0.5, 1000)
    assert histogram_kl(wide, narrow) > 5 * histogram_kl(narrow, wide) > 0


def test_ends_of_the_range_are_counted_and_values_beyond_are_refused():
    share = grey_histogram(np.array([-1.0, 1.0]), bins=4)
    assert share == pytest.approx([0.5, 0, 0, 0.5], abs=1e-7) and share.sum() == pytest.approx(1)
    with pytest.raises(InputError, match="outside range"):
        histogram_kl(A, A * 1.2)
    with pytest.raises(InputError, match="NaN"):
        histogram_kl(A, A * np.nan)
    assert histogram_kl(255 * (A + 1) / 2, 255 * (A + 1) / 2, range=(0, 255)) == 0


def test_masks_choose_the_pixels():
    b = A.copy()
    b[:12] = 0
    m = np.zeros(A.shape, int)
    m[12:] = 3
    assert histogram_kl(A, b) > 0.1 and histogram_kl(A, b, m, m) == 0
    assert histogram_kl(torch.tensor(A), torch.tensor(b), torch.tensor(m), torch.tensor(m)) == 0
    for bad in (m * 0, m[1:]):
        with pytest.raises(InputError, match="mask of fake"):
            histogram_kl(A, b, m, bad)


# ---------------------------------------------------------------- PSNR, SSIM
@pytest.mark.parametrize("score", [psnr, ssim])
def test_unpaired_input_is_refused(score):
    for wrong in (dict(), dict(paired=False), dict(paired=1), dict(paired="yes")):
        with pytest.raises(InputError, match="registered"):
            score(A, A, **wrong)
    with pytest.raises(InputError, match="one grid"):
        score(A, A[1:], paired=True)
    with pytest.raises(InputError, match="data_range"):
        score(A * 127, A * 127, paired=True)
    assert np.isfinite(score(A * 127, A * 120, paired=True, data_range=255))


def test_psnr_by_hand_and_on_tensors():
    assert psnr(A, A, paired=True) == np.inf
    assert psnr(np.zeros(8), np.full(8, 0.2), paired=True) == pytest.approx(20)  # R = 2, error .2
    assert psnr(torch.zeros(8), torch.full((8,), 0.1), True, 1.0) == pytest.approx(20, abs=1e-4)


def test_ssim_is_one_for_itself_symmetric_and_refuses_small_images():
    b = np.clip(A + 0.3 * rng(1, "b").standard_normal(A.shape), -1, 1)
    assert ssim(A, A, paired=True) == pytest.approx(1)
    assert 0 < ssim(A, b, paired=True) < 0.99 and ssim(A, b, paired=True) == pytest.approx(
        ssim(b, A, paired=True)
    )
    for small in (A[:10], A[None], A[0]):
        with pytest.raises(InputError, match="window"):
            ssim(small, small, paired=True)


def test_registered_names_the_first_difference():
    assert check_registered(["a/1", "a/2"], ("a/1", "a/2")) is True
    for a, b, words in (
        (["x"], ["y"], "image 0 is 'x'"),
        (["x", "y"], ["x"], "2 and 1"),
        ([], [], "at least one"),
        (["x", "x"], ["x", "x"], "twice"),
    ):
        with pytest.raises(InputError, match=words):
            check_registered(a, b)


# ---------------------------------------------------------------- ROC
def cases():
    r = rng(0, "roc cases")
    y = [np.zeros((90, 90), bool), np.zeros((30, 30), bool)]
    for m in y:
        m[3:15, 3:15] = True
    return [m * 1.5 + s * r.standard_normal(m.shape) for m, s in zip(y, (1, 3))], y


def test_full_roc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    s, y = cases()
    found = roc(s, y, most=None)
    assert found.auc == pytest.approx(
        roc_auc_score(
            np.concatenate([m.ravel() for m in y]), np.concatenate([v.ravel() for v in s])
        )
    )
    assert found.foreground == 288 and found.used == found.background == 8100 + 900 - 288
    assert found.fpr[[0, -1]].tolist() == found.tpr[[0, -1]].tolist() == [0, 1]


def test_weighted_subsample_is_unbiased_over_unequal_cases():
    s, y = cases()
    full = roc(s, y, None).auc
    few = [roc(s, y, 400, seed=k) for k in range(12)]
    assert all(f.used == 800 and f.background == 8712 for f in few)
    assert np.mean([f.auc for f in few]) == pytest.approx(full, abs=0.006)
    one, two = (roc(s[k], y[k], None).auc for k in (0, 1))
    plain = roc(
        [np.concatenate([v[m], v[~m][:400]]) for v, m in zip(s, y)],
        [np.concatenate([m[m], m[~m][:400]]) for m in y],
        None,
    ).auc
    # without weights the small hard case counts too much
    assert abs(plain - full) > 0.02 and one > two


def test_roc_is_repeatable_and_refuses_one_class():
    s, y = cases()
    assert roc(s, y, 100, seed=3).auc == roc(s, y, 100, seed=3).auc != roc(s, y, 100, seed=4).auc
    assert roc(torch.tensor(s[0]), torch.tensor(y[0]), 100).used == 100
    for args in ((s[0], y[0] * 0), (s[0], y[0] | True)):
        with pytest.raises(InputError, match="needs both"):
            roc(*args)
    with pytest.raises(InputError, match="case 0"):
        roc(s[0], y[1])
    with pytest.raises(InputError, match="one of each"):
        roc(s, y[:1])
    with pytest.raises(InputError, match="at least 1"):
        roc(s, y, most=0)
