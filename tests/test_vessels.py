"""Vessel phantoms, patches without labels, labels of any value, volumes on disk: purity,
distances, difficulty, isolation of labels, lost chunks."""

import subprocess
import sys
import zlib
from dataclasses import astuple, replace

import numpy as np
import pytest
import tifffile

from unpaired_kd.core import InputError, rng
from unpaired_kd.data.collections import Collection, open_collection
from unpaired_kd.data.formats import images
from unpaired_kd.data.formats.images import Image, read_image, read_label
from unpaired_kd.data.formats.ngff import open_zarr
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.data.intensity import to_unit, volume_window
from unpaired_kd.data.labels import infer_labels, label_map
from unpaired_kd.data.patches import Patches
from unpaired_kd.data.phantoms.vessels import (
    MICROSCOPES,
    VesselKnobs,
    draw_animal,
    render_mask,
    smooth_noise,
    stamp_balls,
    vessel_volume,
    vessels,
)
from unpaired_kd.data.splits import choose_labelled, split_groups

SMALL = VesselKnobs(size=32, radius=(1.0, 3.0))


@pytest.fixture(scope="module")
def drawn():
    return {m: [vessel_volume(m, number=n) for n in range(10)] for m in MICROSCOPES}


def dice(a, b):
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


def two_thresholds(image, label):
    "Dice of Otsu's threshold and of the best of 85 thresholds."
    y = label > 0
    levels = range(1, 256, 3)
    h = np.bincount(image.ravel(), minlength=256) / image.size
    w = np.cumsum(h)
    m = np.cumsum(h * np.arange(256))
    otsu = int(np.argmax((m[-1] * w - m) ** 2 / np.maximum(w * (1 - w), 1e-9)))
    return dice(image > otsu, y), max(dice(image >= t, y) for t in levels)


# the phantom


@pytest.mark.parametrize("modality", MICROSCOPES)
def test_a_volume_is_a_function_of_the_address(modality, drawn):
    np.random.seed(1)  # the global state plays no part
    image, label = vessel_volume(modality, 0, None, 3)
    assert np.array_equal(image, drawn[modality][3][0]) and np.array_equal(
        label, drawn[modality][3][1]
    )
    for other in (dict(seed=1), dict(number=4)):
        assert not np.array_equal(label, vessel_volume(modality, **{**dict(number=3), **other})[1])


def test_another_process_draws_the_same_and_the_import_is_light(drawn):
    code = """import sys, zlib
from unpaired_kd.data.phantoms.vessels import vessel_volume
heavy = ("scipy", "matplotlib", "monai", "skimage", "unpaired_kd.data.collections")
print(*[m for m in heavy if m in sys.modules])
images = [vessel_volume(m, number=1)[0] for m in ("lightsheet", "twophoton")]
print(*[zlib.crc32(image.tobytes()) for image in images])"""
    heavy, found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "" and found.split() == [
        str(zlib.crc32(drawn[m][1][0].tobytes())) for m in ("lightsheet", "twophoton")
    ]


@pytest.mark.parametrize(
    "modality, shape", [("lightsheet", (64, 64, 64)), ("twophoton", (16, 64, 64))]
)
def test_values_and_shares(modality, shape, drawn):
    shares = []
    for image, label in drawn[modality]:
        assert (
            image.shape == label.shape == shape
            and image.dtype == label.dtype == np.uint8
            and set(np.unique(label)) == {0, 1}
        )
        assert (image == 255).mean() < 0.03 and len(np.unique(image)) > 60
        shares.append(label.mean())
    assert 0.02 <= min(shares) and max(shares) <= 0.05


def test_the_modalities_have_no_animal_in_common():
    a, b = (
        vessel_volume(m, knobs=replace(SMALL, ratio=2))[1] for m in MICROSCOPES
    )  # the same grid of fine voxels
    assert dice(a[: 2 * 16].reshape(16, 2, 32, 32).any(1), b > 0) < 0.3
    assert not set(vessels("lightsheet", 2, 32, knobs={"radius": (1, 3)}).groups) & set(
        vessels("twophoton", 2, 32, knobs={"radius": (1, 3)}).groups
    )


@pytest.mark.parametrize("modality", MICROSCOPES)
def test_hard_for_a_threshold_yet_not_impossible(modality, drawn):
    otsu, best = np.mean([two_thresholds(*v) for v in drawn[modality]], axis=0)
    assert otsu < 0.55 and 0.45 < best < 0.7


@pytest.mark.parametrize("modality", MICROSCOPES)
def test_animals_differ_and_can_be_made_alike(modality):
    def of(scale):
        return np.array(
            [
                astuple(draw_animal(modality, rng(0, n), VesselKnobs(animal=scale)))
                for n in range(40)
            ]
        )

    assert np.allclose(of(0.0), of(0.0)[0])
    spread = np.log(of(1.0)[:, :10]).std(0)  # all but `hollow`, which is 0 for twophoton
    assert (spread > 0.1).all() and (np.log(of(2.0)[:, 2:10]).std(0) > 1.8 * spread[2:]).all()


def test_volumes_differ_in_noise_blur_and_brightness(drawn):
    def facts(x):
        fine = x.astype(float)
        return (
            fine.mean(),
            np.abs(np.diff(fine, axis=2)).mean() / fine.mean(),
            np.percentile(fine, 99) / np.median(fine),
        )

    all_facts = np.array([facts(x) for x, _ in drawn["lightsheet"]])
    assert (all_facts.max(0) / all_facts.min(0) > 1.5).all()


def test_collection():
    c = open_collection(
        "phantom:vessels", "twophoton", volumes=3, size=32, knobs={"radius": (1, 3)}
    )
    assert (
        c.dims == 3
        and c.channels == 1
        and c.classes == ("background", "vessel")
        and c.ids == c.groups == ["twophoton-00", "twophoton-01", "twophoton-02"]
    )
    assert c[0].spacing == (0.005, 0.001, 0.001) and tuple(c[0].image.shape) == (1, 16, 32, 32)
    small = vessels("twophoton", 1, 32, knobs={"radius": (1, 3)})
    assert np.array_equal(
        small[0].image, c[0].image
    )  # a smaller set is the beginning of a larger one
    assert vessels("lightsheet", 1, knobs=SMALL)[0].spacing == (0.003,) * 3 and tuple(
        vessels("lightsheet", 1, knobs=SMALL)[0].image.shape
    ) == (1, 32, 32, 32)


def test_distance_against_every_sample():
    r = rng(0, "balls")
    points = np.c_[
        r.uniform(-2, 14, (20, 3)), r.uniform(0.5, 4, 20)
    ]  # also outside the box and across its border
    value = r.uniform(1, 2, 20)
    d, v = stamp_balls((12, 10, 13), points, value)
    at = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in (12, 10, 13)], indexing="ij"), -1)
    s = np.sqrt(((at[..., None, :] - points[:, :3]) ** 2).sum(-1)) - points[:, 3]
    np.testing.assert_allclose(d, np.minimum(s.min(-1), 1.5), atol=1e-5)
    near = np.abs(s - 1.5).min(-1) > 1e-4  # away from the edge of the reach, where rounding decides
    np.testing.assert_allclose(v[near], np.where(s < 1.5, value, 0).max(-1)[near], rtol=1e-6)


def test_waves_have_unit_spread():
    x = np.stack([smooth_noise(rng(0, n), (20, 20, 20), 6.0) for n in range(60)])
    assert (
        abs(x.mean()) < 0.1
        and abs(x.std(0).mean() - 1) < 0.1
        and np.abs(np.diff(x, axis=1)).mean() < 0.3
    )


@pytest.mark.parametrize("modality, spacing", [("lightsheet", (1, 1, 1)), ("twophoton", (5, 1, 1))])
def test_given_masks_are_painted(modality, spacing):
    mask = vessel_volume("lightsheet", knobs=SMALL)[1][:: spacing[0]]
    image = render_mask(mask, rng(0, "a"), modality=modality, spacing=spacing)
    assert (
        image.dtype == np.uint8
        and image.shape == mask.shape
        and image[mask > 0].mean() > 1.3 * image[mask == 0].mean()
    )
    assert np.array_equal(
        image,
        render_mask(mask.astype(np.uint16) * 254, rng(0, "a"), modality=modality, spacing=spacing),
    )
    assert not np.array_equal(
        image, render_mask(mask, rng(0, "b"), modality=modality, spacing=spacing)
    )
    for flat in (0, 1):
        assert render_mask(np.full((4, 9, 7), flat), rng(0, "a"), modality=modality).shape == (
            4,
            9,
            7,
        )


@pytest.mark.parametrize(
    "wrong, word",
    [
        (lambda: vessels("confocal"), "lightsheet"),
        (lambda: vessel_volume("confocal"), "lightsheet"),
        (lambda: vessels("lightsheet", 0), "volumes=0"),
        (lambda: vessels("lightsheet", 1, knobs={"blur": 1}), "psf"),
        (lambda: VesselKnobs(radius=(4, 1)), "smaller number first"),
        (lambda: VesselKnobs(radius=(1, 2, 3)), "2 numbers"),
        (lambda: VesselKnobs(noise=-1), "noise"),
        (lambda: VesselKnobs(hollow=2), "at most 1"),
        (lambda: vessels("lightsheet", 1, 8), "size"),
        (lambda: render_mask(np.zeros((8, 8)), rng(0)), "volume"),
        (lambda: render_mask(np.zeros((2, 2, 2)), rng(0), modality="ct"), "modality"),
        (lambda: render_mask(np.zeros((2, 2, 2)), rng(0), spacing=(1, 1)), "spacing"),
    ],
)
def test_slips_are_refused(wrong, word):
    with pytest.raises(InputError, match=word):
        wrong()


# patches without labels


def lamps(n=4, shape=(32, 32, 32), dim=1.0):
    "Dark noisy volumes with one bright spot each; returns images and the places of the spots."
    out = []
    at = rng(0, "lamps").integers(4, np.array(shape) - 4, (n, len(shape)))
    for i, p in enumerate(at):
        x = rng(0, "dark", i).integers(10, 20, shape)
        x[tuple(slice(a - 2, a + 2) for a in p)] = 200
        out.append((x * (dim if i == 0 else 1)).astype(np.uint8))
    return out, at


def old_corners(c, size, B, seed, stream, step):
    "Uniform placing, as it was before there was `bright_share`: written out again."
    r = rng(seed, "patches", stream, step, 0)
    n = len(c)
    dims = len(size)
    index = np.concatenate([r.permutation(n) for _ in range(-(-B // n))])[:B]
    u = r.random((B, 3 + 2 * dims))
    return index, np.stack(
        [
            (row[3 : 3 + dims] * (np.array(c[i].image.shape[1:]) - size + 1)).astype(int)
            for i, row in zip(index, u)
        ]
    )


def test_without_rich_the_stream_is_the_old_one():
    c = Collection.from_arrays(lamps()[0], dims=3)
    for kw in ({}, {"bright_share": 0.0}):
        plan = Patches(c, 8, 3, 5, "look", **kw).plan(11)
        index, corner = old_corners(c, (8, 8, 8), 3, 5, "look", 11)
        assert np.array_equal(plan.index, index) and np.array_equal(plan.corner, corner)
    bright_share = Patches(c, 8, 3, 5, "look", bright_share=0.5).plan(11)
    assert (
        np.array_equal(bright_share.index, index) and bright_share.address == plan.address
    )  # the cases and the augmentation do not change either


def test_with_labels_rich_says_nothing():
    x, _ = lamps()
    c = Collection.from_arrays(x, [(a > 100).astype(np.uint8) for a in x], dims=3)
    a, b = (Patches(c, 8, 4, 0, "look", bright_share=f) for f in (0.0, 1.0))
    assert (
        all(np.array_equal(a.plan(n).corner, b.plan(n).corner) for n in range(20))
        and b._blocks is None
    )


def test_rich_patches_show_what_is_bright_also_in_a_dim_volume():
    x, at = lamps(6, dim=0.06)  # the lamp of the first is darker than the dark of the others
    c = Collection.from_arrays([np.pad(a, 0) for a in x], dims=3)
    share = {}
    for f in (0.0, 1.0):
        p = Patches(c, 16, 6, 0, "look", bright_share=f)
        plans = [p.plan(n) for n in range(30)]
        seen = [
            (i, bool((cor <= at[i]).all() and (at[i] < cor + 16).all()))
            for q in plans
            for i, cor in zip(q.index, q.corner)
        ]
        share[f] = [np.mean([s for i, s in seen if i == k]) for k in range(6)]
    assert min(share[1.0]) > max(share[0.0]) and np.mean(share[1.0]) > 0.6
    again = Patches(c, 16, 6, 0, "look", bright_share=1.0)
    assert np.array_equal(
        again.plan(29).corner, plans[29].corner
    )  # a fresh process needs no history
    assert not np.array_equal(again.plan(29, rank=1).corner, plans[29].corner)


@pytest.mark.parametrize(
    "shape, size",
    [
        ((10, 12, 9), (16, 16, 16)),
        ((16, 40, 33), (4, 15, 16)),
        ((50, 41), (16, 12)),
        ((5, 5, 5), (1, 1, 1)),
    ],
)
def test_rich_patches_stay_inside(shape, size):
    c = Collection.from_arrays(
        [rng(0, "any", i).integers(0, 255, shape, dtype=np.uint8) for i in range(3)],
        dims=len(shape),
    )
    p = Patches(c, size, 3, 0, "look", bright_share=1.0)
    for n in range(20):
        corner = p.plan(n).corner
        assert (corner >= 0).all() and (corner + size <= np.maximum(shape, size)).all()
    assert tuple(p.batch(0).image.shape) == (3, 1, *size)


def test_volumes_without_contrast_are_drawn_uniformly():
    c = Collection.from_arrays([np.full((16, 16, 16), 7, np.uint8)] * 2, dims=3)
    assert np.array_equal(
        Patches(c, 8, 2, 0, "look", bright_share=1.0).plan(4).corner,
        old_corners(c, (8, 8, 8), 2, 0, "look", 4)[1],
    )


def test_rich_is_a_probability():
    with pytest.raises(InputError, match="bright_share=2"):
        Patches(Collection.from_arrays(lamps()[0], dims=3), 8, bright_share=2)


# labels stay closed; splits keep animals whole


@pytest.fixture
def ward(tmp_path):
    for n in range(4):
        image, label = vessel_volume("lightsheet", knobs=SMALL, number=n)
        write_image(tmp_path / f"images/a{n}.tif", Image(image[None], (0.003,) * 3))
        write_label(tmp_path / f"labels/a{n}.tif", label * np.uint8(254))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*groups.csv")
def test_unlabelled_never_opens_a_label(ward, monkeypatch):
    c = Collection.from_folders(ward)
    assert (
        c.has_labels and c.label_kind == "semantic" and set(c[0].label.unique().tolist()) == {0, 1}
    )
    some = choose_labelled(c, 1)
    silent = Collection.from_folders(ward).subset([i for i in c.ids if i not in some]).unlabelled()
    for f in (ward / "labels").iterdir():
        f.unlink()
    monkeypatch.setattr(images, "read_label", lambda *a, **k: pytest.fail("a label was opened"))
    fresh = silent._with(silent.cases, _store=type(silent._store)(1.0))
    for bright_share in (0.0, 0.5):
        p = Patches(fresh, 16, 3, 0, "student", bright_share=bright_share)
        assert (
            all(p.batch(n).label is None for n in range(4)) and p.eval_batches(1)[0].label is None
        )
    monkeypatch.undo()
    with pytest.raises(InputError, match="labels"):
        Patches(c._with(c.cases, _store=type(c._store)(1.0)), 16, 3).batch(0)


def test_splits_keep_animals_whole_and_say_what_they_split():
    c = vessels("lightsheet", 6, knobs=SMALL)
    halves = Collection.from_arrays(
        [c.cases[i].image[0, h] for i in range(6) for h in (slice(0, 16), slice(16, 32))],
        groups=[g for g in c.groups for _ in (0, 1)],
        dims=3,
    )
    split = split_groups(halves, dict(labelled=2, unlabelled=2, val=1, test=1))
    of = {k: {halves.groups[halves.ids.index(i)] for i in v} for k, v in split.parts.items()}
    assert (
        sum(map(len, of.values())) == len(set.union(*of.values())) == 6
        and split.hash == split_groups(halves, dict(labelled=2, unlabelled=2, val=1, test=1)).hash
    )
    leak = replace(split, parts={**split.parts, "test": split["test"] + split["val"][:1]})
    with pytest.raises(InputError, match="two parts"):
        leak.verify(halves)


def test_percentiles_are_of_the_volume_not_of_the_patch():
    x = vessel_volume("lightsheet", knobs=SMALL)[0]
    c = Collection.from_arrays([x], dims=3, intensity="percentile")
    p = Patches(c, 8, 1, 0, "look")
    whole = to_unit(x, "percentile")
    for n in range(5):
        b = p.batch(n)
        cut = tuple(slice(a, a + 8) for a in b.plan.corner[0])
        assert np.array_equal(b.image[0, 0].numpy(), whole[cut]) and not np.allclose(
            b.image[0, 0].numpy(), to_unit(x[cut], "percentile"), atol=0.02
        )


# labels of two values

TWO = ("background", "vessel")


@pytest.mark.parametrize("value", [1, 2, 128, 254, 255, 65535])
@pytest.mark.parametrize("shape", [(6, 7), (3, 6, 7)])
def test_any_single_value_is_foreground(value, shape):
    y = (rng(0, "y").random(shape) < 0.3) * value
    classes, instances = label_map(y, TWO, "semantic", "y")
    assert np.array_equal(classes, y > 0) and instances is None
    assert np.array_equal(label_map(np.zeros(shape, int), TWO, "semantic", "y")[0], np.zeros(shape))


@pytest.mark.parametrize("values", [(0, 254, 255), (0, 3, 7), (0, 1, 2), (3,), (0, -1)])
def test_true_conflicts_stay_errors(values):
    y = np.resize(values, (4, 6))
    with pytest.raises(InputError):
        label_map(y, TWO, "semantic", "y.tif")


def test_three_classes_are_not_binarised():
    with pytest.raises(InputError, match="254"):
        label_map(np.array([0, 254]), ("a", "b", "c"), "semantic", "y.tif")


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2)])
def test_254_is_recognised_and_never_beside_small_numbers(wide, shape):
    y = np.array([0, 254, 254, 0]).reshape(shape)
    for classes in (None, TWO):
        m = infer_labels([("y", y, wide)], classes)
        assert (m.classes, m.kind, m.values, m.read) == (
            classes or ("background", "foreground"),
            "semantic",
            (254,),
            1,
        )
        with pytest.raises(InputError, match="y.tif: the label holds 254 beside 1-2.*ignore"):
            infer_labels([("y.tif", np.array([0, 1, 2, 254]).reshape(shape), wide)], classes)


@pytest.mark.parametrize("ending", [".tif", ".nii.gz", ".zarr"])
def test_254_from_a_file(tmp_path, ending):
    y = (rng(0, "y").random((3, 8, 9)) < 0.3) * np.uint16(254)
    for n in range(2):
        write_image(tmp_path / f"images/{n}{ending}", Image(np.zeros((1, 3, 8, 9), np.uint8)))
        write_image(tmp_path / f"labels/{n}{ending}", Image(y[None].astype(np.uint16)))
    c = Collection.from_folders(tmp_path, group=lambda i: i)
    assert (
        c.label_kind == "semantic"
        and len(c.classes) == 2
        and np.array_equal(c[1].label.numpy(), y > 0)
    )


# volumes on disk


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_stacks_are_z_first_in_either_byte_order(tmp_path, order, dtype):
    x = (np.arange(5 * 6 * 7).reshape(5, 6, 7) % 251).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", x, byteorder=order, photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "x.tif") as t:
        assert t.byteorder == order
    with tifffile.TiffWriter(tmp_path / "pages.tif", byteorder=order) as t:
        for plane in x:
            t.write(plane, photometric="minisblack", contiguous=False)
    for name in ("x.tif", "pages.tif"):
        image = read_image(tmp_path / name)
        assert (
            image.array.shape == (1, 5, 6, 7)
            and image.array.dtype == np.dtype(dtype)
            and image.array.dtype.isnative
            and image.spacing is None
        )
        assert np.array_equal(image.array[0], x)


def test_ome_spacing_and_units(tmp_path):
    x = np.zeros((3, 6, 7), np.uint8)
    tifffile.imwrite(
        tmp_path / "x.ome.tif",
        x,
        photometric="minisblack",
        metadata={
            "axes": "ZYX",
            "PhysicalSizeX": 0.99,
            "PhysicalSizeY": 0.99,
            "PhysicalSizeZ": 5.0,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeYUnit": "µm",
            "PhysicalSizeZUnit": "µm",
        },
    )
    assert read_image(tmp_path / "x.ome.tif").spacing == pytest.approx((0.005, 0.00099, 0.00099))
    tifffile.imwrite(
        tmp_path / "part.ome.tif",
        x,
        photometric="minisblack",
        metadata={"axes": "ZYX", "PhysicalSizeX": 0.99, "PhysicalSizeY": 0.99},
    )
    assert read_image(tmp_path / "part.ome.tif").spacing is None  # two of three are not a spacing


@pytest.mark.parametrize("one_by_one", [False, True])
def test_cut_tiff_stack(tmp_path, one_by_one):
    x = rng(0, "x").integers(0, 255, (6, 20, 20), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "x.tif") as t:
        for plane in x if one_by_one else [x]:
            t.write(plane, photometric="minisblack", compression="zlib")
    data = (tmp_path / "x.tif").read_bytes()
    assert np.array_equal(read_image(tmp_path / "x.tif").array[0], x)
    for part in np.linspace(0.02, 0.98, 40):
        (tmp_path / "cut.tif").write_bytes(data[: int(part * len(data))])
        with pytest.raises(InputError, match="cut.tif"):
            read_image(tmp_path / "cut.tif")


def test_several_images_in_a_tiff_are_no_volume(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as t:
        for n in (6, 7):
            t.write(np.zeros((n, 7), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match="2 images"):
        read_image(tmp_path / "x.tif")


@pytest.fixture
def store(tmp_path):
    "Makes a Zarr: (name, array, **settings) -> its path."
    zarr = pytest.importorskip("zarr")

    def make(name, a, chunks=(4, 4, 4), **kw):
        z = zarr.create_array(
            str(tmp_path / name), shape=a.shape, chunks=chunks, dtype=a.dtype, **kw
        )
        z[...] = a
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"zarr_format": 2},
        {"zarr_format": 2, "order": "F"},
        {"shards": (8, 8, 8)},
        {"config": {"order": "F"}},
    ],
)
def test_zarr_layouts_round_trip_contiguous(store, kw):
    x = rng(0, "x").integers(1, 60000, (9, 10, 11), dtype=np.uint16)
    image = read_image(store("x.zarr", x, **kw))
    assert (
        np.array_equal(image.array[0], x)
        and image.array.flags.c_contiguous
        and image.spacing is None
    )


def test_zarr_of_a_transposed_array(tmp_path):
    x = rng(0, "x").integers(0, 255, (4, 5, 6), dtype=np.uint8)
    turned = np.asfortranarray(x).transpose(2, 0, 1)
    assert not turned.flags.c_contiguous
    write_image(tmp_path / "x.zarr", Image(turned[None], (3.0, 1.0, 1.0)))
    back = read_image(tmp_path / "x.zarr")
    assert np.array_equal(back.array[0], turned) and back.spacing == (3.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "kw, lost",
    [
        ({}, "c/1/0/1"),
        ({"zarr_format": 2}, "1.0.1"),
        ({"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}, "1/0/1"),
        ({"shards": (8, 8, 8)}, "c/1/0/0"),
    ],
)
def test_a_lost_chunk_is_named(store, kw, lost):
    x = rng(0, "x").integers(1, 255, (10, 8, 8), dtype=np.uint8)
    path = store("x.zarr", x, **kw)
    assert np.array_equal(read_image(path).array[0], x)
    (path / lost).unlink()
    for f in (read_image, read_label, open_zarr):
        with pytest.raises(InputError) as e:
            f(path)
        assert (
            lost in str(e.value)
            and "write_empty_chunks=True" in str(e.value)
            and "absent='empty'" in str(e.value)
        )
    assert (read_image(path, absent="empty").array == 0).any() and (
        read_label(path, absent="empty").array == 0
    ).any()
    with pytest.raises(InputError, match="absent"):
        read_image(path, absent="maybe")


def test_chunks_that_zarr_left_out_can_be_declared_empty(store):
    import zarr

    x = np.zeros((8, 8, 8), np.uint8)
    x[:4] = 3
    path = store("x.zarr", x)
    with pytest.raises(InputError, match="not there"):
        read_image(path)
    zarr.open(str(path), mode="r+").attrs["absent_chunks"] = "empty"
    assert np.array_equal(read_image(path).array[0], x)
    assert np.array_equal(
        read_image(store("all.zarr", x, config={"write_empty_chunks": True})).array[0], x
    )


def test_what_we_write_is_complete(tmp_path):
    y = np.zeros((3, 300, 300), np.uint8)
    y[1, 5, 5] = 2
    write_label(tmp_path / "y.zarr", y)
    assert np.array_equal(read_label(tmp_path / "y.zarr").array, y)


def test_a_damaged_chunk(store):
    path = store("x.zarr", rng(0, "x").integers(1, 255, (8, 8, 8), dtype=np.uint8))
    f = path / "c/0/1/0"
    f.write_bytes(f.read_bytes()[:5])
    with pytest.raises(InputError, match="x.zarr"):
        read_image(path)


def test_open_zarr_reads_nothing(tmp_path):
    x = rng(0, "x").integers(1, 255, (2, 6, 5, 4), dtype=np.uint8)
    write_image(tmp_path / "x.zarr", Image(x, (3.0, 1.0, 2.0), np.diag([2.0, 1, 3, 1])))
    z, axes, spacing, affine = open_zarr(tmp_path / "x.zarr")
    assert (
        not isinstance(z, np.ndarray)
        and z.shape == x.shape
        and axes == "czyx"
        and spacing == (3.0, 1.0, 2.0)
        and affine[0, 0] == 2
    )
    assert np.array_equal(z[:, 2:4], x[:, 2:4])


# the window of a volume


class Slow:
    "A source that is made as it is read, and notes how much was asked for."

    def __init__(self, shape):
        self.shape = shape
        self.largest = 0
        self.read = 0

    def __getitem__(self, key):
        z, y, x = (
            np.arange(n)[k] for n, k in zip(self.shape, (*key, *[slice(None)] * (3 - len(key))))
        )
        self.largest = max(self.largest, len(z) * len(y) * len(x))
        self.read = self.read + len(z) * len(y) * len(x)
        return ((z[:, None, None] * 1.0 + y[:, None] % 97 + x % 89) % 300).astype(np.uint16)


def test_small_volumes_are_exact(store):
    x = rng(0, "x").integers(0, 60000, (9, 10, 11), dtype=np.uint16)
    for source in (x, x[None], store("x.zarr", x)):
        source = open_zarr(source)[0] if not isinstance(source, np.ndarray) else source
        assert volume_window(source) == tuple(np.percentile(x, (0.5, 99.8))) and volume_window(
            source, 1, 60, budget=x.size
        ) == tuple(np.percentile(x, (1, 60)))


def test_a_volume_that_does_not_fit():
    s = Slow((3000, 400, 500))
    low, high = volume_window(s, budget=100_000)
    assert s.largest <= 100_000 and s.read < 0.02 * 3000 * 400 * 500
    truth = np.percentile(Slow((300, 97, 89))[:, :, :], (0.5, 99.8))
    assert np.abs(np.subtract((low, high), truth)).max() < 0.1 * (truth[1] - truth[0])
    lazy = Slow((3000, 400, 500))
    assert volume_window(lazy, budget=100_000) == (low, high)


@pytest.mark.parametrize(
    "shape, budget",
    [((3, 40, 50, 60), 4000), ((1, 2, 300, 200), 3000), ((500,), 50), ((700, 3), 100)],
)
def test_any_shape(shape, budget):
    x = rng(0, "x").random(shape, dtype=np.float32)
    low, high = volume_window(x, 5, 95, budget)
    assert abs(low - 0.05) < 0.08 and abs(high - 0.95) < 0.08


def test_all_rows_of_a_plane_are_looked_at():
    x = np.broadcast_to(
        np.arange(1000, dtype=np.float32)[:, None], (6, 1000, 100)
    )  # a plane is larger than the budget
    assert volume_window(x, 5, 95, budget=5000) == pytest.approx((50, 950), abs=40)


def test_windows_of_odd_volumes():
    assert volume_window(np.full((3, 4, 5), 7)) == (7.0, 8.0) and volume_window(
        np.array([[True, False]])
    ) == pytest.approx((0.005, 0.998), abs=0.01)
    assert np.array_equal(
        to_unit(np.full((3, 4, 5), 7), volume_window(np.full((3, 4, 5), 7))), np.zeros((3, 4, 5))
    )
    for wrong in (
        lambda: volume_window(np.zeros((0, 3, 3))),
        lambda: volume_window(np.zeros((3, 3)), 60, 40),
        lambda: volume_window(np.zeros((3, 3)), 0, 101),
        lambda: volume_window(np.array([0, np.nan])),
        lambda: volume_window(np.zeros(3), budget=0),
    ):
        with pytest.raises(InputError):
            wrong()
