"Reader studies: analytic spheres, misses, tables by hand, tests that pair and know patients."

import numpy as np
import pytest

from unpaired_kd.core import InputError, rng
from unpaired_kd.metrics.agreement import (
    agreement_rows,
    average_cases,
    make_arm_rows,
    pair_scores,
    rater_table,
    tolerance_from_raters,
)
from unpaired_kd.metrics.segmentation import dice, hausdorff, surface_dice, surface_distances
from unpaired_kd.study.statistics import compare, holm, wilcoxon

THICK = (3.0, 1.0, 1.0)


def ball(shift=(0, 0, 0), R=12.0, spacing=THICK, margin=8):
    n = [int(np.ceil(2 * (R + margin) / s)) for s in spacing]
    z = [(np.arange(k) - k / 2) * s - d for k, s, d in zip(n, spacing, shift)]
    return (z[0][:, None, None] ** 2 + z[1][:, None] ** 2 + z[2] ** 2) < R**2


def study(cases=4, readers=3):
    """Balls of slightly different place and size by three readers, all in one frame of 11 x 33 x 33
    voxels."""

    def frame(i, j):
        return ball((0, rng(0, i, j).uniform(-2, 2), 0), 8 + 0.5 * j, margin=8.5 - 0.5 * j)

    return [np.stack([frame(i, j) for j in range(readers)]) for i in range(cases)]


# ---------------------------------------------------------------- golden cases
@pytest.mark.parametrize(
    "spacing,most",
    [
        ((1.0, 1.0, 1.0), (0.002, 0.01, 0.15, 0.03)),
        (THICK, (0.012, 0.01, 0.95, 0.2)),
        ((1.0, 1.5, 1.0), (0.004, 0.01, 0.4, 0.1)),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_shifted_spheres_have_their_analytic_scores(spacing, most, axis):
    R = 15.0
    d = 6.0
    tau = 4.0
    a = ball(R=R, spacing=spacing)
    b = ball(d * np.eye(3)[axis], R, spacing)
    got = pair_scores(a, b, spacing, tau)
    exact = (4 * R + d) * (2 * R - d) ** 2 / (16 * R**3), d, 0.95 * d, tau / d
    for value, goal, m in zip(
        (got["dsc"], hausdorff(a, b, 100, spacing), got["hd95"], got["sdsc"]), exact, most
    ):
        assert abs(value - goal) < m
    assert pair_scores(b, a, spacing, tau) == got  # symmetric, HD95 too
    assert got["hd95_worst"] == got["hd95"] and not got["missed"]


def test_distances_are_in_mm_along_every_axis():
    a = np.zeros((5, 9, 9), bool)
    a[1, 4, 4] = True
    for axis, (step, mm) in enumerate(((2, 6.0), (3, 3.0), (2, 2.0))):
        assert pair_scores(a, np.roll(a, step, axis), THICK, 3.0)["hd95"] == mm


# ---------------------------------------------------------------- misses
def test_a_miss_is_counted_left_out_and_imputed():
    a = ball()
    none = np.zeros_like(ball())
    for x, y in ((a, none), (none, a)):
        s = pair_scores(x, y, THICK, 3.0)
        assert (s["missed"], s["both_empty"], s["dsc"], s["sdsc"]) == (1, 0, 0, 0) and np.isnan(
            s["hd95"]
        )
        assert s["hd95_worst"] == pytest.approx(np.linalg.norm((np.array(a.shape) - 1) * THICK))
    s = pair_scores(none, none, THICK, 3.0)
    assert (s["missed"], s["both_empty"]) == (0, 1) and all(
        np.isnan(s[k]) for k in ("dsc", "sdsc", "hd95", "hd95_worst")
    )


def test_the_table_keeps_a_missed_tumour_in_view():
    masks = study()
    good = [m[0] for m in masks]
    lazy = [p & (i != 2) for i, p in enumerate(good)]
    a, b = (
        next(
            t
            for t in rater_table(masks, THICK, p)
            if t["who"] == "model" and t["reference"] == "all"
        )
        for p in (good, lazy)
    )
    assert (a["missed"], b["missed"]) == (0, 3)
    found = average_cases(
        [r for r in agreement_rows(masks, THICK, good) if r["other"] == "model" and r["case"] != 2]
    )
    assert b["hd95"] == pytest.approx(np.mean([c["hd95"] for c in found.values()]))
    assert b["hd95_worst"] > 3 * b["hd95"] and b["dsc"] < a["dsc"] and b["n"] == 4


def test_readers_that_miss_are_counted_once_over_all():
    masks = study()
    masks[1][2] = False
    t = {r["reference"]: r for r in rater_table(masks, THICK)}
    assert (t[1]["missed"], t[2]["missed"], t[3]["missed"], t["all"]["missed"]) == (1, 1, 2, 2)


# ---------------------------------------------------------------- tolerance
def test_tolerance_is_the_percentile_of_all_distances():
    masks = study()
    pooled = np.concatenate(
        [
            np.concatenate(surface_distances(m[a], m[b], THICK))
            for m in masks
            for a, b in ((0, 1), (0, 2), (1, 2))
        ]
    )
    tau = tolerance_from_raters(masks, THICK)
    assert tau == pytest.approx(np.percentile(pooled, 95)) and tau > tolerance_from_raters(
        masks, THICK, 50
    )
    assert tolerance_from_raters(masks, 2 * np.array(THICK)) == pytest.approx(2 * tau)


def test_tolerance_without_readers_is_three_mm():
    assert (
        tolerance_from_raters(None) == tolerance_from_raters([m[:1] for m in study()], THICK) == 3
    )
    with pytest.raises(InputError, match="no two readers"):
        tolerance_from_raters([np.zeros((2, 3, 3, 3))], THICK)


# ---------------------------------------------------------------- table
def test_one_line_by_hand_and_ddof():
    masks = study()
    x = np.mean([[dice(m[1], m[0]), dice(m[1], m[2])] for m in masks], 1)
    for ddof in (0, 1):
        t = next(t for t in rater_table(masks, THICK, ddof=ddof) if t["reference"] == 2)
        assert (
            t["dsc"] == pytest.approx(x.mean())
            and t["dsc_sd"] == pytest.approx(x.std(ddof=ddof))
            and t["dsc_cv"] == pytest.approx(x.std(ddof=ddof) / x.mean())
        )
    t = next(t for t in rater_table(masks, THICK, tolerance=1.5) if t["reference"] == 2)
    assert t["sdsc"] == pytest.approx(
        np.mean([[surface_dice(m[1], m[k], 1.5, THICK) for k in (0, 2)] for m in masks])
    )


def test_a_model_that_copies_reader_two():
    masks = study()
    t = {(r["who"], r["reference"]): r for r in rater_table(masks, THICK, [m[1] for m in masks])}
    assert (
        t["model", 2]["dsc"] == 1
        and t["model", 2]["hd95"] == 0
        and np.isnan(t["model", 2]["hd95_cv"])
    )
    assert len(t) == 8 and t["model", 1]["dsc"] < 1


def test_one_spacing_per_case():
    masks = study(2)
    rows = agreement_rows(masks, [THICK, (6.0, 2.0, 2.0)], tolerance=3.0)
    plain = agreement_rows(masks, THICK, tolerance=3.0)
    for a, b in zip(rows, plain):
        assert a["hd95"] == pytest.approx(b["hd95"] * (2 if a["case"] else 1))


def test_refusals_name_the_fault():
    masks = study(2)
    with pytest.raises(InputError, match="two readers"):
        rater_table([m[:1] for m in masks], THICK)
    with pytest.raises(InputError, match="same number of readers"):
        rater_table([masks[0], masks[1][:2]], THICK)
    with pytest.raises(InputError, match="2 cases and 3 spacings"):
        rater_table(masks, [THICK] * 3)
    with pytest.raises(InputError, match="pred has 1"):
        rater_table(masks, THICK, [masks[0][0]])
    with pytest.raises(InputError, match="pred"):
        make_arm_rows(agreement_rows(masks, THICK))


# ---------------------------------------------------------------- tests
def test_wilcoxon_reproduces_scipys_manual():
    d = np.array([6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75])
    assert wilcoxon(d) == wilcoxon(-d) == pytest.approx(0.041259765625, abs=1e-12)
    assert wilcoxon(d + 1e-14) == wilcoxon(d)
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])


def test_arms_pair_model_and_readers_by_case_and_patient():
    masks = study()
    rows = make_arm_rows(
        agreement_rows(masks, THICK, [m[0] for m in masks]), "net", ["x", "x", "y", "z"]
    )
    c = compare(rows, "readers", "dsc")[1]
    assert (c["arm"], c["n_cases"], c["n_groups"]) == ("net", 4, 3)
    d = [
        np.mean([dice(m[0], r) for r in m])
        - np.mean([dice(m[0], m[1]), dice(m[0], m[2]), dice(m[1], m[2])])
        for m in masks
    ]
    assert c["difference"] == pytest.approx(np.mean([(d[0] + d[1]) / 2, d[2], d[3]]))
