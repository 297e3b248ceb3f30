"""DICOM: every slice where its file says, numbers in the unit of their scale, files that do not
belong, contours and segments by the rules of the standard."""

import gzip
import warnings

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
import torch
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from skimage.draw import polygon2mask
from test_clinical import CORNER, PX, STEP, D, H, W, base, circle, put, rtstruct, scan_image, seg

from unpaired_kd.core import InputError
from unpaired_kd.data.formats.dicom import _split_folder, dicom_files
from unpaired_kd.data.formats.geometry import lay_on, measure_shear, measure_spacing
from unpaired_kd.data.formats.images import Image, list_images, read_image, read_label
from unpaired_kd.data.formats.regions import (
    _is_same_contour,
    _join_polygons,
    fill_contours,
    rtstruct_mask,
    seg_mask,
)
from unpaired_kd.data.formats.writing import write_label
from unpaired_kd.data.sets.chaos import slice_files
from unpaired_kd.inference.files import PartlyDone, _is_one_series, predict_path
from unpaired_kd.inference.student import Recipe, Student

R = np.random.default_rng(0)
AXIAL = (1, 0, 0, 0, 1, 0)
HEAD = R.integers(0, 4096, (6, 8, 10)).astype(np.uint16)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tilted gantry"),
    pytest.mark.filterwarnings("ignore:.*exceeds the maximum length"),
]


def one(path, a, corner=(0, 0, 0), turn=AXIAL, spacing=(0.5, 0.25), modality="CT", bits=16, **tags):
    "One slice; a tag of None is written empty, and one that is `...` is left out."
    s = base(modality, pydicom.uid.CTImageStorage, f"1.2.{abs(hash(str(path))) % 10**9}")
    s.SeriesInstanceUID = "1.2.3"
    s.ImagePositionPatient = list(map(float, corner))
    s.ImageOrientationPatient = list(map(float, turn))
    s.PixelSpacing = list(spacing)
    put(s, np.asarray(a), bits)
    for k, v in tags.items():
        if v is ...:
            delattr(s, k)
        else:
            setattr(s, k, v)
    path.parent.mkdir(parents=True, exist_ok=True)
    s.save_as(path, enforce_file_format=True)
    return path


def scan(folder, a=HEAD, corners=None, **tags):
    for k, plane in enumerate(a):
        one(
            folder / f"{(5 * k) % 7}.dcm",
            plane,
            (-8, -9, 3.0 * k) if corners is None else corners[k],
            **tags,
        )
    return folder


def names(folder):
    return {k: f"{(5 * k) % 7}.dcm" for k in range(6)}


def refused(path, *words):
    with pytest.raises(InputError) as e:
        read_image(path)
    for w in words:
        assert w in str(e.value), f"{w!r} is not in: {e.value}"
    assert "damaged" not in str(e.value).lower()


# Where slices lie


@pytest.mark.parametrize(
    "turn", [AXIAL, (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0)]
)
@pytest.mark.parametrize("degrees", [0, 12, 25])
def test_every_slice_lies_where_its_file_says(tmp_path, turn, degrees):
    o = np.array(turn, float)
    normal = np.cross(o[:3], o[3:])
    t = np.radians(degrees)
    table = np.cos(t) * normal + np.sin(t) * o[3:]  # the way of the table
    corners = np.array([[-30.2, 11.7, 205.0]] * 6) + np.arange(6)[:, None] * 2.7 * table
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        im = read_image(scan(tmp_path / "s", corners=corners, turn=turn))
    assert np.array_equal(im.array[0], HEAD)
    for k in range(6):
        assert np.allclose((im.affine @ [0, 0, k, 1])[:3] * (-1, -1, 1), corners[k], atol=1e-4)
    row = 5
    column = 7  # one pixel in the world, by the standard's equation C.7.6.2.1-1
    world = corners[2] + o[:3] * 0.25 * column + o[3:] * 0.5 * row
    assert np.allclose((im.affine @ [column, row, 2, 1])[:3] * (-1, -1, 1), world, atol=1e-4)
    assert np.allclose(im.spacing, (2.7, 0.5, 0.25), atol=1e-5) and np.allclose(
        measure_spacing(im.affine), im.spacing
    )
    assert np.isclose(measure_shear(im.affine), degrees, atol=0.01)
    assert ["tilted gantry" in str(w.message) and "s:" in str(w.message) for w in heard] == [
        True
    ] * (degrees > 0)


def test_contours_and_labels_follow_a_tilt(tmp_path):
    t = np.radians(20)
    o = np.array([1, 0, 0, 0, np.cos(t), -np.sin(t)])
    folder = tmp_path / "ct"
    for k in range(5):
        one(folder / f"{k}.dcm", np.zeros((20, 24)), (0, 0, 5 * k), o, (1.0, 1.0))
    im = read_image(folder)
    box = [
        (0, 0, 15.0) + c * o[:3] + r * o[3:]
        for r, c in ((3.5, 5.5), (3.5, 9.5), (12.5, 9.5), (12.5, 5.5))
    ]
    m = fill_contours([np.array(box)], im)
    truth = np.zeros((5, 20, 24), bool)
    truth[3, 4:13, 6:10] = True
    assert np.array_equal(m, truth)
    write_label(tmp_path / "y.nii.gz", truth.astype(np.uint8), im)
    y = read_label(tmp_path / "y.nii.gz")
    assert np.allclose(y.affine, im.affine, atol=1e-5) and np.array_equal(lay_on(y, im), truth)


def test_positions_that_do_not_fit_are_named(tmp_path):
    even = np.array([[0, 0, 3.0 * k] for k in range(6)])

    def at(name, k, where):
        c = even.copy()
        c[k] = where
        return scan(tmp_path / name, corners=c)

    n = names(tmp_path)
    refused(at("side", 3, (1.5, 0, 9)), n[3], "sideways", "1.50 mm")
    refused(at("last", 5, (0, 2, 15)), n[5], "sideways")
    refused(at("uneven", 5, (0, 0, 16)), n[4], n[5], "4.00 mm instead of 3.00")
    refused(at("twice", 3, even[2]), n[3], n[2], "twice")
    refused(
        scan(tmp_path / "bent", corners=even + np.c_[0.012 * np.arange(6) ** 2, np.zeros((6, 2))]),
        "drift",
    )
    (scan(tmp_path / "lost") / n[2]).unlink()
    refused(tmp_path / "lost", n[1], n[3], "6.00 mm instead of 3.00", "missing")
    jitter = even + np.random.default_rng(0).normal(0, 0.01, even.shape)
    assert np.allclose(
        read_image(scan(tmp_path / "jitter", corners=jitter)).spacing, (3, 0.5, 0.25), atol=0.02
    )
    rounded = np.array([[0, 0, round(10 / 3 * k, 1)] for k in range(6)])  # positions with one digit
    assert np.isclose(
        read_image(scan(tmp_path / "rounded", corners=rounded)).spacing[0], 16.7 / 5, atol=1e-3
    )


def many(folder, corners, **tags):
    for k, c in enumerate(corners):
        one(folder / f"{k}.dcm", np.full((8, 10), k), c, **tags)
    return folder


@pytest.mark.parametrize("step, start", [(0.625, -100), (0.625, 0.03), (1 / 1.3, 7), (0.45, 2)])
def test_positions_with_one_digit_are_even(tmp_path, step, start):
    im = read_image(many(tmp_path, [(-8, -8, round(start + step * k, 1)) for k in range(20)]))
    assert np.isclose(im.spacing[0], step, atol=0.1 / 19)
    assert im.array[0, :, 0, 0].tolist() == list(range(20))


def test_an_oblique_stack_with_one_digit_is_even(tmp_path):
    o = np.array(
        [
            np.cos(0.4),
            np.sin(0.4),
            0,
            -np.sin(0.4) * np.cos(0.3),
            np.cos(0.4) * np.cos(0.3),
            -np.sin(0.3),
        ]
    )
    corners = np.round(np.cross(o[:3], o[3:]) * 0.5 * np.arange(60)[:, None], 1)
    im = read_image(many(tmp_path, corners, turn=np.round(o, 5), spacing=(0.3, 0.3)))
    assert np.isclose(im.spacing[0], 0.5, atol=0.005)


@pytest.mark.parametrize("step", [0.625, 0.45, 1.0, 5.0])
@pytest.mark.parametrize("start", [0, 0.037])
@pytest.mark.parametrize("n, lost", [(4, 1), (4, 2), (5, 2), (20, 9), (20, 18)])
def test_rounding_excuses_no_lost_slice(tmp_path, step, start, n, lost):
    at = [k for k in range(n) if k != lost]
    folder = many(tmp_path, [(0, 0, round(start + step * k, 1)) for k in at])
    refused(folder, "missing", f"from {lost - 1}.dcm", f"to {lost}.dcm")


def test_rounding_is_taken_as_written(tmp_path):
    corners = [
        (0, 0, v) for v in (0, 5, 10, 16, 21, 26)
    ]  # 5.25 mm without digits, or 5 mm and a fault
    for k, c in enumerate(corners):
        one(tmp_path / "whole" / f"{k}.dcm", HEAD[k], ImagePositionPatient=list(map(str, c)))
    assert np.isclose(read_image(tmp_path / "whole").spacing[0], 5.2)
    refused(many(tmp_path / "digit", corners), "6.00 mm instead of 5.00")  # written as 16.0
    for k, x in enumerate("0010"):
        one(tmp_path / "aside" / f"{k}.dcm", HEAD[k], ImagePositionPatient=[x, "0", str(5 * k)])
    refused(tmp_path / "aside", "1.00 mm sideways")
    coarse = [(0, 0, round(0.3 * k + 0.05, 1)) for k in (0, 1, 2, 4, 5)]
    refused(many(tmp_path / "coarse", coarse), "missing", "rounded (0.1 mm)")


def test_a_slice_that_differs_is_named(tmp_path):
    def odd(name, a=HEAD[3], corner=(-8, -9, 9), **tags):
        scan(tmp_path / name)
        one(tmp_path / name / "1.dcm", a, corner, **tags)  # takes the place of slice 3
        return tmp_path / name

    assert names(tmp_path)[3] == "1.dcm"
    refused(
        odd("size", np.zeros((12, 9))), "1.dcm", "another size", "12 x 9 pixels instead of 8 x 10"
    )
    refused(odd("turn", turn=(0, 1, 0, 1, 0, 0)), "1.dcm", "another orientation")
    refused(
        odd("pixels", spacing=(0.4, 0.25)),
        "1.dcm",
        "another pixel spacing",
        "[0.4, 0.25] instead of [0.5, 0.25]",
    )
    refused(
        odd("colours", PhotometricInterpretation="MONOCHROME1"), "1.dcm", "another kind of colour"
    )
    refused(odd("scale", RescaleSlope=1, RescaleIntercept=-1024), "1.dcm", "another rescale")
    refused(odd("place", ImagePositionPatient=...), "1.dcm", "ImagePositionPatient")
    refused(odd("unit", PixelSpacing=["0.5", "0"]), "1.dcm", "PixelSpacing", "positive")
    refused(odd("zero", turn=(0,) * 6), "1.dcm", "ImageOrientationPatient")
    refused(odd("skew", turn=(1, 0, 0, 0.6, 0.8, 0)), "1.dcm", "right angle")
    refused(odd("slope", RescaleSlope=0, RescaleIntercept=0), "1.dcm", "RescaleSlope")
    refused(odd("high", HighBit=12, BitsStored=12), "1.dcm", "HighBit")
    loc = scan(tmp_path / "loc")
    one(
        loc / "loc",
        np.zeros((30, 4)),
        (0, -50, 40),
        (1, 0, 0, 0, 0, -1),
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    refused(loc, "its slice loc ", "localizer", "30 x 4")
    near = scan(tmp_path / "near")  # rounding is no other orientation
    one(near / "1.dcm", HEAD[3], (-8, -9, 9), (1, 1e-5, 0, -1e-5, 1, 0), (0.50001, 0.25))
    assert np.array_equal(read_image(near).array[0], HEAD)


def test_a_slice_of_another_frame_of_reference_is_named(tmp_path):
    scan(tmp_path, FrameOfReferenceUID="1.2.9")
    assert np.array_equal(read_image(tmp_path).array[0], HEAD)
    one(tmp_path / names(0)[2], HEAD[2], (-8, -9, 6.0), FrameOfReferenceUID="1.2.8")
    refused(tmp_path, names(0)[2], "frame of reference", "1.2.8 instead of 1.2.9")


@pytest.mark.parametrize(
    "tags, words",
    [
        (dict(modality="PT"), ("another modality", "PT instead of CT")),
        (dict(PatientID="other"), ("another patient", "other instead of p")),
        (dict(StudyInstanceUID="9.9"), ("another study", "9.9 instead of 1.1")),
        (dict(PatientID=None), ("another patient", "None instead of p")),
    ],
)
def test_one_series_is_of_one_patient_study_and_modality(tmp_path, tags, words):
    who = dict(PatientID="p", StudyInstanceUID="1.1")
    scan(tmp_path, **who)
    assert np.array_equal(read_image(tmp_path).array[0], HEAD)
    one(tmp_path / "o.dcm", HEAD[0], (-8, -9, 18.0), **who | tags)
    refused(tmp_path, "its slice o.dcm", *words)


def test_a_mosaic_is_no_slice(tmp_path):
    kind = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    refused(
        one(tmp_path / "m.dcm", HEAD[0], modality="MR", ImageType=kind),
        "m.dcm is a mosaic",
        "dcm2niix",
    )
    refused(
        one(tmp_path / "f/m.dcm", HEAD[0], modality="MR", ImageType=kind).parent,
        "m.dcm is a mosaic",
    )


def test_a_single_slice_of_unknown_thickness(tmp_path):
    p = one(tmp_path / "f/x.dcm", HEAD[0], (1, 2, 3))
    im = read_image(p.parent)
    assert im.array.shape == (1, 1, 8, 10) and im.spacing is None  # nobody said 1 mm
    assert np.allclose(im.affine, [[-0.25, 0, 0, -1], [0, -0.5, 0, -2], [0, 0, 1, 3], [0, 0, 0, 1]])
    assert read_image(p).spacing == (0.5, 0.25)
    write_label(tmp_path / "y.nii.gz", HEAD[:1] % 3, im)  # its place is still compared
    assert np.array_equal(lay_on(read_label(tmp_path / "y.nii.gz"), im), HEAD[:1] % 3)
    mirrored = read_image(
        one(tmp_path / "g/x.dcm", HEAD[0], (3.25, 2, 3), (-1, 0, 0, 0, 1, 0)).parent
    )
    assert np.array_equal(
        lay_on(read_label(tmp_path / "y.nii.gz"), mirrored), HEAD[:1, :, ::-1] % 3
    )


def test_echoes_times_and_series_are_told_apart(tmp_path):
    echo = scan(tmp_path / "echo")
    for k in range(6):
        one(echo / f"b{k}.dcm", HEAD[k], (-8, -9, 3 * k), EchoTime=4.6)
    refused(echo, "twice", "EchoTime")
    two = scan(tmp_path / "two")
    rtstruct(two / "rs.dcm", [("GTV-1", [circle(0, 0, 3, 3)])])
    refused(two, "rs.dcm holds no picture", "RTSTRUCT")
    other = scan(tmp_path / "other")
    one(other / "c.dcm", HEAD[0], modality="PT", SeriesInstanceUID="1.2.4")
    refused(other, "2 DICOM series", "CT with 6 files", "PT with 1 files, e.g. c.dcm")
    alone = tmp_path / "alone"
    rtstruct(alone / "rs.dcm", [("GTV-1", [circle(0, 0, 3, 3)])])
    refused(alone, "rs.dcm holds no picture", "RTSTRUCT")
    nameless = scan(tmp_path / "nameless", SeriesInstanceUID=...)
    assert np.array_equal(read_image(nameless).array[0], HEAD)


def test_files_without_endings_without_marks_and_beside_others(tmp_path):
    folder = scan(tmp_path / "s")
    for k, f in enumerate(sorted(folder.iterdir())):
        data = f.read_bytes()
        f.unlink()
        (folder / f"IM{k}").write_bytes(
            data[132:] if k % 2 else data
        )  # every second one starts with its first tag
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    (folder / "README.txt").write_text("a scan of a head, exported on a Monday " * 9)
    (folder / ".hidden").write_bytes(b"\0" * 128 + b"DICM")
    assert [f.name for f in dicom_files(folder)] == [f"IM{k}" for k in range(6)]
    assert np.array_equal(read_image(folder).array[0], HEAD)
    bare = Dataset()  # no mark, no header: implicit little endian, as old files are
    bare.update(pydicom.dcmread(folder / "IM0"))
    pydicom.dcmwrite(folder / "IM0", bare, implicit_vr=True, little_endian=True)
    assert (folder / "IM0").read_bytes()[:2] == b"\x08\0" and np.array_equal(
        read_image(folder).array[0], HEAD
    )
    assert len(slice_files(folder)) == 6
    (folder / "IM3").write_bytes((folder / "IM3").read_bytes()[:150])
    with pytest.raises(InputError, match="IM3"):
        read_image(folder)


@pytest.mark.parametrize(
    "name, content",
    [
        ("6.dcm.gz", lambda raw: gzip.compress(raw)),
        ("rest.zip", lambda raw: b"PK" + raw[:40]),
        ("IM6", lambda raw: bytes(200) + raw),  # its first bytes are lost
        ("IM6", lambda raw: bytes(132) + raw[132:]),
        ("IM6", lambda raw: raw[140:]),
    ],
)
def test_what_may_be_a_slice_is_not_left_out(tmp_path, name, content):
    folder = scan(tmp_path / "s")
    (folder / name).write_bytes(content((folder / "0.dcm").read_bytes()))
    for road in (read_image, dicom_files, slice_files, _is_one_series):
        with pytest.raises(InputError, match=f"(?s){name}.*out of the folder"):
            road(folder)


def test_what_is_left_out_is_named(tmp_path, capsys):
    folder = scan(tmp_path / "s")
    size = (folder / "0.dcm").stat().st_size
    (folder / "S.seg.nrrd").write_bytes(b"NRRD0004\n" + b"x" * 200 + bytes(size - 209))
    (folder / "note.txt").write_text("n" * size)
    (folder / "big.bin").write_bytes(bytes(2 * size))
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * size)
    assert len(dicom_files(folder)) == 6 and _split_folder(folder)[1] == [
        folder / n for n in ("S.seg.nrrd", "big.bin", "note.txt")
    ]
    for road in (
        read_image,
        lambda f: predict_path(bright(), f, tmp_path / "o.nii.gz", bars=False),
    ):
        with pytest.warns(
            UserWarning, match="s: not DICOM, left out: S.seg.nrrd, big.bin, note.txt"
        ):
            road(folder)


class Bright(torch.nn.Module):
    "A network for pictures of any size."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x[:, :1] - 0.5 + self.weight


def bright():
    return Student(Bright(), Recipe(channels=1, in_channels=1, dims=2, intensity="percentile"))


UNPLACED = dict(ImagePositionPatient=..., ImageOrientationPatient=...)


@pytest.mark.parametrize("name", ["p{}.dcm", "IM_000{}", "p{}.IMA", "1.2.{}"])
def test_a_folder_of_pictures_is_no_series(tmp_path, name):
    names = [name.format(k) for k in range(3)]
    for k, n in enumerate(names):
        one(
            tmp_path / "images" / n,
            HEAD[k],
            modality="DX",
            SeriesInstanceUID=f"1.2.{k}",
            **UNPLACED,
        )
    (tmp_path / "images" / "note.txt").write_text("three patients")
    images, others = list_images(tmp_path / "images")
    assert [p.name for p in images] == sorted(names) and [p.name for p in others] == ["note.txt"]
    assert not _is_one_series(tmp_path / "images")
    done = predict_path(bright(), tmp_path / "images", tmp_path / "out", bars=False)
    assert [p.name for p in done] == [n.removesuffix(".dcm") + ".nii.gz" for n in sorted(names)]
    for k, n in enumerate(names):
        assert np.array_equal(read_image(tmp_path / "images" / n).array[0], HEAD[k])
        assert read_label(tmp_path / "out" / (n.removesuffix(".dcm") + ".nii.gz")).array.shape == (
            8,
            10,
        )


def test_which_folders_are_a_series(tmp_path):
    series = scan(tmp_path / "series")
    assert _is_one_series(series)
    one(series / "pet.dcm", HEAD[0], (-8, -9, 40), modality="PT", SeriesInstanceUID="1.2.4")
    assert _is_one_series(series)  # reading it names the two series
    refused(series, "2 DICOM series")
    assert _is_one_series(one(tmp_path / "slice/x.dcm", HEAD[0]).parent)
    assert not _is_one_series(
        one(tmp_path / "film/x.dcm", HEAD[0], modality="DX", **UNPLACED).parent
    )
    views = tmp_path / "views"  # two views of each patient
    for k in range(4):
        one(
            views / f"{k}.dcm",
            HEAD[k],
            modality="DX",
            SeriesInstanceUID=f"1.2.{k // 2}",
            **UNPLACED,
        )
    assert not _is_one_series(views)
    stripped = scan(tmp_path / "stripped", **UNPLACED)  # slices whose order is lost
    assert _is_one_series(stripped)
    refused(stripped, "no position")
    corners = np.array([[-8, -9, 3.0 * k] for k in range(6)])
    enhanced(tmp_path / "one/p.dcm", HEAD, corners)
    assert _is_one_series(tmp_path / "one")

    def other(s):
        s.SeriesInstanceUID = "1.2.5"

    edit(enhanced(tmp_path / "one/q", HEAD[:3], corners[:3]), other)
    assert not _is_one_series(tmp_path / "one")  # a volume of each patient
    done = predict_path(bright(), tmp_path / "one", tmp_path / "out", bars=False)
    assert [read_label(p).array.shape for p in done] == [(6, 8, 10), (3, 8, 10)]
    assert not _is_one_series(tmp_path / "out")
    (series / "pet.dcm").unlink()
    (series / "7.dcm").write_bytes(b"")
    with pytest.raises(InputError, match="7.dcm is cut short"):
        _is_one_series(series)


def test_a_damaged_picture_does_not_stop_the_others(tmp_path):
    for k in range(3):
        one(
            tmp_path / f"images/p{k}.dcm",
            HEAD[k],
            modality="DX",
            SeriesInstanceUID=f"1.2.{k}",
            **UNPLACED,
        )
    f = tmp_path / "images/p1.dcm"
    f.write_bytes(f.read_bytes()[:300])
    with pytest.raises(PartlyDone, match="(?s)2 of 3.*p1.dcm"):
        predict_path(bright(), f.parent, tmp_path / "out", bars=False)
    assert sorted(p.name for p in (tmp_path / "out").glob("p*")) == ["p0.nii.gz", "p2.nii.gz"]


def test_single_slices(tmp_path):
    p = tmp_path / "x.dcm"
    for tags in (
        dict(SpacingBetweenSlices=-3.0),
        dict(SpacingBetweenSlices=0.0, SliceThickness=3.0),
        dict(SliceThickness=3.0),
        dict(SpacingBetweenSlices=None, SliceThickness=3.0),
    ):
        im = read_image(one(p, HEAD[0], (1, 2, 3), **tags))
        assert (
            im.spacing == (0.5, 0.25)
            and np.array_equal(im.array[0], HEAD[0])
            and np.allclose(
                im.affine, [[-0.25, 0, 0, -1], [0, -0.5, 0, -2], [0, 0, 3, 3], [0, 0, 0, 1]]
            )
        )
        one(tmp_path / "f/x.dcm", HEAD[0], (1, 2, 3), **tags)
        assert read_image(tmp_path / "f").spacing == (3.0, 0.5, 0.25)
    im = read_image(
        one(
            p,
            HEAD[0],
            modality="DX",
            PixelSpacing=...,
            ImagePositionPatient=...,
            ImageOrientationPatient=...,
            ImagerPixelSpacing=[0.15, 0.15],
        )
    )
    assert im.spacing == (0.15, 0.15) and im.affine is None
    assert (
        read_image(
            one(
                p,
                HEAD[0],
                modality="OT",
                PixelSpacing=...,
                ImagePositionPatient=...,
                ImageOrientationPatient=...,
            )
        ).spacing
        is None
    )
    with pytest.raises(InputError, match="(?s)x.dcm.*PixelSpacing.*2 numbers"):
        read_image(one(p, HEAD[0], PixelSpacing=".5"))


def enhanced(path, a, corners, slopes=None, shared_scale=False, turn=AXIAL, groups=True):
    "An enhanced multi-frame file, frames in the order given."
    s = base("MR", pydicom.uid.EnhancedMRImageStorage, "1.2.77")
    s.SeriesInstanceUID = "1.2.3"
    s.NumberOfFrames = len(a)
    put(s, a)

    def group(**fields):
        d = Dataset()
        for k, v in fields.items():
            setattr(d, k, v)
        return Sequence([d])

    shared = Dataset()
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=list(map(float, turn)))
    shared.PixelMeasuresSequence = group(PixelSpacing=[0.5, 0.25], SliceThickness=9.0)
    if shared_scale:
        shared.PixelValueTransformationSequence = group(
            RescaleSlope=2, RescaleIntercept=-7, RescaleType="US"
        )
    frames = []
    for k, c in enumerate(corners):
        f = Dataset()
        f.PlanePositionSequence = group(ImagePositionPatient=list(map(float, c)))
        if slopes is not None:
            f.PixelValueTransformationSequence = group(RescaleSlope=slopes[k], RescaleIntercept=k)
        frames.append(f)
    if groups:
        s.SharedFunctionalGroupsSequence = Sequence([shared])
        s.PerFrameFunctionalGroupsSequence = Sequence(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    s.save_as(path, enforce_file_format=True)
    return path


def test_enhanced_files_are_read_frame_by_frame(tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    corners = np.array([[-8, -9, 3.0 * k] for k in range(6)])
    p = enhanced(tmp_path / "x.dcm", HEAD[order], corners[order])
    im = read_image(p)
    assert np.array_equal(im.array[0], HEAD) and im.spacing == (3.0, 0.5, 0.25)
    for k in range(6):
        assert np.allclose((im.affine @ [0, 0, k, 1])[:3], corners[k] * (-1, -1, 1))
    slopes = [1 + 0.5 * k for k in order]
    im = read_image(enhanced(p, HEAD[order], corners[order], slopes))
    for i, k in enumerate(order):
        assert np.allclose(im.array[0, k], HEAD[k] * slopes[i] + i)
    im = read_image(enhanced(p, HEAD[order], corners[order], shared_scale=True))
    assert im.array.dtype.kind == "i" and np.array_equal(im.array[0], HEAD * 2 - 7)
    folder = tmp_path / "halves"  # two files of one series
    enhanced(folder / "a.dcm", HEAD[:4], corners[:4])
    enhanced(folder / "b.dcm", HEAD[4:], corners[4:])
    assert np.array_equal(read_image(folder).array[0], HEAD)
    refused(
        enhanced(p, HEAD[:4], corners[[0, 1, 1, 2]]),
        "frame 2 of x.dcm and frame 3 of x.dcm",
        "twice",
    )
    refused(
        enhanced(p, HEAD[:4], corners[[0, 1, 2, 4]]),
        "from frame 3 of x.dcm (slice 3) to frame 4 of x.dcm",
        "A frame is missing",
    )

    def refused_frames(*words):
        refused(p, "Split the file", "dcm2niix", *words)
        with pytest.raises(InputError) as e:
            read_image(p)
        assert "folder" not in str(e.value)  # frames cannot be moved

    def echoes(s):
        for k, f in enumerate(s.PerFrameFunctionalGroupsSequence):
            f.MREchoSequence = Sequence([Dataset()])
            f.MREchoSequence[0].EffectiveEchoTime = 2.3 * (1 + k // 2)

    enhanced(p, HEAD[:4], corners[[0, 1, 0, 1]])
    refused_frames("frame 1 of x.dcm and frame 3 of x.dcm", "twice.")
    edit(p, echoes)
    refused_frames("frame 1 of x.dcm and frame 3 of x.dcm", "they differ in EffectiveEchoTime")

    def planes(s):
        del s.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        for f, turn in zip(s.PerFrameFunctionalGroupsSequence, (AXIAL, AXIAL, (1, 0, 0, 0, 0, -1))):
            f.PlaneOrientationSequence = Sequence([Dataset()])
            f.PlaneOrientationSequence[0].ImageOrientationPatient = list(map(float, turn))

    edit(enhanced(p, HEAD[:3], corners[:3]), planes)
    refused_frames("frame 3 of x.dcm", "another orientation")
    enhanced(p, HEAD[:3], [(0, 0, 0), (2, 0, 3), (0, 0, 6)])
    refused_frames("from frame 1 of x.dcm", "sideways")
    refused(enhanced(p, HEAD, corners, groups=False), "x.dcm", "multi-frame", "6 frames")


# What numbers mean


def test_scales(tmp_path):
    p = tmp_path / "s"
    slopes = [0.5, 2.0, 1.25, 1.0, 3.0, 0.1]
    for k in range(6):
        one(p / f"{k}.dcm", HEAD[k], (0, 0, k), RescaleSlope=slopes[k], RescaleIntercept=k)
    assert np.allclose(
        read_image(p).array[0],
        HEAD * np.reshape(slopes, (6, 1, 1)) + np.arange(6).reshape(6, 1, 1),
        atol=1e-3,
    )
    for tags in (dict(RescaleSlope=None, RescaleIntercept=None), dict(RescaleSlope=None), {}):
        assert np.array_equal(read_image(scan(tmp_path / f"e{len(tags)}", **tags)).array[0], HEAD)
    im = read_image(one(tmp_path / "x.dcm", HEAD[0], RescaleSlope=1, RescaleIntercept=-1024))
    assert im.array.dtype == np.int32 and np.array_equal(im.array[0], HEAD[0].astype(int) - 1024)
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.ModalityLUTType = "US"
    table.add_new("LUTData", "OW", (65535 - 3 * np.arange(4096)).astype("<u2").tobytes())
    im = read_image(one(tmp_path / "x.dcm", HEAD[0], ModalityLUTSequence=Sequence([table])))
    assert np.array_equal(im.array[0], 65535 - 3 * HEAD[0].astype(int))


def test_bits_that_are_not_stored_do_not_count(tmp_path):
    noisy = HEAD[0] | (R.integers(0, 16, HEAD[0].shape) << 12).astype(
        np.uint16
    )  # an overlay in the upper bits
    assert np.array_equal(
        read_image(one(tmp_path / "x.dcm", noisy, BitsStored=12, HighBit=11)).array[0], HEAD[0]
    )
    signed = HEAD[0].astype(int) - 2048
    im = read_image(
        one(
            tmp_path / "x.dcm",
            (signed & 0xFFF).astype(np.uint16),
            BitsStored=12,
            HighBit=11,
            PixelRepresentation=1,
        )
    )
    assert np.array_equal(im.array[0], signed)


def test_white_is_zero_is_turned_once_for_the_whole_series(tmp_path):
    kind = dict(PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    assert np.array_equal(read_image(scan(tmp_path / "s", **kind)).array[0], 4095 - HEAD)
    signed = HEAD[0].astype(int) - 2048  # range -2048..2047: the smallest becomes the largest
    im = read_image(
        one(tmp_path / "x.dcm", (signed & 0xFFFF).astype(np.uint16), PixelRepresentation=1, **kind)
    )
    assert np.array_equal(im.array[0], -1 - signed)
    im = read_image(
        one(tmp_path / "x.dcm", HEAD[0], RescaleSlope=1, RescaleIntercept=-1024, **kind)
    )  # numbers with a unit keep it
    assert np.array_equal(im.array[0], HEAD[0].astype(int) - 1024)
    assert np.array_equal(
        read_label(one(tmp_path / "x.dcm", HEAD[0] % 4, **kind)).array, HEAD[0] % 4
    )
    mixed = scan(tmp_path / "m", **kind)
    one(
        mixed / "1.dcm",
        HEAD[3],
        (-8, -9, 9),
        PhotometricInterpretation="MONOCHROME1",
        BitsStored=16,
        HighBit=15,
    )
    refused(mixed, "1.dcm", "number of bits")


WHITE = dict(PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)


@pytest.mark.parametrize(
    "modality, scales, want",
    [
        ("CT", [(1, 0), (2, 0), (3, 0)], [100, 200, 300]),  # HU, with a slope of 1 too
        ("CT", [(1, 0), (1, 0), (1, -1)], [100, 100, 99]),
        ("PT", [(1, 0), (0.5, 0), (2, 0)], [100, 50, 200]),  # BQML, of the tag Units
        ("DX", [(1, 0), (1, 0), (1, 0)], [3995, 3995, 3995]),  # 4095 - 100
        ("DX", [(0.25, 0), (0.25, 0), (0.25, 0)], [998.75] * 3),  # 1023.75 - 25
        ("DX", [(1, 7), (1, 7), (1, 7)], [4002] * 3),  # 7 to 4102: 4109 - 107
        ("DX", [(1, 0), (2, 0), (-1, 0)], [3995, 3895, 4195]),  # -4095 to 8190: one mirror for all
        ("DX", [(1, 0), (0.5, 0), (1, 0)], [3995, 4045, 3995]),  # 0 to 4095
    ],
)
def test_a_unit_and_not_a_number_decides_what_is_mirrored(tmp_path, modality, scales, want):
    for kind in ({}, dict(RescaleType="US")) if modality == "DX" else ({},):
        for k, (slope, shift) in enumerate(scales):
            one(
                tmp_path / f"{k}.dcm",
                np.full((8, 10), 100),
                (0, 0, 3 * k),
                modality=modality,
                RescaleSlope=slope,
                RescaleIntercept=shift,
                **(dict(Units="BQML") if modality == "PT" else kind),
                **WHITE,
            )
        a = read_image(tmp_path).array[0, :, 0, 0]
        assert a.tolist() == want
        assert (a.dtype.kind == "f") == any(float(slope) % 1 for slope, _ in scales)


@pytest.mark.parametrize("kind, want", [("US", 65535 - 700), ("OD", 700)])
def test_the_unit_of_a_table_decides_too(tmp_path, kind, want):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.ModalityLUTType = kind
    table.add_new("LUTData", "OW", (7 * np.arange(4096)).astype("<u2").tobytes())
    im = read_image(
        one(
            tmp_path / "x.dcm",
            np.full((8, 10), 100),
            modality="CR",
            ModalityLUTSequence=Sequence([table]),
            **WHITE,
        )
    )
    assert (im.array == want).all() and im.array.dtype == np.uint16


def test_a_mirrored_scan_has_one_kind_of_number(tmp_path):
    scan(tmp_path / "sign", modality="DX", **WHITE)
    one(
        tmp_path / "sign" / "1.dcm",
        HEAD[3],
        (-8, -9, 9),
        modality="DX",
        PixelRepresentation=1,
        **WHITE,
    )
    refused(tmp_path / "sign", "1.dcm", "another PixelRepresentation")
    scan(tmp_path / "unit", RescaleSlope=1, RescaleIntercept=0, **WHITE)
    one(
        tmp_path / "unit" / "1.dcm", HEAD[3], (-8, -9, 9), **WHITE
    )  # equal numbers, but one is no HU
    refused(tmp_path / "unit", "1.dcm", "no rescale instead of")


@pytest.mark.parametrize(
    "tags",
    [
        dict(RescaleSlope=1, RescaleIntercept=None),
        dict(RescaleSlope=1),
        dict(RescaleIntercept=-1024),
        dict(RescaleSlope=None, RescaleIntercept=-1024),
    ],
)
def test_half_a_scale_is_named(tmp_path, tags):
    scan(tmp_path, RescaleSlope=1, RescaleIntercept=-1024)
    one(tmp_path / "1.dcm", HEAD[3], (-8, -9, 9), **tags)
    refused(
        tmp_path, "1.dcm", "another rescale", "instead of RescaleSlope and RescaleIntercept in HU"
    )


def test_a_ct_that_names_no_unit_has_hounsfield_units(tmp_path):
    scan(tmp_path, RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    one(tmp_path / "1.dcm", HEAD[3], (-8, -9, 9), RescaleSlope=1, RescaleIntercept=-1024)
    assert np.array_equal(read_image(tmp_path).array[0], HEAD.astype(int) - 1024)
    one(
        tmp_path / "1.dcm",
        HEAD[3],
        (-8, -9, 9),
        RescaleSlope=1,
        RescaleIntercept=-1024,
        RescaleType="US",
    )
    refused(
        tmp_path, "1.dcm", "in no known unit instead of RescaleSlope and RescaleIntercept in HU"
    )


def test_colours(tmp_path):
    index = np.arange(80).reshape(8, 10)
    colours = R.integers(0, 256, (256, 3))
    tags = dict(PhotometricInterpretation="PALETTE COLOR")
    for name, c in zip(("Red", "Green", "Blue"), colours.T):
        tags |= {
            f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16],
            f"{name}PaletteColorLookupTableData": (c * 257).astype("<u2").tobytes(),
        }
    p = one(tmp_path / "x.dcm", index, bits=8, modality="US", **tags)
    im = read_image(p)
    assert im.array.dtype == np.uint8 and np.array_equal(
        im.array, colours[index].transpose(2, 0, 1)
    )
    assert np.array_equal(read_label(p).array, index)  # a label keeps its indices
    half = one(
        tmp_path / "half.dcm",
        index,
        bits=8,
        **{k: v for k, v in tags.items() if "BluePaletteColorLookupTableData" != k},
    )
    with pytest.raises(InputError, match="half.dcm"):
        read_image(half)
    s = pydicom.dcmread(p)
    ybr = R.integers(0, 256, (8, 10, 3)).astype(np.uint8)
    s.PhotometricInterpretation = "YBR_FULL"
    s.SamplesPerPixel = 3
    s.PlanarConfiguration = 0
    s.PixelData = ybr.tobytes()
    s.save_as(p, enforce_file_format=True)
    y, b, r = (ybr[..., k].astype(float) for k in range(3))  # C.7.6.3.1.2
    rgb = np.stack(
        [
            y + 1.402 * (r - 128),
            y - 0.344136 * (b - 128) - 0.714136 * (r - 128),
            y + 1.772 * (b - 128),
        ]
    )
    assert np.abs(read_image(p).array - np.clip(rgb, 0, 255)).max() <= 1.5


def palette(path, index, entries, first=0, bits=16, **tags):
    "A picture of indices (H,W) with one grey palette for red, green and blue."
    for name in ("Red", "Green", "Blue"):
        tags |= {
            f"{name}PaletteColorLookupTableDescriptor": [len(entries), first, bits],
            f"{name}PaletteColorLookupTableData": np.asarray(entries).astype("<u2").tobytes(),
        }
    return one(path, index, bits=8, PhotometricInterpretation="PALETTE COLOR", **tags)


@pytest.mark.parametrize(
    "entries, want",
    [
        ((np.arange(256) ** 2).tolist(), 225 >> 8),  # 16 bits, dark ones below 256
        ([k // 2 for k in range(256)], 7),  # 8 bits, whatever the descriptor says
        ([k * 257 for k in range(256)], 15),
    ],
)
def test_the_palette_says_how_many_bits_it_has(tmp_path, entries, want):
    dark = np.full((8, 10), 15)
    bright = dark.copy()
    bright[0, 0] = 255
    for k, index in enumerate((dark, bright)):
        palette(tmp_path / "s" / f"{k}.dcm", index, entries, corner=(0, 0, 3 * k))
    im = read_image(tmp_path / "s")
    assert im.array.dtype == np.uint8 and (im.array[:, :, 4, 4] == want).all()
    assert (
        im.array[:, 1, 0, 0] == (entries[255] >> 8 if max(entries) > 255 else entries[255])
    ).all()


def test_indices_outside_a_palette_take_its_ends(tmp_path):
    p = palette(
        tmp_path / "x.dcm", np.arange(80).reshape(8, 10), [6000 * k for k in range(10)], first=5
    )
    want = [6000 * min(max(i - 5, 0), 9) >> 8 for i in range(80)]  # C.7.6.3.1.5
    assert read_image(p).array[1].ravel().tolist() == want
    wide = palette(
        tmp_path / "wide.dcm", np.zeros((8, 10)), np.arange(150) + 256 * np.arange(150), bits=8
    )
    s = pydicom.dcmread(wide)
    for name in ("Red", "Green", "Blue"):
        setattr(s, f"{name}PaletteColorLookupTableDescriptor", [300, 0, 8])
    s.save_as(wide)
    refused(wide, "wide.dcm", "300 entries", "RGB")


# Contours by the rules of the standard


def square(r0, r1, c0, c1, k=2):
    "A polygon that encloses rows r0 to r1 and columns c0 to c1, ends included."
    return np.array(
        [
            [CORNER[0] + PX * c, CORNER[1] + PX * r, CORNER[2] + STEP * k]
            for r, c in (
                (r0 - 0.5, c0 - 0.5),
                (r0 - 0.5, c1 + 0.5),
                (r1 + 0.5, c1 + 0.5),
                (r1 + 0.5, c0 - 0.5),
            )
        ]
    )


def drawn(*boxes):
    m = np.zeros((D, H, W), np.uint8)
    for value, r0, r1, c0, c1 in boxes:
        m[2, r0 : r1 + 1, c0 : c1 + 1] = value
    return m


A = (3, 14, 4, 16)
HOLE = (6, 11, 7, 13)
ISLAND = (8, 9, 9, 11)
CROSS = (10, 17, 12, 20)
APART = (1, 2, 20, 22)


@pytest.mark.parametrize(
    "boxes, truth",
    [
        ((A,), drawn((1, *A))),
        ((A, A), drawn((1, *A))),  # stored twice: counts once
        ((A, APART), drawn((1, *A), (1, *APART))),
        ((A, CROSS), drawn((1, *A), (1, *CROSS))),  # the overlap belongs to the region
        ((A, HOLE), drawn((1, *A), (0, *HOLE))),
        ((HOLE, A, ISLAND), drawn((1, *A), (0, *HOLE), (1, *ISLAND))),
        ((A, HOLE, HOLE, A), drawn((1, *A), (0, *HOLE))),
        (
            (A, HOLE, (10, 17, 4, 20)),
            drawn((1, *A), (0, *HOLE), (1, 10, 17, 4, 20)),
        ),  # another contour lies over the hole in part
        (
            ((3, 14, 4, 16), (2, 13, 3, 15), HOLE),
            drawn((1, 3, 14, 4, 16), (1, 2, 13, 3, 15), (0, *HOLE)),
        ),  # drawn twice, not quite alike; one hole
    ],
)
def test_closed_planar_contours(tmp_path, boxes, truth):
    like = scan_image(tmp_path)
    for order in (1, -1):
        f = rtstruct(tmp_path / "r.dcm", [("GTV-1", [square(*b) for b in boxes][::order])])
        assert np.array_equal(rtstruct_mask(f, like), truth)
    turned = [
        np.roll(square(*b)[::-1], 2, 0) + 1e-3 for b in boxes
    ]  # another first corner, the other way round
    assert np.array_equal(fill_contours(turned + [square(*b) for b in boxes], like), truth)


@pytest.mark.parametrize("kind", ["CLOSEDPLANAR_XOR", "CLOSED_PLANAR_XOR"])
def test_exclusive_or_is_what_it_says(tmp_path, kind):
    like = scan_image(tmp_path)

    def mask(*boxes):
        return rtstruct_mask(
            rtstruct(tmp_path / "r.dcm", [("GTV-1", [square(*b) for b in boxes])], kind=kind), like
        )

    assert np.array_equal(mask(A, HOLE), drawn((1, *A), (0, *HOLE)))
    assert np.array_equal(mask(A, CROSS), drawn((1, *A)) ^ drawn((1, *CROSS)))
    assert np.array_equal(mask(A, A, HOLE), drawn((1, *HOLE)))  # the standard: twice is out again
    with pytest.raises(InputError, match="encloses no voxel"):
        mask(A, A)


def test_contours_of_two_kinds_are_refused(tmp_path):
    f = rtstruct(tmp_path / "r.dcm", [("GTV-1", [square(*A), square(*HOLE)])])
    s = pydicom.dcmread(f)
    s.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "CLOSEDPLANAR_XOR"
    s.save_as(f)
    with pytest.raises(InputError, match="(?s)r.dcm.*mixes.*CLOSEDPLANAR_XOR"):
        rtstruct_mask(f, scan_image(tmp_path))
    s.ROIContourSequence[0].ContourSequence[1].NumberOfContourPoints = 9
    s.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "CLOSED_PLANAR"
    s.save_as(f)
    with pytest.raises(InputError, match="(?s)r.dcm.*contour 1.*promises 9 points"):
        rtstruct_mask(f, read_image(tmp_path / "ct"))


def test_a_keyhole_leaves_its_hole(tmp_path):
    like = scan_image(tmp_path)
    a = square(*A)
    h = square(*HOLE)
    key = np.r_[
        a, a[:1], h[:1], h[::-1], a[:1]
    ]  # in through a channel without width, around, and out
    assert np.array_equal(
        rtstruct_mask(rtstruct(tmp_path / "r.dcm", [("GTV-1", [key])]), like),
        drawn((1, *A), (0, *HOLE)),
    )


def test_damaged_structures_name_the_file(tmp_path):
    like = scan_image(tmp_path)
    f = tmp_path / "r.dcm"
    for change in ("ROIContourSequence", "StructureSetROISequence"):
        s = pydicom.dcmread(rtstruct(f, [("GTV-1", [square(*A)])]))
        del s[change]
        s.save_as(f)
        with pytest.raises(InputError, match="r.dcm"):
            rtstruct_mask(f, like)
    s = pydicom.dcmread(rtstruct(f, [("GTV-1", [square(*A)])]))
    del s.ROIContourSequence[0].ContourSequence
    s.save_as(f)
    with pytest.raises(InputError, match="encloses no voxel"):
        rtstruct_mask(f, like)
    s.ROIContourSequence[0].ContourSequence = Sequence([Dataset()])
    s.save_as(f)
    with pytest.raises(InputError, match="(?s)r.dcm.*type unknown"):
        rtstruct_mask(f, like)


def test_one_contour_and_two_close_ones():
    a = circle(30, 30, 20, 0)[:, :2]

    def pair(p):
        return (p, polygon2mask((64, 64), p))

    again = circle(30.2, 30, 20, 0, 200)[:, :2]  # .2 pixels aside: they cross
    assert _is_same_contour(pair(a), pair(np.roll(a, 9, 0)[::-1]))
    assert _is_same_contour(pair(a), pair(again))
    assert _is_same_contour(pair(a), pair(a[::2]))  # inside, but they meet
    for thin in (0.1, 0.3, 0.45, 0.55, 1.5):  # a wall is a wall
        wall = circle(30, 30, 20 - thin, 0)[:, :2]
        assert not _is_same_contour(pair(a), pair(wall))
        for order in (1, -1):
            both = _join_polygons([pair(a), pair(wall)][::order])
            assert np.array_equal(both, pair(a)[1] & ~pair(wall)[1])


@pytest.mark.parametrize(
    "with_outer, with_hole, truth",
    [
        (False, False, drawn((1, *A), (0, *HOLE))),
        (True, False, drawn((1, *A))),  # joined: the whole
        (True, True, drawn((1, *A), (0, *HOLE))),
        (False, True, drawn((1, *A))),
    ],
)  # a region of its own
@pytest.mark.parametrize("off", [0, 0.02, 0.2])  # pixels: drawn again, not quite alike
def test_a_keyhole_beside_its_outlines(tmp_path, with_outer, with_hole, off, truth):
    like = scan_image(tmp_path)
    a = square(*A)
    h = square(*HOLE)
    key = np.r_[a, a[:1], h[:1], h[::-1], a[:1]]
    again = np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]]) * off * PX
    contours = [key] + [a + again] * with_outer + [h] * with_hole
    for order in (1, -1):
        assert np.array_equal(fill_contours(contours[::order], like), truth)


def test_a_hole_may_touch_the_outline(tmp_path):
    hole = (6, 11, A[2], 13)  # its left side lies on that of A
    found = fill_contours([square(*A), square(*hole)], scan_image(tmp_path))
    assert np.array_equal(found, drawn((1, *A), (0, *hole)))


# Segments

MASK = np.zeros((D, H, W), np.uint8)
MASK[2:5, 5:9, 7:11] = 1
MASK[2, 5, 7:18] = 1  # no symmetry


def edit(f, change):
    s = pydicom.dcmread(f)
    change(s)
    s.save_as(f)
    return f


def test_segment_numbers_in_shared_groups_or_nowhere(tmp_path):
    like = scan_image(tmp_path)
    f = tmp_path / "s.dcm"

    def share(s):
        s.SharedFunctionalGroupsSequence[
            0
        ].SegmentIdentificationSequence = s.PerFrameFunctionalGroupsSequence[
            0
        ].SegmentIdentificationSequence
        forget(s)

    def forget(s):
        for p in s.PerFrameFunctionalGroupsSequence:
            del p.SegmentIdentificationSequence

    assert np.array_equal(seg_mask(edit(seg(f, MASK), share), like), MASK)
    with pytest.raises(InputError, match="(?s)s.dcm.*frame 1 does not say which segment"):
        seg_mask(edit(seg(f, MASK), forget), like)

    def no_place(s):
        for p in s.PerFrameFunctionalGroupsSequence:
            del p.PlanePositionSequence

    with pytest.raises(InputError, match="(?s)s.dcm.*does not say where it lies"):
        seg_mask(edit(seg(f, MASK), no_place), like)


def test_overlapping_segments_and_label_maps(tmp_path):
    like = scan_image(tmp_path)
    f = tmp_path / "s.dcm"
    other = np.zeros_like(MASK)
    other[2:5, 7:12, 9:14] = 1  # overlaps the first

    def two(s):
        g = Dataset()
        g.SegmentNumber = 2
        g.SegmentLabel = "Node"
        s.SegmentSequence.append(g)
        frames = []
        for k in range(2, 5):
            p = Dataset()
            p.PlanePositionSequence = s.PerFrameFunctionalGroupsSequence[
                k - 2
            ].PlanePositionSequence
            n = Dataset()
            n.ReferencedSegmentNumber = 2
            p.SegmentIdentificationSequence = Sequence([n])
            frames.append(p)
        s.PerFrameFunctionalGroupsSequence.extend(frames)
        s.NumberOfFrames = 6
        s.PixelData = np.packbits(
            np.concatenate([MASK[2:5], other[2:5]]).ravel(), bitorder="little"
        ).tobytes()

    seg(f, MASK)
    edit(f, two)
    assert np.array_equal(seg_mask(f, like), MASK) and np.array_equal(
        seg_mask(f, like, "node"), other
    )
    both = np.where(other > 0, 2, MASK)

    def labelmap(s):
        g = Dataset()
        g.SegmentNumber = 2
        g.SegmentLabel = "Node"
        s.SegmentSequence.append(g)
        s.SegmentationType = "LABELMAP"
        for p in s.PerFrameFunctionalGroupsSequence:
            del p.SegmentIdentificationSequence

    edit(seg(f, both, bits=8), labelmap)
    assert np.array_equal(seg_mask(f, like), both == 1) and np.array_equal(
        seg_mask(f, like, "node"), both == 2
    )


@pytest.mark.parametrize("flip", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_segments_counted_from_another_corner(tmp_path, flip):
    like = scan_image(tmp_path)
    f = tmp_path / "s.dcm"

    def turn(s):
        s.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [
            flip[1],
            0,
            0,
            0,
            flip[0],
            0,
        ]
        for p in s.PerFrameFunctionalGroupsSequence:
            x, y, z = p.PlanePositionSequence[0].ImagePositionPatient
            p.PlanePositionSequence[0].ImagePositionPatient = [
                x + PX * (W - 1) * (flip[1] < 0),
                y + PX * (H - 1) * (flip[0] < 0),
                z,
            ]

    edit(seg(f, MASK[:, :: flip[0], :: flip[1]]), turn)
    assert np.array_equal(seg_mask(f, like), MASK)


def test_sagittal_frames_on_an_axial_scan(tmp_path):
    like = scan_image(tmp_path)
    f = tmp_path / "s.dcm"
    sagittal = MASK.transpose(2, 0, 1)  # (W, D, H): rows along the body, columns to the back
    columns = np.flatnonzero(sagittal.any((1, 2)))
    seg(f, sagittal)

    def turn(s):
        shared = s.SharedFunctionalGroupsSequence[0]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 0, 0, 1]
        shared.PixelMeasuresSequence[0].PixelSpacing = [STEP, PX]
        for c, p in zip(columns, s.PerFrameFunctionalGroupsSequence):
            p.PlanePositionSequence[0].ImagePositionPatient = [
                CORNER[0] + PX * int(c),
                CORNER[1],
                CORNER[2],
            ]

    edit(f, turn)
    assert np.array_equal(seg_mask(f, like), MASK)


def test_a_segment_file_is_a_label_of_its_own(tmp_path):
    whole = MASK.copy()
    whole[:, 0, 0] = 1  # a frame for every slice
    y = read_label(seg(tmp_path / "s.dcm", whole))
    assert np.array_equal(y.array, whole)
    turned = Image(
        whole[None, :, ::-1],
        (STEP, PX, PX),
        y.affine @ np.array([[1, 0, 0, 0], [0, -1, 0, H - 1], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    )
    assert np.array_equal(lay_on(y, turned), whole[:, ::-1])
