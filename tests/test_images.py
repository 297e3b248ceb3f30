"""Every format, every fault: what would not teach in the chapter."""

import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from unpaired_kd.core import InputError
from unpaired_kd.data.formats.images import (
    Image,
    list_images,
    match_channels,
    orientation,
    read_image,
    read_label,
    suffix_of,
)
from unpaired_kd.data.formats.pictures import arrange
from unpaired_kd.data.formats.writing import WRITERS, write_image, write_label
from unpaired_kd.data.intensity import to_unit
from unpaired_kd.data.resampling import prepare, resize, zoom_label, zoom_size

R = np.random.default_rng(0)
GREY = R.integers(0, 256, (20, 30), np.uint8)
GREY16 = R.integers(0, 65536, (20, 30), np.uint16)
RGB = R.integers(0, 256, (20, 30, 3), np.uint8)
STACK = R.integers(0, 256, (6, 20, 30), np.uint8)


def cuts(path, read, n=40):
    "Each cut of the file either fails with its name or gives the whole image."
    whole = read(path).array
    data = path.read_bytes()
    failed = 0
    short = path.with_name("short_" + path.name)
    for k in np.unique(np.r_[0, 1, np.linspace(2, len(data) - 1, n).astype(int)]):
        short.write_bytes(data[:k])
        try:
            assert np.array_equal(read(short).array, whole), (
                f"a part was read at byte {k} of {len(data)}"
            )
        except InputError as e:
            failed += 1
            assert str(short) in str(e)
    assert failed > n / 2


def write_tiffs(folder):
    "One stack, written in the ways that are met in the wild."
    for name, kw in {
        "plain": {},
        "deflate": dict(compression="zlib"),
        "ome": dict(ome=True, metadata={"axes": "ZYX"}),
        "imagej": dict(imagej=True, metadata={"axes": "ZYX"}),
        "tiled": dict(tile=(16, 16), compression="zlib"),
        "big": dict(bigtiff=True),
    }.items():
        tifffile.imwrite(folder / f"{name}.tif", STACK, photometric="minisblack", **kw)
    pages = [Pillow.fromarray(p) for p in STACK]
    pages[0].save(folder / "pillow.tif", save_all=True, append_images=pages[1:])
    pages[0].save(
        folder / "lzw.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw"
    )
    return sorted(folder.glob("*.tif"))


def test_truncated_tiff_never_gives_a_part(tmp_path):
    for path in write_tiffs(tmp_path):
        assert np.array_equal(read_image(path).array[0], STACK), path.name
        cuts(path, read_image)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_truncated_nifti(tmp_path, name):
    write_image(tmp_path / name, Image(STACK[None], (5.0, 1.0, 1.0)))
    whole = read_image(tmp_path / name)
    assert np.array_equal(whole.array, STACK[None]) and np.allclose(
        whole.spacing, (5.0, 1.0, 1.0)
    )  # what the cuts are held against is right
    cuts(tmp_path / name, read_image)


def test_truncated_pictures(tmp_path):
    for name, a in {"g.png": GREY, "g16.png": GREY16, "c.png": RGB}.items():
        Pillow.fromarray(a).save(tmp_path / name)
    Pillow.fromarray(RGB).save(tmp_path / "c.jpg")
    for p in tmp_path.glob("*.png"):
        cuts(p, read_image)
    data = (tmp_path / "c.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="half.jpg"):
        read_image(tmp_path / "half.jpg")


def test_damaged_bytes_name_the_file(tmp_path):
    write_image(tmp_path / "x.nii.gz", Image(STACK[None]))
    data = bytearray((tmp_path / "x.nii.gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.nii.gz").write_bytes(data)
    with pytest.raises(InputError, match="x.nii.gz"):
        read_image(tmp_path / "x.nii.gz")
    for suffix in (".png", ".jpg", ".tif", ".nii", ".nii.gz", ".dcm"):
        p = tmp_path / f"text{suffix}"
        p.write_text("this is text")
        with pytest.raises(InputError, match=f"text{suffix}"):
            read_image(p)
        p.write_bytes(b"")
        with pytest.raises(InputError, match=f"text{suffix}"):
            read_image(p)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(InputError, match="empty.zarr"):
        read_image(tmp_path / "empty.zarr")


def test_missing_file_unknown_suffix_empty_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere.png does not exist"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "a.bmp").write_bytes(b"BM")
    with pytest.raises(InputError, match="(?s)a.bmp.*not known.*nii.gz"):
        read_image(tmp_path / "a.bmp")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no DICOM"):
        read_image(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a folder"):
        list_images(tmp_path / "a.bmp")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x.tif", "x.nii.gz", "x.zarr"])
def test_nan_and_infinity(tmp_path, name, value):
    a = np.ones((1, 4, 20, 30), np.float32)
    a[0, 1, 2, 3] = value
    write_image(tmp_path / name, Image(a))
    with pytest.raises(InputError, match=f"(?s){name}.*1 of 2400"):
        read_image(tmp_path / name)
    with pytest.raises(InputError, match="NaN"):
        prepare(a)


@pytest.mark.parametrize(
    "module, name, extra", [("pydicom", "x.dcm", "dicom"), ("zarr", "x.zarr", "volumes")]
)
def test_missing_extra(tmp_path, monkeypatch, module, name, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).mkdir() if name.endswith("zarr") else (tmp_path / name).write_bytes(
        b"\0" * 128 + b"DICM"
    )
    with pytest.raises(InputError, match=rf"(?s){name}.*pip install 'unpaired_kd\[{extra}\]'"):
        read_image(tmp_path / name)
    if extra == "volumes":
        with pytest.raises(InputError, match="pip install"):
            write_image(tmp_path / "y.zarr", Image(STACK[None]))
        assert not (tmp_path / "y.zarr").exists()


def test_channels(tmp_path):
    Pillow.fromarray(RGB).save(tmp_path / "c.png")
    Pillow.fromarray(GREY).save(tmp_path / "g.png")
    with pytest.raises(InputError, match="c.png is RGB, but grey"):
        read_image(tmp_path / "c.png", channels=1)
    assert np.array_equal(read_image(tmp_path / "g.png", channels=3).array, np.stack([GREY] * 3))
    assert read_image(tmp_path / "c.png", channels=3).array.shape == (3, 20, 30)
    with pytest.raises(InputError, match="equal"):
        match_channels(np.stack([GREY] * 3), 1)
    with pytest.raises(InputError, match="2 channels"):
        match_channels(np.zeros((2, 4, 4)), 3)


def test_picture_modes(tmp_path):
    p = tmp_path / "x.png"
    Pillow.fromarray(GREY16).save(p)
    a = read_image(p).array
    assert a.dtype == np.uint16 and np.array_equal(a[0], GREY16)
    Pillow.fromarray(np.dstack([RGB, GREY])).save(p)
    assert np.array_equal(read_image(p).array, np.moveaxis(RGB, -1, 0))
    Pillow.fromarray(np.dstack([GREY, GREY // 2]), "LA").save(p)
    assert np.array_equal(read_image(p).array[0], GREY)
    palette = Pillow.fromarray(GREY % 3, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    palette.save(p)
    assert read_image(p).array.shape == (3, 20, 30) and np.array_equal(
        read_label(p).array, GREY % 3
    )
    Pillow.fromarray(GREY > 99).save(p)
    assert np.array_equal(read_label(p).array, GREY > 99)


def test_16_bit_colour_png_is_refused_not_cut(tmp_path):
    def chunk(t, d):
        return len(d).to_bytes(4, "big") + t + d + zlib.crc32(t + d).to_bytes(4, "big")

    rows = b"".join(b"\0" + r.astype(">u2").tobytes() for r in RGB.astype(np.uint16) * 257)
    head = (30).to_bytes(4, "big") + (20).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(InputError, match="(?s)deep.png.*16-bit"):
        read_image(tmp_path / "deep.png")


def test_tiff_kinds(tmp_path):
    p = tmp_path / "x.tif"
    tifffile.imwrite(p, RGB, photometric="rgb")
    assert np.array_equal(read_image(p).array, np.moveaxis(RGB, -1, 0))
    tifffile.imwrite(p, np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_image(p).array, np.moveaxis(RGB, -1, 0))
    tifffile.imwrite(p, np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(p).array.shape == (3, 20, 30)
    tifffile.imwrite(p, GREY, photometric="miniswhite")
    assert np.array_equal(read_image(p).array[0], 255 - GREY)
    tifffile.imwrite(p, GREY16.astype(">u2"), byteorder=">")
    assert np.array_equal(read_image(p).array[0], GREY16) and read_image(p).array.dtype.isnative
    tifffile.imwrite(p, STACK[:3], photometric="minisblack")
    assert read_image(p).array.shape == (1, 3, 20, 30)  # three pages are not RGB
    with tifffile.TiffWriter(p) as t:
        t.write(GREY)
        t.write(GREY[:10])
    with pytest.raises(InputError, match="2 images of different size"):
        read_image(p)
    tifffile.imwrite(
        p, R.integers(0, 9, (2, 3, 20, 30), np.uint8), imagej=True, metadata={"axes": "TZYX"}
    )
    with pytest.raises(InputError, match="(?s)x.tif.*TZYX"):
        read_image(p)


def test_tiff_spacing(tmp_path):
    p = tmp_path / "x.tif"
    tifffile.imwrite(p, GREY, resolution=(100, 50), resolutionunit="CENTIMETER")
    assert read_image(p).spacing == pytest.approx((0.2, 0.1))
    tifffile.imwrite(p, GREY, resolution=(96, 96), resolutionunit="INCH")
    assert read_image(p).spacing is None
    tifffile.imwrite(
        p,
        STACK,
        imagej=True,
        resolution=(4, 2),
        metadata={"spacing": 3.0, "unit": "um", "axes": "ZYX"},
    )
    assert read_image(p).spacing == pytest.approx((0.003, 0.0005, 0.00025))
    tifffile.imwrite(
        p,
        STACK,
        ome=True,
        photometric="minisblack",
        metadata={"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25},
    )
    assert read_image(p).spacing is None  # no z
    tifffile.imwrite(
        p,
        STACK,
        ome=True,
        photometric="minisblack",
        metadata={"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 2.0},
    )
    assert read_image(p).spacing == pytest.approx((0.002, 0.00025, 0.0005))


def test_nifti_kinds(tmp_path):
    p = tmp_path / "x.nii.gz"
    affine = np.array([[-2.0, 0, 0, 5], [0, 3, 0, 6], [0, 0, 4, 7], [0, 0, 0, 1]])
    f = nib.Nifti1Image(STACK.T, affine)
    f.header.set_xyzt_units("mm")
    nib.save(f, p)
    im = read_image(p)
    assert (
        im.array.shape == (1, 6, 20, 30)
        and im.spacing == (4.0, 3.0, 2.0)
        and np.array_equal(im.affine, affine)
        and orientation(im) == "SAL"
    )
    f.header.set_xyzt_units("micron")
    nib.save(f, p)
    assert read_image(p).spacing == pytest.approx((0.004, 0.003, 0.002))
    f = nib.Nifti1Image(STACK.T.astype(np.int16), affine)
    f.header.set_slope_inter(2, -1000)
    nib.save(f, p)
    f = nib.load(p)
    assert np.allclose(read_image(p).array[0], f.get_fdata().T)
    nib.save(nib.Nifti2Image(STACK.T, affine), p)
    assert np.array_equal(read_image(p).array[0], STACK)
    nib.save(nib.Nifti1Image(GREY.T, np.eye(4)), p)
    assert read_image(p).array.shape == (1, 20, 30)
    nib.save(nib.Nifti1Image(np.zeros((5, 4, 3, 2), np.uint8), np.eye(4)), p)
    assert read_image(p).array.shape == (2, 3, 4, 5)
    rgb = np.ascontiguousarray(R.integers(0, 256, (5, 4, 3, 3), np.uint8)).view(
        [("R", "u1"), ("G", "u1"), ("B", "u1")]
    )[..., 0]
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), p)
    assert read_image(p).array.shape == (3, 3, 4, 5) and np.array_equal(
        read_image(p).array[1], rgb["G"].T
    )
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3, 2, 2), np.uint8), np.eye(4)), p)
    with pytest.raises(InputError, match="5 axes"):
        read_image(p)


def dicom_series(folder, volume, **change):
    "A minimal CT series with file names in the wrong order; `change` replaces tags of slice 1."
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileMetaDataset

    folder.mkdir()
    for k, plane in enumerate(volume):
        s = pydicom.Dataset()
        s.file_meta = FileMetaDataset()
        s.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        s.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        s.file_meta.MediaStorageSOPInstanceUID = f"1.2.{k + 1}"
        s.SOPClassUID = pydicom.uid.CTImageStorage
        s.SOPInstanceUID = f"1.2.{k + 1}"
        s.SeriesInstanceUID = "1.2.3"
        s.SliceThickness = 5.0
        s.ImagePositionPatient = [-10.0, -20.0, 30.0 + 6 * k]
        s.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        s.PixelSpacing = [0.5, 0.25]
        s.RescaleSlope = 1
        s.RescaleIntercept = -1024
        s.SamplesPerPixel = 1
        s.PhotometricInterpretation = "MONOCHROME2"
        s.Rows, s.Columns, s.BitsAllocated, s.BitsStored, s.HighBit, s.PixelRepresentation = (
            *plane.shape,
            16,
            16,
            15,
            0,
        )
        s.PixelData = (plane + 1024).astype(np.uint16).tobytes()
        if k == 1:
            for tag, v in change.items():
                setattr(s, tag, v)
        s.save_as(folder / f"{9 - k}.dcm", enforce_file_format=True)
    return folder


def test_dicom(tmp_path):
    ct = R.integers(-1000, 1000, (4, 6, 8)).astype(np.int16)
    folder = dicom_series(tmp_path / "ct", ct)
    im = read_image(folder)
    assert (
        np.array_equal(im.array[0], ct)
        and im.spacing == (6.0, 0.5, 0.25)
        and orientation(im) == "SPL"
    )
    assert np.allclose(
        im.affine @ [1, 2, 3, 1], [10 - 0.25, 20 - 1.0, 30 + 18, 1]
    )  # DICOM counts to the left and back, the affine to the right and front
    one = read_image(folder / "8.dcm")
    assert np.array_equal(one.array[0], ct[1]) and one.spacing == (0.5, 0.25)
    (folder / "7.dcm").unlink()
    with pytest.raises(InputError, match="(?s)ct.*not evenly spaced"):
        read_image(folder)
    with pytest.raises(InputError, match="2 DICOM series"):
        read_image(dicom_series(tmp_path / "two", ct, SeriesInstanceUID="1.2.4"))
    with pytest.raises(InputError, match="twice"):
        read_image(dicom_series(tmp_path / "twice", ct, ImagePositionPatient=[-10.0, -20.0, 30.0]))
    short = dicom_series(tmp_path / "short", ct)
    data = (short / "8.dcm").read_bytes()
    (short / "8.dcm").write_bytes(data[:-20])
    with pytest.raises(InputError, match="8.dcm"):
        read_image(short)


def test_zarr_kinds(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_array(str(tmp_path / "plain.zarr"), data=STACK)
    assert np.array_equal(read_image(tmp_path / "plain.zarr").array[0], STACK)
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    with pytest.raises(InputError, match="(?s)group.zarr.*multiscales"):
        read_image(tmp_path / "group.zarr")
    write_image(tmp_path / "x.zarr", Image(STACK[None]))
    write_image(tmp_path / "x.zarr", Image(STACK[None] // 2))  # replaces
    assert (
        np.array_equal(read_image(tmp_path / "x.zarr").array[0], STACK // 2)
        and read_image(tmp_path / "x.zarr").spacing is None
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "group.zarr",
        "plain.zarr",
        "x.zarr",
    ]  # nothing temporary is left


def test_labels(tmp_path):
    for top in (1, 255, 256, 65535, 70000):
        y = np.zeros((20, 30), np.int64)
        y[3, 4] = top
        write_label(tmp_path / "y.tif", y)
        back = read_label(tmp_path / "y.tif").array
        assert np.array_equal(back, y) and back.dtype == (
            np.uint8 if top < 256 else np.uint16 if top < 65536 else np.int32
        )
    with pytest.raises(InputError, match="y.png"):
        write_label(tmp_path / "y.png", y)
    for bad in (np.full((4, 4), -1), np.full((4, 4), 0.5), np.full((4, 4), 2**31)):
        with pytest.raises(InputError, match="whole numbers"):
            write_label(tmp_path / "bad.tif", bad)
    assert not (tmp_path / "bad.tif").exists()
    with pytest.raises(InputError, match=r"(?s)z.tif.*\(20, 30\)"):
        write_label(tmp_path / "z.tif", y, like=Image(np.zeros((1, 20, 31))))
    write_image(tmp_path / "soft.tif", Image(np.full((1, 4, 4), 0.5, np.float32)))
    with pytest.raises(InputError, match="soft.tif"):
        read_label(tmp_path / "soft.tif")
    write_image(tmp_path / "whole.nii.gz", Image(np.full((1, 4, 4, 4), 3, np.float32)))
    assert read_label(tmp_path / "whole.nii.gz").array.dtype == np.int32
    Pillow.fromarray(RGB).save(tmp_path / "c.png")
    Pillow.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "g.png")
    Pillow.fromarray(GREY).save(tmp_path / "g.jpg")
    with pytest.raises(InputError, match="c.png"):
        read_label(tmp_path / "c.png")
    assert np.array_equal(read_label(tmp_path / "g.png").array, GREY)
    with pytest.raises(InputError, match="JPEG"):
        read_label(tmp_path / "g.jpg")


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.nii.gz", "x.zarr"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / name
    old = Image(GREY[None] if name == "x.png" else STACK[None])
    write_image(path, old)

    def broken(t, a, image):
        (Path(t) / "part" if Path(t).is_dir() else Path(t)).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(WRITERS, suffix_of(name), broken)
    with pytest.raises(InputError, match=f"(?s){name}.*No space left"):
        write_image(path, old)
    assert np.array_equal(read_image(path).array, old.array) and [
        p.name for p in tmp_path.iterdir()
    ] == [name]


@pytest.mark.parametrize("ending", [e for e in WRITERS if "jp" not in e])
@pytest.mark.parametrize("change", [str.lower, str.upper, str.title, str.swapcase])
def test_the_ending_may_be_written_in_any_way(tmp_path, ending, change):
    path = tmp_path / f"a{change(ending)}"
    label = STACK[0] if ending == ".png" else STACK
    write_label(path, label)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing beside it
    assert np.array_equal(read_label(path).array, label)
    if ending == ".nii.gz":
        assert path.read_bytes()[:2] == b"\x1f\x8b"
    if ending == ".nii":
        assert path.read_bytes()[344:347] == b"n+1"


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("x.png", "x.zarr"):
        with pytest.raises(InputError, match="file"):
            write_image(tmp_path / "file" / name, Image(GREY[None]))
    for name in ("x.bmp", "x.dcm", "x"):
        with pytest.raises(InputError, match="ending"):
            write_image(tmp_path / name, Image(GREY[None]))


def test_big_endian_and_wide_types_become_native(tmp_path):
    p = tmp_path / "x.nii"
    nib.save(nib.Nifti1Image(STACK.T.astype(">f8"), np.eye(4)), p)
    a = read_image(p).array
    assert a.dtype == np.float32 and a.dtype.isnative and a.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, bool])
@pytest.mark.parametrize("rule", ["percentile", (0, 100)])
def test_to_unit_is_in_range_and_monotone(dtype, rule):
    a = np.sort(R.integers(0, 120, 500)).astype(dtype)
    x = to_unit(a, rule)
    assert x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1 and (np.diff(x) >= 0).all()


def test_to_unit_refuses():
    for rule in ("minmax", (1,), (1, 1), (2, 1), (0, np.inf), None, 3):
        with pytest.raises(InputError):
            to_unit(GREY, rule)
    with pytest.raises(InputError, match="percentile"):
        to_unit(np.array([0.0, 255.0]))
    assert to_unit(GREY16).max() == GREY16.max() / np.float32(65535)
    assert np.array_equal(to_unit(GREY, [0, 255]), to_unit(GREY))  # a window from JSON is a list


@pytest.mark.parametrize("zoom", [0.1, 0.33, 0.5, 0.77, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [(17, 30), (64, 64), (1, 5)])
def test_image_and_label_keep_the_same_size(zoom, size):
    a = R.integers(0, 256, (1, 3, *size), np.uint8)
    x = prepare(a, zoom=zoom)
    y = zoom_label(a[0], zoom)
    assert x.shape[1:] == y.shape == (3, *zoom_size(size, zoom)) and set(np.unique(y)) <= set(
        np.unique(a)
    )
    assert np.allclose(
        resize(np.full((2, *size), 0.3, np.float32), zoom_size(size, zoom)), 0.3, atol=1e-6
    )
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(InputError, match="zoom"):
            zoom_size(size, bad)


def test_invert_and_prepare_commute():
    assert np.allclose(
        prepare(GREY[None], invert=True, zoom=0.5), 1 - prepare(GREY[None], zoom=0.5), atol=1e-6
    )


def test_arrange_refuses_what_it_cannot_place():
    for shape, axes in (((2, 3, 4, 5), "TZYX"), ((2, 3, 4, 5), "CSYX"), ((4, 5), "ZX")):
        with pytest.raises(InputError):
            arrange(np.zeros(shape), axes)


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.nii.gz", ".hidden.png", "notes.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "sub").mkdir()
    images, others = list_images(tmp_path)
    assert [p.name for p in images] == ["a.nii.gz", "b.PNG"] and [p.name for p in others] == [
        "notes.csv",
        "sub",
    ]


def test_real_files(real_data):
    ct = read_image(real_data("abdomen_ct_mr") / "ct/images/ct_000.nii.gz")
    y = read_label(real_data("abdomen_ct_mr") / "ct/labels/ct_000.nii.gz")
    assert (
        ct.array.shape == (1, *y.array.shape) == (1, 49, 256, 256)
        and ct.spacing == pytest.approx((5, 1.708, 1.708))
        and orientation(ct) == "SAL"
        and set(np.unique(y.array)) == {0, 1, 2, 3, 4}
    )
    assert read_image(real_data("vessels_extra") / "lightsheet_image.tif").array.shape == (
        1,
        100,
        100,
        100,
    )
    assert (
        read_label(real_data("nuclei_he_fluo") / "histology_he/labels/he_000.png").array.dtype
        == np.uint16
    )
