"""Geometry: labels in every orientation, what NIfTI says of place and what is written back, pairs
that lie elsewhere."""

import copy
import gzip
import pickle
import struct
import warnings
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import tifffile

from unpaired_kd.core import InputError
from unpaired_kd.data.collections import Collection
from unpaired_kd.data.formats.geometry import (
    Grid,
    Spacing,
    _measure_tilt,
    add_steps,
    align_label,
    describe_grid,
    drop_axis,
    find_turn,
    is_affine,
    measure_shear,
    measure_spacing,
    orientation_letters,
)
from unpaired_kd.data.formats.images import Image, read_image, read_label
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.data.resampling import zoom_spacing
from unpaired_kd.inference.volume_files import open_volume

R = np.random.default_rng(0)
SCAN = R.integers(1, 200, (6, 7, 9)).astype(np.uint8)  # (D,H,W), all sides differ
LABEL = R.integers(0, 3, SCAN.shape).astype(np.uint8)
SPL = np.array([[-0.8, 0, 0, 11], [0, -0.9, 0, 5], [0, 0, 2.5, -300], [0, 0, 0, 1]])


def rotation(seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return q * np.sign(np.linalg.det(q))


def oblique_affine(seed=0, steps=(0.8, 0.9, 2.5)):
    a = np.eye(4)
    a[:3, :3] = rotation(seed) * steps
    a[:3, 3] = (-71.3, 12.8, 900.1)
    return a


def reordered(a, affine, axes, ways):
    """The voxels in file order (x,y,z), stored along other axes in other directions, with the
    affine that belongs to them."""
    stored = a.transpose(axes)[tuple(slice(None, None, w) for w in ways)]
    new = np.eye(4)
    for j, (k, w) in enumerate(zip(axes, ways)):
        new[:3, j] = affine[:3, k] * w
    first = [stored.shape[axes.index(k)] - 1 if ways[axes.index(k)] < 0 else 0 for k in range(3)]
    new[:3, 3] = (affine @ [*first, 1])[:3]
    return stored, new


def pair(folder, affine, label, label_affine, name="p.nii.gz"):
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(SCAN.T, affine), folder / "images/p.nii.gz")
    nib.save(nib.Nifti1Image(label, label_affine), folder / "labels" / name)
    return Collection.from_folders(folder, classes=("a", "b", "c"))


@pytest.mark.parametrize("axes", list(permutations(range(3))))
@pytest.mark.parametrize("ways", list(product((1, -1), repeat=3)))
def test_a_label_of_any_of_the_48_orientations_lies_on_its_image(tmp_path, axes, ways):
    affine = oblique_affine()
    stored, other = reordered(LABEL.T, affine, axes, ways)
    voxel = tuple(np.argwhere(stored == 2)[0])  # one marked voxel lies at one place in the world
    world = (other @ [*voxel, 1])[:3]
    x, y, z = np.rint((np.linalg.inv(affine) @ [*world, 1])[:3]).astype(int)
    assert LABEL[z, y, x] == 2
    c = pair(tmp_path, affine, stored, other)
    assert np.array_equal(c[0].label.numpy(), LABEL) and np.allclose(c[0].spacing, (2.5, 0.9, 0.8))


def test_an_objects_map_and_slices_follow_the_image(tmp_path):
    stored, other = reordered(LABEL.T, SPL, (2, 0, 1), (-1, 1, -1))
    pair(tmp_path, SPL, stored, other)
    objects = Collection.from_folders(tmp_path, label_kind="instance")
    assert np.array_equal(objects[0].instances.numpy(), LABEL)
    c = Collection.from_folders(tmp_path, classes=("a", "b", "c"))
    assert np.array_equal(c.slices(keep="all")[4].label.numpy(), LABEL[4]) and np.array_equal(
        c.native(0).label, LABEL
    )


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(shift=0.5), "lies elsewhere"),
        (dict(shift=0.25), "lies elsewhere"),
        (dict(scale=1.05), "lies elsewhere"),
        (dict(turn=2.0), "lies elsewhere"),
        (dict(crop=1), "label has shape"),
    ],
)
def test_another_place_is_refused_with_both_geometries(tmp_path, change, word):
    affine = SPL.copy()
    label = LABEL
    affine[:3, 3] += change.get("shift", 0) * affine[:3, 0]
    affine[:3, :3] *= change.get("scale", 1)
    t = np.radians(change.get("turn", 0))
    affine = (
        np.array(
            [
                [np.cos(t), -np.sin(t), 0, 0],
                [np.sin(t), np.cos(t), 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 1],
            ]
        )
        @ affine
    )
    if "crop" in change:
        label = label[1:]
    said = f"(?s)labels/p.nii.gz.*{word}.*SPL.*images/p.nii.gz.*SPL.*2.5 x 0.9 x 0.8 mm.*"
    with pytest.raises(InputError, match=said + r"\(11, 5, -300\)"):
        pair(tmp_path, SPL, label.T, affine)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_to_32_bits_and_by_a_quaternion_is_forgiven(tmp_path, seed):
    affine = oblique_affine(seed, (0.9765625, 0.9765625, 1.25))
    f = nib.Nifti1Image(LABEL.T, None)
    f.set_qform(affine, 1)  # quaternion of 32 bits, no sform
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    nib.save(nib.Nifti2Image(SCAN.T, affine), tmp_path / "images/p.nii.gz")  # 64 bits
    nib.save(f, tmp_path / "labels/p.nii.gz")
    assert np.array_equal(
        Collection.from_folders(tmp_path, classes=("a", "b", "c"))[0].label.numpy(), LABEL
    )
    big = Grid((300, 512, 512), None, affine)
    small = Grid((300, 512, 512), None, affine.astype(np.float32).astype(float))
    assert find_turn(small, big) == ([0, 1, 2], [1, 1, 1])


def test_tolerance_is_relative_to_the_voxel():
    for size in (1e-4, 1.0, 50.0):
        a = np.diag([size, size, size, 1.0])
        for shift, same in ((0.05, True), (0.15, False)):
            b = a.copy()
            b[0, 3] = shift * size
            assert (
                find_turn(Grid((5, 5, 5), None, b), Grid((5, 5, 5), None, a)) is not None
            ) is same
    a = np.eye(4)
    b = np.diag([1.0015, 1.0015, 1, 1])  # 1.5 in 1000: 0.75 voxels over 500, never allowed
    assert find_turn(Grid((500, 500), None, b), Grid((500, 500), None, a)) is None
    assert find_turn(Grid((40, 40), None, b), Grid((40, 40), None, a)) is not None


def test_one_slice_and_two_dimensions():
    flat = Grid((1, 7, 9), None, np.diag([1.0, 1, 5, 1]))
    thick = Grid((1, 7, 9), None, np.diag([-1.0, 1, 3, 1]) + np.eye(4)[:, [3]] * [0, 0, 0, 0])
    mirrored = np.diag([-1.0, 1, 3, 1])
    mirrored[0, 3] = 8
    assert find_turn(Grid((1, 7, 9), None, mirrored), flat) == (
        [0, 1, 2],
        [-1, 1, 1],
    )  # the thickness of one slice is not compared
    assert find_turn(thick, flat) is None
    image = Grid((7, 9), None, np.diag([1.0, 1, 5, 1]))
    turned = Grid((9, 7), None, np.diag([1.0, 1, 5, 1])[:, [1, 0, 2, 3]])
    assert find_turn(turned, image) == ([1, 0], [1, 1])
    sagittal = Grid((7, 9), None, np.diag([1.0, 1, 1, 1])[:, [1, 2, 0, 3]])
    assert find_turn(sagittal, image) is None


def test_what_says_nothing_is_compared_by_shape_and_a_tiff_by_spacing(tmp_path):
    image = Image(SCAN[None], (2.5, 0.9, 0.8), SPL, "i.nii.gz")
    assert align_label(Image(LABEL), image) is LABEL
    assert align_label(Image(LABEL, (2.5, 0.9, 0.8)), image) is LABEL
    assert align_label(Image(LABEL, (2.5, 0.9, 0.8)), Image(SCAN[None])) is LABEL
    with pytest.raises(InputError, match="(?s)another spacing.*1 x 1 x 1 mm.*2.5 x 0.9 x 0.8"):
        align_label(Image(LABEL, (1.0, 1.0, 1.0)), image)
    with pytest.raises(InputError, match="has shape"):
        align_label(Image(LABEL.transpose(1, 0, 2)), image)
    assert (
        align_label(Image(LABEL, None, np.zeros((4, 4))), image) is LABEL
    )  # no place: not trusted
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    write_image(tmp_path / "images/a.tif", Image(SCAN[None, 0], (0.5, 0.5)))
    for size, ok in ((0.5, True), (0.50001, True), (0.25, False)):
        write_label(tmp_path / "labels/a.tif", LABEL[0], like=Image(SCAN[None, 0], (size, size)))

        def read():
            return Collection.from_folders(tmp_path, classes=("a", "b", "c"))

        if ok:
            assert np.array_equal(read()[0].label.numpy(), LABEL[0])
        else:
            with pytest.raises(InputError, match="(?s)labels/a.tif.*another spacing.*0.25.*0.5"):
                read()


def test_words():
    assert describe_grid(Grid((6, 7, 9), (2.5, 0.9, 0.8), SPL)) == (
        "6 x 7 x 9 voxels, SPL, spacing 2.5 x 0.9 x 0.8 mm, "
        "first voxel at (11, 5, -300) mm right, front, up"
    )
    t = np.radians(12.0)
    a = np.array(
        [[1, 0, 0, 0], [0, np.cos(t), -np.sin(t), 0], [0, np.sin(t), np.cos(t), 0], [0, 0, 0, 1]]
    )
    assert (
        "SAR turned by 12.0 degrees" in describe_grid(Grid((2, 2, 2), None, a))
        and np.isclose(_measure_tilt(a), 12)
        and measure_shear(a) < 1e-6
    )
    assert orientation_letters(SPL, 2) == "PL" and measure_spacing(SPL, 2) == pytest.approx(
        (0.9, 0.8)
    )
    assert (
        not is_affine(np.full((4, 4), np.inf))
        and not is_affine(np.diag([1.0, 1, 0, 1]))
        and is_affine(np.diag([1e-6, 1e-6, 1e-3, 1]))
    )


# Grids without right angles


def sheared(degrees, within=False):
    "SPL, its slices (or its rows) inclined."
    a = SPL.copy()
    j, k = (1, 0) if within else (2, 1)
    a[k, j] = abs(a[j, j]) * np.tan(np.radians(degrees))
    return a


def distances(a, b, affine):
    """Hausdorff distance of two sets of voxels, each of which is surface, by comparing all pairs in
    mm."""
    a, b = (np.c_[np.argwhere(m)[:, ::-1], np.ones(m.sum())] @ affine.T[:, :3] for m in (a, b))
    d = np.linalg.norm(a[:, None] - b[None], axis=2)
    return max(d.min(0).max(), d.min(1).max())


@pytest.mark.parametrize(
    "degrees, within, cause",
    [
        (30, False, "a tilted gantry"),
        (-12, False, "a tilted gantry"),
        (20, True, "a sheared affine"),
        (0.9, False, ""),
        (0, False, ""),
    ],
)
@pytest.mark.parametrize("name", ["x.nii.gz", "x.zarr"])
def test_distances_follow_the_true_axes(tmp_path, degrees, within, cause, name):
    from unpaired_kd.metrics.segmentation import hausdorff, surface_dice

    affine = sheared(degrees, within)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_image(tmp_path / name, Image(SCAN[None], measure_spacing(affine), affine))
    image = (
        loud(tmp_path / name, f"axes are {abs(degrees):.1f} degrees off right angles .{cause}")
        if cause
        else quiet(tmp_path / name)
    )
    assert isinstance(image.spacing, Spacing) == bool(cause) and np.allclose(
        image.spacing, measure_spacing(affine)
    )
    a, b = np.zeros((2, *SCAN.shape), bool)
    a[1, 1:3, 2:4] = b[3, 4:6, 4] = True  # one voxel thick: all is surface
    true = distances(a, b, affine)
    assert np.isclose(hausdorff(a, b, spacing=image.spacing), true, rtol=1e-6 if cause else 0.01)
    if abs(degrees) > 10:
        assert not np.isclose(hausdorff(a, b, spacing=tuple(image.spacing)), true, rtol=0.01)
    assert (
        surface_dice(a, b, true * 1.02, image.spacing)
        == 1
        > surface_dice(a, b, true * 0.98, image.spacing)
    )
    corners = np.array([[*c, 1] for c in product((0, 8), (0, 6), (0, 5))]) @ affine.T[:, :3]
    longest = np.linalg.norm(
        corners[:, None] - corners[None], axis=2
    ).max()  # a miss costs the longest diagonal
    assert np.isclose(
        hausdorff(a, np.zeros_like(a), spacing=image.spacing), longest, rtol=1e-6 if cause else 0.01
    )


def test_a_study_measures_a_tilted_scan_along_its_axes(tmp_path):
    from types import SimpleNamespace

    from unpaired_kd.data.check import examine
    from unpaired_kd.metrics.segmentation import hausdorff
    from unpaired_kd.study.scoring import evaluate

    a, b = np.zeros((2, *SCAN.shape), np.uint8)
    a[1, 1:3, 2:4] = b[3, 4:6, 4] = 1
    affine = sheared(25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = pair(tmp_path, affine, a.T, affine)
        (row,) = evaluate(SimpleNamespace(predict=lambda image: b), c, "arm", 0)
        found = examine("ct", c.cases, [])
    assert row["hd95_unit"] == "mm" and np.isclose(
        row["hd95"], distances(a > 0, b > 0, affine), rtol=0.05
    )
    assert (
        abs(row["hd95"] / hausdorff(a, b, 95, measure_spacing(affine)) - 1) > 0.1
    )  # what the lengths alone would say
    assert any(
        "axes of 1 of 1 images are not at right angles" in n and "p.nii.gz" in n
        for n in found.notes
    )


def test_a_spacing_with_angles_is_a_tuple_that_survives():
    s = Spacing([[0, 1, 2.0], [0, 3, 0], [4, 0, 0]])
    assert s == (5**0.5, 3, 4) and np.allclose(np.asarray(s) * 2, [20**0.5, 6, 8])
    for again in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s), copy.copy(s)):
        assert type(again) is Spacing and np.array_equal(again.steps, s.steps)
    assert drop_axis(s, 0) == (3, 4) and np.array_equal(drop_axis(s, 1).steps, s.steps[[0, 2]])
    assert drop_axis((1.0, 2.0, 3.0), 1) == (1, 3) and drop_axis(None, 0) is None
    half = zoom_spacing(s, (5, 8, 10), 0.5)
    assert np.array_equal(half.steps, [[0, 1, 2], [0, 6, 0], [8, 0, 0]])
    assert add_steps(None, SPL, "x") is None and add_steps((1, 2), None, "x") == (1, 2)


# What NIfTI says


def save(
    path,
    sform=None,
    scode=0,
    qform=None,
    qcode=0,
    pixdim=None,
    unit=None,
    cls=nib.Nifti1Image,
    a=SCAN,
):
    f = cls(a.T, None)
    if qform is not None:
        f.header.set_qform(qform, qcode)
    if sform is not None:  # by hand: nibabel does not write a singular one
        f.header["sform_code"] = scode
        for k, row in zip("xyz", sform):
            f.header[f"srow_{k}"] = row
    if pixdim is not None:
        f.header["pixdim"][1:4] = pixdim
    if unit:
        f.header.set_xyzt_units(unit)
    nib.save(f, path)
    return path


def quiet(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_image(path)


def loud(path, word):
    with pytest.warns(UserWarning, match=f"(?s){path.name}.*{word}"):
        return read_image(path)


Q = np.diag([-0.8, -0.9, 2.5, 1])
Q[:3, 3] = 100, 90, -300
S = np.diag([0.8, 0.9, 2.5, 1])
S[:3, 3] = -11, 5, 123


def test_which_place_is_taken(tmp_path):
    p = tmp_path / "x.nii.gz"
    im = loud(
        save(p, S, 4, Q, 1), "sform and its qform are two different places; the sform is taken"
    )
    assert np.allclose(im.affine, S) and np.allclose(im.header.other, Q)
    assert np.allclose(quiet(save(p, None, 0, Q, 1)).affine, Q)
    assert np.allclose(quiet(save(p, Q, 1, Q, 1)).affine, Q)
    im = quiet(save(p, S, 2, pixdim=(0.8, 0.9, 2.5)))
    assert np.allclose(im.affine, S) and np.allclose(im.spacing, (2.5, 0.9, 0.8))
    im = loud(
        save(p, S, 2, pixdim=(1, 1, 1)),
        "pixdim says 1 x 1 x 1 mm and its sform 2.5 x 0.9 x 0.8 mm; the sform is taken",
    )
    assert np.allclose(im.spacing, (2.5, 0.9, 0.8))
    for zero in (np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1.0, 1, 0, 1])):
        im = loud(save(p, zero, 1, Q, 1), "sform \\(code 1\\) is no place")
        assert np.allclose(im.affine, Q) and np.allclose(im.spacing, (2.5, 0.9, 0.8))
        im = loud(save(p, zero, 1, pixdim=(0.8, 0.9, 2.5)), "no place")
        assert im.affine is None and np.allclose(im.spacing, (2.5, 0.9, 0.8))
    im = quiet(save(p, pixdim=(0.8, 0.9, 2.5)))  # both codes 0: a spacing, no place
    assert im.affine is None and np.allclose(im.spacing, (2.5, 0.9, 0.8))
    im = quiet(save(p))  # a writer that knows nothing
    assert im.affine is None and im.spacing is None
    assert quiet(save(p, unit="mm")).spacing == (1, 1, 1)  # it says millimetres
    assert loud(
        save(p, S, 1, pixdim=(0, 0.9, 2.5)), "pixdim says nothing"
    ).spacing == pytest.approx((2.5, 0.9, 0.8))
    assert quiet(save(p, pixdim=(0, 0, 0), unit="mm")).spacing is None  # nibabel makes ones of them


@pytest.mark.parametrize("unit, mm", [("micron", 1e-3), ("meter", 1e3), ("mm", 1.0)])
def test_units(tmp_path, unit, mm):
    im = quiet(save(tmp_path / "x.nii", S, 1, S, 1, unit=unit))
    assert np.allclose(im.spacing, np.array([2.5, 0.9, 0.8]) * mm) and np.allclose(
        im.affine[:3], S[:3] * mm
    )
    write_label(tmp_path / "y.nii", LABEL, im)
    assert nib.load(tmp_path / "y.nii").header.get_xyzt_units()[0] == unit
    assert np.allclose(read_label(tmp_path / "y.nii").affine, im.affine) and np.array_equal(
        align_label(read_label(tmp_path / "y.nii"), im), LABEL
    )


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_all_that_is_said_of_place_survives(tmp_path, kind):
    sheared = S.copy()
    sheared[0, 2] = 1.3
    for sform, scode, qform, qcode in (
        (S, 4, Q, 1),
        (None, 0, Q, 2),
        (S, 3, None, 0),
        (None, 0, None, 0),
        (sheared, 2, Q, 1),
    ):
        save(tmp_path / "x.nii.gz", sform, scode, qform, qcode, unit="mm", cls=kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = read_image(tmp_path / "x.nii.gz")
        write_label(tmp_path / "y.nii.gz", LABEL, image)
        write_image(tmp_path / "z.nii.gz", image)
        a = nib.load(tmp_path / "x.nii.gz").header
        for name in ("y", "z"):
            b = nib.load(tmp_path / f"{name}.nii.gz").header
            assert (int(b["sform_code"]), int(b["qform_code"])) == (
                scode,
                qcode,
            ) and b.get_xyzt_units() == a.get_xyzt_units()
            assert np.allclose(a.get_qform(), b.get_qform(), atol=1e-4) and np.allclose(
                a.get_sform(), b.get_sform(), atol=1e-4
            )
            assert np.allclose(a["pixdim"][:4], b["pixdim"][:4])


def test_a_moved_image_does_not_keep_the_old_header(tmp_path):
    image = quiet(save(tmp_path / "x.nii", S, 1, S, 1))
    image.affine = Q
    write_image(tmp_path / "y.nii", image)
    f = nib.load(tmp_path / "y.nii")
    assert np.allclose(f.get_sform(), Q) and np.allclose(f.get_qform(), Q)


def test_what_is_written_without_a_nifti_header(tmp_path):
    p = tmp_path / "x.nii.gz"
    write_image(p, Image(SCAN[None], (2.5, 0.9, 0.8), SPL))
    f = nib.load(p)
    assert (
        np.allclose(f.get_qform(), SPL)
        and np.allclose(f.get_sform(), SPL)
        and (f.header["sform_code"], f.header["qform_code"]) == (1, 1)
    )
    assert (
        np.allclose(f.header["pixdim"][1:4], (0.8, 0.9, 2.5))
        and f.header.get_xyzt_units()[0] == "mm"
    )
    tilted = SPL.copy()
    tilted[1, 2] = -1.7  # no right angles: a qform cannot say it
    with pytest.warns(
        UserWarning, match="scan.dcm: its axes are 34 degrees off .*built on ITK do not open"
    ):
        write_image(p, Image(SCAN[None], measure_spacing(tilted), tilted, "scan.dcm"))
    f = nib.load(p)
    assert (
        np.allclose(f.get_sform(), tilted)
        and f.header["qform_code"] == 0
        and np.allclose(loud(p, "34.2 degrees off").affine, tilted)
    )
    write_image(p, Image(SCAN[None], (2.5, 0.9, 0.8)))
    assert (
        (nib.load(p).header["sform_code"], nib.load(p).header["qform_code"]) == (0, 0)
        and quiet(p).affine is None
        and quiet(p).spacing == pytest.approx((2.5, 0.9, 0.8))
    )
    write_image(p, Image(SCAN[None]))
    assert quiet(p).spacing is None
    write_image(p, Image(SCAN[None, 0], (0.9, 0.8), SPL))
    assert quiet(p).array.shape == (1, 7, 9) and np.allclose(
        quiet(p).affine[:3, [0, 1, 3]], SPL[:3, [0, 1, 3]]
    )


@pytest.mark.parametrize("k, stated", [(0, True), (0.019, True), (0.021, False)])
def test_the_nearest_qform_is_written_if_it_moves_no_voxel_by_a_tenth(tmp_path, k, stated):
    """Half of a small shear goes to either axis: of 11 voxels the far corner moves by 10 k / 2
    voxels."""
    affine = np.eye(4)
    affine[0, 2] = k
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        write_image(
            tmp_path / "x.nii", Image(np.zeros((1, 11, 11, 11), np.uint8), (1, 1, 1), affine)
        )
    f = nib.load(tmp_path / "x.nii")
    assert np.allclose(f.get_sform(), affine) and (
        f.header["sform_code"],
        f.header["qform_code"],
    ) == (1, stated)
    assert bool(heard) == (not stated)
    if stated:
        assert np.isclose(
            np.abs((f.get_qform() - affine) @ [10, 10, 10, 1]).max(), 5 * k, atol=2e-3
        )


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_rounded_cosines_still_get_a_qform(tmp_path, digits):
    turn = rotation(3)
    affine = np.eye(4)
    affine[:3, :2] = np.round(turn[:, :2], digits)
    affine[:3, 2] = np.round(5 * turn[:, 2] * 3, 2) / 5
    assert measure_shear(affine) > 0.001
    write_label(tmp_path / "x.nii", LABEL, Image(SCAN[None], measure_spacing(affine), affine))
    q = nib.load(tmp_path / "x.nii").get_qform(coded=True)[0][:3, :3]
    q /= np.linalg.norm(q, axis=0)
    assert np.allclose(q.T @ q, np.eye(3), atol=1e-6) and np.allclose(q, turn, atol=0.02)
    assert np.array_equal(
        align_label(quiet_label(tmp_path / "x.nii"), Image(SCAN[None], None, affine)), LABEL
    )


def quiet_label(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_label(path)


def test_a_label_that_was_drawn_by_the_qform_is_at_home(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    save(tmp_path / "images/p.nii", S, 4, Q, 1)
    stored, other = reordered(LABEL.T, Q, (0, 1, 2), (-1, 1, 1))
    nib.save(nib.Nifti1Image(stored, other), tmp_path / "labels/p.nii")
    with pytest.warns(UserWarning):
        c = Collection.from_folders(tmp_path, classes=("a", "b", "c"))
    assert np.array_equal(c[0].label.numpy(), LABEL)


MIRROR = np.diag([-0.8, 0.9, 2.5, 1])
MIRROR[:3, 3] = S[0, 3] + 0.8 * 8, 5, 123  # the box of S, counted from the other side
ROLLED = np.diag([0.8, -0.9, 2.5, 1])
ROLLED[:3, 3] = -11, 5 + 0.9 * 6, 123  # and from front to back


def laid(folder, image, label):
    "A label, stored as LABEL, laid on its image; each file has (sform, qform)."
    folder.mkdir()
    place, drawn = ((a, 2, b, 1) for a, b in (image, label))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = align_label(
            read_label(save(folder / "y.nii", *drawn, a=LABEL)),
            read_image(save(folder / "x.nii", *place)),
        )
    return found, [
        str(w.message) for w in heard if "laid on its image by a qform" in str(w.message)
    ]


@pytest.mark.parametrize(
    "image, label, warned",
    [
        ((S, MIRROR), (MIRROR, MIRROR), True),  # drawn in a program that goes by the qform
        ((S, MIRROR), (S, S), False),  # by the sform
        ((S, MIRROR), (S, MIRROR), False),  # the header copied
        ((MIRROR, S), (S, None), True),
        ((S, S), (Q, S), True),  # only the qform of the label is at home
        ((S, None), (None, S), False),
    ],
)
def test_a_label_drawn_voxel_for_voxel_stays_so(tmp_path, image, label, warned):
    found, heard = laid(tmp_path / "a", image, label)
    assert np.array_equal(found, LABEL) and bool(heard) == warned


def test_two_places_that_differ_are_refused_unless_one_turns_nothing(tmp_path):
    found, heard = laid(
        tmp_path / "a", (S, S), (MIRROR, MIRROR)
    )  # one answer: counted from the other side
    assert np.array_equal(found, LABEL[:, :, ::-1]) and not heard
    for n, (image, label) in enumerate(
        [((S, MIRROR), (ROLLED, ROLLED)), ((S, S), (MIRROR, S)), ((S, S), (S, MIRROR))]
    ):
        said = "(?s)y.nii: the label lies on its image in two ways.*by its qform .*into both forms"
        with pytest.raises(InputError, match=said):
            laid(tmp_path / f"b{n}", image, label)
    with pytest.raises(
        InputError, match="lies elsewhere.*by its qform .*SAR.*Its image .*SAL.*by its qform"
    ):
        laid(tmp_path / "c", (MIRROR, Q), (oblique_affine(), S + np.diag([0.1, 0, 0, 0])))


def test_singular_forms_are_not_written_on(tmp_path):
    save(tmp_path / "x.nii", np.zeros((4, 4)), 1, Q, 1)
    with pytest.warns(UserWarning):
        image = read_image(tmp_path / "x.nii")
    write_label(tmp_path / "y.nii", LABEL, image)
    f = nib.load(tmp_path / "y.nii")
    assert (
        f.header["sform_code"] == 0
        and np.allclose(f.get_qform(), Q)
        and np.allclose(quiet(tmp_path / "y.nii").affine, Q)
    )


def patched(path, at, form, *values, **place):
    "A NIfTI-1 with some bytes of its header changed."
    raw = bytearray(save(path, unit="mm", **place).read_bytes())
    struct.pack_into("<" + form, raw, at, *values)
    path.write_bytes(raw)
    return path


BY_Q = dict(qform=Q, qcode=1)
BY_S = dict(sform=S, scode=1)
PIXDIM = 80
QUATERNION = 256
QCODE = 252
SCODE = 254  # where they stand


@pytest.mark.parametrize(
    "at, form, values, place, word, affine, spacing",
    [
        (PIXDIM, "3f", (0.8, 0.9, 0), BY_Q, "qform .code 1. is no place", None, None),
        (
            QUATERNION,
            "3f",
            (0.9, 0.9, 0.9),
            BY_Q,
            "qform .code 1. is no place",
            None,
            (2.5, 0.9, 0.8),
        ),
        (
            QUATERNION,
            "3f",
            (0.9, 0.9, 0.9),
            BY_Q | BY_S,
            "qform .code 1. is no place",
            S,
            (2.5, 0.9, 0.8),
        ),
        (
            PIXDIM,
            "3f",
            (0.8, 0.9, 0),
            BY_Q | BY_S,
            "qform .code 1. is no place",
            S,
            (2.5, 0.9, 0.8),
        ),
        (
            QCODE,
            "h",
            (200,),
            BY_Q,
            "qform_code is 200, which NIfTI does not know; 2 is taken",
            Q,
            (2.5, 0.9, 0.8),
        ),
        (SCODE, "h", (6,), BY_S, "sform_code is 6, ", S, (2.5, 0.9, 0.8)),
        (SCODE, "h", (-1,), BY_Q | BY_S, "sform_code is -1, .*0 is taken", Q, (2.5, 0.9, 0.8)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*x.nii", "ignore:.*y.nii")
def test_damaged_places_are_named_and_nothing_is_invented(
    tmp_path, capfd, at, form, values, place, word, affine, spacing
):
    image = loud(patched(tmp_path / "x.nii", at, form, *values, **place), word)
    write_label(tmp_path / "y.nii", LABEL, image)
    for found in (image, read_label(tmp_path / "y.nii")):  # a label says no more than its image
        assert found.affine is None if affine is None else np.allclose(found.affine, affine)
        assert found.spacing is None if spacing is None else np.allclose(found.spacing, spacing)
    assert np.array_equal(image.array[0], SCAN) and np.array_equal(
        open_volume(tmp_path / "x.nii")[...][0], SCAN
    )
    assert capfd.readouterr().err == ""  # nibabel says nothing without a name


def test_a_series_in_time_is_no_colour_image(tmp_path):
    f = nib.Nifti1Image(np.stack([SCAN.T] * 3, -1), S)
    nib.save(f, tmp_path / "colours.nii")
    assert quiet(tmp_path / "colours.nii").array.shape == (3, *SCAN.shape)
    for unit in ("sec", "msec", "hz"):
        f.header.set_xyzt_units("mm", unit)
        nib.save(f, tmp_path / "times.nii")
        for read in (read_image, read_label, open_volume):
            with pytest.raises(
                InputError, match="times.nii: its last axis is time .3 points.*own file"
            ):
                read(tmp_path / "times.nii")
    one = nib.Nifti1Image(SCAN.T[..., None], S)  # one point in time is a volume
    one.header.set_xyzt_units("mm", "sec")
    nib.save(one, tmp_path / "one.nii")
    image = quiet(tmp_path / "one.nii")
    assert image.array.shape == (1, *SCAN.shape)
    image.array = np.concatenate([image.array] * 3)  # channels on its grid are no times
    write_image(tmp_path / "y.nii", image)
    assert np.array_equal(quiet(tmp_path / "y.nii").array, image.array)


def test_kinds_of_nifti(tmp_path):
    p = tmp_path / "x.nii"
    nib.save(nib.Nifti1Image(SCAN.T.astype(np.complex64), S), p)
    with pytest.raises(InputError, match="(?s)x.nii.*complex numbers"):
        read_image(p)
    with pytest.raises(InputError, match="(?s)x.nii.*complex"):
        open_volume(p)
    save(p, S, 1, S, 1)
    raw = p.read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(raw)  # not packed, whatever its name
    assert np.array_equal(read_image(tmp_path / "plain.nii.gz").array[0], SCAN)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(raw))
    assert np.array_equal(read_image(tmp_path / "packed.nii").array[0], SCAN)
    big = nib.Nifti1Image(SCAN.T.astype(">i2"), S, nib.Nifti1Header(endianness=">"))
    nib.save(big, p)
    im = read_image(p)
    assert np.array_equal(im.array[0], SCAN) and np.allclose(im.affine, S)
    write_label(tmp_path / "y.nii", LABEL, im)
    assert np.allclose(read_label(tmp_path / "y.nii").affine, S)
    vector = R.random((9, 7, 6, 1, 3), np.float32)
    nib.save(nib.Nifti1Image(vector, S), p)
    assert np.array_equal(read_image(p).array, vector[:, :, :, 0].T)


@pytest.mark.parametrize(
    "bad",
    ["huge", "pair", "dims", "magic", "short", "packed short", "packed tail", "empty", "text"],
)
def test_damaged_nifti_is_refused_by_name(tmp_path, bad):
    p = save(tmp_path / "x.nii.gz", S, 1, S, 1)
    raw = bytearray(gzip.decompress(p.read_bytes()))
    packed = None
    if bad == "huge":
        struct.pack_into("<8h", raw, 40, 3, 30000, 30000, 30000, 1, 1, 1, 1)
    if bad == "pair":
        raw[344:348] = b"ni1\0"
    if bad == "dims":
        struct.pack_into("<8h", raw, 40, 3, -4, 7, 9, 1, 1, 1, 1)
    if bad == "magic":
        raw[344:348] = b"XYZ\0"
    if bad == "short":
        raw = raw[:-40]
    if bad == "packed short":
        packed = gzip.compress(bytes(raw))[:-30]
    if bad == "packed tail":
        packed = gzip.compress(bytes(raw)) + b"garbage"
    if bad == "empty":
        packed = b""
    if bad == "text":
        packed = b"not an image, only words" * 30
    p.write_bytes(gzip.compress(bytes(raw)) if packed is None else packed)
    with pytest.raises(InputError, match="x.nii.gz"):
        read_image(p)


def test_slope_and_intercept(tmp_path):
    p = save(tmp_path / "x.nii", S, 1, S, 1)
    raw = bytearray(p.read_bytes())
    for slope, inter, a, b in ((2.0, -5.0, 2, -5), (0.0, 7.0, 1, 0), (np.nan, np.nan, 1, 0)):
        struct.pack_into("<2f", raw, 112, slope, inter)
        p.write_bytes(raw)
        assert np.array_equal(read_image(p).array[0], a * SCAN.astype(float) + b)


def test_volumes_in_blocks_take_the_same_place(tmp_path):
    p = save(tmp_path / "x.nii", S, 2, pixdim=(1, 1, 1))
    with pytest.warns(UserWarning, match="pixdim"):
        v = open_volume(p)
    assert np.allclose(v.spacing, (2.5, 0.9, 0.8)) and np.allclose(v.affine, S)


def test_a_dicom_label_on_a_nifti_image(tmp_path):
    from test_clinical import CORNER, PX, STEP, D, H, W, series

    y = R.integers(0, 3, (D, H, W)).astype(np.int16)
    affine = np.diag([PX, PX, STEP, 1.0])
    affine[:3, 3] = -(CORNER[0] + PX * (W - 1)), -(CORNER[1] + PX * (H - 1)), CORNER[2]
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    image = R.integers(0, 99, (D, H, W)).astype(np.uint8)  # counted to the right and the front
    nib.save(nib.Nifti1Image(image.T, affine), tmp_path / "images/p.nii.gz")
    series(tmp_path / "labels/p", y, modality="SEG")  # counted to the left and the back
    c = Collection.from_folders(tmp_path, classes=("a", "b", "c"))
    assert np.array_equal(c[0].label.numpy(), y[:, ::-1, ::-1]) and np.array_equal(
        c.native(0).image[0], image
    )


# Pictures and volumes of one slice


def test_a_volume_of_one_slice_is_a_picture(tmp_path):
    S1 = SPL @ np.array(
        [[-1, 0, 0, 8], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )  # columns counted from the other side
    flat = Image(SCAN[:1], (0.9, 0.8), SPL, "i.nii.gz")  # (1,H,W): one channel
    thick = Image(SCAN[None, :1], (2.5, 0.9, 0.8), SPL, "i.nii.gz")  # (1,1,H,W)
    for label, affine, spacing in (
        (LABEL[:1], SPL, (2.5, 0.9, 0.8)),
        (LABEL[:1, :, ::-1], S1, (2.5, 0.9, 0.8)),
        (LABEL[0], SPL, (0.9, 0.8)),
        (LABEL[0, :, ::-1], S1, (0.9, 0.8)),
        (LABEL[0], None, (0.9, 0.8)),
        (LABEL[:1], None, (9.0, 0.9, 0.8)),
        (LABEL[0], None, None),
        (LABEL[:1], None, None),
    ):
        for image in (flat, thick):
            got = align_label(Image(label, spacing, affine, "l.nii.gz"), image)
            assert got.shape == image.array.shape[1:] and np.array_equal(got.squeeze(), LABEL[0])
    for image in (flat, thick):
        for label in (LABEL[:2], LABEL[0, 1:], LABEL[:1, :, :-1]):
            with pytest.raises(InputError, match="(?s)l.nii.gz.*has shape"):
                align_label(Image(label, None, None, "l.nii.gz"), image)
        far = SPL.copy()
        far[1, 3] += 3
        for label in (LABEL[0], LABEL[:1]):
            with pytest.raises(InputError, match="elsewhere"):
                align_label(Image(label, None, far), image)
    with pytest.raises(InputError, match="another spacing"):
        align_label(Image(LABEL[:1], (2.5, 0.9, 0.9)), flat)


def test_a_collection_of_pictures_with_labels_of_one_slice(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    write_image(tmp_path / "images/a.png", Image(SCAN[:1]))
    nib.save(nib.Nifti1Image(LABEL[:1].T, SPL), tmp_path / "labels/a.nii.gz")
    c = Collection.from_folders(tmp_path, classes=("a", "b", "c"))
    assert np.array_equal(c[0].label.numpy(), LABEL[0])


# Both roads into a NIfTI


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "packed",
        "swapped",
        "slope",
        "whole slope",
        "big",
        "two",
        "wide",
        "one more axis",
        "vector",
        "channels",
        "colours",
        "one slice",
        "members",
        "quaternion",
    ],
)
def test_blocks_are_what_reading_gives(tmp_path, kind):
    a = {
        "one more axis": SCAN.T[..., None],
        "vector": np.stack([SCAN.T] * 3, -1)[:, :, :, None] * np.uint8([1, 2, 3]),
        "channels": np.stack([SCAN.T, SCAN.T + 9], -1),
        "wide": SCAN.T.astype(float),
        "one slice": SCAN.T[:, :, :1],
        "big": SCAN.T.astype(">i2"),
    }.get(kind, SCAN.T)
    if kind == "colours":
        a = np.stack([SCAN.T, SCAN.T // 2, SCAN.T // 3], -1).view(
            [("R", "u1"), ("G", "u1"), ("B", "u1")]
        )[..., 0]
    f = (nib.Nifti2Image if kind == "two" else nib.Nifti1Image)(
        a, SPL, nib.Nifti1Header(endianness=">") if kind == "big" else None
    )
    if "slope" in kind:
        f.header.set_slope_inter(2 if "whole" in kind else 0.3, -7)
    if kind == "quaternion":
        f = nib.Nifti1Image(a, None)
        f.set_qform(SPL, 1)
    p = tmp_path / ("x.nii.gz" if kind == "packed" else "x.nii")
    nib.save(f, p)
    if kind == "swapped":
        (tmp_path / "x.nii.gz").write_bytes(p.read_bytes())
        p = tmp_path / "x.nii.gz"
    if kind == "members":
        raw = p.read_bytes()
        p.write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]))
    image = read_image(p)
    volume = open_volume(p)
    assert volume.shape == image.array.shape and volume.dtype.kind == image.array.dtype.kind
    assert np.array_equal(volume[...], image.array)
    assert np.array_equal(volume[:, 0:1, 3:6, 2:], image.array[:, 0:1, 3:6, 2:])
    assert np.allclose(volume.affine, image.affine) and np.allclose(volume.spacing, image.spacing)
    truth = {
        "slope": 0.3 * SCAN - 7.0,
        "whole slope": 2.0 * SCAN - 7,
        "one slice": SCAN[:1],
        "channels": SCAN,
    }.get(kind, SCAN)
    assert np.allclose(volume[...][0], truth)
    if kind == "colours":
        assert np.array_equal(volume[...][2], SCAN // 3)


def test_boxes_are_read_by_several_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    for name in ("x.nii", "x.nii.gz"):
        nib.save(nib.Nifti1Image(SCAN.T, SPL), tmp_path / name)
        volume = open_volume(tmp_path / name)
        with ThreadPoolExecutor(4) as pool:
            got = list(
                pool.map(volume.__getitem__, [np.s_[:, k % 6 : k % 6 + 1] for k in range(120)])
            )
        assert all(np.array_equal(g[0, 0], SCAN[k % 6]) for k, g in enumerate(got))


# Labels whose numbers are stored otherwise


def test_labels_with_a_slope_are_whole_and_large_numbers_stay(tmp_path):
    p = tmp_path / "l.nii"
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    five = np.array([0, 1, 5])[LABEL]
    f = nib.Nifti1Image(five.T.astype(float), SPL, header)
    f.header.set_data_dtype(np.uint8)
    nib.save(f, p)
    values = np.unique(nib.load(p).get_fdata())
    assert (values % 1).any()  # 5.00000007: the slope is rounded
    assert np.array_equal(read_label(p).array, five)
    huge = LABEL.astype(float)
    huge[0, 0, 0] = 2**24 + 1  # float32 has no such number
    nib.save(nib.Nifti1Image(huge.T, SPL), p)
    assert np.array_equal(read_label(p).array, huge)
    tifffile.imwrite(tmp_path / "l.tif", huge)
    assert np.array_equal(read_label(tmp_path / "l.tif").array, huge)
    for off in (0.01, 0.5):
        nib.save(nib.Nifti1Image((LABEL + off * (LABEL == 1)).T, SPL), p)
        with pytest.raises(InputError, match="(?s)l.nii.*not whole numbers"):
            read_label(p)
