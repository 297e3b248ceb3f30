"""`foreground` places patches on structures, also where volumes are trained slice by slice."""

from dataclasses import replace

import numpy as np
import pytest

from unpaired_kd.data.collections import Collection
from unpaired_kd.data.patches import Patches, Unpaired
from unpaired_kd.study.building import draw_patches
from unpaired_kd.study.config import PatchConfig

DEPTH = 40
TUMOUR = (11, 12, 30)  # slices that show it
NAMES = ("background", "organ", "tumour")


def stacks(count=4):
    "Stacks of 40 slices of 16 x 16: an organ in slices 5 to 34, a tumour of 2 x 2 px in three."
    image = np.zeros((DEPTH, 16, 16), np.uint8)
    label = np.zeros((DEPTH, 16, 16), np.uint8)
    label[5:35, 1:6, 1:6] = 1
    for z in TUMOUR:
        label[z, 10:12, 10:12] = 2
    cases = [f"v{i}" for i in range(count)]
    return Collection.from_arrays(
        [image + i for i in range(count)],
        [label] * count,
        cases,
        cases,
        classes=NAMES,
        label_kind="semantic",
        dims=3,
    )


def share_with(patches, structure, steps=300):
    "Share of the patches that show a structure."
    labels = np.concatenate([patches.batch(n).label.numpy() for n in range(steps)])
    return (labels == structure).reshape(len(labels), -1).any(1).mean()


@pytest.mark.parametrize("foreground", [0.0, 0.5, 0.9, 1.0])
def test_slices_are_placed_on_structures_as_often_as_volumes(foreground):
    """A patch is as large as a slice. Placed on a structure, it is on the tumour in half of the
    draws, else on the organ, which the tumour shares 3 of 30 slices with; placed freely, it shows
    the tumour in 3 of 40."""
    config = PatchConfig(patch=16, batch=4, foreground=foreground)
    patches = draw_patches(config, stacks(), 0, "student", 1)
    placed = 0.5 + 0.5 * 3 / 30
    wanted = foreground * placed + (1 - foreground) * 3 / 40
    assert share_with(patches, 2) == pytest.approx(wanted, abs=0.045)  # three standard errors


def test_the_share_is_that_of_patches_of_volumes():
    flat = draw_patches(PatchConfig(patch=16, batch=4, foreground=0.9), stacks(), 0, "student", 1)
    whole = Patches(stacks(), (1, 16, 16), 4, 0, "student", foreground=0.9)
    assert share_with(flat, 2) == pytest.approx(share_with(whole, 2), abs=0.06)


def test_a_patch_stays_in_the_volume_it_was_drawn_for():
    "All volumes are drawn equally often, placed on structures or not."
    patches = draw_patches(PatchConfig(patch=8, batch=4, foreground=1), stacks(), 0, "student", 1)
    plans = [patches.plan(n) for n in range(300)]
    groups = [patches.collection.groups[i] for plan in plans for i in plan.index]
    for volume in ("v0", "v1", "v2", "v3"):
        assert groups.count(volume) / len(groups) == pytest.approx(0.25, abs=0.04)


def test_a_volume_without_structures_and_validation_batches():
    volumes = stacks(2)
    empty = Collection.from_arrays(
        [np.zeros((DEPTH, 16, 16), np.uint8)] * 2,
        [np.zeros((DEPTH, 16, 16), np.uint8), volumes.native(0)[1]],
        ["a", "b"],
        ["a", "b"],
        classes=NAMES,
        label_kind="semantic",
        dims=3,
    )
    patches = draw_patches(PatchConfig(patch=16, batch=4, foreground=1), empty, 0, "student", 1)
    assert share_with(patches, 2) == pytest.approx(0.55 / 2, abs=0.045)
    ids = [name for batch in patches.eval_batches() for name in batch.ids]
    assert ids == list(patches.collection.ids)  # in order, each once


def test_a_partner_of_the_same_group_keeps_its_group():
    teacher = draw_patches(PatchConfig(patch=8, batch=4, foreground=1), stacks(), 0, "teacher", 1)
    named = teacher.collection._with(
        [_with_group(case) for case in teacher.collection.cases], dims=2
    )
    sources = {
        name: Patches(named, 8, 4, 0, name, foreground=1.0) for name in ("student", "teacher")
    }
    both = Unpaired(sources, pairing="label_group")
    for step in range(50):
        batch = both.batch(step)
        assert batch["student"].label_groups == batch["teacher"].label_groups
        assert all(label.any() for label in batch["teacher"].label)


def _with_group(case):
    return replace(case, label_group="even" if case.group in ("v0", "v2") else "odd")


def test_single_images_are_drawn_as_before():
    "Fixed numbers: cases and corners of the phantom of bone do not change."
    from unpaired_kd.data.phantoms.bone import bone

    plan = Patches(bone("microct", patients=3, seed=1), 48, 4, 0, "student").plan(5)
    assert plan.index.tolist() == [5, 1, 7, 6]
    assert plan.corner.tolist() == [[46, 1], [0, 12], [48, 30], [32, 33]]
