"""Clinical scans: faults that are named, labels that stay with their slices, contours in
millimetres, patients that stay together, folders that are whole or absent."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset

from unpaired_kd.core import InputError, read_json, torch_rng
from unpaired_kd.data.augment import Augment
from unpaired_kd.data.collections import Collection, open_collection
from unpaired_kd.data.formats.dicom import read_header
from unpaired_kd.data.formats.images import Image, read_image
from unpaired_kd.data.formats.regions import fill_contours, rtstruct_mask, seg_mask
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.data.intensity import (
    HistogramStandard,
    check_hu,
    measure_landmarks,
    standardise,
    window_hu,
)
from unpaired_kd.data.sets.chaos import (
    CHAOS_CLASSES,
    greys_to_classes,
    list_chaos_scans,
    read_chaos,
    read_chaos_label,
    slice_files,
)
from unpaired_kd.data.sets.clinical import _NOTE, Scan, prepare_clinical
from unpaired_kd.data.sets.nsclc import NSCLC_FAULTS, list_nsclc_scans, mask_lungs, read_nsclc
from unpaired_kd.data.splits import fold_patients

D = 6
H = 20
W = 24
STEP = 5.0
PX = 2.0
CORNER = (-20.0, -30.0, 100.0)
GREYS = np.array([0, 63, 126, 189, 252], np.uint8)


def mr(seed, gain=1.0):
    r = np.random.default_rng(seed)
    v = (
        np.where(np.hypot(*np.mgrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]) < 0.8, 200, 5)
        + r.integers(0, 60, (D, H, W))
        + 30 * np.arange(D)[:, None, None]
    )
    return (gain * v).astype(np.int16)


def organs(seed=0):
    y = np.zeros((D, H, W), np.uint8)
    y[3:, 4:10, 3:9] = 1
    y[:4, 11:15, 5:8] = 2
    y[1:4, 11:15, 15:19] = 3
    y[4:, 6:9, 17:20] = 4
    y[0, 0, seed] = 1
    return y


def base(modality, storage, uid, frame="1.2.9"):
    s = Dataset()
    s.file_meta = FileMetaDataset()
    s.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    s.file_meta.MediaStorageSOPClassUID = storage
    s.file_meta.MediaStorageSOPInstanceUID = uid
    s.Modality = modality
    s.SOPClassUID = storage
    s.SOPInstanceUID = uid
    s.FrameOfReferenceUID = frame
    return s


def put(s, a, bits=16):
    s.Rows, s.Columns, s.SamplesPerPixel, s.PhotometricInterpretation = (
        *a.shape[-2:],
        1,
        "MONOCHROME2",
    )
    s.BitsAllocated = bits
    s.BitsStored = bits
    s.HighBit = bits - 1
    s.PixelRepresentation = 0
    s.PixelData = {
        1: lambda: np.packbits(a.ravel(), bitorder="little"),
        8: lambda: a.astype(np.uint8),
        16: lambda: a.astype("<u2"),
    }[bits]().tobytes()
    if len(s.PixelData) % 2:
        s.PixelData += b"\0"
    return s


def series(
    folder, volume, names=None, offset=0, modality="MR", uid="1.2.3", frame="1.2.9", **change
):
    folder.mkdir(parents=True)
    for k, plane in enumerate(volume):
        s = base(modality, pydicom.uid.CTImageStorage, f"{uid}.{k + 1}", frame)
        s.SeriesInstanceUID = uid
        s.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        s.PixelSpacing = [PX, PX]
        s.ImagePositionPatient = [*CORNER[:2], CORNER[2] + STEP * k]
        s.RescaleSlope = 1
        s.RescaleIntercept = -offset
        if k == 1:
            for tag, v in change.items():
                setattr(s, tag, v)
        put(s, plane + offset).save_as(
            folder / f"{names[k] if names else f'IMG-{k + 1:03d}'}.dcm", enforce_file_format=True
        )
    return folder


def ground(folder, label, names=None, values=GREYS):
    folder.mkdir(parents=True)
    for k, plane in enumerate(label):
        Pillow.fromarray(values[plane]).save(
            folder / f"{names[k] if names else f'gt_{k + 1:03d}'}.png"
        )
    return folder


INNER = {
    "t1in": "T1DUAL/DICOM_anon/InPhase",
    "t1out": "T1DUAL/DICOM_anon/OutPhase",
    "t2": "T2SPIR/DICOM_anon",
}


def chaos(root, n=4, sequences=("t1in", "t2"), down=()):
    for p in range(1, n + 1):
        order = [D - k if p in down else k + 1 for k in range(D)]
        for s in sequences:
            series(root / f"MR/{p}" / INNER[s], mr(p, p), [f"IMG-0004-{v:05d}" for v in order])
            g = root / f"MR/{p}" / INNER[s].split("/")[0] / "Ground"
            if not g.exists():
                ground(g, organs(p), [f"s{v:02d}" for v in order])
    return root


def circle(x, y, radius, z, n=80):
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.c_[x + radius * np.cos(t), y + radius * np.sin(t), np.full(n, z)]


def rtstruct(path, rois, frame="1.2.9", kind="CLOSED_PLANAR"):
    s = base("RTSTRUCT", pydicom.uid.RTStructureSetStorage, "1.2.4", frame)
    s.StructureSetROISequence = []
    s.ROIContourSequence = []
    for k, (name, contours) in enumerate(rois, 1):
        r = Dataset()
        c = Dataset()
        r.ROINumber = k
        r.ROIName = name
        r.ReferencedFrameOfReferenceUID = frame
        c.ReferencedROINumber = k
        c.ContourSequence = []
        for p in contours:
            q = Dataset()
            q.ContourGeometricType = kind
            q.NumberOfContourPoints = len(p)
            q.ContourData = [f"{v:.3f}" for v in p.ravel()]
            c.ContourSequence.append(q)
        s.StructureSetROISequence.append(r)
        s.ROIContourSequence.append(c)
    path.parent.mkdir(parents=True, exist_ok=True)
    s.save_as(path, enforce_file_format=True)
    return path


def seg(path, mask, label="GTV-1", corner=CORNER, spacing=PX, frame="1.2.9", bits=1, shared=True):
    s = base("SEG", pydicom.uid.SegmentationStorage, "1.2.5", frame)
    g = Dataset()
    common = Dataset()
    turn = Dataset()
    measure = Dataset()
    g.SegmentNumber = 1
    g.SegmentLabel = label
    g.SegmentDescription = "Neoplasm"
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measure.PixelSpacing = [spacing] * 2
    s.SegmentationType = "BINARY" if bits == 1 else "FRACTIONAL"
    s.SegmentSequence = [g]
    s.PerFrameFunctionalGroupsSequence = []
    slices = np.flatnonzero(mask.any((1, 2)))
    if shared:
        common.PlaneOrientationSequence = [turn]
        common.PixelMeasuresSequence = [measure]
    s.SharedFunctionalGroupsSequence = [common]
    s.MaximumFractionalValue = 200
    for k in slices:
        f = Dataset()
        at = Dataset()
        which = Dataset()
        at.ImagePositionPatient = [*corner[:2], corner[2] + STEP * int(k)]
        which.ReferencedSegmentNumber = 1
        f.PlanePositionSequence = [at]
        f.SegmentIdentificationSequence = [which]
        if not shared:
            f.PlaneOrientationSequence = [turn]
            f.PixelMeasuresSequence = [measure]
        s.PerFrameFunctionalGroupsSequence.append(f)
    s.NumberOfFrames = len(slices)
    path.parent.mkdir(parents=True, exist_ok=True)
    put(s, mask[slices], bits).save_as(path, enforce_file_format=True)
    return path


def hu(seed=0):
    return np.random.default_rng(seed).integers(-1000, 400, (D, H, W)).astype(np.int16)


def scan_image(tmp_path):
    return read_image(series(tmp_path / "ct", hu(), offset=1024, modality="CT"))


# Hounsfield units and lungs


def test_window_is_linear_between_its_ends_and_keeps_the_shape():
    v = np.array([[-3024, -1000, -250], [125, 500, 3000]], np.int16)
    assert (
        np.allclose(window_hu(v), [[0, 0, 0.5], [0.75, 1, 1]]) and window_hu(v).dtype == np.float32
    )
    assert np.allclose(window_hu(v, -160, 240)[1], [0.7125, 1, 1])


@pytest.mark.parametrize(
    "volume, match",
    [
        (np.arange(256, dtype=np.uint8), "to_unit"),
        (np.linspace(0, 1, 9), "windowed"),
        (np.linspace(-1, 1, 9), "windowed"),
        (np.arange(0, 2000), "RescaleSlope"),
        (np.arange(0, 2000, dtype=np.uint16), "RescaleSlope"),
        (np.full(4, -1000), "nothing but air"),
        (np.array([-1000, np.nan]), "NaN"),
        (np.array([-1000, np.inf]), "NaN"),
        (np.zeros(0), "shape"),
        (np.zeros(3, bool), "bool"),
    ],
)
def test_numbers_that_are_no_hounsfield_units_are_refused(volume, match):
    with pytest.raises(InputError, match=f"(?s)scan7.*{match}"):
        check_hu(volume, "scan7")
    with pytest.raises(InputError):
        window_hu(volume)


def test_lungs_are_the_air_inside():
    v = np.full((8, 30, 40), 40)
    v[:, :3], v[:, -3:], v[:, :, :3], v[:, :, -3:] = (-1000,) * 4
    left = np.zeros(v.shape, bool)
    right = np.zeros(v.shape, bool)
    left[1:6, 8:20, 7:16] = True
    right[1:6, 8:20, 22:33] = True
    v[left | right] = -800
    v[7, 22:24, 10:12] = -700  # a bubble
    assert np.array_equal(mask_lungs(v), left | right)
    assert np.array_equal(mask_lungs(v, keep=1), right)  # the larger one
    joined = v.copy()
    joined[
        3, 10, 16:22
    ] = -900  # the windpipe joins both: one piece, and the bubble is not the second lung
    assert np.array_equal(mask_lungs(joined), mask_lungs(joined, keep=1))
    assert mask_lungs(joined)[7].sum() == 0 and mask_lungs(joined, least=0)[7].sum() == 4
    solid = np.where(v == 40, 40, -100)
    assert not mask_lungs(solid).any()
    with pytest.raises(InputError, match=r"\(D,H,W\)"):
        mask_lungs(v[0])


# The common scale of MR


def test_gain_and_offset_cannot_be_seen_afterwards():
    s = HistogramStandard.fit([mr(k) for k in range(3)])
    v = mr(9)
    assert np.allclose(s.apply(v), s.apply(4.2 * v.astype(float) - 77), atol=1e-6)
    assert (
        s.apply(v).dtype == np.float32
        and s.apply(v).shape == v.shape
        and 0 <= s.apply(v).min() <= s.apply(v).max() <= 1
    )


def test_landmarks_go_to_their_places_and_order_is_kept():
    s = HistogramStandard.fit([mr(k, 1 + k) for k in range(4)])
    v = mr(7, 3)
    m = measure_landmarks(v)
    y = s.apply(v).astype(float) * s.clip
    assert len(m) == 12 and (np.diff(m) >= 0).all()
    flat = np.argsort(v, axis=None, kind="stable")
    assert (np.diff(y.ravel()[flat]) >= 0).all()
    again = HistogramStandard.fit([y] * 3, clip=s.clip)
    assert np.allclose(
        again.landmarks[1:], s.landmarks[1:], atol=8
    )  # a standardised volume is at home
    assert (
        s.volumes == 4
        and s.landmarks[0] == 0
        and abs(s.landmarks[-1] - 1000) < 1e-9
        and s.clip > 900
    )


def test_the_fit_is_the_mean_over_volumes_in_any_order():
    a, b, c = (HistogramStandard.fit([mr(k)] * 3) for k in (1, 2, 3))
    s = HistogramStandard.fit(mr(k) for k in (3, 1, 2))  # an iterator
    assert np.allclose(
        s.landmarks, np.mean([a.landmarks, b.landmarks, c.landmarks], 0)
    ) and np.isclose(s.clip, np.mean([a.clip, b.clip, c.clip]))
    assert HistogramStandard.fit([mr(1)] * 3, clip=1136).clip == 1136
    assert HistogramStandard.fit([mr(1)] * 3, clip=500).apply(mr(1)).max() == 1


def test_the_scale_is_plain_data():
    s = HistogramStandard.fit([mr(k) for k in range(3)])
    t = HistogramStandard.from_dict(json.loads(json.dumps(s.to_dict())))
    assert t == s and np.array_equal(t.apply(mr(5)), s.apply(mr(5)))
    for change in (
        dict(landmarks=[0, 1]),
        dict(clip=0),
        dict(clip=None),
        dict(clip=float("nan")),
        dict(percentiles=[50, 10]),
        dict(landmarks=s.landmarks[::-1]),
        dict(landmarks=[0] * 12),
        dict(extra=1),
    ):
        with pytest.raises(InputError, match="histogram standard"):
            HistogramStandard.from_dict({**s.to_dict(), **change})


@pytest.mark.parametrize(
    "bad, match",
    [
        (np.full((4, 4), 7), "constant"),
        (np.array([1.0, np.nan, 3]), "NaN"),
        (np.array([0, 0, 1, 1]), "label map"),
        (np.zeros(0), "constant"),
    ],
)
def test_volumes_without_a_histogram_are_refused(bad, match):
    good = [mr(k) for k in range(3)]
    with pytest.raises(InputError, match=match):
        HistogramStandard.fit([*good, bad])
    with pytest.raises(InputError, match=match):
        HistogramStandard.fit(good).apply(bad)
    with pytest.raises(InputError, match="(?s)p4.*" + match):
        HistogramStandard.fit([*good, bad], names=["p1", "p2", "p3", "p4"])


def test_too_few_volumes_are_refused():
    with pytest.raises(InputError, match="2 volumes are too few"):
        HistogramStandard.fit([mr(0), mr(1)])
    assert HistogramStandard.fit([mr(0)], least=1).volumes == 1


def test_ties_and_flat_tops_stay_finite():
    v = np.concatenate([np.zeros(100), np.full(60, 10.0), np.full(60, 20.0), [500.0]])
    s = HistogramStandard.fit([v] * 3)
    y = s.apply(v)
    assert np.isfinite(y).all() and (np.diff(y) >= 0).all()


# CHAOS


def test_greys_at_the_ends_of_their_ranges():
    g = np.array([0, 55, 70, 110, 135, 175, 200, 240, 255])
    assert greys_to_classes(g).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    for wrong in (1, 54, 71, 109, 136, 174, 201, 239):
        with pytest.raises(InputError, match=rf"x.png has the grey values \[{wrong}\]"):
            greys_to_classes(np.array([0, wrong]), name="x.png")


def test_labels_follow_their_slices_in_either_numbering(tmp_path):
    root = chaos(tmp_path, 3, ("t1in", "t1out", "t2"), down=(2,))
    for s in ("t1in", "t1out", "t2"):
        c = read_chaos(root, s)
        assert (
            c.groups == ["mr01", "mr02", "mr03"]
            and c.classes == CHAOS_CLASSES["MR"]
            and c.native(0).spacing == (STEP, PX, PX)
        )
        for p in range(3):
            assert np.array_equal(c.native(p).image[0], mr(p + 1, p + 1)) and np.array_equal(
                c.native(p).label, organs(p + 1)
            )
    flipped = sorted((root / "MR/2/T2SPIR/Ground").iterdir())
    assert not np.array_equal(
        np.stack([greys_to_classes(np.array(Pillow.open(f))) for f in flipped]), organs(2)
    )  # by name alone it would stand on its head


def test_equal_names_win_over_order(tmp_path):
    names = list("cafebd")  # letters: no numbers, no order
    s = series(tmp_path / "d", mr(0), names)
    g = ground(tmp_path / "g", organs(), names)
    assert np.array_equal(read_chaos_label(read_image(s), s, g), organs())
    (g / "a.png").rename(g / "z.png")
    with pytest.raises(InputError, match="do not tell the slices apart"):
        read_chaos_label(read_image(s), s, g)


def test_names_that_do_not_follow_the_body_are_refused(tmp_path):
    s = series(tmp_path / "d", mr(0), [f"I{k}" for k in (1, 3, 2, 4, 5, 6)])
    g = ground(tmp_path / "g", organs())
    with pytest.raises(InputError, match="do not follow the positions"):
        read_chaos_label(read_image(s), s, g)
    assert [f.stem for f in slice_files(s)] == ["I1", "I3", "I2", "I4", "I5", "I6"]


def test_numbers_in_names_are_numbers(tmp_path):
    s = series(
        tmp_path / "d", mr(0), [f"i{k}" for k in range(7, 13)]
    )  # i10 sorts before i7 as text
    g = ground(tmp_path / "g", organs(), [f"liver_GT_{k}" for k in range(7, 13)])
    assert np.array_equal(read_chaos_label(read_image(s), s, g), organs())


def test_ct_has_a_liver_and_other_people(tmp_path):
    for p in (2, 11):
        series(tmp_path / f"Train_Sets/CT/{p}/DICOM_anon", hu(p), offset=1024, modality="CT")
        ground(
            tmp_path / f"Train_Sets/CT/{p}/Ground",
            (organs() == 1).astype(np.uint8),
            values=np.array([0, 255], np.uint8),
        )
    c = read_chaos(tmp_path, "ct")
    assert (
        c.groups == ["ct02", "ct11"]
        and c.classes == ("background", "liver")
        and np.array_equal(c.native(1).label, organs() == 1)
    )
    assert np.allclose(c[0].image[0].numpy(), window_hu(hu(2)))
    with pytest.raises(InputError, match="(?s)no case was found.*T2SPIR"):
        list_chaos_scans(tmp_path, "t2")


def test_faults_of_a_chaos_case_name_the_place(tmp_path):
    root = chaos(tmp_path / "c", 3)
    case = root / "MR/2/T2SPIR"

    def read():
        return read_chaos(root, "t2")

    (case / "Ground/s03.png").rename(tmp_path / "s03.png")
    with pytest.raises(
        InputError, match="(?s)MR/2/T2SPIR/Ground holds 5 label pictures.*holds 6 slices"
    ):
        read()
    small = Pillow.open(tmp_path / "s03.png").resize((8, 8), 0)
    small.save(case / "Ground/s03.png")
    with pytest.raises(InputError, match="(?s)s03.png has 8 x 8 pixels, its slice 20 x 24"):
        read()
    Pillow.fromarray(np.full((H, W), 90, np.uint8)).save(case / "Ground/s03.png")
    with pytest.raises(InputError, match=r"(?s)s03.png has the grey values \[90\]"):
        read()
    (case / "Ground/s03.png").write_bytes((tmp_path / "s03.png").read_bytes()[:-30])
    with pytest.raises(InputError, match="s03.png"):
        read()
    shutil.copy(tmp_path / "s03.png", case / "Ground/s03.png")
    assert len(read()) == 3
    f = case / "DICOM_anon/IMG-0004-00003.dcm"
    whole = f.read_bytes()
    f.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="(?s)MR/2/T2SPIR/DICOM_anon.*00003.dcm"):
        read()
    f.unlink()
    (case / "Ground/s03.png").unlink()
    with pytest.raises(InputError, match="(?s)MR/2/T2SPIR/DICOM_anon.*not evenly spaced"):
        read()
    assert read_chaos(root, "t2", skip=(2,)).groups == ["mr01", "mr03"]
    f.write_bytes(whole)
    shutil.rmtree(case / "Ground")
    with pytest.raises(InputError, match="labels=False"):
        read()
    shutil.rmtree(case)
    with pytest.raises(InputError, match=r"(?s)MR/2 has no T2SPIR.*skip=\(2,\)"):
        read()
    with pytest.raises(InputError, match="unknown CHAOS sequence 't3'"):
        list_chaos_scans(root, "t3")
    with pytest.raises(InputError, match="every case was skipped"):
        list_chaos_scans(root, "t2", skip=(1, 2, 3))


def test_mixed_series_are_refused(tmp_path):
    s = series(tmp_path / "MR/1/T2SPIR/DICOM_anon", mr(0), SeriesInstanceUID="9.9")
    ground(tmp_path / "MR/1/T2SPIR/Ground", organs())
    with pytest.raises(InputError, match="2 DICOM series"):
        read_chaos(tmp_path, "t2")
    assert (
        len(read_chaos(chaos(tmp_path / "x", 3), "t2", labels=False)) == 3
        and not read_chaos(tmp_path / "x", "t2", labels=False).has_labels
    )
    with pytest.raises(InputError, match="holds no DICOM"):
        slice_files(tmp_path / "MR")
    (s / "IMG-001.dcm").write_bytes((s / "IMG-001.dcm").read_bytes()[:150])
    with pytest.raises(InputError, match="IMG-001.dcm"):
        slice_files(s)


# Folds


def arrays(groups, name):
    return Collection.from_arrays(
        [np.full((4, 4), 0.01 * k, np.float32) for k in range(len(groups))],
        [np.eye(4, dtype=np.uint8)] * len(groups),
        groups,
        [f"{g}_{i}" for i, g in enumerate(groups)],
        name=name,
    )


@pytest.mark.parametrize("valid", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_on_both_sides_in_either_sequence(seed, valid):
    both = {
        "t1": arrays([f"p{k}" for k in range(12)], "t1"),
        "t2": arrays([f"p{k // 2}" for k in range(20)], "t2"),
    }  # 10 of 12 patients have two T2 scans
    folds = fold_patients(both, 4, seed, valid)
    tested = []
    for fold in folds:
        parts = {
            part: [
                {g for i, g in zip(c.ids, c.groups) if i in fold[n].parts.get(part, ())}
                for n, c in both.items()
            ]
            for part in ("train", "val", "test")
        }
        for a in parts:
            for b in parts:
                if a != b:
                    assert not set.union(*parts[a]) & set.union(*parts[b])
        for n, c in both.items():
            fold[n].verify(c)
            assert sorted(i for ids in fold[n].parts.values() for i in ids) == sorted(c.ids)
        tested += sorted(set.union(*parts["test"]))
    assert sorted(tested) == sorted(f"p{k}" for k in range(12))  # each patient is tested once
    assert fold_patients(both, 4, seed, valid)[0]["t2"].hash == folds[0]["t2"].hash


def test_folds_that_cannot_be_are_refused():
    a = arrays([f"p{k}" for k in range(6)], "a")
    b = arrays(["p0", "p0", "p1"], "b")
    with pytest.raises(InputError, match="collection 'b' has no image in part test"):
        fold_patients({"a": a, "b": b}, 3)
    with pytest.raises(InputError, match="k=9"):
        fold_patients({"a": a}, 9)
    with pytest.raises(InputError, match="empty"):
        fold_patients({}, 3)


# Contours and segments


def test_even_odd_holes_pieces_and_grid(tmp_path):
    like = scan_image(tmp_path)
    y, x = np.meshgrid(CORNER[1] + PX * np.arange(H), CORNER[0] + PX * np.arange(W), indexing="ij")

    def disc(cx, cy, r):
        return np.hypot(x - cx, y - cy) < r

    z = [CORNER[2] + STEP * k for k in range(D)]
    contours = [
        c
        for k in (2, 3)
        for c in (
            circle(-5.3, -12.7, 10.1, z[k]),
            circle(-5.3, -12.7, 4.2, z[k]),
            circle(15.2, -8.9, 5.1, z[k]),
        )
    ] + [circle(0, 0, 3, z[5])[:2], np.zeros((0, 3))]
    m = fill_contours(contours, like)
    truth = disc(-5.3, -12.7, 10.1) & ~disc(-5.3, -12.7, 4.2) | disc(15.2, -8.9, 5.1)
    assert np.array_equal(np.flatnonzero(m.any((1, 2))), [2, 3])
    for k in (2, 3):
        assert 2 * (m[k] & truth).sum() / (m[k].sum() + truth.sum()) > 0.97
    assert np.array_equal(
        fill_contours([c[::-1] for c in contours[::-1]], like), m
    )  # the direction and the order do not matter


def test_a_turned_grid_places_contours_too(tmp_path):
    like = scan_image(tmp_path)
    c = [circle(3, -14, 8, CORNER[2] + STEP * 2)]
    plain = fill_contours(c, like)
    turned = Image(
        like.array[:, ::-1],
        like.spacing,
        like.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, D - 1], [0, 0, 0, 1.0]]),
    )  # slices from the top
    assert plain.any() and np.array_equal(fill_contours(c, turned), plain[::-1])


def test_faults_of_contours_are_named(tmp_path):
    like = scan_image(tmp_path)
    z = CORNER[2] + STEP * 2
    good = circle(0, -10, 8, CORNER[2] + STEP * 2)
    f = tmp_path / "r.dcm"

    def go(rois, roi="GTV-1", **kw):
        return rtstruct_mask(rtstruct(f, rois), like, roi, **kw)

    assert (
        go([("gtv-1 ", [good])]).sum()
        == go([("Lung", [good + 1]), ("GTV-1", [good])], frame="1.2.9").sum()
        > 20
    )
    assert go([("GTV-1", [good + (0, 0, 0.05 * STEP)])]).any()  # rounding is forgiven
    with pytest.raises(InputError, match="(?s)r.dcm: unknown ROI 'GTV-1'.*GTV-2.*Lung"):
        go([("Lung", [good]), ("GTV-2", [good])])
    with pytest.raises(InputError, match="2 ROIs called"):
        go([("GTV-1", [good]), ("GTV-1", [good])])
    for off in (0.3 * STEP, -0.5 * STEP):
        with pytest.raises(
            InputError, match="(?s)r.dcm, ROI 'GTV-1': contour 1 lies off the slice planes"
        ):
            go([("GTV-1", [good, good + (0, 0, off)])])
    tilted = good + np.c_[np.zeros((80, 2)), np.linspace(-STEP, STEP, 80)]
    with pytest.raises(InputError, match="off the slice planes"):
        go([("GTV-1", [tilted])])
    for far in ((0, 0, 10 * STEP), (0, 0, -5 * STEP), (100, 0, 0), (0, -60, 0)):
        with pytest.raises(InputError, match="reaches out of the scan"):
            go([("GTV-1", [good + far])])
    with pytest.raises(InputError, match="encloses no voxel"):
        go([("GTV-1", [])])
    with pytest.raises(InputError, match="encloses no voxel"):
        go([("GTV-1", [circle(0.9, -10.9, 0.1, z)])])
    with pytest.raises(InputError, match="frame of reference"):
        go([("GTV-1", [good])], frame="1.2.8")
    with pytest.raises(InputError, match="OPEN_PLANAR"):
        rtstruct_mask(rtstruct(f, [("GTV-1", [good])], kind="OPEN_PLANAR"), like)
    with pytest.raises(InputError, match="does not say where"):
        rtstruct_mask(rtstruct(f, [("GTV-1", [good])]), Image(like.array))
    (tmp_path / "text.dcm").write_text("no DICOM")
    with pytest.raises(InputError, match="text.dcm"):
        rtstruct_mask(tmp_path / "text.dcm", like)


def test_a_file_of_contours_that_is_cut_short_is_never_half_a_tumour(tmp_path):
    like = scan_image(tmp_path)
    f = rtstruct(
        tmp_path / "r.dcm",
        [("GTV-1", [circle(0, -10, 8, CORNER[2] + STEP * k, 20) for k in range(4)])],
    )
    data = f.read_bytes()
    whole = rtstruct_mask(f, like)
    for n in np.linspace(0, len(data) - 1, 60).astype(int):
        f.write_bytes(data[:n])
        try:
            m = rtstruct_mask(f, like)
        except InputError as e:
            assert "r.dcm" in str(e)
        else:
            assert np.array_equal(m, whole), f"cut at {n} of {len(data)}: a part of the tumour"


@pytest.mark.parametrize("kw", [{}, {"bits": 8}, {"shared": False}])
def test_segments_land_on_their_slices(tmp_path, kw):
    like = scan_image(tmp_path)
    mask = np.zeros((D, H, W), np.uint8)
    mask[2:5, 5:9, 7:11] = 1
    f = seg(tmp_path / "s.dcm", mask * (150 if kw.get("bits") == 8 else 1), **kw)
    assert np.array_equal(seg_mask(f, like), mask) and np.array_equal(
        seg_mask(f, like, "neoplasm", frame="1.2.9"), mask
    )


def test_faults_of_segments_are_named(tmp_path):
    like = scan_image(tmp_path)
    mask = np.zeros((D, H, W), np.uint8)
    mask[2:5, 5:9, 7:11] = 1
    f = tmp_path / "s.dcm"
    with pytest.raises(InputError, match="(?s)s.dcm: unknown segment 'GTV-1'.*GTV-2, Neoplasm"):
        seg_mask(seg(f, mask, "GTV-2"), like)
    for kw in (
        dict(corner=(CORNER[0] + 5, *CORNER[1:])),
        dict(corner=(*CORNER[:2], CORNER[2] + 2)),
        dict(spacing=1.0),
        dict(corner=(*CORNER[:2], 900.0)),
    ):
        with pytest.raises(InputError, match="does not lie on a slice"):
            seg_mask(seg(f, mask, **kw), like)
    with pytest.raises(InputError, match="does not lie on a slice"):
        seg_mask(seg(f, mask[:, :-2]), like)
    with pytest.raises(InputError, match="frame of reference"):
        seg_mask(seg(f, mask, frame="3.4"), like, frame="1.2.9")
    data = seg(f, mask).read_bytes()
    f.write_bytes(data[:-30])
    with pytest.raises(InputError, match="s.dcm"):
        seg_mask(f, like)


def nsclc(root, n=2):
    mask = np.zeros((D, H, W), np.uint8)
    mask[2:5, 5:9, 7:11] = 1
    for p in range(1, n + 1):
        study = root / f"LUNG1-{p:03d}/01-01-2000-study"
        series(study / "CT", hu(p), [f"1-{D - k}" for k in range(D)], offset=1024, modality="CT")
        rtstruct(
            study / "RTSTRUCT/1-1.dcm",
            [("GTV-1", [circle(0, -10, 8, CORNER[2] + STEP * k) for k in (2, 3)])],
        )
        seg(study / "SEG/1-1.dcm", mask)
    return root, mask


def test_nsclc_layout_and_its_faults(tmp_path):
    root, mask = nsclc(tmp_path / "n")
    c = read_nsclc(root)
    s = read_nsclc(root, "seg")
    assert (
        c.groups == ["LUNG1-001", "LUNG1-002"]
        and c.classes == ("background", "tumour")
        and np.array_equal(c.native(1).image[0], hu(2))
    )
    assert np.array_equal(s.native(0).label, mask) and c.native(0).label.any((1, 2)).tolist() == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert not read_nsclc(root, "").has_labels
    shutil.copytree(root / "LUNG1-002/01-01-2000-study/CT", root / "LUNG1-002/other/CT")
    with pytest.raises(InputError, match="(?s)LUNG1-002 holds 2 series of modality CT"):
        list_nsclc_scans(root)
    assert len(list_nsclc_scans(root, skip=("LUNG1-002",))) == 1
    shutil.rmtree(root / "LUNG1-002/other")
    shutil.rmtree(root / "LUNG1-002/01-01-2000-study/RTSTRUCT")
    with pytest.raises(
        InputError, match="(?s)LUNG1-002 holds 0 series of modality RTSTRUCT.*CT 1, SEG 1"
    ):
        list_nsclc_scans(root)
    with pytest.raises(InputError, match="unknown kind of label"):
        list_nsclc_scans(root, "png")
    with pytest.raises(InputError, match="no patient folders"):
        list_nsclc_scans(tmp_path / "none")
    series(root / "LUNG1-003/CT", hu(3), offset=1024, modality="CT", frame="7.7")
    rtstruct(root / "LUNG1-003/RT/1.dcm", [("GTV-1", [circle(0, -10, 8, CORNER[2])])])
    with pytest.raises(InputError, match="frame of reference"):
        read_nsclc(root, skip=("LUNG1-002",))


def test_known_faults_of_the_archive_are_named(tmp_path):
    root, _ = nsclc(tmp_path / "n", 3)
    assert set(NSCLC_FAULTS) == {
        f"LUNG1-{n}" for n in ("014", "021", "085", "095", "128", "194", "246")
    }
    (root / "LUNG1-002").rename(root / "LUNG1-128")
    shutil.rmtree(root / "LUNG1-128/01-01-2000-study/RTSTRUCT")
    with pytest.raises(InputError, match="LUNG1-128 has no contours.*skip=tuple.NSCLC_FAULTS"):
        list_nsclc_scans(root)
    (root / "LUNG1-003").rename(root / "LUNG1-014")
    files = sorted((root / "LUNG1-014/01-01-2000-study/CT").iterdir())
    files[len(files) // 2].unlink()  # a gap of two steps
    scans = list_nsclc_scans(root, skip=("LUNG1-128",))
    with pytest.raises(InputError, match="not evenly spaced.*LUNG1-014 has gaps.*NSCLC_FAULTS"):
        scans[1].load()
    assert [s.id for s in list_nsclc_scans(root, skip=tuple(NSCLC_FAULTS))] == ["LUNG1-001"]


# Prepared folders

MR = CHAOS_CLASSES["MR"]


def test_a_prepared_folder_holds_images_labels_and_the_rule(tmp_path):
    root = chaos(tmp_path / "c", 4, down=(2,))
    scans = {s: list_chaos_scans(root, s) for s in ("t1in", "t2")}

    def go(target, **kw):
        return prepare_clinical(
            scans, target, {"t1in": "histogram", "t2": "histogram"}, {"t1in": MR, "t2": MR}, **kw
        )

    out = go(tmp_path / "out", fit_on=["mr01", "mr02", "mr03"])
    note = read_json(out / _NOTE)
    s = HistogramStandard.fit([mr(p, p) for p in (1, 2, 3)])
    assert (
        np.allclose(note["rules"]["t2"]["landmarks"], s.landmarks)
        and note["fit_on"] == ["mr01", "mr02", "mr03"]
        and note["rules"]["t2"]["volumes"] == 3
    )
    c = open_collection(out, "t2", classes=MR)
    assert (
        c.groups == ["mr01", "mr02", "mr03", "mr04"]
        and c.check()["spleen"] == 4
        and c[0].spacing == (STEP, PX, PX)
    )
    for p in range(4):
        assert np.abs(
            c[p].image[0].numpy() - s.apply(mr(p + 1, p + 1))
        ).max() < 1e-5 and np.array_equal(c[p].label.numpy(), organs(p + 1))
    assert np.allclose(
        read_image(out / "t2/mr02_t2.nii.gz").affine,
        read_image(root / "MR/2/T2SPIR/DICOM_anon").affine,
    )  # it lies where it lay
    assert np.array_equal(standardise(mr(4, 4), note["rules"]["t2"]), s.apply(mr(4, 4)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out"] and sorted(
        p.name for p in out.iterdir()
    ) == ["labels", "manifest.csv", _NOTE, "t1in", "t2"]
    stamp = (out / "manifest.csv").stat().st_mtime_ns
    assert (
        go(out, fit_on=["mr03", "mr01", "mr02"]) == out
        and (out / "manifest.csv").stat().st_mtime_ns == stamp
    )
    with pytest.raises(InputError, match="other rules"):
        go(out)
    assert (
        np.abs(
            np.array(read_json(go(tmp_path / "all") / _NOTE)["rules"]["t2"]["landmarks"])
            - s.landmarks
        ).max()
        > 0
    )


def ct_scans(tmp_path, n=3, bad=None):
    out = []
    for p in range(n):
        v = hu(p).astype(np.float32)
        if p == bad:
            v[0, 0, 0] = np.nan
        write_image(tmp_path / f"in/p{p}.nii.gz", Image(v[None], (STEP, PX, PX)))
        out.append(
            Scan(
                f"p{p}",
                f"p{p}",
                tmp_path / f"in/p{p}.nii.gz",
                lambda image: (image.array[0] > 300).astype(np.uint8),
            )
        )
    return {"ct": out}


def test_a_fault_leaves_no_target_and_the_rest_resumes(tmp_path):
    def go(scans):
        return prepare_clinical(
            scans, tmp_path / "out", {"ct": (-1000, 500)}, {"ct": ("background", "bone")}
        )

    scans = ct_scans(tmp_path, bad=1)
    with pytest.raises(InputError, match="(?s)p1.nii.gz.*NaN"):
        go(scans)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*manifest*"))
    first = tmp_path / ".out.part/ct/p0.nii.gz"
    stamp = first.stat().st_mtime_ns
    out = go(ct_scans(tmp_path))
    assert (
        (out / "ct/p0.nii.gz").stat().st_mtime_ns == stamp
        and len(open_collection(out, "ct")) == 3
        and open_collection(out, "ct").check() == {"background": 3, "foreground": 3}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert np.abs(open_collection(out, "ct")[1].image[0].numpy() - window_hu(hu(1))).max() < 1e-5


def test_leftovers_of_other_rules_are_not_mixed_in(tmp_path):
    scans = ct_scans(tmp_path, bad=1)
    with pytest.raises(InputError):
        prepare_clinical(
            scans, tmp_path / "out", {"ct": (-1000, 500)}, {"ct": ("background", "bone")}
        )
    out = prepare_clinical(
        ct_scans(tmp_path), tmp_path / "out", {"ct": (-160, 240)}, {"ct": ("background", "bone")}
    )
    assert (
        np.abs(open_collection(out, "ct")[0].image[0].numpy() - window_hu(hu(0), -160, 240)).max()
        < 1e-5
    )


def test_a_replaced_scan_is_read_again(tmp_path):
    scans = ct_scans(tmp_path, bad=2)
    with pytest.raises(InputError):
        prepare_clinical(
            scans, tmp_path / "out", {"ct": (-1000, 500)}, {"ct": ("background", "bone")}
        )
    scans = ct_scans(tmp_path)
    write_image(
        scans["ct"][0].image,
        Image(np.clip(hu(5), -900, 390)[None].astype(np.float32), (STEP, PX, PX)),
    )
    out = prepare_clinical(
        scans, tmp_path / "out", {"ct": (-1000, 500)}, {"ct": ("background", "bone")}
    )
    assert (
        np.abs(
            open_collection(out, "ct")[0].image[0].numpy() - window_hu(np.clip(hu(5), -900, 390))
        ).max()
        < 1e-5
    )


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(rules={}), "rules: unknown modality 'ct'"),
        (dict(classes={}), "classes: unknown modality"),
        (dict(classes={"ct": ("background",)}), "holds class 1"),
        (
            dict(classes={"ct": ("background", "bone", "tumour")}),
            "no label of 'ct' shows class 'tumour'",
        ),
        (dict(rules={"ct": "percentile"}), "unknown rule"),
        (dict(rules={"ct": 5}), "rule 5"),
        (dict(rules={"ct": "histogram"}, fit_on=["p0", "p9"]), "unknown group 'p9'"),
        (dict(rules={"ct": "histogram"}, fit_on=["p0", "p1"]), "too few"),
        (dict(rules={"ct": (500, -1000)}), "low must be below high"),
    ],
)
def test_impossible_plans_are_refused(tmp_path, kw, match):
    with pytest.raises(InputError, match=match):
        prepare_clinical(
            **{
                **dict(
                    scans=ct_scans(tmp_path),
                    target=tmp_path / "out",
                    rules={"ct": (-1000, 500)},
                    classes={"ct": ("background", "bone")},
                ),
                **kw,
            }
        )
    assert not (tmp_path / "out").exists()


def test_what_is_no_prepared_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        prepare_clinical(
            ct_scans(tmp_path),
            tmp_path / "out",
            {"ct": (-1000, 500)},
            {"ct": ("background", "bone")},
        )
    assert (tmp_path / "out/mine.txt").read_text() == "mine" and not (
        tmp_path / ".out.part"
    ).exists()


def test_8_bit_ct_is_refused_with_its_file(tmp_path):
    write_image(
        tmp_path / "in/a.nii.gz", Image(np.arange(D * H * W, dtype=np.uint8).reshape(1, D, H, W))
    )
    with pytest.raises(InputError, match="(?s)a.nii.gz.*Hounsfield"):
        prepare_clinical(
            {"ct": [Scan("a", "a", tmp_path / "in/a.nii.gz")]},
            tmp_path / "out",
            {"ct": (-1000, 500)},
            {"ct": ("background",)},
        )
    with pytest.raises(InputError, match="unknown kind of rule"):
        standardise(hu(), {"kind": "z"})


# Augmentation


def test_a_warped_disc_and_its_warped_label_agree():
    disc = ((torch.arange(64.0)[:, None] - 30) ** 2 + (torch.arange(64.0)[None] - 35) ** 2 < 14**2)[
        None
    ]
    for seed in range(10):
        a, b = Augment(
            brightness=0, contrast=0, gamma=0, noise=0, blur=0, elastic=2.0, rotate=30.0
        )(disc[None].float(), disc.long(), torch_rng(seed, "disc"))
        assert 2 * ((a[:, 0] > 0.5) & (b > 0)).sum() / ((a > 0.5).sum() + (b > 0).sum()) > 0.98


def test_headers_are_read_without_pixels(tmp_path):
    s = series(tmp_path / "d", mr(0))
    h = read_header(s / "IMG-001.dcm")
    assert h.Modality == "MR" and "PixelData" not in h
    with pytest.raises(InputError, match="gone.dcm"):
        read_header(tmp_path / "gone.dcm")


def test_real_scans(real_data):
    folder = real_data("totalseg_fixture")
    v = read_image(folder / "example_ct_sm.nii.gz").array[0]
    assert 0 <= window_hu(v).min() and window_hu(v).max() <= 1 and 0.05 < window_hu(v).mean() < 0.9
    m = read_image(folder / "example_mr_sm.nii.gz").array[0]
    s = HistogramStandard.fit([m, 2.5 * m, 0.3 * m + 4])
    assert np.allclose(s.apply(m), s.apply(7.0 * m), atol=1e-5) and s.apply(m).std() > 0.05


def test_scans_that_would_overwrite_each_other_are_refused(tmp_path):
    scans = ct_scans(tmp_path)["ct"]

    def go(s):
        return prepare_clinical(
            {"ct": s}, tmp_path / "out", {"ct": (-1000, 500)}, {"ct": ("background", "bone")}
        )

    with pytest.raises(InputError, match="two have one id"):
        go([*scans, scans[0]])
    with pytest.raises(InputError, match="empty"):
        go([])
    with pytest.raises(InputError, match="(?s)p1.nii.gz.*holds class -1"):
        go(
            [
                scans[0],
                Scan("p1", "p1", scans[1].image, lambda image: -(image.array[0] > 300).astype(int)),
            ]
        )
    with pytest.raises(InputError, match="(?s)p1.nii.gz: the label has shape"):
        go([scans[0], Scan("p1", "p1", scans[1].image, lambda image: np.zeros((2, 2, 2), int))])


def test_a_modality_without_labels_has_none(tmp_path):
    scans = [Scan(s.id, s.group, s.image) for s in ct_scans(tmp_path)["ct"]]
    out = prepare_clinical(
        {"ct": scans}, tmp_path / "out", {"ct": (-1000, 500)}, {"ct": ("background", "bone")}
    )
    assert not open_collection(out, "ct").has_labels and not (out / "labels").exists()


def test_filling_agrees_with_counting_crossings(tmp_path):
    like = scan_image(tmp_path)
    r = np.random.default_rng(3)
    z = CORNER[2] + STEP * 2
    for _ in range(5):
        polygons = [
            np.c_[r.uniform(-19.7, 25.3, 7), r.uniform(-29.6, 7.3, 7), np.full(7, z)]
            for _ in range(3)
        ]
        index = [(p[:, :2] - CORNER[:2]) / PX for p in polygons]
        points = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1).reshape(-1, 2)
        odd = np.zeros(len(points), int)
        for q in index:  # crossings of a ray to the right, one polygon after the other
            for (x0, y0), (x1, y1) in zip(q, np.roll(q, -1, 0)):
                cross = (y0 > points[:, 1]) != (y1 > points[:, 1])
                odd += cross & (points[:, 0] < x0 + (points[:, 1] - y0) * (x1 - x0) / (y1 - y0))
        assert np.array_equal(fill_contours(polygons, like, xor=True)[2].ravel(), odd % 2 == 1)
