"""DICOM SEG: the class of a voxel is the number of its segment, on whatever slices are stored."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset
from test_clinical import (
    CORNER,
    PX,
    STEP,
    D,
    H,
    W,
    base,
    circle,
    hu,
    put,
    rtstruct,
    scan_image,
    series,
)

from unpaired_kd.core import InputError
from unpaired_kd.data.check import check_data
from unpaired_kd.data.collections import Collection
from unpaired_kd.data.formats.geometry import lay_on
from unpaired_kd.data.formats.images import Image, read_image, read_label
from unpaired_kd.data.formats.nifti import NiftiPlace
from unpaired_kd.data.formats.regions import rtstruct_mask, seg_mask
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.data.sets.nsclc import read_nsclc

pytestmark = pytest.mark.filterwarnings("ignore:.*has no groups.csv")
FRAME = "1.2.9"
NAMES = {1: ("Liver", "Organ"), 2: ("Tumour", "Lesion"), 7: ("Node", "Lesion")}
TRUTH = np.zeros((D, H, W), np.uint8)
TRUTH[1:4, 3:9, 4:11] = 1
TRUTH[2, 5, 7:18] = 2  # on a slice with segment 1, and no symmetry
TRUTH[4, 12:15, 2:6] = 7  # alone on its slice
STORED = {"BINARY": (1, 1), "FRACTIONAL": (8, 200), "LABELMAP": (8, 1)}  # bits; one


def item(**tags):
    out = Dataset()
    for k, v in tags.items():
        setattr(out, k, v)
    return out


def corner_of(k):
    return [*CORNER[:2], CORNER[2] + STEP * int(k)]


def write(path, frames, kind="BINARY", names=NAMES, turn=(1, 0, 0, 0, 1, 0), size=(PX, PX), **tags):
    "A SEG of (number of the segment or None, corner, picture) for each frame."
    bits, _ = STORED[kind]
    s = base("SEG", pydicom.uid.SegmentationStorage, "1.2.5", FRAME)
    s.SegmentationType = kind
    s.MaximumFractionalValue = 200
    s.NumberOfFrames = len(frames)
    s.SegmentSequence = [
        item(SegmentNumber=k, SegmentLabel=a, SegmentDescription=b) for k, (a, b) in names.items()
    ]
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=list(turn))],
        PixelMeasuresSequence=[item(PixelSpacing=list(size))],
    )
    s.SharedFunctionalGroupsSequence = [shared]
    s.PerFrameFunctionalGroupsSequence = []
    for number, corner, _ in frames:
        group = item()
        if corner is not None:
            group.PlanePositionSequence = [item(ImagePositionPatient=list(map(float, corner)))]
        if number is not None:
            group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=number)]
        s.PerFrameFunctionalGroupsSequence.append(group)
    put(s, np.stack([picture for *_, picture in frames]), bits)
    for k, v in tags.items():
        setattr(s, k, v)
    path.parent.mkdir(parents=True, exist_ok=True)
    s.save_as(path, enforce_file_format=True)
    return path


def frames_of(label, kind="BINARY", every=False):
    "The frames of a label map, last slice first; `every`: those without a voxel, too."
    if kind == "LABELMAP":
        return [(None, corner_of(k), label[k]) for k in range(D)[::-1] if every or label[k].any()]
    full = STORED[kind][1]
    return [
        (number, corner_of(k), full * (label[k] == number).astype(np.uint8))
        for number in (7, 1, 2)
        for k in range(D)[::-1]
        if every or (label[k] == number).any()
    ]


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("every", [False, True])
def test_the_class_is_the_number_of_the_segment(tmp_path, kind, every):
    image = scan_image(tmp_path)
    y = read_label(write(tmp_path / "s.dcm", frames_of(TRUTH, kind, every), kind))
    stored = range(D) if every else (1, 2, 3, 4)
    assert y.array.dtype == np.uint8 and np.array_equal(y.array, TRUTH[list(stored)])
    assert np.array_equal(lay_on(y, image), TRUTH)
    for number, (name, _) in NAMES.items():
        assert np.array_equal(seg_mask(tmp_path / "s.dcm", image, name), TRUTH == number)


@pytest.mark.parametrize("slices, even", [((0, 1, 4), False), ((0, 2, 4), True), ((3,), True)])
def test_slices_that_are_left_out(tmp_path, slices, even):
    label = np.zeros_like(TRUTH)
    for k in slices:
        label[k, 3:6, 4 : 9 + k] = 2
    y = read_label(write(tmp_path / "s.dcm", frames_of(label)))
    assert (y.affine is not None) == even and len(y.array) == len(slices)
    assert np.array_equal(lay_on(y, scan_image(tmp_path)), label)


@pytest.mark.parametrize("kind", STORED)
def test_segments_in_a_collection(tmp_path, kind, capsys):
    for p in (1, 2):
        series(tmp_path / f"data/images/p{p}", np.random.default_rng(p).integers(0, 900, (D, H, W)))
    write(tmp_path / "data/labels/p1.dcm", frames_of(TRUTH, kind), kind)
    write(tmp_path / "data/labels/p2/seg.dcm", frames_of(TRUTH[:, ::-1], kind), kind)
    c = Collection.from_folders(tmp_path / "data", intensity="percentile", label_kind="semantic")
    assert len(c.classes) == 8 and np.array_equal(c[0].label.numpy(), TRUTH)
    assert np.array_equal(c[1].label.numpy(), TRUTH[:, ::-1])
    check_data(tmp_path / "data")
    assert "1-2, 7" in capsys.readouterr().out


def test_segments_on_a_nifti_and_on_one_slice(tmp_path):
    image = scan_image(tmp_path)
    y = read_label(write(tmp_path / "s.dcm", frames_of(TRUTH)))
    image.array = image.array[:, :, ::-1]
    image.affine = image.affine.copy()
    image.affine[:3, 3] += image.affine[:3, 1] * (H - 1)  # rows upwards, as converters do
    image.affine[:3, 1] *= -1
    write_image(tmp_path / "x.nii.gz", image)
    assert np.array_equal(lay_on(y, read_image(tmp_path / "x.nii.gz")), TRUTH[:, ::-1])
    one = read_image(sorted((tmp_path / "ct").iterdir())[4])
    y = read_label(write(tmp_path / "s.dcm", frames_of(TRUTH)[:1]))
    assert one.array.shape == (1, H, W)
    assert np.array_equal(lay_on(y, one), TRUTH[4] * (TRUTH[4] == 7))


def test_segments_on_a_nifti_of_two_places(tmp_path):
    image = scan_image(tmp_path)
    y = read_label(write(tmp_path / "s.dcm", frames_of(TRUTH)))
    template = image.affine.copy()
    upwards = image.affine.copy()
    template[1, 3] += 30  # mm: another place
    upwards[:3, 3] += upwards[:3, 1] * (H - 1)  # the same box from below
    upwards[:3, 1] *= -1

    def stored(sform, qform):
        header = NiftiPlace({}, image.spacing, sform, qform)
        return Image(image.array, image.spacing, sform, "x.nii.gz", header)

    assert np.array_equal(lay_on(y, stored(template, image.affine)), TRUTH)
    assert np.array_equal(lay_on(y, stored(template, upwards)), TRUTH[:, ::-1])
    refused(lambda: lay_on(y, stored(image.affine, upwards)), "in two ways", "qform")


def test_sagittal_segments_on_an_axial_scan(tmp_path):
    found = [(k, c) for k in NAMES for c in range(W) if (TRUTH[:, :, c] == k).any()]
    frames = [(k, (CORNER[0] + PX * c, *CORNER[1:]), 1 * (TRUTH[:, :, c] == k)) for k, c in found]
    f = write(tmp_path / "s.dcm", frames, turn=(0, 1, 0, 0, 0, 1), size=(STEP, PX))
    assert np.array_equal(lay_on(read_label(f), scan_image(tmp_path)), TRUTH)


def test_half_or_less_of_a_fraction_is_background(tmp_path):
    picture = np.zeros((H, W), np.uint8)
    picture[0, :5] = 1, 99, 100, 101, 200
    y = read_label(write(tmp_path / "s.dcm", [(2, CORNER, picture)], "FRACTIONAL"))
    assert y.array[0, 0, :6].tolist() == [0, 0, 0, 2, 2, 0]


def test_the_background_of_a_label_map_may_have_any_number(tmp_path):
    named = {**NAMES, 255: ("Background", "")}
    frames = frames_of(np.where(TRUTH > 0, TRUTH, 255), "LABELMAP", every=True)
    f = write(tmp_path / "s.dcm", frames, "LABELMAP", named, PixelPaddingValue=255)
    assert np.array_equal(read_label(f).array, TRUTH)


def refused(read, *words):
    with pytest.raises(InputError) as e:
        read()
    for word in words:
        assert word in str(e.value), f"{word!r} is not in: {e.value}"


def test_what_segments_do_not_say_is_refused(tmp_path):
    f = tmp_path / "s.dcm"
    image = scan_image(tmp_path)

    def read(frames, *a, **kw):
        return read_label(write(f, frames, *a, **kw))

    good = frames_of(TRUTH)
    over = good + [(2, corner_of(1), TRUTH[1])]
    refused(lambda: read(over), str(f), "1 (Liver)", "2 (Tumour)", "overlap in 42 pixels")
    assert np.array_equal(seg_mask(f, image, "liver"), TRUTH == 1)  # each alone is sound
    refused(lambda: read([*good[:-1], (None, *good[-1][1:])]), str(f), "frame 5 does not say which")
    refused(lambda: read([*good[:-1], (3, *good[-1][1:])]), str(f), "segment 3", "[1, 2, 7]")
    no_place = [*good[:-1], (1, None, good[-1][2])]
    refused(lambda: read(no_place), str(f), "does not say where it lies")
    odd = np.where(TRUTH == 1, 5, TRUTH)
    refused(lambda: read(frames_of(odd, "LABELMAP"), "LABELMAP"), str(f), "segment 5")
    two = tmp_path / "two"
    for name in "ab":
        write(two / f"{name}.dcm", good)
    refused(lambda: read_label(two), str(two), "2 files", "Give that file")


@pytest.mark.parametrize("move", [(PX, 0, 0), (0, 0, STEP / 2), (0, 0, 9 * STEP), (0.2 * PX, 0, 0)])
def test_slices_of_another_scan_are_refused(tmp_path, move):
    frames = [(k, np.add(corner, move), a) for k, corner, a in frames_of(TRUTH)]
    f = write(tmp_path / "s.dcm", frames)
    image = scan_image(tmp_path)
    for read in (lambda: lay_on(read_label(f), image), lambda: seg_mask(f, image, "node")):
        refused(read, str(f), "does not lie on a slice", str(tmp_path / "ct"))


def test_two_slices_for_one_of_the_image_are_refused(tmp_path):
    frames = frames_of(TRUTH)
    number, corner, picture = frames[-1]
    frames[-1] = number, np.add(corner, (0.05 * PX, 0, 0)), picture  # no longer that of segment 1
    f = write(tmp_path / "s.dcm", frames)
    assert len(read_label(f).array) == 5  # for four slices
    image = scan_image(tmp_path)
    refused(lambda: lay_on(read_label(f), image), str(f), "or another one lies there")


def test_a_name_means_one_segment(tmp_path):
    f = write(tmp_path / "s.dcm", frames_of(TRUTH))
    image = scan_image(tmp_path)
    refused(lambda: seg_mask(f, image, "lesion"), str(f), "2 segments called 'lesion'", "2, 7")
    names = {1: ("Liver", "Tumour"), 2: ("Tumour", "Organ"), 7: ("Node", "")}
    write(f, frames_of(TRUTH), names=names)
    assert np.array_equal(seg_mask(f, image, " tumour "), TRUTH == 2)  # labels before descriptions
    assert np.array_equal(seg_mask(f, image, "organ"), TRUTH == 2)
    refused(lambda: seg_mask(f, image, ""), "unknown segment")


def test_one_frame_without_a_place_goes_by_its_shape(tmp_path):
    f = write(tmp_path / "s.dcm", [(2, None, 1 * (TRUTH[2] == 2))])
    y = read_label(f)
    assert y.affine is None and y.header.planes == () and y.array.shape == (1, H, W)
    image = scan_image(tmp_path)
    one = read_image(sorted((tmp_path / "ct").iterdir())[2])
    assert np.array_equal(lay_on(y, one), 2 * (TRUTH[2] == 2))
    refused(lambda: seg_mask(f, image, "tumour"), str(f), f"has shape (1, {H}, {W})")


# The frame of reference


def test_a_label_of_another_frame_of_reference_is_refused(tmp_path):
    image = scan_image(tmp_path)
    f = tmp_path / "s.dcm"
    ball = [("GTV-1", [circle(0, -10, 8, CORNER[2] + STEP * 2)])]
    drawn = rtstruct_mask(rtstruct(tmp_path / "r.dcm", ball), image)
    for frame, sound in ((FRAME, True), ("", True), ("1.2.8", False)):
        write(f, frames_of(TRUTH), FrameOfReferenceUID=frame)
        rtstruct(tmp_path / "r.dcm", ball, frame)
        series(tmp_path / f"y{frame}", TRUTH, uid="1.2.4", frame=frame)
        tries = {
            lambda: lay_on(read_label(f), image): TRUTH,
            lambda: seg_mask(f, image, "node"): TRUTH == 7,
            lambda: rtstruct_mask(tmp_path / "r.dcm", image): drawn,
            lambda y=tmp_path / f"y{frame}": lay_on(read_label(y), image): TRUTH,
        }
        for read, truth in tries.items():
            if sound:
                assert np.array_equal(read(), truth)
            else:
                refused(read, str(tmp_path), "another frame of reference (1.2.8)", "(1.2.9)")
    write_image(tmp_path / "x.nii.gz", image)  # NIfTI names no frame
    nifti = read_image(tmp_path / "x.nii.gz")
    assert np.array_equal(lay_on(read_label(f), nifti), TRUTH)
    refused(lambda: seg_mask(f, nifti, "node", frame=FRAME), "another frame of reference")
    refused(lambda: rtstruct_mask(tmp_path / "r.dcm", nifti, frame=FRAME), "another frame")


# Two series in one folder


@pytest.mark.parametrize("name", ["0.dcm", "z.dcm"])  # sorted before the CT, after it
@pytest.mark.parametrize("labels", ["rtstruct", "seg"])
def test_a_folder_of_two_series_is_named(tmp_path, name, labels):
    ct = series(tmp_path / "n/p1/ct", hu(), offset=1024, modality="CT")
    if labels == "seg":
        write(ct / name, frames_of(TRUTH), FrameOfReferenceUID=FRAME)
    else:
        rtstruct(ct / name, [("GTV-1", [circle(0, -10, 8, CORNER[2] + STEP * 2)])])
    kind = labels.upper()
    refused(
        lambda: read_nsclc(tmp_path / "n", labels),
        str(tmp_path / "n/p1"),
        f"{ct} holds CT ({D} files), {kind} (1 file): put each series into its own folder",
    )
    (tmp_path / "n/p1/label").mkdir()
    (ct / name).rename(tmp_path / "n/p1/label" / name)
    roi = "node" if labels == "seg" else "GTV-1"
    label = read_nsclc(tmp_path / "n", labels, roi).native(0).label
    if labels == "seg":
        assert np.array_equal(label, TRUTH == 7)
    else:
        assert label[2].any() and not label[3].any()
