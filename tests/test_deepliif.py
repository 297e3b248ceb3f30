"""DeepLIIF tiles: faults named, colours under noise, objects, groups, and the folder that
`open_collection` reads.
"""

import re
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from unpaired_kd.core import InputError
from unpaired_kd.data.collections import open_collection
from unpaired_kd.data.sets.deepliif import (
    CLASSES,
    PANELS,
    base_tile,
    convert_deepliif,
    find_tiles,
    organ_of,
    read_classes,
    read_colours,
    read_objects,
    read_panels,
    split_panels,
    student_input,
    teacher_input,
    unpair,
)

S = 40


def seg(spots):
    "A label with discs (y, x, radius, colour 0 red | 2 blue) inside a green line 2 px wide."
    y, x, out = *np.mgrid[:S, :S], np.zeros((3, S, S), np.uint8)
    for cy, cx, r, _ in spots:
        d = np.hypot(y - cy, x - cx)
        out[1][(d >= r) & (d < r + 2)] = 255
    for cy, cx, r, k in spots:
        d = np.hypot(y - cy, x - cx)
        out[:, d < r] = 0
        out[k][d < r] = 255
    return out


SPOTS = [(10, 10, 5, 0), (10, 28, 6, 2), (28, 12, 6, 2), (28, 29, 4, 0)]


def strip(seed=0, spots=SPOTS):
    r = np.random.default_rng(seed)
    bright = r.integers(150, 250, (2, 3, S, S), np.uint8)
    dark = r.integers(0, 60, (2, 1, S, S), np.uint8)
    lap = np.zeros((3, S, S), np.uint8)
    return np.concatenate(
        [*bright, np.repeat(dark[0], 3, 0), lap, np.repeat(dark[1], 3, 0), seg(spots)], 2
    )


def save(path, a, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(a[0] if len(a) == 1 else np.moveaxis(a, 0, -1)).save(path, **kw)
    return path


def jpeg(a, quality, tmp_path):
    return np.moveaxis(np.asarray(Pillow.open(save(tmp_path / "x.jpg", a, quality=quality))), -1, 0)


def test_panels_are_views_in_order_and_inputs_come_from_the_right_ones(tmp_path):
    a = strip()
    p = read_panels(save(tmp_path / "t.png", a))
    assert list(p) == list(PANELS) and np.array_equal(np.concatenate(list(p.values()), 2), a)
    assert np.shares_memory(split_panels(a)["Seg"], a)
    marked = np.zeros((3, S, 6 * S), np.uint8)
    for i in range(6):
        marked[:, :, i * S : (i + 1) * S] = 10 * (i + 1)
    p = split_panels(marked)
    assert (
        (teacher_input(p) == 10).all()
        and (student_input(p) == 50).all()
        and student_input(p).shape == (1, S, S)
    )
    assert student_input(p, "separate")[:, 0, 0].tolist() == [30, 50, 50]
    with pytest.raises(InputError, match="mix"):
        student_input(p, "mean")


@pytest.mark.parametrize(
    "a, says",
    [
        (strip()[:, :, :-1], "239 px wide"),
        (strip()[:, :, : 5 * S], "200 px wide"),
        (strip()[:, :-1], "39 px high"),
        (strip()[:1], "RGB"),
        (np.zeros((3, S, S), np.uint8), "40 px wide"),
    ],
)
def test_wrong_shapes_name_the_file(tmp_path, a, says):
    save(tmp_path / "in" / "faulty.png", a)
    with pytest.raises(InputError, match=f"(?s)faulty.png.*{says}"):
        read_panels(tmp_path / "in" / "faulty.png")
    with pytest.raises(InputError, match="faulty.png"):
        convert_deepliif(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]  # nothing is left behind


def test_truncated_and_16_bit_and_text(tmp_path):
    whole = save(tmp_path / "whole.png", strip()).read_bytes()
    for n in (0, 50, len(whole) // 2, len(whole) - 300):
        (tmp_path / "short.png").write_bytes(whole[:n])
        with pytest.raises(InputError, match="short.png"):
            read_panels(tmp_path / "short.png")
    tifffile.imwrite(
        tmp_path / "deep.tif",
        np.moveaxis(strip().astype(np.uint16) * 257, 0, -1),
        photometric="rgb",
    )
    with pytest.raises(InputError, match="deep.tif.*uint16"):
        read_panels(tmp_path / "deep.tif")


def test_colours_have_names():
    a = np.array(
        [
            [0, 0, 0],
            [255, 0, 0],
            [0, 0, 255],
            [0, 255, 0],
            [210, 0, 0],
            [0, 7, 251],
            [30, 20, 10],
            [120, 90, 0],
            [0, 90, 120],
        ],
        np.uint8,
    ).T[:, None]
    assert read_colours(a)[0].tolist() == [0, 1, 2, 3, 1, 2, 0, 1, 2]
    assert read_colours(a, 150)[0].tolist()[-2:] == [0, 0]
    y = read_classes(seg(SPOTS))
    assert CLASSES[y[10, 10]] == "positive" and CLASSES[y[10, 28]] == "negative" and y[0, 0] == 0


def test_every_panel_but_the_right_one_is_refused_as_label():
    p = split_panels(strip())
    for name in ("IHC", "Hematoxylin", "DAPI", "Marker"):
        with pytest.raises(InputError, match=f"tile.png.*{PANELS[-1]}"):
            read_colours(p[name], name="tile.png")
    assert not read_colours(np.zeros((3, 5, 5), np.uint8)).any()  # an empty tile is a label
    for bad in (np.zeros((5, 5), np.uint8), np.zeros((3, 5, 5)), np.zeros((1, 5, 5), np.uint8)):
        with pytest.raises(InputError):
            read_colours(bad)
    with pytest.raises(InputError, match="threshold"):
        read_colours(p["Seg"], 255)


@pytest.mark.parametrize("quality", [95, 75, 50])
def test_jpeg_keeps_classes_and_objects(tmp_path, quality):
    clean = seg(SPOTS)
    noisy = jpeg(seg(SPOTS), quality, tmp_path)
    assert not (noisy == 255).all(0).any() and len(np.unique(noisy)) > 20  # the noise is there
    y, n = read_objects(clean, "nucleus")
    z, m = read_objects(noisy, "nucleus")
    assert n.max() == m.max() == 4
    for k in (1, 2):
        assert 2 * ((y == k) & (z == k)).sum() / ((y == k).sum() + (z == k).sum()) > 0.93


def test_objects_and_classes_agree():
    for rule in ("background", "nucleus"):
        y, n = read_objects(seg(SPOTS), rule)
        assert (
            y.dtype == np.uint8
            and n.dtype == np.int32
            and np.array_equal(y > 0, n > 0)
            and sorted(np.unique(n)) == [0, 1, 2, 3, 4]
        )
        assert [len(np.unique(y[n == k])) for k in range(1, 5)] == [
            1
        ] * 4  # an object has one class
        assert [y[10, 10], y[10, 28], y[28, 12], y[28, 29]] == [1, 2, 2, 1]
    with pytest.raises(InputError, match="boundary"):
        read_objects(seg(SPOTS), "ignore")


def test_boundary_goes_to_the_nearest_nucleus_within_reach():
    a = seg([(20, 10, 5, 0), (20, 22, 5, 2)])  # the lines touch at x = 16
    y, n = read_objects(a, "nucleus")
    inner = read_objects(a)[0]
    assert y[20, 15] == 1 and y[20, 17] == 2 and (y[inner > 0] == inner[inner > 0]).all()
    assert np.array_equal(y > 0, a.max(0) > 0)  # all of the green is given away
    a[1, 2:4, 30:38] = 255  # a stray green line
    assert (
        not read_objects(a, "nucleus")[0][2:4, 30:38].any()
        and read_objects(a, "nucleus", reach=99.0)[0][2:4, 30:38].all()
    )


def test_touching_nuclei_of_two_classes_and_specks():
    a = np.zeros((3, S, S), np.uint8)
    a[0, 5:15, 5:15] = 255
    a[2, 5:15, 15:25] = 255  # red beside blue, no line
    a[0, 30, 30] = 255  # one noisy pixel
    y, n = read_objects(a)
    assert (
        n.max() == 2
        and (y == 1).sum() == (y == 2).sum() == 100
        and read_objects(a, min_px=1)[1].max() == 3
    )
    corner = np.zeros((3, S, S), np.uint8)
    corner[0, 5:15, 5:15] = corner[0, 15:25, 15:25] = 255  # they touch at a corner only
    assert read_objects(corner)[1].max() == 2
    only_line = np.zeros((3, S, S), np.uint8)
    only_line[1, 5] = 255
    assert not read_objects(only_line, "nucleus")[1].any()


@pytest.mark.parametrize(
    "id, base",
    [
        ("Lung1", "Lung1"),
        ("Lung1_neg", "Lung1"),
        ("Lung1_empty.png", "Lung1"),
        ("val/Lung1_1.10_0.90.png", "Lung1"),
        ("Lung1_1.10_0.90_neg", "Lung1"),
        ("Lung1_0.9_neg_empty.tif", "Lung1"),
        ("22_2", "22_2"),
        ("Bladder_12_3.png", "Bladder_12_3"),
        ("a_negative", "a_negative"),
        ("x_neg_2", "x_neg_2"),
    ],
)
def test_base_tile(id, base):
    assert base_tile(id) == base and base_tile(base) == base  # once is enough


def test_organ_and_nothing_left():
    assert [organ_of(i) for i in ("Lung1_neg", "val/Bladder_3", "22_2")] == ["Lung", "Bladder", ""]
    with pytest.raises(InputError, match="Rename"):
        base_tile("_neg.png")


def tree(folder, names):
    for i, n in enumerate(names):
        save(folder / n, strip(i))
    return folder


def test_folder_becomes_two_collections(tmp_path):
    src = tree(
        tmp_path / "src",
        [
            "Lung1.png",
            "Lung1_neg.png",
            "Lung2.png",
            "Bladder1.png",
            "Bladder2_1.10_0.90.png",
            ".hidden.png",
        ],
    )
    (src / "readme.txt").write_text("x")
    out = convert_deepliif(src, tmp_path / "out", mix="separate")
    ihc, light = (open_collection(out, m, classes=CLASSES) for m in ("ihc", "if"))
    assert (
        len(ihc) == 5
        and ihc.ids == light.ids
        and set(ihc.groups) == {"Lung1", "Lung2", "Bladder1", "Bladder2"}
        and ihc.label_kind == "semantic"
    )
    assert ihc.check() == light.check() == {k: 5 for k in CLASSES} and (
        ihc.channels,
        light.channels,
    ) == (3, 3)
    i = ihc.ids.index("Lung2")
    p = read_panels(src / "Lung2.png")
    assert (
        np.array_equal(ihc.native(i).image, p["IHC"])
        and np.array_equal(light.native(i).image, student_input(p, "separate"))
        and np.array_equal(light.native(i).label, read_classes(p["Seg"]))
    )
    with pytest.raises(InputError, match="exists"):
        convert_deepliif(src, out)
    assert len(open_collection(out, "ihc")) == 5  # and it was not touched


def test_objects_and_boundary_reach_the_files(tmp_path):
    out = convert_deepliif(
        tree(tmp_path / "src", ["Lung1.png"]), tmp_path / "out", "objects", "nucleus"
    )
    c = open_collection(out, "if", label_kind="instance")
    assert (
        np.array_equal(c.native(0).instances, read_objects(seg(SPOTS), "nucleus")[1])
        and c.channels == 1
    )
    with pytest.raises(InputError, match="labels"):
        convert_deepliif(tmp_path / "src", tmp_path / "b", "instances")


def test_split_folders_and_torn_tiles(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = convert_deepliif(
            tree(tmp_path / "src", ["train/Lung1.png", "train/Lung3.png", "val/Lung2.png"]),
            tmp_path / "out",
        )
    assert open_collection(out, "if", classes=CLASSES, split="val").ids == ["val/Lung2"]
    with pytest.warns(UserWarning, match="Lung1"):
        convert_deepliif(
            tree(tmp_path / "torn", ["train/Lung1.png", "val/Lung1_neg.png"]), tmp_path / "out2"
        )


def test_nothing_and_twice(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        find_tiles(tmp_path / "empty")
    for bad in (tmp_path / "nowhere", save(tmp_path / "t.png", strip())):
        with pytest.raises(InputError, match=re.escape(bad.name)):
            convert_deepliif(bad, tmp_path / "out")
    tree(tmp_path / "two", ["Lung1.png", "Lung1.tif"])
    with pytest.raises(InputError, match="same id 'Lung1'"):
        find_tiles(tmp_path / "two")


def test_unpaired_sides_share_no_tile(tmp_path):
    out = convert_deepliif(
        tree(
            tmp_path / "src",
            [f"{o}{i}{c}.png" for o in ("Lung", "Bladder") for i in range(4) for c in ("", "_neg")],
        ),
        tmp_path / "out",
    )
    ihc, light = (open_collection(out, m, classes=CLASSES) for m in ("ihc", "if"))
    for seed in range(5):
        t, s = unpair(ihc, light, 0.5, seed)
        assert (
            not set(t.groups) & set(s.groups)
            and len(t) == len(s) == 8
            and t.channels == 3
            and s.channels == 1
        )
        assert sorted(t.label_groups).count("Lung") == 4
    assert unpair(ihc, light, seed=1)[1].ids == unpair(ihc, light, seed=1)[1].ids
    with pytest.raises(InputError):
        unpair(ihc.subset(["Lung0"]), light.subset(["Lung0"]))
