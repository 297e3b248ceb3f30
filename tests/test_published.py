"""Published rows: names once, arms that a study can train, numbers as printed."""

import pytest

from unpaired_kd.core import InputError
from unpaired_kd.methods.published import (
    TABLES,
    Row,
    arm_of,
    arm_text,
    row_of,
    shared_options,
    table_of,
)
from unpaired_kd.methods.registry import method_class, options_of

ROWS = [row for table in TABLES.values() for row in table]
TRAINED = [row for row in ROWS if row.arm]


def test_rows_have_one_shape():
    assert all(
        type(row) is Row and row.paper == paper for paper, table in TABLES.items() for row in table
    )
    assert {paper: len(table) for paper, table in TABLES.items()} == {
        "lotus": 6,
        "lotus_methods": 10,
        "lotus_audit": 13,
        "cmedl": 35,
        "vpbsd": 14,
    }
    assert all(len({row.name for row in table}) == len(table) for table in TABLES.values())


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: f"{row.paper} {row.name}")
def test_every_arm_is_one_that_its_method_takes(row):
    arm = row.arm
    cls = method_class(row.arm["method"])
    assert set(arm) <= {"method", "start", "teacher", "preset", "options", "weights", "reuses"}
    assert arm["start"] in cls.starts and arm.get("teacher", "true") in cls.teachers
    options = options_of(
        arm["method"], arm.get("preset", "recommended"), arm.get("options", {}), 64
    )
    assert set(arm.get("weights", {})) <= set(cls.default_weights(options))
    if "reuses" in arm:
        assert row_of(row.paper, arm["reuses"]).arm["method"] == arm["method"] and set(
            arm["options"]
        ) <= set(cls.after_training)


def test_what_was_printed():
    assert row_of("lotus", "kl").published == dict(dsc=57.58, hd95=137.95, aji=41.09, pq=29.24)
    assert row_of("lotus_methods", "nnU-Net").published["dsc"] == 60.10
    assert (
        row_of("cmedl", "R05").published == {"dsc": 77.0} and row_of("cmedl", "R17").published == {}
    )
    assert row_of("cmedl", "R30").study == dict(student="mr", teacher="ct", network="mrrn")
    assert not any(row.published for row in TABLES["vpbsd"] + TABLES["lotus_audit"])
    for name, own in (("student", "none"), ("LOTUS", "diff kl ifv")):
        assert row_of("lotus_methods", name).published == row_of("lotus", own).published


def test_questions_of_the_audit_are_compared_with_something():
    names = {row.name for row in TABLES["lotus_audit"]} | {"alone"}
    assert all(row.against in names and row.against != row.name for row in TABLES["lotus_audit"])


@pytest.mark.parametrize(
    "paper,name,words",
    [
        ("lotos", "kl", "Did you mean 'lotus'"),
        ("lotus", "kll", "row of lotus 'kll'. Did you mean 'kl'"),
        ("cmedl", "r05", "Did you mean 'R05'"),
    ],
)
def test_unknown_rows_are_refused_with_the_nearest(paper, name, words):
    with pytest.raises(InputError, match=words):
        row_of(paper, name)


def test_sizes_of_an_experiment_go_where_they_belong():
    sizes = {"width": 8, "seg": "common", "cx_on": "teacher"}
    weights = {"hint": 0.3}

    def of(name):
        return arm_of(row_of("cmedl", name), sizes, weights, "paper")

    assert of("R13") == dict(
        method="cmedl",
        start="scratch",
        preset="paper",
        options={**sizes, "hint": "low"},
        weights={"hint": 0.3},
    )
    assert of("R17")["weights"] == {"hint": 0.0, "hint_g": 0.0}  # the row's own come first
    assert arm_of(row_of("cmedl", "R13"), {"hint": "high"})["options"] == {"hint": "low"}
    assert of("R26") == dict(
        method="mutual", start="scratch", preset="paper", options={"width": 8, "seg": "common"}
    )
    assert of("R23")["options"] == {"width": 8, "seg": "common", "fuse": "concat"}
    assert of("R01") == dict(method="single", start="scratch", preset="paper") and of(
        "R27"
    ) == dict(method="ummkd", start="scratch", preset="paper")
    assert of("R25") == {k: row_of("cmedl", "R25").arm[k] for k in ("reuses", "options")}
    late = arm_of(row_of("cmedl", "R21"), sizes, {"hint_g": 0.3, "kd": 0.1})[
        "weights"
    ]  # a translation that is trained alone hears no hint
    assert late == {"cx": 0.0, "hint": 0.0, "kd": 0.1}
    assert arm_of(row_of("lotus_audit", "released"), {"tau": 4.0}, preset="paper") == dict(
        method="lotus", start="scratch", preset="released", options={"tau": 4.0}
    )
    assert "options" not in arm_of(
        row_of("vpbsd", "reconstruction"), {"decoder": 16}
    )  # the teacher's decoder is not this one


def test_no_option_is_dropped_silently():
    with pytest.raises(InputError, match="cmedl: unknown option 'widht'.*'width'"):
        arm_of(row_of("cmedl", "R01"), {"widht": 8})
    with pytest.raises(InputError, match="loss term 'hnt'.*'hint'"):
        arm_of(row_of("cmedl", "R00"), {}, {"hnt": 0.3})
    with pytest.raises(InputError, match="not in this book"):
        arm_of(row_of("lotus_methods", "MAML"))
    assert (
        shared_options("mutual", "cmedl") == shared_options("fusion", "cmedl")
        and "gan" in shared_options("mutual", "cmedl")
        and not shared_options("single", "cmedl")
    )


def test_tables_as_markdown():
    lines = table_of("lotus").splitlines()
    assert lines[0] == "| row | question | arm | dsc | hd95 | aji | pq |" and len(lines) == 8
    arm = "`lotus`: distill_from=raw, kl_on=head, weight of diff: 0, weight of ifv: 0"
    assert lines[3] == f"| kl | class scores only | {arm} | 57.58 | 137.95 | 41.09 | 29.24 |"
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| against |" in table_of("lotus_audit") and "| study |" in table_of("cmedl")
    assert (
        arm_text({}) == "not in this book"
        and arm_text(row_of("vpbsd", "fine-tuned").arm) == "`single`: start=teacher"
    )
    with pytest.raises(InputError, match="'lotus'"):
        table_of("lotu")
