"""The grid of CMEDL's rows: two rows differ in what the table says, and in nothing else."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unpaired_kd.command.grid import choose_rows, expand_grid
from unpaired_kd.core import InputError

GRID = Path(__file__).parents[1] / "nbs/experiments/cmedl_matrix.yaml"
COMMON = {"seg": "common", "beta1": 0.9}


def cells_at(scale, *given):
    return {c.name: c for c in expand_grid(GRID, list(given), scale)[1]}


def differences(a, b):
    return {k for k in a.values if a.values[k] != b.values[k]}


@pytest.mark.parametrize("scale", [None, "demo", "full"])
def test_loss_and_optimiser_are_one_in_all_rows(scale):
    for name, cell in cells_at(scale).items():
        options = {k: v for k, v in cell.values["options"].items() if k != "cx_h"}
        assert options == COMMON, name
        assert cell.values["preset"] == "paper", name


@pytest.mark.parametrize("scale", [None, "demo", "full"])
def test_a_row_changes_nothing_but_what_it_names(scale):
    cells = cells_at(scale)
    first = cells["R00 R25 CMEDL, and its teacher on pseudo images"]
    allowed = {"R31": {"augment"}, "R32": {"augment"}, "R33": {"augment"}, "R34": {"augment"}}
    sweeps = {"hint": {"weights"}, "h": {"options"}, "teacher": {"teacher_share"}}
    for name, cell in cells.items():
        row, *words = name.split()
        more = sweeps[words[0]] if row == "R35" else allowed.get(row, set())
        assert differences(first, cell) - {"rows"} == more, name


@pytest.mark.parametrize("scale", ["demo", "full"])
def test_a_sweep_over_h_changes_h_only(scale):
    cells = cells_at(scale)
    for value in ("0.1", "0.2", "1"):
        assert cells[f"R35 h {value}"].values["options"] == COMMON | {"cx_h": float(value)}
    for value in ("0.1", "0.3", "3", "10"):
        weight = float(value)
        assert cells[f"R35 hint {value}"].values["weights"] == {"hint": weight, "hint_g": weight}


def test_left_and_right_stay_where_they_are_on_chaos():
    cells = cells_at("full")
    chaos = [c for n, c in cells.items() if n[:3] in ("R31", "R32", "R33", "R34")]
    assert len(chaos) == 4
    assert all(c.values["augment"] == {"rot90": False, "flip": 0.0} for c in chaos)


def test_data_and_weights_of_vgg_reach_every_cell():
    cells = cells_at("full", ("data", "folder"), ("vgg", "vgg.pth"))
    assert {(c.values["data"], c.values["vgg"]) for c in cells.values()} == {("folder", "vgg.pth")}
    assert len(choose_rows(GRID, list(cells.values()), ["R3[1-4]*"])) == 4


def test_full_has_the_sizes_of_the_paper():
    cell = cells_at("full")["R01 student alone"].values
    assert {
        k: cell[k] for k in ("batch", "patch", "lr", "schedule", "gan_width", "gan_blocks")
    } == {
        "batch": 2,
        "patch": 256,
        "lr": 0.0002,
        "schedule": "constant",
        "gan_width": 64,
        "gan_blocks": 9,
    }
    assert cell["widths"] == {"unet_bilinear": 64, "densefcn": 48, "mrrn": 32, "unet": 16}


def function_of(notebook, name, **known):
    "A function that a notebook defines, with what it reads."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    tree = next(ast.parse(c) for c in code if f"def {name}(" in c)
    tree.body = [n for n in tree.body if getattr(n, "name", "") == name]
    exec(compile(tree, str(notebook), "exec"), known)
    return known[name]


@pytest.mark.parametrize(
    "patch,augment,classes,words",
    [
        (64, {"flip": 0}, ("left kidney",), ""),
        (64, {"swap": [[1, 2]]}, ("left kidney", "right kidney"), ""),
        (64, {}, ("liver", "upright"), ""),
        (65, {"flip": 0}, ("liver",), "patch=65.*64 x 48 px"),
        (64, {"rot90": False}, ("liver", "left kidney"), "flip.*'left kidney'"),
        (64, {"flip": 0.1}, ("right kidney",), "flip.*'right kidney'"),
    ],
)
def test_mirrored_patches_and_mirrored_organs_are_refused(patch, augment, classes, words):
    class Images(list):
        pass

    images = Images([SimpleNamespace(image=torch.zeros(1, 64, 48))])
    images.classes = ("background", *classes)
    empty = Images()
    empty.classes = images.classes
    parts = SimpleNamespace(test=images, validation=empty)
    study = SimpleNamespace(data=lambda seed: parts)
    check = function_of(
        GRID.parent / "cmedl.ipynb",
        "check_patches",
        patch=patch,
        augment=augment,
        seeds=[0],
        InputError=InputError,
    )
    if words:
        with pytest.raises(InputError, match=words):
            check(study)
    else:
        check(study)
