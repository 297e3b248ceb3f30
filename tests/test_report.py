"Rows in files, the results table and the figures of report.py."

import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from unpaired_kd.core import InputError, rng
from unpaired_kd.study.figures import (
    box_plot,
    forest_plot,
    history_plot,
    outcomes,
    overlay,
    save_figure,
)
from unpaired_kd.study.rows import arrange_arms, find_guests, load_rows, load_runs, save_rows
from unpaired_kd.study.statistics import compare
from unpaired_kd.study.tables import (
    evidence,
    published_table,
    rank_agreement,
    results_table,
    summarise,
)
from unpaired_kd.study.typesetting import markdown_table, name_of, p_text


def table(arms=("teacher", "alone", "placebo", "distilled"), seeds=2, patients=4, images=2):
    r = rng(0, "report")
    return [
        dict(
            arm=a,
            seed=s,
            collection="histology" if a == "teacher" else "ct",
            case=f"{p}{i}",
            group=f"{p:03d}",
            label_group="",
            hd95_unit="mm",
            dsc=0.5 + 0.1 * (a == "distilled") + 0.05 * p + r.normal(0, 0.01),
            hd95=9 + r.normal(),
            aji=0.4,
            pq=0.3,
        )
        for a in arms
        for s in range(seeds)
        for p in range(patients)
        for i in range(images)
    ]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines(text, start):
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {start}")
    ]


# ---------------------------------------------------------------- files
def test_rows_survive_a_file_with_every_digit_and_every_leading_zero(tmp_path):
    rows = table()
    rows[0]["dsc"] = 0.1 + 0.2
    rows[1]["dsc_liver"] = float("nan")
    save_rows(tmp_path / "metrics.csv", rows)
    back = load_rows(tmp_path)
    assert (
        math.isnan(back[1].pop("dsc_liver"))
        and math.isnan(rows[1].pop("dsc_liver"))
        and back == rows
    )
    assert (
        back[0]["case"] == "00"
        and back[0]["group"] == "000"
        and isinstance(back[0]["seed"], int)
        and back[0]["label_group"] == ""
    )
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_names_with_commas_quotes_and_line_breaks(tmp_path):
    rows = [dict(table()[0], case='a,"b"\nc')]
    save_rows(tmp_path / "m.csv", rows)
    assert load_rows(tmp_path / "m.csv") == rows


def test_runs_are_joined_and_a_run_given_twice_is_refused(tmp_path):
    rows = table()
    save_rows(tmp_path / "a" / "metrics.csv", [r for r in rows if r["seed"] == 0])
    save_rows(tmp_path / "b" / "metrics.csv", [r for r in rows if r["seed"] == 1])
    both = load_runs([tmp_path / "a", tmp_path / "b"])
    assert results_table(both) == results_table(rows)
    with pytest.raises(InputError, match="two rows"):
        results_table(load_runs([tmp_path / "a", tmp_path / "a"]))


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "no column 'arm'"),
        ("a,b\n1,2\n", "no column 'arm'"),
        ("arm,seed,case,group,dsc\nalone,0,x\n", "line 2 is cut"),
        ("arm,seed,case,group,dsc\nalone,0,x,p,.5,.6\n", "line 2 is cut or too long"),
        ("arm,seed,case,group,dsc\nalone,0,x,p,half\n", "line 2"),
        ("arm,seed,case,group,dsc\nalone,zero,x,p,.5\n", "line 2"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=message) as e:
        load_rows(tmp_path / "m.csv")
    assert "m.csv" in str(e.value)


def test_missing_and_binary_files_are_named(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00\x80")
    for p in ("m.csv", "none.csv", "."):
        with pytest.raises(InputError, match="cannot read"):
            load_rows(tmp_path / p)


# ---------------------------------------------------------------- table
def test_table_prints_what_compare_found():
    rows = table()
    text = results_table(rows)
    c = next(
        c
        for c in compare([r for r in rows if r["arm"] != "teacher"], "alone")
        if c["arm"] == "distilled"
    )
    first = lines(text, "distilled")[0]
    second = next(line for line in lines(text, "distilled")[1:] if line[1] == "DSC")
    assert first[1:4] == ["8", "2", f"{100 * c['mean']:.1f} ± {100 * c['sd']:.1f}"]
    assert second[2:6] == [
        f"{100 * c['difference']:+.1f}",
        f"{100 * c['ci_low']:+.1f} to {100 * c['ci_high']:+.1f}",
        p_text(c["p_t_holm"]),
        p_text(c["p_wilcoxon_holm"]),
    ]
    assert (
        second[7] == f"{c['seeds_won']}/2"
        and "HD95, mm" in text
        and "8 cases of 4 patients, 2 seeds" in text
    )


def test_teacher_has_a_mean_and_no_p():
    text = results_table(table())
    assert len(lines(text, "teacher (on histology)")) == 1 and find_guests(table(), "alone") == {
        "teacher": "histology"
    }
    rows = [
        {
            k: v
            for k, v in dict(
                r, case=r["arm"] + r["case"] if r["arm"] == "teacher" else r["case"]
            ).items()
            if k != "collection"
        }
        for r in table()
    ]
    assert find_guests(rows, "alone") == {
        "teacher": "other images"
    }  # rows without a collection: by their cases


def test_source_is_aligned_markdown():
    block = results_table(table()).split("\n\n")[0].splitlines()
    assert (
        len({len(line) for line in block}) == 1
        and len({line.count("|") for line in block}) == 1
        and re.fullmatch(r"\|:-+\|(-+:\|)+", block[1])
    )
    assert markdown_table(["a"], [["x"]]).splitlines() == ["| a   |", "|:----|", "| x   |"]


def test_order_hides_arms_but_not_their_questions():
    rows = table()
    short = results_table(rows, order=["distilled", "alone"], metrics=("dsc",))
    assert not lines(short, "placebo") and lines(short, "distilled")[1] in lines(
        results_table(rows), "distilled"
    )
    assert arrange_arms(rows, "placebo") == ["teacher", "placebo", "alone", "distilled"]
    with pytest.raises(InputError, match="unknown arm 'x'"):
        results_table(rows, order=["x"])


def test_one_seed_and_one_patient_still_print():
    one = results_table([r for r in table() if r["seed"] == 0])
    assert next(line for line in lines(one, "distilled")[1:] if line[1] == "DSC")[6] == "–"
    single = results_table([r for r in table() if r["group"] == "000" and r["case"] == "00"])
    assert (
        "One patient only" in " ".join(single.split())
        and "± –" in single
        and "against" not in single
    )


def note(text):
    return " ".join(text.split("\n\n")[-1].split())


def level(rows, by=0.02, arm="level"):
    "An arm that is better than `alone` by the same amount in every case."
    return [dict(r, arm=arm, dsc=r["dsc"] + by) for r in rows if r["arm"] == "alone"]


@pytest.mark.parametrize("patients", [2, 3, 7, 8, 12])
def test_the_foot_names_the_interval(patients):
    text = results_table(table(patients=patients))
    kind = "bootstrap over patients" if patients >= 8 else f"Student's t over {patients} patients"
    assert f"is likely to lie ({kind})." in note(text)
    assert ("cannot fall below" in note(text)) == (2 * 2 / 2**patients > 0.05)
    if patients == 3:
        assert (
            "With 3 patients p (Wilcoxon) cannot fall below 0.25, even before it is corrected."
            in note(text)
        )


def test_the_table_prints_students_interval():
    rows = table(patients=3)
    d = [
        np.mean(
            [
                r["dsc"] * (1 if r["arm"] == "distilled" else -1)
                for r in rows
                if r["arm"] in ("alone", "distilled") and r["group"] == f"{p:03d}"
            ]
        )
        * 2
        for p in range(3)
    ]
    low, high = stats.t.interval(0.95, 2, np.mean(d), stats.sem(d))
    assert (
        next(line for line in lines(results_table(rows), "distilled")[1:] if line[1] == "DSC")[3]
        == f"{100 * low:+.1f} to {100 * high:+.1f}"
    )


def test_equal_differences_have_no_interval_no_p_and_no_part_in_holm(recwarn):
    rows = [r for r in table() if r["arm"] in ("alone", "placebo")]
    text = results_table(rows + level(rows), metrics=("dsc",))
    assert (
        lines(text, "level")[1][2:7] == ["+2.0", "–", "–", "–", "–"]
        and "0.000" not in text
        and "nan" not in text
    )
    assert "corrected for 1 comparison (Holm)" in note(text)
    assert "the same in every patient there is no interval and no p" in note(text)
    assert lines(text, "placebo")[1] == lines(results_table(rows, metrics=("dsc",)), "placebo")[1]
    only = results_table([r for r in rows if r["arm"] == "alone"] + level(rows), metrics=("dsc",))
    assert "Each is the same in every patient" in note(only) and "Holm" not in note(only)
    forest_plot(evidence(rows + level(rows), "alone", ("dsc",)), rows)
    assert not recwarn.list


def test_an_arm_or_metric_without_values_does_not_stop_the_table():
    nan = float("nan")
    rows = [dict(r, pq=nan, hd95=nan if r["arm"] == "placebo" else r["hd95"]) for r in table()]
    text = results_table(rows)
    kept = results_table([r for r in rows if r["arm"] != "placebo"], metrics=("hd95",))
    assert (
        lines(text, "distilled")[2] == lines(kept, "distilled")[1]
    )  # HD95, as if the other had not been asked
    why = "Not tested, because fewer than two patients have finite values: "
    assert why + "placebo (HD95), placebo (PQ), distilled (PQ)." in note(text)
    assert "corrected for 1 to 2 comparisons (Holm)" in note(text)


def test_mixed_numbers_of_patients_are_said():
    rows = [
        dict(r, hd95=float("inf")) if r["arm"] == "alone" and r["group"] > "004" else r
        for r in table(patients=9)
    ]
    text = note(results_table(rows, metrics=("dsc", "hd95")))
    assert (
        "(bootstrap over patients, Student's t over fewer than 8)." in text
        and "Up to 8 cases" in text
    )


def test_a_value_that_one_seed_lacks_is_counted():
    rows = [
        dict(r, hd95=float("nan"))
        if (r["arm"], r["case"], r["seed"]) == ("placebo", "10", 1)
        else r
        for r in table()
    ]
    assert "Up to 1 case without a finite value is left out of a difference" in note(
        results_table(rows)
    )
    away = [
        dict(r, hd95=float("nan")) if (r["arm"], r["case"]) == ("teacher", "10") else r
        for r in table()
    ]
    assert "Up to 1 case without a finite value is left out of a mean" in note(results_table(away))


def test_rows_that_do_not_match_are_still_refused():
    rows = [r for r in table() if (r["arm"], r["seed"]) not in (("alone", 0), ("placebo", 1))]
    with pytest.raises(InputError, match="different .seed, case. rows"):
        results_table(rows)


def test_undefined_values_are_left_out_and_counted():
    rows = [
        dict(r, hd95=float("nan")) if r["arm"] == "placebo" and r["case"] == "10" else r
        for r in table()
    ]
    assert (
        "Up to 1 case" in " ".join(results_table(rows).split())
        and summarise([r for r in rows if r["arm"] == "placebo"], "hd95")[2] == 7
    )


def test_missed_structures_stand_beside_hd95(tmp_path):
    rows = [
        dict(r, missed=2, hd95=500.0)
        if (r["arm"], r["case"]) == ("alone", "00")
        else dict(r, missed=0)
        for r in table()
    ]
    save_rows(tmp_path / "m.csv", rows)
    text = results_table(load_rows(tmp_path / "m.csv"), metrics=("dsc", "hd95", "pq"))
    head, alone, placebo = (lines(text, k)[0] for k in ("arm", "alone", "placebo"))
    assert head[4:8] == ["HD95, mm", "found only", "missed", "PQ, %"] and len(alone) == len(head)
    found, _, n = summarise([r for r in rows if r["arm"] == "alone" and r["case"] != "00"], "hd95")
    assert (
        alone[5].startswith(f"{found:.1f} ±")
        and n == 7
        and alone[6] == "4"
        and float(alone[4].split()[0]) > 50
    )  # two seeds, two structures
    assert placebo[4] == placebo[5] and placebo[6] == "0" and "diagonal" in text
    assert "found only" not in results_table(rows, metrics=("dsc",))


def test_rows_without_the_new_columns_are_reported_as_before():
    old = results_table(table())
    assert (
        "missed" not in old.lower()
        and results_table([dict(r, missed=0, sdsc=0.9) for r in table()]) == old
    )
    mixed = [
        dict(r, missed=1) if r["arm"] == "placebo" else r for r in table()
    ]  # new runs beside old ones
    assert lines(results_table(mixed), "alone")[0][5:7] == ["– ± –", "–"] and lines(
        results_table(mixed), "placebo"
    )[0][5:7] == ["– ± –", "16"]
    assert name_of("missed") == ("missed", "", 1) and name_of("sdsc") == ("SDSC", "%", 100)
    with pytest.raises(InputError, match="has no 'sdsc'"):
        results_table(table(), metrics=("sdsc",))


def test_published_results_still_load():
    folders = sorted((Path(__file__).parents[1] / "nbs/results/lotus").glob("*/metrics.csv"))
    rows = load_rows(folders[0])
    assert folders and rows and "missed" not in rows[0]
    assert "HD95" in results_table(rows) and "found only" not in results_table(rows)


def test_evidence_corrects_the_two_way_p_as_well():
    found = [c for c in evidence(table(), "alone") if c["metric"] == "dsc"]
    both = compare([r for r in table() if r["arm"] != "teacher"], "alone", unit="both")[1:]
    assert [c["p_both_holm"] for c in found] == [c["p_t_holm"] for c in both]


def test_microscopy_is_printed_in_micrometres():
    rows = [dict(r, hd95=r["hd95"] / 1000) for r in table()]
    small = results_table(rows)
    large = results_table(table())
    assert (
        "HD95, µm" in small
        and small.replace("HD95, µm", "HD95, mm") == large
        and "HD95, µm" == forest_plot(evidence(rows, "alone"), rows).axes[1].get_title()
    )


@pytest.mark.parametrize(
    "mm, unit, factor",
    [
        (25.0, "mm", 1),
        (1.0, "mm", 1),
        (0.999, "µm", 1e3),
        (0.001, "µm", 1e3),
        (5e-5, "nm", 1e6),
        (0.0, "mm", 1),
    ],
)
def test_the_unit_of_a_distance_fits_its_size(mm, unit, factor):
    rows = [dict(hd95_unit="mm", hd95=v) for v in (0.0, mm / 3, mm, float("nan"))]
    assert name_of("hd95", rows) == ("HD95", unit, factor)


@pytest.mark.parametrize("arm", ["alone", "distilled"])
def test_a_table_without_any_test_says_why(arm):
    "One arm has no finite value outside one patient, so nothing is compared: the note says so."
    rows = [r for r in table() if r["arm"] in ("alone", "distilled")]
    home = rows[0]["group"]
    rows = [
        dict(r, dsc=float("nan")) if r["arm"] == arm and r["group"] != home else r for r in rows
    ]
    text = " ".join(results_table(rows, metrics=("dsc",)).split())
    assert "against alone" not in text
    assert (
        "Not tested, because fewer than two patients have finite values: distilled (DSC)." in text
    )
    one = [r for r in table() if r["group"] == home]
    assert "One patient only" in " ".join(
        results_table(one).split()
    ) and "Not tested" not in results_table(one)


def test_numbers_as_text():
    assert [p_text(p) for p in (1, 0.1, 0.0999, 0.001, 0.00099, float("nan"))] == [
        "1.00",
        "0.10",
        "0.100",
        "0.001",
        "<0.001",
        "–",
    ]
    assert name_of("hd95", [dict(hd95_unit="px"), dict(hd95_unit="mm")]) == (
        "HD95",
        "mm or px",
        1,
    ) and name_of("dsc_liver") == ("DSC liver", "%", 100)


def test_lengths_in_two_units_are_not_averaged():
    "Two of four patients lack a spacing: their HD95 is in px. It is left out and named; DSC stays."
    rows = [dict(r, hd95_unit="px" if r["group"] < "002" else "mm") for r in table()]
    text = results_table(rows, metrics=("dsc", "hd95"))
    assert "HD95, m" not in text.partition("Not shown")[0] and "DSC, %" in text
    assert "Not shown: HD95, in mm for some cases and in px for others" in note(text)
    with pytest.raises(InputError, match="hd95 is in mm in some rows and in px in others"):
        compare([r for r in rows if r["arm"] != "teacher"], "alone", "hd95")


def test_a_teacher_in_pixels_stands_beside_students_in_mm():
    "The teacher's images have no spacing: its cell says px, the column stays in mm."
    rows = [dict(r, hd95=0.25, hd95_unit="mm") for r in table()]
    rows = [dict(r, hd95=7.0, hd95_unit="px") if r["arm"] == "teacher" else r for r in rows]
    text = results_table(rows, metrics=("hd95",))
    assert "HD95, µm" in text and "250.0 ± 0.0" in text
    assert lines(text, "teacher")[0][-1] == "7.0 ± 0.0 px"
    assert lines(text, "alone")[0][-1] == "250.0 ± 0.0"


@pytest.mark.parametrize(
    "seeds,patients,said",
    [(2, 4, "With two seeds"), (3, 4, None), (3, 2, "With two patients"), (1, 2, None)],
)
def test_two_seeds_or_patients_are_said_to_be_few(seeds, patients, said):
    text = note(results_table(table(seeds=seeds, patients=patients), metrics=("dsc",)))
    found = [w for w in ("With two seeds", "With two patients") if w in text]
    assert found == [said] * (said is not None)


def test_cases_missing_in_a_mean_are_counted_also_where_a_difference_lacks_them():
    rows = [
        dict(r, hd95=float("inf")) if (r["arm"], r["case"]) == ("alone", "10") else r
        for r in table()
    ]
    text = note(results_table(rows, metrics=("hd95",)))
    assert "Up to 1 case without a finite value is left out of a difference. " in text
    assert "Up to 1 case without a finite value is left out of a mean. " in text


# ---------------------------------------------------------------- figures
def test_outcomes_count_like_dice():
    a, b = rng(0, "masks").random((2, 40, 40)) < 0.3
    n = np.bincount(outcomes(a.astype(int), b.astype(int)).ravel(), minlength=5)
    assert n.tolist() == [(~a & ~b).sum(), (a & b).sum(), (a & ~b).sum(), (~a & b).sum(), 0]


@pytest.mark.parametrize("shape", [(24, 32), (1, 24, 32), (3, 24, 32), (24, 32, 3)])
def test_overlay_takes_any_image_and_legends_what_it_shows(shape):
    target = np.zeros((24, 32), int)
    target[4:12, 4:12] = 1
    target[14:20, 14:30] = 2
    image = rng(0, "image").normal(size=shape)
    fig = overlay(image, target, {"same": target, "swapped": (target > 0) * (3 - target)})
    assert len(fig.axes) == 3 and [t.get_text() for t in fig.legends[0].get_texts()] == [
        "correct",
        "missed",
        "extra",
        "wrong class",
    ]
    assert (
        len(overlay(image, target * 0, {"none": target * 0}).axes) == 2
    )  # nothing there, nothing found


@pytest.mark.parametrize("lead", [(), (1,)])
def test_overlay_shows_the_fullest_slice_of_a_volume(lead):
    target = np.zeros((5, 20, 24), int)
    target[3, 5:15, 5:15] = 1
    target[1, 5, 5] = 1
    fig = overlay(rng(0, "volume").random((*lead, 5, 20, 24)), target, {"all missed": target * 0})
    shown = fig.axes[1].get_images()[0].get_array()
    assert (
        shown.shape == (20, 24, 3) and np.ptp(shown[8, 8]) > 0.5 and np.ptp(shown[0, 0]) < 1e-6
    )  # coloured inside, grey outside


def test_overlay_refuses_another_shape():
    with pytest.raises(InputError, match="shape"):
        overlay(np.zeros((8, 8)), np.ones((8, 8), int), {"a": np.ones((8, 9), int)})


def test_box_plot_joins_the_patients_of_paired_arms_only():
    ax = box_plot(table()).axes[0]
    joined = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(joined) == 4 and all(list(line.get_xdata()) == [1, 2, 3] for line in joined)
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "teacher\n(histology)",
        "alone",
        "placebo",
        "distilled",
    ]


def test_forest_plot_draws_interval_and_seeds():
    found = [c for c in evidence(table(), "alone") if c["metric"] in ("dsc", "hd95")]
    fig = forest_plot(found, table())
    assert [a.get_title() for a in fig.axes] == ["DSC, points", "HD95, mm"] and [
        a.get_xlabel() for a in fig.axes
    ] == ["better →", "← better"]
    bar = fig.axes[0].lines[0]
    assert list(bar.get_xdata()) == pytest.approx(
        [100 * found[0]["ci_low"], 100 * found[0]["ci_high"]]
    )
    with pytest.raises(InputError, match="nothing to show"):
        forest_plot(compare([r for r in table() if r["arm"] == "alone"], "alone"))


def test_history_plot_finds_its_columns_and_stages(tmp_path):
    history = [
        dict(
            step=i,
            stage="a" if i < 4 else "b",
            seg=1.0 / (i + 1),
            **(dict(kl=0.1) if i > 3 else {}),
        )
        for i in range(8)
    ]
    fig = history_plot(history)
    assert [a.get_title() for a in fig.axes if a.axison] == ["seg", "kl"]
    assert (
        list(fig.axes[0].lines[1].get_xdata()) == [3.5, 3.5]
        and len(fig.axes[1].lines[0].get_xdata()) == 4
    )
    save_rows(tmp_path / "history.csv", history)
    assert [a.get_title() for a in history_plot(tmp_path).axes if a.axison] == ["seg", "kl"]
    with pytest.raises(InputError, match="Did you mean 'seg'"):
        history_plot(history, columns=["sge"])
    with pytest.raises(InputError, match="empty"):
        history_plot([])


def test_figures_are_whole_or_absent(tmp_path):
    save_figure(tmp_path / "f" / "a.png", plt.figure())
    assert (tmp_path / "f" / "a.png").read_bytes()[:4] == b"\x89PNG" and not plt.get_fignums()
    with pytest.raises(ValueError):
        save_figure(tmp_path / "f" / "b.nonsense", plt.figure())
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["a.png"]


def ordered(arms, seeds=2, shared=False):
    "Two seeds; each tests one patient of its own. Arm number n is n points better in every case."
    return [
        dict(arm=a, seed=s, case=f"p{s}", group=f"p{s}", collection="c", dsc=0.5 + 0.01 * n)
        for n, a in enumerate(arms)
        for s in range(seeds)
    ]


def test_perfect_order_agrees_in_every_draw_that_has_patients():
    rows = ordered("abcd")
    assert rank_agreement(rows, dict(a=1, b=2, c=3, d=4)) == (1.0, 1.0)
    assert rank_agreement(rows, dict(a=4, b=3, c=2, d=1)) == (-1.0, 0.0)
    assert rank_agreement(rows, dict(a=1, b=1)) == (0.0, 0.0)
    noisy = [dict(r, dsc=0.5 + (r["arm"] == "b") * 2e-16) for r in ordered("ab")]
    assert rank_agreement(noisy, dict(a=1, b=2)) == (0.0, 0.0)  # rounding noise is no order


def test_published_table_shows_both_and_refuses_what_was_not_run():
    text = published_table(ordered("ab"), dict(a=dict(dsc=50.0), b=dict(dsc=56.0)))
    assert "+1.0" in text and "+6.00" in text and "each counted once" in text
    with pytest.raises(InputError, match="z"):
        published_table(ordered("ab"), dict(a=dict(dsc=50.0), z=dict(dsc=56.0)))
    with pytest.raises(InputError, match="no arm"):
        published_table(ordered("ab"), {})
    with pytest.raises(InputError, match="'b' has no dsc"):
        published_table(ordered("ab"), dict(a=dict(dsc=50.0), b=dict(aji=56.0)))


@pytest.mark.parametrize("patients", [1, 2, 5, 9])
def test_published_table_says_what_few_patients_allow(patients, recwarn):
    rows = [r for r in table(patients=patients, images=2) if r["arm"] != "teacher"]
    text = published_table(rows, dict(alone=dict(dsc=50.0), distilled=dict(dsc=56.0)))
    cells = next(line for line in lines(text, "distilled"))
    assert ("no draws" in text) == (patients < 8) and "nan" not in text and not recwarn.list
    if patients == 1:
        assert cells[2:4] == ["–", "–"] and "fewer than two patients" in text
    else:
        c = next(c for c in compare(rows, "alone") if c["arm"] == "distilled")
        assert (
            cells[2]
            == f"{100 * c['difference']:+.1f} [{100 * c['ci_low']:+.1f}, {100 * c['ci_high']:+.1f}]"
        )
        assert ("Student's t over" in text) == (patients < 8)
    flat = published_table(ordered("ab"), dict(a=dict(dsc=50.0), b=dict(dsc=56.0)))
    assert lines(flat, "b")[0][2:4] == ["+1.0 –", "–"] and "no interval and no p" in flat


@pytest.mark.parametrize(
    "seeds,patients,images,said",
    [
        (
            1,
            1,
            1,
            "1 case of 1 patient, 1 seed (one training of every arm). Scores: mean ± standard ",
        ),
        (2, 3, 1, "3 cases of 3 patients, 2 seeds (2 trainings of every arm). Scores: mean ± "),
        (1, 4, 2, "8 cases of 4 patients, 1 seed (one training of every arm). Scores: mean ± "),
    ],
)
def test_one_is_not_plural(seeds, patients, images, said):
    text = note(results_table(table(("alone", "placebo"), seeds, patients, images)))
    assert text.startswith(said)
    assert ("corrected for 1 comparison (Holm)." in text) == (patients > 1)
    assert ("there is no p (with seeds)" in text) == (patients > 1 and seeds == 1)
    assert ("is its mean over the seeds" in text) == (seeds > 1)


def test_a_history_without_numbers_is_refused():
    with pytest.raises(InputError, match="no column of numbers"):
        history_plot([dict(step=1, stage="train")])
