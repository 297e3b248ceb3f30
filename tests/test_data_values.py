"""Values of the data, written out by hand: where augmentation reads, what it does to greys, where
patches lie, which values percentiles and zooms give, and what may never be in two parts."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.data.augment import Augment, swap_sides
from unpaired_kd.data.collections import Collection
from unpaired_kd.data.examine import ModalityReport, find_leaks, read_case
from unpaired_kd.data.instances import number_objects
from unpaired_kd.data.intensity import HistogramStandard, check_hu, to_unit, volume_window
from unpaired_kd.data.labels import infer_labels, label_map
from unpaired_kd.data.layouts import Case, list_manifest
from unpaired_kd.data.patches import Patches, Unpaired
from unpaired_kd.data.phantoms.bone import BoneKnobs, bone_image
from unpaired_kd.data.resampling import prepare, resize, zoom_label, zoom_spacing
from unpaired_kd.data.splits import (
    Split,
    choose_labelled,
    fold_patients,
    kfold_groups,
    split_groups,
)

OFF = {name: 0 for name in Augment.__dataclass_fields__}


# ---------------------------------------------------------------- augmentation
def numbers(n, seed):
    "The uniform numbers of a batch: row of an image -> 19 of them, in float64."
    return torch.rand(n, 19, generator=torch_rng(seed)).double().tolist()


def place_read(u, row, column, height, width, on):
    "Row and column of the input that one output pixel reads, by the formula of the chapter."
    x = column - (width - 1) / 2
    y = row - (height - 1) / 2
    y *= -1 if u[0] < on.get("flip", 0) else 1
    x *= -1 if u[1] < on.get("flip", 0) else 1
    turns = int(4 * u[3]) if on.get("rot90") else 0
    if height != width:
        turns = turns // 2 * 2
    angle = turns * math.pi / 2 + (2 * u[4] - 1) * on.get("rotate", 0) * math.pi / 180
    grown = math.exp((2 * u[5] - 1) * on.get("scale", 0))
    across = grown * (math.cos(angle) * x - math.sin(angle) * y)
    down = grown * (math.sin(angle) * x + math.cos(angle) * y)
    across += (2 * u[7] - 1) * on.get("shift", 0) * width
    down += (2 * u[6] - 1) * on.get("shift", 0) * height
    return down + (height - 1) / 2, across + (width - 1) / 2


@pytest.mark.parametrize(
    "on",
    [
        dict(flip=0.5),
        dict(rot90=True),
        dict(rotate=25.0),
        dict(scale=0.3),
        dict(shift=0.2),
        dict(flip=0.4, rot90=True, rotate=40.0, scale=0.2, shift=0.1),
    ],
)
@pytest.mark.parametrize("height, width", [(15, 15), (12, 20)])
def test_every_pixel_reads_where_the_formula_says(on, height, width):
    rows = torch.arange(float(height))[:, None].expand(height, width)
    columns = torch.arange(float(width))[None].expand(height, width)
    image = torch.stack([rows, columns]).expand(12, 2, height, width)
    moved, _ = Augment(**{**OFF, **on})(image, None, torch_rng(3))
    compared = 0
    for k, u in enumerate(numbers(12, 3)):
        for row in range(height):
            for column in range(width):
                r, c = place_read(u, row, column, height, width, on)
                if 0 <= r <= height - 1 and 0 <= c <= width - 1:  # outside, the border is mirrored
                    compared += 1
                    assert abs(moved[k, 0, row, column] - r) < 1e-3
                    assert abs(moved[k, 1, row, column] - c) < 1e-3
    assert compared > 4 * height * width


def test_outside_an_image_its_mirror_image_is_seen():
    image = torch.arange(1.0, 101).reshape(1, 1, 10, 10) / 100
    label = torch.ones(1, 10, 10, dtype=torch.int64)
    far = Augment(**{**OFF, "shift": 0.3})
    for seed in range(5):
        moved, same = far(image, label, torch_rng(seed))
        assert moved.min() >= image.min() - 1e-6 and same.min() == 1


def test_greys_are_changed_as_written():
    image = torch.tensor([0.3, 0.45, 0.5, 0.6]).reshape(1, 1, 2, 2).expand(6, 1, 2, 2)
    on = dict(contrast=0.3, brightness=0.08, gamma=0.4)
    changed, _ = Augment(**{**OFF, **on})(image, None, torch_rng(5))
    for k, u in enumerate(numbers(6, 5)):
        contrast, brightness, gamma = (2 * u[i] - 1 for i in (10, 11, 12))
        mean = (0.3 + 0.45 + 0.5 + 0.6) / 4
        for j, grey in enumerate((0.3, 0.45, 0.5, 0.6)):
            value = mean + (grey - mean) * math.exp(0.3 * contrast) + 0.08 * brightness
            value = value ** math.exp(0.4 * gamma)
            assert abs(changed[k].flatten()[j] - value) < 1e-5


@pytest.mark.parametrize("on", [dict(noise=0.1), dict(blur=2.0)])
def test_half_of_the_images_get_neither_noise_nor_blur(on):
    image = torch.rand(300, 1, 8, 8, generator=torch_rng(0))
    changed, _ = Augment(**{**OFF, **on})(image, None, torch_rng(1))
    same = [(a - b).abs().max() < 1e-6 for a, b in zip(image, changed)]
    assert 120 < sum(same) < 180


def test_left_and_right_change_places_once():
    label = torch.tensor([[2, 3, 1, 0], [2, 3, 1, 0]])
    where = torch.tensor([True, False])
    assert swap_sides(label, [(2, 3)], where).tolist() == [[3, 2, 1, 0], [2, 3, 1, 0]]
    sides = torch.tensor([2, 2, 1, 0, 3, 3]).repeat(60, 4, 1)
    image = torch.zeros(60, 1, 4, 6)
    _, named = Augment(**{**OFF, "flip": 0.5, "swap": ((2, 3),)})(image, sides, torch_rng(2))
    for u, got in zip(numbers(60, 2), named.tolist()):
        upside_down, sideways = u[0] < 0.5, u[1] < 0.5
        expected = [3, 3, 0, 1, 2, 2] if sideways else [2, 2, 1, 0, 3, 3]
        if upside_down != sideways:  # a mirror image: the names of the sides are exchanged
            expected = [{2: 3, 3: 2}.get(k, k) for k in expected]
        assert got == [expected] * 4


# ---------------------------------------------------------------- patches
def spots(*areas, n=6, side=40):
    "Images whose label holds one square of each class: class k has the side areas[k-1]."
    label = np.zeros((side, side), np.uint8)
    for k, a in enumerate(areas):
        label[2 + 12 * k : 2 + 12 * k + a, 5 : 5 + a] = k + 1
    names = ["background", *(f"class {k + 1}" for k in range(len(areas)))]
    return Collection.from_arrays([60 * label] * n, [label] * n, classes=names)


def test_a_patch_lies_about_its_pixel_up_to_a_quarter_off():
    label = np.zeros((60, 50), np.uint8)
    label[30, 25] = 1
    two = ("background", "dot")
    dot = Collection.from_arrays([255 * label] * 5, [label] * 5, classes=two)
    p = Patches(dot, 16, 5, seed=0, foreground=1.0)
    corners = np.concatenate([p.plan(n).corner for n in range(60)])
    assert set(corners[:, 0] - 30) == set(range(-12, -4))  # 8 before it, and -4 to 3 more
    assert set(corners[:, 1] - 25) == set(range(-12, -4))
    half = Patches(dot, 16, 5, seed=0, foreground=0.5)
    found = np.mean([half.batch(n).label.flatten(1).any(1).numpy() for n in range(60)])
    by_chance = 16 / 45 * 16 / 35
    assert abs(found - (0.5 + 0.5 * by_chance)) < 0.09


def test_a_patch_may_lie_at_either_end():
    p = Patches(spots(3, side=10, n=4), 8, 4, seed=0, foreground=0)
    corners = np.concatenate([p.plan(n).corner for n in range(40)])
    assert set(corners[:, 0]) == set(corners[:, 1]) == {0, 1, 2}


def test_every_class_is_looked_for_equally_often():
    p = Patches(spots(9, 3, 1), 1, 6, seed=0, foreground=1.0)
    shown = Counter(k for n in range(150) for k in p.batch(n).label.flatten().tolist())
    assert set(shown) == {1, 2, 3}
    assert max(shown.values()) - min(shown.values()) < 90
    wide = Patches(spots(9), 1, 6, seed=0, foreground=1.0)
    corners = {tuple(c) for n in range(200) for c in wide.plan(n).corner}
    assert len(corners) == 81  # every pixel of the class


def test_no_case_twice_in_a_batch_and_each_process_its_own():
    p = Patches(spots(5, n=7), 8, 7, seed=0)
    for step in range(5):
        assert sorted(p.plan(step).index) == list(range(7))
        assert p.plan(step, rank=1).corner.tolist() != p.plan(step).corner.tolist()


def test_a_partner_has_the_label_group_of_the_lead():
    def ward(groups, name):
        blank = [np.zeros((9, 9), np.uint8)] * len(groups)
        return Collection.from_arrays(blank, blank, label_groups=groups, name=name)

    lead = Patches(ward(["a", "b", "c"] * 3, "lead"), 4, 5, seed=0)
    other = Patches(ward(["c", "a", "b", "a", "b"], "other"), 4, 5, seed=0, stream="teacher")
    both = Unpaired({"student": lead, "teacher": other}, "label_group")
    for step in range(20):
        batch = both.batch(step)
        assert batch["student"].label_groups == batch["teacher"].label_groups


def test_bright_blocks_are_the_upper_quarter_after_each_image_was_stretched():
    r = np.random.default_rng(0)
    images = [r.integers(0, 40, (24, 24)), r.integers(100, 140, (24, 24))]
    for k, image in enumerate(images):
        image[4 * k : 4 * k + 4, 8:12] += 60  # a bright structure
        image[20, 20] = (255, 145)[k]  # one odd pixel, far above the dim image only
    images = [image.astype(np.uint8) for image in images]
    found = Patches(Collection.from_arrays(images), 8, 2, bright_share=1.0)._bright_blocks()
    values = []
    for k, image in enumerate(images):
        low, high = np.percentile(image / 255, (0.5, 99.8))
        for row in range(0, 24, 4):
            for column in range(0, 24, 4):
                block = image[row : row + 4, column : column + 4] / 255
                values.append((k, row, column, (np.percentile(block, 99) - low) / (high - low)))
    limit = np.quantile([v for *_, v in values], 0.75)
    for k in (0, 1):
        expected = {(row, column) for i, row, column, v in values if i == k and v > limit}
        assert {tuple(c) for c in found[k].tolist()} == expected


# ---------------------------------------------------------------- splits
def people(n=12, each=3):
    "A collection of patients with several images each."
    groups = [f"p{i:02d}" for i in range(n) for _ in range(each)]
    diseases = ["abc"[i % 3] for i in range(n) for _ in range(each)]
    images = [np.full((4, 4), k, np.uint8) for k in range(n * each)]
    ids = [f"{g}-{k}" for k, g in enumerate(groups)]
    return Collection.from_arrays(images, groups=groups, ids=ids, label_groups=diseases)


def patients(ids):
    return {i.split("-")[0] for i in ids}


def check_disjoint(*parts):
    "No patient in two parts, and none lost."
    names = [patients(ids) for ids in parts]
    assert sum(map(len, names)) == len(set().union(*names)) == 12


@pytest.mark.parametrize("seed", range(4))
def test_a_patient_is_in_one_part(seed):
    c = people()
    check_disjoint(*split_groups(c, dict(train=0.5, val=2, test="rest"), seed).parts.values())
    for fold in kfold_groups(c, 4, seed, valid=2):
        check_disjoint(*fold.parts.values())
        assert len(patients(fold["val"])) == 2 and len(patients(fold["test"])) == 3
        assert {c.label_groups[c.ids.index(i)] for i in fold["test"]} == set("abc")
    for fold in fold_patients({"mr": c, "ct": c.subset(c.ids[3:33])}, 3, seed, valid=1):
        for part in ("train", "val"):
            both = patients(fold["mr"][part]) | patients(fold["ct"][part])
            assert not both & (patients(fold["mr"]["test"]) | patients(fold["ct"]["test"]))


def test_a_split_that_tears_a_patient_apart_is_refused():
    c = people()
    with pytest.raises(InputError, match="two parts"):
        Split(dict(train=["p00-0"], test=["p00-1"])).verify(c)
    with pytest.raises(InputError, match="other data"):
        Split(dict(train=["p00-0"]), "0123456789abcdef").verify(c)


def test_fractions_are_rounded_by_the_largest_remainder():
    parts = split_groups(people(), dict(a=0.45, b=0.3, c=0.25)).parts  # 5.4, 3.6 and 3
    assert [len(patients(ids)) for ids in parts.values()] == [5, 4, 3]


def test_a_budget_goes_round_the_patients():
    c = people()
    for n in (1, 5, 12, 20, 36):
        counts = Counter(i.split("-")[0] for i in choose_labelled(c, n))
        assert sum(counts.values()) == n
        assert max(counts.values()) == -(-n // 12)
    assert set(choose_labelled(c, 5)) < set(choose_labelled(c, 6))


# ---------------------------------------------------------------- intensity
def test_percentiles_leave_half_a_per_cent_at_each_end():
    x = to_unit(np.arange(1001, dtype=np.uint16), "percentile")
    assert x[5] == 0 and x[6] > 0 and x[994] < 1 and x[995] == 1
    assert abs(x[500] - 0.5) < 1e-6
    assert abs(to_unit(np.array([40], np.int16), (-160, 240))[0] - 0.5) < 1e-7
    assert volume_window(np.arange(1001.0)) == pytest.approx((5, 998))


def interpolated(values, percent):
    "A percentile, with a straight line between the two values about it."
    values = sorted(values)
    at = percent / 100 * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def landmarks_of(values, percentiles):
    "First percentile of all, then percentiles of what lies above the mean."
    mean = sum(values) / len(values)
    tissue = [v for v in values if v > mean]
    return [interpolated(values, 1.0), *(interpolated(tissue, p) for p in percentiles)]


def test_an_mr_scale_is_fitted_and_applied_as_written():
    volumes = []
    for k in range(3):
        volumes.append([(7 * i * i + 13 * k * i) % 101 + 20 * k + (i > 60) * 90 for i in range(90)])
    percentiles = (10.0, 50.0, 90.0)
    scale = HistogramStandard.fit(np.array(v, float) for v in volumes)
    few = HistogramStandard.fit([np.array(v, float) for v in volumes], percentiles=percentiles)
    assert len(scale.landmarks) == 12
    rows = []
    tops = []
    for v in volumes:
        *m, top = landmarks_of(v, (*percentiles, 99.9))
        rows.append([1000 * (a - m[0]) / (m[-1] - m[0]) for a in m])
        tops.append(1000 * (top - m[0]) / (m[-1] - m[0]))
    mu = [sum(column) / 3 for column in zip(*rows)]
    assert few.landmarks == pytest.approx(mu)
    assert few.clip == pytest.approx(sum(tops) / 3)
    new = [3.0 * v + 5 for v in volumes[1]]
    m = landmarks_of(new, percentiles)
    for value, got in zip(new, few.apply(np.array(new))):
        j = sum(value >= a for a in m[1:-1])  # the piece it lies in; the outer ones go on
        y = mu[j] + (value - m[j]) / (m[j + 1] - m[j]) * (mu[j + 1] - mu[j])
        assert got == pytest.approx(min(max(y, 0), few.clip) / few.clip, abs=1e-6)


def test_hounsfield_units_reach_below_fat():
    check_hu(np.array([-60, 40]))
    for wrong in ([-40, 40], [0, 255], [-1000, -950]):
        with pytest.raises(InputError, match="Hounsfield"):
            check_hu(np.array(wrong))


# ---------------------------------------------------------------- resampling, labels, cases
def test_an_image_is_averaged_and_a_label_is_not():
    stripes = np.tile(np.float32([0, 0, 1]), (9, 9))
    small = resize(stripes, (3, 9))
    assert abs(small[:, 2:-2] - 1 / 3).max() < 0.02
    label = np.arange(6)[:, None] * 10 + np.arange(8)[None]
    assert zoom_label(label, 0.5).tolist() == [[11, 13, 15, 17], [31, 33, 35, 37], [51, 53, 55, 57]]
    assert zoom_spacing((3.0, 1.0, 1.0), (5, 10, 7), 0.5) == (3.0, 2.0, 7 / 4)


def test_percentiles_are_taken_before_the_zoom():
    raw = np.tile(np.uint16([100, 100, 1000]), (30, 10))[None]
    x = prepare(raw, "percentile", zoom=1 / 3)
    assert abs(x[0, 2:-2, 2:-2] - 1 / 3).max() < 0.02
    assert abs(prepare(raw, "percentile", True, 1 / 3)[0, 2:-2, 2:-2] - 2 / 3).max() < 0.02


def test_whole_numbers_are_divided_by_the_largest_of_their_type():
    for kind, top in ((np.uint8, 255), (np.uint16, 65535)):
        images = [np.array([[0, top // 5, top]], kind)]
        got = Collection.from_arrays(images)[0].image.flatten().tolist()
        assert got == pytest.approx([0, 0.2, 1], abs=1e-7)


def test_a_collection_is_inverted_and_its_fingerprint_sees_labels():
    image = np.array([[0, 51, 255]], np.uint8)
    got = Collection.from_arrays([image], invert=True)[0].image.flatten().tolist()
    assert got == pytest.approx([1, 0.8, 0], abs=1e-6)
    one, two = (Collection.from_arrays([image], [image > 60 * k], ["p"]) for k in (0, 1))
    assert one.fingerprint() != two.fingerprint()


def test_one_file_belongs_to_one_group(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").touch()
    rows = ["modality,id,image,group", "ct,1,a.png,p1", "ct,2,b.png,p2", "ct,3,a.png,p3"]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    (fault,) = list_manifest(tmp_path, "ct")[1]
    assert "'p1'" in fault and "'p3'" in fault


def test_labels_of_sixteen_numbers_may_be_classes_and_of_seventeen_are_objects():
    def row(n):
        return np.repeat(np.arange(n + 1), 3)[None].repeat(3, 0)

    assert infer_labels([("a", row(16), False)]).kind == "semantic"
    assert infer_labels([("a", row(17), False)]).kind == "instance"
    black_white = np.array([[0, 255]])
    assert label_map(black_white, ("background", "cell"), "semantic", "a")[0].tolist() == [[0, 1]]


def test_slices_are_the_planes_that_show_something():
    label = np.zeros((5, 6, 7), np.uint8)
    label[1, 2, 3] = label[3, 5, 0] = 1
    c = Collection.from_arrays([label], [label], ["p"], ids=["v"], dims=3, classes=("no", "yes"))
    assert c.slices().ids == ["v/z001", "v/z003"]
    assert c.slices(axis=1).ids == ["v/y002", "v/y005"]
    assert c.slices(axis=2).ids == ["v/x000", "v/x003"]
    assert c.slices().groups == ["p", "p"] and c.unlabelled()[0].label is None


def test_equal_pixels_are_a_leak_unless_the_patient_is_one():
    image = np.arange(400).reshape(1, 20, 20)

    def report(name, *groups):
        cases = [Case(f"{name}{i}", image, None, g) for i, g in enumerate(groups)]
        return ModalityReport(name, [read_case(c) for c in cases], cases=cases)

    assert len(find_leaks([report("ct", "p1", "p2")])[0]) == 1
    assert find_leaks([report("ct", "p1", "p1")])[0] == []
    assert len(find_leaks([report("ct", "p1"), report("mr", "p1")])[0]) == 1


def test_objects_of_the_smallest_size_are_kept():
    label = np.zeros((6, 12), np.uint8)
    label[1:3, 1:3] = label[1:4, 6:9] = 1
    label[2, 7] = 0  # a hole of one pixel
    assert number_objects(label, min_size=4).max() == 2
    assert number_objects(label, min_size=5).max() == 1
    assert number_objects(label, max_hole=1)[2, 7] == 2
    assert number_objects(label, max_hole=0)[2, 7] == 0


# ---------------------------------------------------------------- phantoms
def test_lacunae_have_the_size_of_their_knobs():
    knobs = BoneKnobs(patient=0, shape_spread=0, wobble=0, marrow=0, pores=0)
    areas = []
    for patient in range(6):
        instances = bone_image("microct", "healthy", 0, knobs, patient)[1]
        inner = set(np.unique(instances[1:-1, 1:-1]))
        border = set(np.unique(np.concatenate([instances[[0, -1]], instances[:, [0, -1]].T])))
        areas += [(instances == k).sum() for k in inner - border - {0}]
    assert abs(np.mean(areas) / (math.pi * 3.2 * 3.2 * 1.8) - 1) < 0.05


def test_two_modalities_never_show_one_scene():
    alike = BoneKnobs(patient=0)  # patients that do not differ
    one, two = (bone_image(m, "healthy", 0, alike)[1] > 0 for m in ("histology", "microct"))
    assert (one != two).mean() > 0.05
    assert (bone_image("microct", "healthy", 0, alike, 1)[1] > 0).tolist() != two.tolist()
