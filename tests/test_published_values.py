"""The tables of the papers, row by row, as they were printed and as each row trains; the grids that
run them."""

import re
from pathlib import Path

import pytest
import yaml

from unpaired_kd.methods.published import TABLES, row_of

GRIDS = Path(__file__).parents[1] / "nbs/experiments"

# fmt: off
RAW = {"distill_from": "raw"}
HEAD = {"kl_on": "head"}
BY_PLACE = {"correspondence": "positional"}
SEES = {"teacher_input": "student", "adabn": True}
LABELS = {"diff": 0, "projection": 0, "kl": 0, "ifv": 0}
TABLE_2 = {  # LOTUS: name -> (DSC, HD95, AJI, PQ), method, options, weights that are off
    "none":        ((55.69, 148.78, 39.60, 29.36), "single", {}, ()),
    "kl":          ((57.58, 137.95, 41.09, 29.24), "lotus", RAW | HEAD, ("diff", "ifv")),
    "ifv":         ((57.58, 142.33, 41.12, 31.41), "lotus", RAW, ("diff", "projection", "kl")),
    "diff ifv":    ((59.66, 123.91, 42.91, 32.04), "lotus", {}, ("kl",)),
    "diff kl":     ((59.73, 113.81, 42.85, 30.94), "lotus", HEAD, ("ifv",)),
    "diff kl ifv": ((61.59, 109.86, 45.12, 34.74), "lotus", HEAD, ()),
}
TABLE_1 = {
    "student":   (55.69, 148.78, 39.60, 29.36),
    "teacher":   (65.96,  99.89, 49.78, 40.91),
    "UNet++":    (56.62, 138.88, 40.20, 29.49),
    "U2Net":     (57.20, 137.53, 40.87, 30.63),
    "Swin-UNet": (59.61, 122.32, 43.30, 32.34),
    "nnU-Net":   (60.10, 114.04, 43.95, 33.06),
    "MAML":      (60.51, 113.54, 43.46, 32.44),
    "MEDIAR":    (56.94, 135.92, 40.82, 29.88),
    "UMMKD":     (58.92, 126.73, 42.01, 32.93),
    "LOTUS":     (61.59, 109.86, 45.12, 34.74),
}
ARMS_1 = {"student": ("single", None), "UMMKD": ("ummkd", None), "LOTUS": ("lotus", "paper")}
AUDIT = {  # name -> against, what its arm changes
    "class":             ("alone", {}),
    "hard Dice":         ("alone", {"options": {"dice": "hard"}, "weights": LABELS}),
    "positional":        ("class", {"options": BY_PLACE}),
    "random partner":    ("class", {"options": {"correspondence": "random"}}),
    "sees the students": ("positional", {"options": BY_PLACE | SEES}),
    "no variation":      ("class", {"weights": {"ifv": 0}}),
    "positional, none":  ("positional", {"options": BY_PLACE, "weights": {"ifv": 0}}),
    "on logits":         ("positional", {"options": BY_PLACE | {"ifv_on": "logits"}}),
    "width projector":   ("class", {"options": {"projector": "width"}}),
    "no projector":      ("class", {"options": {"projector": "none"}}),
    "batch statistics":  ("class", {"options": {"statistics": "batch"}}),
    "paper":             ("class", {"preset": "paper"}),
    "released":          ("class", {"preset": "released"}),
}
SOFT = {"weights": {"hint": 0, "hint_g": 0, "kd": 1}}
DRIT = {"options": {"i2i": "drit"}}
MOVES = {"options": {"hint_to": "student"}}
FAKE = {"infer": "teacher_on_fake"}
APART = {"translate_first": True, "infer": "teacher_on_fake"}
NO_LESSON = {"weights": {"cx": 0, "hint": 0}}
WEAK = {"student": "mr", "teacher": "ct", "network": "mrrn"}
T1 = {"student": "t1", "teacher": "t2", "network": "mrrn"}
T2 = {"student": "t2", "teacher": "t1", "network": "mrrn"}
DENSE = {"network": "densefcn"}
MRRN = {"network": "mrrn"}
CMEDL = {  # name -> printed Dice (%), method, changes to the arm, changes to the study
    "R00": (75, "cmedl",  {}, {}),
    "R01": (69, "single", {}, {}),
    "R02": (67, "single", {}, DENSE),
    "R03": (73, "single", {}, MRRN),
    "R04": (74, "cmedl",  {}, DENSE),
    "R05": (77, "cmedl",  {}, MRRN),
    "R06": (74, "cmedl",  DRIT, {}),
    "R07": (73, "cmedl",  DRIT, DENSE),
    "R08": (76, "cmedl",  DRIT, MRRN),
    "R09": (72, "cmedl",  {"weights": {"cx": 0}}, {}),
    "R10": (71, "cmedl",  {"weights": {"cyc": 0}}, {}),
    "R11": (71, "cmedl",  {"weights": {"seg_teacher": 0}}, {}),
    "R12": (71, "cmedl",  {"weights": {"seg_pseudo": 0, "seg_g": 0}}, {}),
    "R13": (69, "cmedl",  {"options": {"hint": "low"}}, {}),
    "R14": (70, "cmedl",  {"options": {"hint": "mid"}}, {}),
    "R15": (72, "cmedl",  SOFT, {}),
    "R16": (75, "cmedl",  SOFT, MRRN),
    "R17": (None, "cmedl", {"weights": {"hint": 0, "hint_g": 0}}, {}),
    "R18": (None, "cmedl", MOVES, {}),
    "R19": (None, "cmedl", {"weights": {"hint_g": 0}}, {}),
    "R20": (None, "cmedl", MOVES | {"weights": {"hint_g": 0}}, {}),
    "R21": (71, "cmedl",  {"options": APART} | NO_LESSON, {}),
    "R22": (71, "cmedl",  {"options": {"i2i": "drit"} | APART} | NO_LESSON, {}),
    "R23": (72, "fusion", {"options": {"fuse": "concat"}}, {}),
    "R24": (72, "fusion", {"options": {"fuse": "weighted"}}, {}),
    "R25": (74, "cmedl",  {"options": FAKE, "reuses": "R00"}, {}),
    "R26": (72, "mutual", {}, {}),
    "R27": (None, "ummkd", {}, {}),
    "R28": (81, "single", {}, WEAK),
    "R29": (81, "cmedl",  {}, WEAK),
    "R30": (84, "cmedl",  {"weights": {"seg_fake": 5}}, WEAK),
    "R31": (88, "single", {}, T1),
    "R32": (90, "cmedl",  {}, T1),
    "R33": (92, "single", {}, T2),
    "R34": (93, "cmedl",  {}, T2),
}
VPBSD = {  # name -> method, changes to the arm
    "semi":            ("vpbsd", {"weights": {"dis": 0}}),
    "dis":             ("vpbsd", {"weights": {"semi": 0}}),
    "full":            ("vpbsd", {}),
    "random codebook": ("vpbsd", {"options": {"target": "random"}}),
    "unquantised":     ("vpbsd", {"options": {"target": "unquantised"}}),
    "placebo":         ("vpbsd", {"teacher": "placebo", "weights": {"semi": 0}}),
    "reconstruction":  ("reconstruction", {}),
    "recalibrated":    ("recalibrated", {}),
    "fine-tuned":      ("single", {"start": "teacher"}),
    "code_ce":         ("vpbsd", {"options": {"pattern_loss": "code_ce"}}),
    "channel":         ("vpbsd", {"options": {"pattern_loss": "channel"}}),
    "hint":            ("vpbsd", {"options": {"pattern_loss": "hint"}}),
    "lotus":           ("lotus", {"options": {"taps": ["join1"], "head": "head"}}),
    "ummkd":           ("ummkd", {}),
}
# fmt: on


def scores(values):
    return dict(zip(("dsc", "hd95", "aji", "pq"), values))


def arm(method, changes):
    return {"method": method, "start": "scratch"} | changes


def given(**parts):
    "Those parts of an arm that are not empty."
    return {name: part for name, part in parts.items() if part}


def test_no_row_is_missing_here():
    here = dict(lotus=TABLE_2, lotus_methods=TABLE_1, lotus_audit=AUDIT, cmedl=CMEDL, vpbsd=VPBSD)
    assert {p: [row.name for row in table] for p, table in TABLES.items()} == {
        p: list(table) for p, table in here.items()
    }


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_of_lotus(name):
    printed, method, options, off = TABLE_2[name]
    row = row_of("lotus", name)
    assert row.published == scores(printed) and row.study == {}
    assert row.arm == arm(method, given(options=options, weights=dict.fromkeys(off, 0)))


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_of_lotus(name):
    row = row_of("lotus_methods", name)
    assert row.published == scores(TABLE_1[name])
    method, preset = ARMS_1.get(name, (None, None))
    assert row.arm == (arm(method, given(preset=preset)) if method else {})


@pytest.mark.parametrize("name", AUDIT)
def test_questions_of_the_audit(name):
    against, changes = AUDIT[name]
    row = row_of("lotus_audit", name)
    assert (row.against, row.arm, row.published) == (against, arm("lotus", changes), {})


@pytest.mark.parametrize("name", CMEDL)
def test_rows_of_cmedl(name):
    dice, method, changes, study = CMEDL[name]
    row = row_of("cmedl", name)
    assert row.published == ({} if dice is None else {"dsc": dice})
    assert row.arm == arm(method, changes)
    assert row.study == study


@pytest.mark.parametrize("name", VPBSD)
def test_rows_of_vpbsd(name):
    method, changes = VPBSD[name]
    row = row_of("vpbsd", name)
    assert (row.arm, row.published, row.study) == (arm(method, changes), {}, {})


# ---------------------------------------------------------------- grids
def grid(name):
    return yaml.safe_load((GRIDS / name).read_text(encoding="utf-8"))


def test_every_row_of_cmedl_is_one_row_of_its_grid():
    cells = grid("cmedl_matrix.yaml")["rows"]
    for title, cell in cells.items():
        named = re.findall(r"\bR\d\d\b", title)
        assert cell["rows"] == (["R00"] if named == ["R35"] else named), title
    once = [row for title, cell in cells.items() if "R35" not in title for row in cell["rows"]]
    assert sorted(once) == sorted(CMEDL)


@pytest.mark.parametrize("column,key", [("hint", "weights"), ("h", "options")])
def test_sweeps_of_cmedl_say_what_they_change(column, key):
    cells = grid("cmedl_matrix.yaml")["rows"]
    found = {
        float(m[1]): cell
        for title, cell in cells.items()
        if (m := re.fullmatch(rf"R35 {column} ([\d.]+)", title))
    }
    changed = {"hint": ("hint", "hint_g"), "h": ("cx_h",)}[column]
    assert set(found) == {"hint": {0.1, 0.3, 3.0, 10.0}, "h": {0.1, 0.2, 1.0}}[column]
    for value, cell in found.items():
        assert [cell[key][name] for name in changed] == [value] * len(changed)


def test_sweeps_of_the_teachers_patients():
    cells = grid("cmedl_matrix.yaml")["rows"]
    for value in (0.1, 0.5):
        cell = cells[f"R35 teacher share {value}"]
        assert cell == {"rows": ["R00"], "teacher_share": value}


def test_rows_of_vpbsd():
    cells = grid("vpbsd_grid.yaml")["rows"]
    rows = {title: cell["rows"] for title, cell in cells.items()}
    assert set().union(*rows.values()) == set(VPBSD)
    several = {title: names for title, names in rows.items() if names != ["full"]}
    assert several == {
        "parts": ["semi", "dis", "full", "random codebook", "unquantised"],
        "controls": ["recalibrated", "reconstruction", "placebo", "fine-tuned"],
        "other methods": ["hint", "lotus", "ummkd"],
        "losses": ["full", "code_ce", "channel"],
        "no skips": ["full", "random codebook"],
    }
