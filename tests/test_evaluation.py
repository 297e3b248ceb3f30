"The statistics of evaluation.py: parity with SciPy, hand examples, error rates, refusals."

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from unpaired_kd.core import InputError, rng
from unpaired_kd.data.instances import find_instances
from unpaired_kd.study.scoring import evaluate
from unpaired_kd.study.statistics import (
    FEW,
    UNITS,
    bootstrap_ci,
    compare,
    holm,
    p_value,
    pair_rows,
    student_ci,
    t_test,
    two_way,
    wilcoxon,
)


def table(
    arms=("alone", "taught"), seeds=2, patients=5, images=2, gain=0.05, metric="dsc", stream="rows"
):
    r = rng(0, stream)
    return [
        dict(
            arm=a,
            seed=s,
            collection="ct",
            case=f"{p}/{i}",
            group=f"p{p}",
            label_group="",
            **{metric: 0.6 + gain * arms.index(a) + 0.1 * math.sin(p) + r.normal(0, 0.02)},
        )
        for a in arms
        for s in range(seeds)
        for p in range(patients)
        for i in range(images)
    ]


def by(rows, arm, key):
    names = sorted({r[key] for r in rows})
    return np.array(
        [np.mean([r["dsc"] for r in rows if r["arm"] == arm and r[key] == n]) for n in names]
    )


# ---------------------------------------------------------------- single tests
@pytest.mark.parametrize("n", [2, 5, 14, 60])
def test_t_test_is_scipys(n):
    a, b = rng(0, "t", n).normal(size=(2, n)) + [[0.3], [0]]
    assert t_test(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-10)


@pytest.mark.parametrize("n", [3, 5, 14, 49, 60, 200])
def test_wilcoxon_is_scipys_without_ties(n):
    d = rng(0, "w", n).normal(0.2, 1, n)
    assert wilcoxon(d) == pytest.approx(stats.wilcoxon(d).pvalue, rel=1e-10)


@pytest.mark.parametrize("n", [8, 30])
def test_wilcoxon_with_ties_and_zeros_stays_near_the_exact_permutation(n):
    r = rng(0, "ties", n)
    d = np.round(r.normal(0.3, 1, n), 1)
    d[:2] = 0
    e = d[d != 0]
    ranks = stats.rankdata(np.abs(e))
    null = (r.choice([-1, 1], (40000, len(e))) * ranks).sum(1)
    assert wilcoxon(d) == pytest.approx(
        (np.abs(null) >= abs((np.sign(e) * ranks).sum()) - 1e-9).mean(), abs=0.02
    )


def test_rounding_noise_is_a_tie():
    d = np.array([0.1, 0.1, 0.1, 0.1, -0.1]) + np.arange(5) * 1e-16
    assert wilcoxon(d) == pytest.approx(wilcoxon([1, 1, 1, 1, -1]))


@pytest.mark.parametrize("value", [0.0, 0.2, 1e-17, 1e9])
def test_no_spread_no_test(value):
    noise = value * np.array(
        [0, 1e-16, -1e-16, 0, 2e-16, 1e-16]
    )  # a mean of equal numbers is off by its last bit
    for d in (np.full(6, value), value + noise):
        assert math.isnan(t_test(d)) and math.isnan(wilcoxon(d)) and np.isnan(bootstrap_ci(d)).all()
        assert np.isnan(bootstrap_ci(np.tile(d, 2))).all()  # nor with twelve patients
        assert math.isnan(p_value(*two_way(np.tile(d[:, None], 3))))
    assert math.isnan(p_value(*two_way(np.array([[1.0, -1], [-1, 1]]))))


def test_a_zero_mean_with_a_spread_has_p_one():
    assert t_test([1, -1]) == 1 and wilcoxon([1.0, -1]) == 1
    assert wilcoxon([0, 0, 0.1]) == 1  # zeros are left out: one sign is left


@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1, 1e3, 1e12])
def test_tests_do_not_know_the_unit(unit):
    d = np.array(
        [0.1, 0.3 - 0.2, -0.1, 0.4, 0.25, 0.3, 0.12]
    )  # two differences that tie but for rounding
    assert wilcoxon(unit * d) == pytest.approx(wilcoxon([1, 1, -1, 4, 2.5, 3, 1.2]), rel=1e-12)
    assert t_test(unit * d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-9)
    assert bootstrap_ci(unit * d) == pytest.approx(
        tuple(unit * e for e in bootstrap_ci(d)), rel=1e-9
    )


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_smallest_wilcoxon_of_few_patients(n):
    assert wilcoxon(np.arange(1, n + 1) / 7) == 2 / 2**n  # .5, .25, .125, .0625


# ---------------------------------------------------------------- Holm
def test_holm_hand_example_and_order():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(p[::-1]) == pytest.approx([0.02, 0.06, 0.06, 0.03])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])


def test_holm_passes_over_tests_that_were_not_made():
    out = holm([np.nan, 0.02, 0.04])
    assert np.isnan(out[0]) and out[1:] == pytest.approx([0.04, 0.04])
    assert np.isnan(holm([np.nan])).all() and holm([]).shape == (0,)


def test_holm_lies_between_raw_and_bonferroni():
    p = rng(0, "holm").random((200, 6))
    out = np.array([holm(q) for q in p])
    assert (out >= p).all() and (out <= np.minimum(1, 6 * p) + 1e-12).all()
    assert (
        np.diff(np.take_along_axis(out, np.argsort(p, 1), 1)) >= 0
    ).all()  # a smaller p never ends up larger


# ---------------------------------------------------------------- two-way
def test_two_way_against_a_written_out_analysis_of_variance():
    d = (
        rng(0, "anova").normal(size=(6, 4))
        + rng(0, "rows").normal(size=(6, 1)) * 2
        + rng(0, "columns").normal(size=(1, 4)) * 2
    )
    G, S = d.shape
    ms_g = sum(S * (d[g].mean() - d.mean()) ** 2 for g in range(G)) / (G - 1)
    ms_s = sum(G * (d[:, s].mean() - d.mean()) ** 2 for s in range(S)) / (S - 1)
    ms_e = sum(
        (d[g, s] - d[g].mean() - d[:, s].mean() + d.mean()) ** 2 for g in range(G) for s in range(S)
    ) / ((G - 1) * (S - 1))
    mean, se, df = two_way(d)
    assert (mean, se) == pytest.approx((d.mean(), math.sqrt((ms_g + ms_s - ms_e) / (G * S))))
    assert df == pytest.approx(
        (ms_g + ms_s - ms_e) ** 2
        / (ms_g**2 / (G - 1) + ms_s**2 / (S - 1) + ms_e**2 / ((G - 1) * (S - 1)))
    )


@pytest.mark.parametrize("spread", [(1, 0, 0.5), (0, 1, 0.5), (1, 1, 1), (0.3, 1, 0.3), (0, 0, 1)])
@pytest.mark.parametrize("shape", [(8, 5), (14, 3)])
def test_two_way_keeps_its_level(spread, shape):
    r = rng(0, "level", *map(str, spread), *shape)
    (u, v, e) = spread
    (G, S) = shape
    d = (
        u * r.normal(size=(4000, G, 1))
        + v * r.normal(size=(4000, 1, S))
        + e * r.normal(size=(4000, G, S))
    )
    assert (p_value(*two_way(d)) < 0.05).mean() < 0.07


@pytest.mark.parametrize("spread", [(1, 0, 0.5), (0, 1, 0.5), (1, 1, 1), (0.3, 1, 0.3), (0, 0, 1)])
@pytest.mark.parametrize("nested", [False, True])
def test_two_way_keeps_its_level_with_holes(spread, nested):
    r = rng(0, "holes", *map(str, spread))
    (u, v, e) = spread
    G = 15
    S = 5
    d = (
        u * r.normal(size=(4000, G, 1))
        + v * r.normal(size=(4000, 1, S))
        + e * r.normal(size=(4000, G, S))
    )
    for s in range(S):
        d[:, [g for g in range(G) if (g % S != s if nested else (g + s) % 2)], s] = np.nan
    assert (p_value(*two_way(d)) < 0.05).mean() < 0.07


def test_two_way_is_never_bolder_than_either_one_way_error():
    d = rng(0, "bold").normal(size=(500, 6, 4))
    one = np.maximum(d.mean(2).std(1, ddof=1) / math.sqrt(6), d.mean(1).std(1, ddof=1) / 2)
    assert (two_way(d)[1] >= one - 1e-12).all()


# ---------------------------------------------------------------- bootstrap
def test_bootstrap_covers_about_as_often_as_it_says():
    x = rng(0, "coverage").normal(size=(400, 12))
    ends = np.array([bootstrap_ci(v, n=500, seed=i) for i, v in enumerate(x)])
    assert 0.90 < ((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean() < 0.98


@pytest.mark.parametrize("patients", [6, 12])
def test_intervals_are_over_patients_not_images(patients):
    r = rng(0, "clusters", patients)
    patient = r.normal(size=patients)
    x = np.repeat(patient, 50) + r.normal(0, 0.01, 50 * patients)
    groups = np.repeat(np.arange(patients), 50)

    def width(ci):
        return ci[1] - ci[0]

    assert width(bootstrap_ci(x, groups)) > 4 * width(bootstrap_ci(x))
    assert bootstrap_ci(x, groups) == bootstrap_ci(x, groups)
    assert (bootstrap_ci(x, groups) == bootstrap_ci(x, groups, seed=1)) == (
        patients < FEW
    )  # Student's draws nothing


def test_bootstrap_matches_scipys_percentile_interval():
    x = rng(0, "scipy").normal(size=25)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_ci(x, n=20000, expand=False) == pytest.approx(theirs, abs=0.02)


@pytest.mark.parametrize("patients", [2, 3, 4, 6, 7])
def test_few_patients_have_students_interval(patients):
    d = rng(0, "few", patients).normal(0.3, 1, patients)
    for level in (0.9, 0.95):
        by_hand = stats.t.interval(level, patients - 1, d.mean(), stats.sem(d))
        assert bootstrap_ci(d, level=level) == pytest.approx(by_hand, rel=1e-12)
    images = rng(0, "images").integers(
        1, 6, patients
    )  # each patient counts once, however many images
    assert bootstrap_ci(
        np.repeat(d, images), np.repeat(np.arange(patients), images)
    ) == pytest.approx(bootstrap_ci(d))


def differences(world, patients, studies=1000):
    "Patients' values with the true mean 0, and the patient of each: lists of (values, groups)."
    r = rng(1, "coverage", world, patients)
    normal = r.normal(size=(studies, patients))
    if world == "unequal":  # 1 to 9 images of a patient, who differ too
        many = r.integers(1, 10, (studies, patients))
        images = [np.repeat(p, m) + r.normal(size=m.sum()) for p, m in zip(normal, many)]
        return [(x, np.repeat(np.arange(patients), m)) for x, m in zip(images, many)]
    if world == "heavy":
        normal = r.standard_t(3, (studies, patients))
    if world == "few values":
        normal = np.round(normal * 2)  # ties
    if world == "bounded":
        normal = r.beta(2, 3, (studies, patients)) - 0.4
    return [(d, np.arange(patients)) for d in normal]


@pytest.mark.parametrize("world", ["normal", "unequal", "heavy", "few values", "bounded"])
@pytest.mark.parametrize("patients", [2, 3, 4, 5, 6, 7, 8, 12])
def test_intervals_keep_their_level(world, patients):
    found = [bootstrap_ci(x, g, n=300) for x, g in differences(world, patients)]
    found = [(low, high) for low, high in found if not math.isnan(low)]  # no spread: none is given
    share = np.mean([low <= 0 <= high for low, high in found])
    assert share > (0.93 if patients < FEW else 0.915) - 3 * math.sqrt(
        0.05 * 0.95 / 1000
    )  # three standard errors


@pytest.mark.parametrize("patients", [2, 3, 4])
def test_the_bootstrap_cannot_hold_more_than_the_range_of_its_data(patients):
    held = [
        low <= 0 <= high
        for low, high in (bootstrap_ci(x, n=300, few=0) for x, _ in differences("normal", patients))
    ]
    assert np.mean(held) < 1 - 2.0 ** (1 - patients) + 0.04  # so this is no interval at 95 %


def test_intervals_over_patients_and_seeds_keep_their_level():
    for G, S in ((2, 3), (3, 3), (4, 5), (6, 5), (6, 2)):
        r = rng(0, "both", G, S)
        held = []
        for _ in range(1000):
            mean, se, df = two_way(
                r.normal(size=(G, 1)) + r.normal(size=(1, S)) + 0.5 * r.normal(size=(G, S))
            )
            low, high = student_ci(mean, se, df)
            held.append(low <= 0 <= high)
        assert np.mean(held) > 0.91, (G, S)


def test_an_interval_needs_two_groups_and_numbers():
    with pytest.raises(InputError, match="2 groups"):
        bootstrap_ci([1.0, 2, 3], ["a", "a", "a"])
    with pytest.raises(InputError, match="2 groups"):
        bootstrap_ci([1.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="NaN or infinity"):
            bootstrap_ci([1.0, 2, bad])


# ---------------------------------------------------------------- compare
@pytest.mark.parametrize("unit,key", [("group", "group"), ("seed", "seed"), ("case", "case")])
def test_compare_is_scipy_on_the_unit_means(unit, key):
    rows = table(seeds=3)
    c = compare(rows, "alone", unit=unit)[1]
    a = by(rows, "alone", key)
    b = by(rows, "taught", key)
    assert c["p_t"] == pytest.approx(stats.ttest_rel(b, a).pvalue, rel=1e-6)
    assert c["p_wilcoxon"] == pytest.approx(stats.wilcoxon(b - a).pvalue)
    assert (
        c["difference"] == pytest.approx((b - a).mean())
        and c["ci_low"] < c["difference"] < c["ci_high"]
    )
    assert (c["n_cases"], c["n_groups"], c["n_seeds"]) == (10, 5, 3)
    assert c["seed_differences"] == pytest.approx(
        by(rows, "taught", "seed") - by(rows, "alone", "seed")
    )
    assert (
        c["seed_sd"] == pytest.approx(np.std(c["seed_differences"], ddof=1)) and c["seeds_won"] == 3
    )
    assert c["mean"] == pytest.approx(by(rows, "taught", "case").mean()) and c[
        "sd"
    ] == pytest.approx(by(rows, "taught", "case").std(ddof=1))


def test_patients_weigh_the_same_however_many_images_they_have():
    rows = [r for r in table(seeds=2, images=6) if r["group"] == "p0" or r["case"].endswith("/0")]
    c = compare(rows, "alone")[1]
    assert c["difference"] == pytest.approx(
        (by(rows, "taught", "group") - by(rows, "alone", "group")).mean()
    )
    assert c["n_cases"] == 10 and c["n_groups"] == 5


def test_holm_counts_the_arms_and_not_the_reference():
    rows = table(("alone", "a", "b", "c"), gain=0.01)
    out = compare(rows, "alone")
    assert [r["p_t_holm"] for r in out[1:]] == pytest.approx(
        list(holm([r["p_t"] for r in out[1:]]))
    )
    assert [r["p_wilcoxon_holm"] for r in out[1:]] == pytest.approx(
        list(holm([r["p_wilcoxon"] for r in out[1:]]))
    )
    assert out[0]["arm"] == "alone" and math.isnan(out[0]["p_t"]) and math.isnan(out[0]["p_t_holm"])


def test_distances_are_won_by_the_smaller():
    assert compare(table(metric="hd95"), "alone", "hd95")[1]["seeds_won"] == 0
    assert compare(table(metric="hd95", gain=-0.05), "alone", "hd95")[1]["seeds_won"] == 2


def test_folds_may_test_other_patients_in_every_seed():
    rows = [r for r in table(patients=6) if (r["group"] in ("p0", "p1", "p2")) == (r["seed"] == 0)]
    group, both = (compare(rows, "alone", unit=u)[1] for u in ("group", "both"))
    assert (
        group["n_groups"] == 6
        and both["difference"] == pytest.approx(group["difference"])
        and both["p_t"] >= group["p_t"]
    )


def test_names_that_became_numbers_do_not_matter():
    rows = table()
    assert compare(
        [
            dict(r, case=i % 10 if i % 10 < 5 else f"c{i % 10}", group=int(r["group"][1:]))
            for i, r in enumerate(rows)
        ],
        "alone",
    )[1]["p_t"] == pytest.approx(compare(rows, "alone")[1]["p_t"])


def test_an_identical_arm_is_not_different():
    rows = table(("alone",))
    c = compare(rows + [dict(r, arm="twin") for r in rows], "alone", unit="both")[1]
    assert (c["difference"], c["seeds_won"], c["interval"]) == (0, 0, "none")
    assert all(math.isnan(c[k]) for k in ("p_t", "p_t_holm", "p_wilcoxon", "ci_low", "ci_high"))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("scale", [1e-15, 1, 1e6])
def test_equal_differences_give_no_evidence_in_any_unit(unit, scale, recwarn):
    rows = [
        dict(r, dsc=scale * r["dsc"])
        for r in table(("alone", "taught", "other"), gain=0.0, seeds=3)
    ]
    alone = {(r["seed"], r["case"]): r["dsc"] for r in rows if r["arm"] == "alone"}
    rows = [
        dict(r, dsc=alone[r["seed"], r["case"]] + scale * 0.1) if r["arm"] == "taught" else r
        for r in rows
    ]
    _, c, other = compare(rows, "alone", unit=unit)
    assert c["difference"] == pytest.approx(scale * 0.1) and c["interval"] == "none"
    assert all(
        math.isnan(c[k])
        for k in ("p_t", "p_t_holm", "p_wilcoxon", "p_wilcoxon_holm", "ci_low", "ci_high")
    )
    assert (
        other["interval"] != "none" and other["p_t_holm"] == other["p_t"]
    )  # one test is left to correct for
    assert not recwarn.list


def test_the_interval_is_named_and_follows_the_number_of_patients():
    few, many = (compare(table(patients=k, seeds=3), "alone") for k in (7, 8))
    assert [c["interval"] for c in few] == ["none", "Student's t"] and many[1][
        "interval"
    ] == "bootstrap"
    d = by(table(patients=7, seeds=3), "taught", "group") - by(
        table(patients=7, seeds=3), "alone", "group"
    )
    assert (few[1]["ci_low"], few[1]["ci_high"]) == pytest.approx(
        stats.t.interval(0.95, 6, d.mean(), stats.sem(d)), rel=1e-9
    )
    for unit in ("seed", "both"):
        assert (
            compare(table(patients=9, seeds=9), "alone", unit=unit)[1]["interval"] == "Student's t"
        )


def test_a_score_in_another_unit_gives_the_same_table():
    mm, um = (
        compare(
            [dict(r, hd95=k * r["hd95"]) for r in table(metric="hd95", patients=9)], "alone", "hd95"
        )[1]
        for k in (1e-3, 1.0)
    )
    for k in ("p_t", "p_wilcoxon"):
        assert mm[k] == pytest.approx(um[k], rel=1e-9)
    for k in ("difference", "ci_low", "ci_high"):
        assert 1000 * mm[k] == pytest.approx(um[k], rel=1e-9)


def test_the_bootstrap_is_repeatable_and_the_input_untouched():
    rows = table()
    copy = [dict(r) for r in rows]
    assert compare(rows, "alone")[1] == compare(rows, "alone")[1] and rows == copy


def changed(rows, where, **new):
    return [dict(r, **new) if where(r) else r for r in rows]


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda R: R + R[:1], "two rows"),
        (lambda R: R[1:], "different .seed, case. rows"),
        (
            lambda R: [r for r in R if not (r["arm"] == "taught" and r["seed"] == 1)],
            "different .seed, case. rows",
        ),
        (lambda R: [r for r in R if r["group"] == "p0"], "at least 2 groups"),
        (lambda R: changed(R, lambda r: r["arm"] == "taught", collection="mr"), "nothing to pair"),
        (
            lambda R: changed(R, lambda r: r["arm"] == "taught" and r["case"] == "0/0", group="p1"),
            "two groups",
        ),
        (
            lambda R: changed(R, lambda r: r["case"] == "0/0", dsc=float("nan")),
            "arm 'alone', seed 0, case '0/0': dsc is nan",
        ),
        (lambda R: changed(R, lambda r: r["case"] == "0/0", dsc=float("inf")), "dsc is inf"),
        (lambda R: [{k: v for k, v in r.items() if k != "group"} for r in R], "has no 'group'"),
        (lambda R: [], "unknown reference arm"),
    ],
)
def test_refusals(spoil, message):
    with pytest.raises(InputError, match=message):
        compare(spoil(table()), "alone")


def test_refusals_of_arguments():
    with pytest.raises(InputError, match="Did you mean 'alone'"):
        compare(table(), "alnoe")
    with pytest.raises(InputError, match="unknown unit"):
        compare(table(), "alone", unit="patient")
    with pytest.raises(InputError, match="has no 'dice'"):
        compare(table(), "alone", "dice")
    for unit in ("seed", "both"):
        with pytest.raises(InputError, match="and 1 seed[.]"):
            compare(table(seeds=1), "alone", unit=unit)


def test_missing_values_can_be_dropped_in_all_arms():
    rows = changed(
        table(),
        lambda r: r["arm"] == "taught" and r["seed"] == 0 and r["case"] == "0/0",
        dsc=float("nan"),
    )
    kept = [r for r in table() if not (r["seed"] == 0 and r["case"] == "0/0")]
    assert compare(rows, "alone", missing="drop")[1] == compare(kept, "alone")[1]
    with pytest.raises(InputError, match="no case has a finite"):
        pair_rows(changed(rows, lambda r: True, dsc=float("nan")), "alone", missing="drop")


# ---------------------------------------------------------------- evaluate
class Cases(list):
    "The part of a collection that `evaluate` uses."

    name = "toy"
    classes = ("background", "cell")
    cases = property(
        lambda self: [
            SimpleNamespace(id=f"c{i}", group=f"p{i // 2}", label_group="g")
            for i in range(len(self))
        ]
    )

    def native(self, i):
        return self[i]


def perfect(collection):
    return SimpleNamespace(predict=lambda image: image[0].astype(int))


def toy(spacing=None, classes=("background", "cell")):
    label = np.zeros((32, 32), int)
    label[4:10, 4:10] = 1
    label[18:26, 18:28] = len(classes) - 1
    c = Cases([(label[None].astype(float), label, None, spacing)] * 3)
    c.classes = classes
    return c


def test_evaluate_scores_a_perfect_student_on_every_case():
    rows = evaluate(perfect(toy()), toy(), "oracle", 3)
    assert [
        (r["arm"], r["seed"], r["case"], r["group"], r["label_group"], r["collection"])
        for r in rows
    ] == [("oracle", 3, f"c{i}", f"p{i // 2}", "g", "toy") for i in range(3)]
    assert all(
        r["dsc"] == r["aji"] == r["pq"] == 1 and r["hd95"] == 0 and r["hd95_unit"] == "px"
        for r in rows
    )


def test_distances_follow_the_spacing():
    shifted = SimpleNamespace(predict=lambda image: np.roll(image[0].astype(int), 2, 1))
    px, mm = (evaluate(shifted, toy(s), "shifted", 0)[0] for s in (None, (0.5, 0.5)))
    assert (
        (px["hd95_unit"], mm["hd95_unit"]) == ("px", "mm")
        and mm["hd95"] == pytest.approx(px["hd95"] / 2)
        and px["hd95"] > 0
    )


def test_the_tolerance_follows_the_spacing():
    far = SimpleNamespace(predict=lambda image: np.roll(image[0].astype(int), 4, 1))
    px, mm = (evaluate(far, toy(s), "far", 0)[0]["sdsc"] for s in (None, (0.5, 0.5)))
    assert px < 1 and mm == 1  # 4 px, 2 mm; the default is 3 of either
    assert (
        evaluate(far, toy(), "far", 0, tolerance=4)[0]["sdsc"] == 1
        and evaluate(far, toy((0.5, 0.5)), "far", 0, tolerance=1.0)[0]["sdsc"] < 1
    )
    with pytest.raises(InputError, match="tolerance"):
        evaluate(far, toy(), "far", 0, tolerance=-1)


def test_missed_classes_are_counted_and_fewer_is_better():
    names = ("background", "a", "b")
    half = SimpleNamespace(predict=lambda image: (image[0] == 1).astype(int))
    rows = evaluate(half, toy(classes=names), "half", 0) + evaluate(
        perfect(None), toy(classes=names), "whole", 0
    )
    assert [r["missed"] for r in rows] == [1, 1, 1, 0, 0, 0]
    assert compare(rows, "half", "missed", unit="case")[1]["seeds_won"] == 1


def test_topology_is_an_option_and_its_columns_know_what_is_better():
    half = SimpleNamespace(predict=lambda image: image[0].astype(int) * (np.arange(32) < 14))
    plain, rows = (evaluate(half, toy(), "half", 0, topology=t) for t in (False, True))
    assert (
        not {"cldice", "betti0"} & set(plain[0]) and {k: rows[0][k] for k in plain[0]} == plain[0]
    )
    assert all(0 < r["cldice"] < 1 and r["betti0"] == 1 for r in rows)
    rows += evaluate(perfect(None), toy(), "whole", 0, topology=True)
    for metric in ("cldice", "tsens", "betti0"):
        assert compare(rows, "half", metric, unit="case")[1]["seeds_won"] == 1


def test_cells_are_components_and_organs_are_regions():
    label = toy().native(0)[1]
    assert find_instances(label, ("background", "cell")).max() == 2
    assert (find_instances(label, ("background", "a", "b")) == label).all()
    drawn = label * 7
    assert find_instances(label, ("background", "cell"), drawn) is drawn
    merged = SimpleNamespace(predict=lambda image: np.ones((32, 32), int))
    assert evaluate(merged, toy(), "merged", 0)[0]["pq"] == 0  # one blob is not two cells
    organs = evaluate(perfect(None), toy(classes=("background", "a", "b")), "oracle", 0)[0]
    assert organs["dsc_a"] == organs["dsc_b"] == organs["pq"] == 1


def test_evaluate_refuses():
    with pytest.raises(InputError, match="empty"):
        evaluate(perfect(None), Cases(), "a", 0)
    with pytest.raises(InputError, match="'c0' of 'toy' has no label"):
        evaluate(perfect(None), Cases([(np.zeros((1, 32, 32)), None, None, None)]), "a", 0)
    with pytest.raises(InputError, match="shape"):
        evaluate(SimpleNamespace(predict=lambda x: x[0, :16]), toy(), "a", 0)
    student = SimpleNamespace(
        predict=lambda x: x[0], recipe=SimpleNamespace(classes=("background", "a", "b"), min_size=0)
    )
    with pytest.raises(InputError, match="3 classes"):
        evaluate(student, toy(), "a", 0)


def test_evaluate_with_a_true_student_and_collection():
    from unpaired_kd.core import seeded
    from unpaired_kd.data.collections import Collection
    from unpaired_kd.inference.student import Recipe, Student
    from unpaired_kd.networks.unet import UNet

    r = rng(0, "true")
    images = [(r.random((40, 56)) * 255).astype(np.uint8) for _ in range(4)]
    labels = [(im > 200).astype(np.int32) for im in images]
    c = Collection.from_arrays(images, labels, groups=["a", "a", "b", "b"])
    with seeded(0, "net"):
        net = UNet(in_channels=1, classes=1, width=4).eval()
    recipe = Recipe(
        channels=1,
        in_channels=1,
        classes=c.classes,
        patch=32,
        network="unet",
        network_config=net.config,
    )
    rows = evaluate(Student(net, recipe), c, "random", 0)
    assert [r["case"] for r in rows] == list(c.ids) and [r["group"] for r in rows] == [
        "a",
        "a",
        "b",
        "b",
    ]
    assert all(math.isfinite(r[m]) for r in rows for m in ("dsc", "hd95", "aji", "pq"))
    assert compare(rows + [dict(r, arm="again") for r in rows], "random")[1]["difference"] == 0


def test_one_difference_has_no_t_test():
    with pytest.raises(InputError, match="at least 2 differences, got 1"):
        t_test([0.1])
