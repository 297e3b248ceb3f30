"The slow definitions that tests compare with, as the chapters show them."

import json
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

CHAPTERS = Path(__file__).parents[1] / "nbs"


def defined_in(chapter, name):
    "A function that a chapter defines in a cell it does not export."
    cells = json.loads((CHAPTERS / chapter).read_text(encoding="utf-8"))["cells"]
    found = [s for s in ("".join(c["source"]) for c in cells) if f"\ndef {name}(" in f"\n{s}"]
    assert len(found) == 1, f"{chapter} defines {name} in {len(found)} cells"
    space = {"np": np, "linear_sum_assignment": linear_sum_assignment}
    exec(found[0], space)
    return space[name]


loop_instance_scores = defined_in("metrics/yardsticks.ipynb", "loop_instance_scores")
