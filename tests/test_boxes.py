"Every row of a box 'Paper, code, and here' says where it was measured, or that it was not."

import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
TITLE = re.compile(r"^(## |\*\*)Paper, code, and here(\*\*)?$", re.M)
# where the figure, or a test of it, stands
PLACE = r"\]\(|@fig-|\babove\b|\bbelow\b|\bin step \d|\bin \"|\btiles\b|\bthe cells on\b"
NONE = r"\bnot measured\b|\bnothing to measure\b|\bno study\b"


def boxes():
    "(chapter, text) of every box that has a table."
    for path in sorted(NBS.rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = re.sub(r"^> ?", "", "".join(cell["source"]), flags=re.M)
            if cell["cell_type"] == "markdown" and TITLE.search(text) and "\n|" in text:
                yield str(path.relative_to(NBS)), text[TITLE.search(text).end() :]


def first_table(text):
    "The cells of the first table: head, then rows."
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    lines = [line for line in lines if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    return [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])]


def faults(text):
    "Rows that say neither where they were measured nor that they were not."
    if "No row was measured" in text:
        return []
    head, *rows = first_table(text)
    if head[-1] != "measured" and not re.search(NONE, text):
        return [f"its last column is {head[-1]!r}, not 'measured'"]
    return [row[0] for row in rows if not re.search(f"{PLACE}|{NONE}", row[-1])]


BOXES = list(boxes())


@pytest.mark.parametrize("chapter, text", BOXES, ids=[name for name, _ in BOXES])
def test_every_row_says_where_it_was_measured(chapter, text):
    assert faults(text) == []


def test_there_are_boxes():
    assert len(BOXES) >= 30


@pytest.mark.parametrize(
    "last, found",
    [
        ("[results](../results/lotus.ipynb)", []),
        ("not measured", []),
        ("12 %, above", []),
        ("0.8", ["rate"]),
        ("", ["rate"]),
    ],
)
def test_a_bare_figure_is_no_answer(last, found):
    table = f"\n\n| | paper | here | measured |\n|---|---|---|---|\n| rate | 1 | 2 | {last} |\n"
    assert faults(table) == found


def test_a_box_without_the_column_is_noticed():
    table = "\n\n| | paper | here |\n|---|---|---|\n| rate | 1 | 2 |\n"
    assert faults(table) == ["its last column is 'here', not 'measured'"]
    assert faults("\n\nNo row was measured." + table) == []
