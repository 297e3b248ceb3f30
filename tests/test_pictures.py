"""PNG, JPEG and TIFF: files composed byte by byte, and the numbers that the specifications say are
in them."""

import gc
import io
import os
import struct
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import ImageOps

from unpaired_kd.core import InputError
from unpaired_kd.data.formats.dicom import find_dicom_files
from unpaired_kd.data.formats.images import (
    Image,
    _is_series,
    decode_file,
    list_images,
    read_image,
    read_label,
    stem_of,
    suffix_of,
)
from unpaired_kd.data.formats.pictures import (
    arrange,
    detect_format,
    keep_first_of_sets,
    list_companions,
    turn_upright,
    unit_length,
)
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.inference.volume_files import open_volume

R = np.random.default_rng(0)
SMALL = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
# TIFF 6.0, tag 274: where the stored first row and first column belong, worked out by hand
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


def packbits(data):
    "Literal runs only."
    return b"".join(
        bytes([len(data[k : k + 128]) - 1]) + data[k : k + 128] for k in range(0, len(data), 128)
    )


def lzw(data):
    "LZW of literals: the table is cleared before its codes grow past nine bits."
    codes = [c for k in range(0, len(data), 200) for c in (256, *data[k : k + 200])] + [257]
    bits = "".join(f"{c:09b}" for c in codes)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[k : k + 8], 2) for k in range(0, len(bits), 8))


def reverse(data):
    return bytes(int(f"{b:08b}"[::-1], 2) for b in data)


PACK = {1: bytes, 5: lzw, 8: zlib.compress, 32773: packbits}


def pack_bits(a, bits):
    "Rows of numbers of so many bits, the highest first, each row from a new byte."
    rows = ["".join(f"{int(v):0{bits}b}" for v in row) for row in a]
    rows = [r + "0" * (-len(r) % 8) for r in rows]
    return b"".join(bytes(int(r[k : k + 8], 2) for k in range(0, len(r), 8)) for r in rows)


def entry(code, value, order):
    "Type, count and bytes of a tag: text, a ratio for the two resolutions, else whole numbers."
    if isinstance(value, bytes):
        return 2, len(value), value
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    kind, letter = (5, "L") if code in (282, 283) else (4, "L") if code in (273, 279) else (3, "H")
    return (
        kind,
        len(many) // (2 if kind == 5 else 1),
        struct.pack(f"{order}{len(many)}{letter}", *many),
    )


def tiff(path, *pages, order="<"):
    "A classic TIFF; each page is (tags, data): data are the bytes of its one strip."
    out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    link = 4  # where the place of the next page is written
    for tags, data in pages:
        tags = {**tags, 273: len(out), 279: len(data), 278: tags[257]}
        out += data + b"\0" * (len(data) % 2)
        entries = b""
        for code, value in sorted(tags.items()):
            kind, count, raw = entry(code, value, order)
            if len(raw) > 4:  # too long for the entry itself
                place = len(out)
                out += raw + b"\0" * (len(raw) % 2)
                raw = struct.pack(order + "L", place)
            entries += struct.pack(order + "HHL", code, kind, count) + raw.ljust(4, b"\0")
        struct.pack_into(order + "L", out, link, len(out))
        out += struct.pack(order + "H", len(tags)) + entries
        link = len(out)
        out += bytes(4)
    path.write_bytes(out)
    return path


def grey(path, a, bits=8, packing=1, order="<", photometric=1, **more):
    "One page of numbers; `more` are further tags, as t274=6."
    data = pack_bits(a, bits) if bits % 8 else np.asarray(a, f"{order}u{bits // 8}").tobytes()
    tags = {
        256: a.shape[1],
        257: a.shape[0],
        258: bits,
        259: packing,
        262: photometric,
        277: 1,
        **{int(k[1:]): v for k, v in more.items()},
    }
    return tiff(path, (tags, PACK[packing](data)), order=order)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("tag", UPRIGHT)
def test_orientation_of_tiff(tmp_path, tag, packing):
    p = grey(
        tmp_path / "x.tif", SMALL, packing=packing, t274=tag, t282=(50, 1), t283=(100, 1), t296=3
    )
    im = read_image(p)
    assert im.array[0].tolist() == read_label(p).array.tolist() == UPRIGHT[tag]
    assert im.spacing == pytest.approx(
        (0.1, 0.2) if tag < 5 else (0.2, 0.1)
    )  # mm, of 100 and 50 pixels a centimetre


@pytest.mark.parametrize("tag", UPRIGHT)
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_orientation_of_photographs(tmp_path, tag, ending):
    big = np.kron(SMALL * 40, np.ones((16, 16), np.uint8))  # even blocks: JPEG keeps their middle
    picture = Pillow.fromarray(big)
    exif = picture.getexif()
    exif[274] = tag
    picture.save(
        tmp_path / f"x{ending}", exif=exif, **({"quality": 100} if ending == ".jpg" else {})
    )
    a = read_image(tmp_path / f"x{ending}").array[0]
    assert np.round(a[8::16, 8::16] / 40).tolist() == UPRIGHT[tag]
    if ending == ".png":
        assert (read_label(tmp_path / "x.png").array[8::16, 8::16] // 40).tolist() == UPRIGHT[tag]


def test_turn_is_what_pillow_shows():
    a = R.integers(0, 256, (3, 5, 7), np.uint8)
    for tag in UPRIGHT:
        picture = Pillow.fromarray(np.moveaxis(a, 0, -1))
        picture.getexif()[274] = tag
        assert np.array_equal(
            turn_upright(a, tag), np.moveaxis(np.asarray(ImageOps.exif_transpose(picture)), -1, 0)
        )
    assert turn_upright(a, 0) is a and turn_upright(a, 9) is a  # unknown numbers turn nothing


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 17, 20, 23, 31, 32])
def test_bit_depths(tmp_path, bits, order, packing):
    a = R.integers(0, 2**bits, (5, 11)).astype(np.uint32)
    p = grey(tmp_path / "x.tif", a, bits, packing, order)
    if bits < 32:
        assert np.array_equal(read_label(p).array, a)
    seen = read_image(p).array[0]
    assert np.array_equal(seen, np.round(a * 255 / (2**bits - 1)) if 1 < bits < 8 else a)
    assert seen.dtype == (
        bool if bits == 1 else np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    )


@pytest.mark.parametrize(
    "more, words",
    [
        ({258: 24}, "24 bits.*first"),  # libtiff and imagecodecs begin with another byte
        ({258: 40}, "40 bits"),
        ({258: 12, 339: 2}, r"12 bits \(SampleFormat 2\)"),  # a sign, and no reader
        ({258: 12, 259: 8, 317: 2}, "predictor.*12 bits"),
    ],
)
def test_numbers_that_nobody_reads_alike(tmp_path, more, words):
    tags = {256: 4, 257: 2, 258: 8, 259: 1, 262: 1, 277: 1, **more}
    data = PACK[tags[259]](bytes(range(4 * 2 * tags[258] // 8)))
    p = tiff(tmp_path / "x.tif", (tags, data), (tags, data))
    for read in (read_image, read_label, open_volume):
        with pytest.raises(InputError, match=f"(?s)x.tif.*{words}"):
            read(p)


def test_short_floats(tmp_path):
    "1.5 in 24 bits: a sign, 7 bits of exponent less 63, 16 bits of fraction."
    tags = {256: 1, 257: 1, 258: 24, 259: 1, 262: 1, 277: 1, 339: 3}
    p = tiff(tmp_path / "x.tif", (tags, (63 << 16 | 1 << 15).to_bytes(3, "little")))
    if find_spec("imagecodecs"):
        assert read_image(p).array.tolist() == [[[1.5]]]
    else:
        with pytest.raises(InputError, match="(?s)x.tif.*24 bits.*imagecodecs"):
            read_image(p)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_white_is_zero(tmp_path, bits, packing):
    a = R.integers(0, 2**bits, (5, 11)).astype(np.uint16)
    p = grey(tmp_path / "x.tif", a, bits, packing, photometric=0)
    stored, top = (a * 17, 255) if bits == 4 else (a, 2**bits - 1)
    assert np.array_equal(read_image(p).array[0], top - stored)
    with pytest.raises(InputError, match="(?s)x.tif.*WhiteIsZero.*minisblack"):
        read_label(p)


def first_page(path):
    "What a TIFF says of its first page."
    with tifffile.TiffFile(path) as tif:
        return tif.pages[0]


def test_boolean_mask_of_tifffile(tmp_path):
    mask = R.random((20, 30)) > 0.7
    for packing in (None, "zlib"):
        tifffile.imwrite(tmp_path / "m.tif", mask, compression=packing)
        assert first_page(tmp_path / "m.tif").photometric.name == "MINISWHITE"
        assert np.array_equal(read_label(tmp_path / "m.tif").array, mask)
    tifffile.imwrite(tmp_path / "m.tif", mask, software="another")
    with pytest.raises(InputError, match="WhiteIsZero"):
        read_label(tmp_path / "m.tif")
    for kind in (np.int16, np.float32):  # no largest number, so no white
        tifffile.imwrite(tmp_path / "s.tif", np.ones((4, 4), kind), photometric="miniswhite")
        with pytest.raises(InputError, match="no white"):
            read_image(tmp_path / "s.tif")


@pytest.mark.parametrize("factor", [1, 256, 257])
@pytest.mark.parametrize("packing", [1, 5])
def test_palettes(tmp_path, factor, packing):
    colours = R.integers(0, 256, (3, 256))
    a = R.integers(0, 256, (5, 11), np.uint8)
    p = grey(
        tmp_path / "x.tif",
        a,
        packing=packing,
        photometric=3,
        t320=(colours * factor).ravel().tolist(),
    )
    assert np.array_equal(read_image(p).array, colours[:, a])
    assert np.array_equal(read_label(p).array, a)
    p = grey(
        tmp_path / "x.tif",
        a // 16,
        4,
        packing,
        photometric=3,
        t320=(colours[:, :16] * factor).ravel().tolist(),
    )
    assert np.array_equal(read_image(p).array, colours[:, a // 16])
    assert np.array_equal(read_label(p).array, a // 16)


def test_palette_of_16_bits_and_alpha(tmp_path):
    table = R.integers(0, 65536, (3, 65536)).astype(np.uint16)
    a = R.integers(0, 65536, (5, 11)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", a, photometric="palette", colormap=table)
    assert np.array_equal(read_image(tmp_path / "x.tif").array, table[:, a] >> 8)
    two = np.stack([SMALL, 255 - SMALL], -1)
    table = np.arange(768) * 80
    tiff(
        tmp_path / "a.tif",
        (
            {256: 3, 257: 2, 258: [8, 8], 259: 1, 262: 3, 277: 2, 338: 2, 320: table.tolist()},
            two.tobytes(),
        ),
    )
    assert np.array_equal(
        read_image(tmp_path / "a.tif").array, (table.reshape(3, 256)[:, SMALL] >> 8)
    )
    assert np.array_equal(read_label(tmp_path / "a.tif").array, SMALL)


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [1, 2, 0])  # associated, unassociated, unspecified
def test_extra_samples(tmp_path, packing, kind):
    rgba = R.integers(0, 256, (5, 7, 4), np.uint8)
    tags = {256: 7, 257: 5, 258: [8] * 4, 259: packing, 262: 2, 277: 4, 338: kind}
    tiff(tmp_path / "x.tif", (tags, PACK[packing](rgba.tobytes())))
    assert np.array_equal(read_image(tmp_path / "x.tif").array, np.moveaxis(rgba[..., :3], -1, 0))
    tags |= {258: [8] * 2, 262: 1, 277: 2}
    tiff(tmp_path / "x.tif", (tags, PACK[packing](rgba[..., :2].tobytes())))
    have = read_image(tmp_path / "x.tif").array
    assert np.array_equal(
        have, np.moveaxis(rgba[..., : 1 if kind else 2], -1, 0)
    )  # without a meaning it is a channel


@pytest.mark.parametrize("packing", [5, 8, 32773])
@pytest.mark.parametrize("order", ["<", ">"])
def test_predictors(tmp_path, packing, order):
    a = R.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    less = np.diff(a, axis=1, prepend=np.uint16(0))  # wraps around
    tags = {256: 7, 257: 5, 258: [16] * 3, 259: packing, 262: 2, 277: 3, 317: 2}
    tiff(
        tmp_path / "x.tif", (tags, PACK[packing](less.astype(f"{order}u2").tobytes())), order=order
    )
    assert np.array_equal(read_image(tmp_path / "x.tif").array, np.moveaxis(a, -1, 0))
    f = R.normal(size=(5, 7)).astype(np.float32)
    ranked = np.stack(
        [np.frombuffer(row.astype(">f4").tobytes(), np.uint8).reshape(7, 4).T.ravel() for row in f]
    )
    less = np.diff(ranked, axis=1, prepend=np.uint8(0))
    tags = {256: 7, 257: 5, 258: 32, 259: packing, 262: 1, 277: 1, 317: 3, 339: 3}
    tiff(tmp_path / "f.tif", (tags, PACK[packing](less.tobytes())), order=order)
    assert np.array_equal(read_image(tmp_path / "f.tif").array[0], f)


def test_predictor_without_compression(tmp_path):
    "libtiff takes the numbers as they are, tifffile adds them up."
    tags = {256: 3, 257: 2, 258: 8, 259: 1, 262: 1, 277: 1, 317: 2}
    for read in (read_image, open_volume):
        with pytest.raises(InputError, match="(?s)x.tif.*predictor"):
            read(tiff(tmp_path / "x.tif", (tags, SMALL.tobytes()), (tags, SMALL.tobytes())))


def test_bits_the_other_way_round(tmp_path):
    for bits in (1, 8):
        a = R.integers(0, 2**bits, (5, 16)).astype(np.uint8)
        data = pack_bits(a, bits)
        for packing in PACK:
            tags = {256: 16, 257: 5, 258: bits, 259: packing, 262: 1, 266: 2, 277: 1}
            tiff(tmp_path / "x.tif", (tags, reverse(PACK[packing](data))))
            assert np.array_equal(read_image(tmp_path / "x.tif").array[0], a)


@pytest.mark.parametrize("kind", ["<i1", "<i2", ">i2", "<i4", "<f2", ">f4", "<f8", "<u8"])
@pytest.mark.parametrize("packing", [1, 5, 8])
def test_signed_and_float(tmp_path, kind, packing):
    kind = np.dtype(kind)
    a = (R.normal(size=(5, 7)) * 50).astype(kind)
    order = ">" if kind.str[0] == ">" else "<"
    tags = {
        256: 7,
        257: 5,
        258: 8 * kind.itemsize,
        259: packing,
        262: 1,
        277: 1,
        339: {"u": 1, "i": 2, "f": 3}[kind.kind],
    }
    tiff(tmp_path / "x.tif", (tags, PACK[packing](a.tobytes())), order=order)
    assert np.array_equal(
        read_image(tmp_path / "x.tif").array[0],
        a.astype(np.float32) if kind.itemsize == 8 and kind.kind == "f" else a,
    )


def test_planes_tiles_and_big_files(tmp_path):
    rgb = R.integers(0, 256, (3, 37, 53), np.uint8)
    ways = {
        "separate": dict(planarconfig="separate"),
        "tiles": dict(tile=(16, 32)),
        "strips": dict(rowsperstrip=7),
        "big": dict(bigtiff=True),
        "motorola": dict(byteorder=">"),
    }
    for name, way in ways.items():
        for packing in (None, "zlib", "packbits"):
            if packing == "packbits":  # tifffile alone does not write it
                continue
            a = rgb if name == "separate" else np.moveaxis(rgb, 0, -1)
            tifffile.imwrite(tmp_path / "x.tif", a, photometric="rgb", compression=packing, **way)
            assert np.array_equal(read_image(tmp_path / "x.tif").array, rgb), (name, packing)


def test_strips_of_lzw_and_last_short_one(tmp_path):
    "Several strips in one page, written by Pillow's libtiff."
    a = R.integers(0, 256, (300, 211), np.uint8)
    for mode in ("L", "RGB"):
        b = a if mode == "L" else np.dstack([a, a // 2, 255 - a])
        Pillow.fromarray(b).save(tmp_path / "x.tif", compression="tiff_lzw", tiffinfo={278: 70})
        assert len(first_page(tmp_path / "x.tif").dataoffsets) == 5
        assert np.array_equal(
            read_image(tmp_path / "x.tif").array, np.atleast_3d(b).transpose(2, 0, 1)
        )


@pytest.mark.parametrize("packing", ["group3", "group4", "tiff_ccitt"])
def test_fax(tmp_path, packing):
    mask = np.kron(R.random((9, 13)) > 0.5, np.ones((4, 4), bool))
    Pillow.fromarray(mask).save(tmp_path / "x.tif", compression=packing)
    assert np.array_equal(read_image(tmp_path / "x.tif").array[0], mask)
    page = first_page(tmp_path / "x.tif")
    if page.photometric.name == "MINISWHITE":
        with pytest.raises(InputError, match="WhiteIsZero"):
            read_label(tmp_path / "x.tif")
    else:
        assert np.array_equal(read_label(tmp_path / "x.tif").array, mask)


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr"])
def test_jpeg_inside_tiff(tmp_path, mode):
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([4 * x, 5 * y, 200 - 2 * x], -1).clip(0, 255).astype(np.uint8)
    picture = Pillow.fromarray(smooth).convert(mode)
    picture.save(tmp_path / "x.tif", compression="jpeg", quality=95)
    page = first_page(tmp_path / "x.tif")
    assert (
        page.compression == 7
        and page.photometric.name == {"L": "MINISBLACK", "RGB": "YCBCR", "YCbCr": "YCBCR"}[mode]
        or mode == "RGB"
    )
    a = read_image(tmp_path / "x.tif").array
    want = np.atleast_3d(
        np.asarray(Pillow.fromarray(smooth).convert("L" if mode == "L" else "RGB"))
    )
    assert (
        a.shape == (want.shape[2], 48, 64)
        and np.abs(a - np.moveaxis(want, -1, 0).astype(float)).max() < 16
    )
    with pytest.raises(InputError, match="(?s)x.tif.*JPEG"):
        read_label(tmp_path / "x.tif")


def test_jpeg_of_rgb_with_a_tag_for_subsampling(tmp_path):
    "tifffile and slide scanners write the tag, though it is about YCbCr only."
    rgb = np.kron(R.integers(0, 256, (2, 2, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    data = io.BytesIO()
    Pillow.fromarray(rgb).save(data, "JPEG", quality=100, subsampling=0, keep_rgb=True)
    tags = {256: 32, 257: 32, 258: [8] * 3, 259: 7, 262: 2, 277: 3, 530: [2, 2]}
    tiff(tmp_path / "x.tif", (tags, data.getvalue()))
    a = read_image(tmp_path / "x.tif").array
    assert np.abs(np.moveaxis(a, 0, -1) - rgb.astype(float)).max() <= 2


def test_palette_of_one_bit(tmp_path):
    a = R.integers(0, 2, (5, 11)).astype(np.uint8)
    table = np.array([[9, 200], [0, 30], [255, 7]])
    p = grey(tmp_path / "x.tif", a, 1, photometric=3, t320=(table * 257).ravel().tolist())
    assert np.array_equal(read_image(p).array, table[:, a])
    assert np.array_equal(read_label(p).array, a)


def test_colours_that_are_not_ours(tmp_path):
    for code, name, n in (
        (5, "SEPARATED", 4),
        (8, "CIELAB", 3),
        (6, "YCBCR", 3),
        (32803, "CFA", 1),
    ):
        a = R.integers(0, 256, (4, 5, n), np.uint8)
        tiff(
            tmp_path / "x.tif",
            ({256: 5, 257: 4, 258: [8] * n, 259: 1, 262: code, 277: n, 530: [1, 1]}, a.tobytes()),
        )
        with pytest.raises(InputError, match=f"(?s)x.tif.*{name}"):
            read_image(tmp_path / "x.tif")


def test_no_stack_stays_open(tmp_path):
    a = R.integers(0, 256, (4, 20, 30), np.uint8)
    tags = {256: 3, 257: 2, 258: 8, 259: 34887, 262: 1, 277: 1}
    tiff(tmp_path / "refused.tif", (tags, b"whatever"), (tags, b"whatever"))
    tifffile.imwrite(tmp_path / "packed.tif", a, compression="zlib", photometric="minisblack")
    gc.collect()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match="imagecodecs"):
            open_volume(tmp_path / "refused.tif")
        volume = open_volume(tmp_path / "packed.tif")
        gc.collect()
        assert np.array_equal(volume[:, 1:3][0], a[1:3])
        del volume
        gc.collect()
    assert [str(w.message) for w in heard if str(tmp_path) in str(w.message)] == []


@pytest.mark.skipif(find_spec("imagecodecs") is not None, reason="imagecodecs decodes them")
def test_packing_that_needs_more(tmp_path):
    for code in (50001, 34712, 34887):  # WebP, JPEG 2000, LERC
        tags = {256: 3, 257: 2, 258: 8, 259: code, 262: 1, 277: 1}
        tiff(tmp_path / "x.tif", (tags, b"whatever"), (tags, b"whatever"))
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match="(?s)x.tif.*imagecodecs") as e:
                read(tmp_path / "x.tif")
            assert "damaged" not in str(e.value)


LOSSY = {
    33003: "APERIO_JP2000_YCBC",
    34712: "JPEG2000",
    34887: "LERC",
    34934: "JPEGXR",
    50001: "WEBP",
    50002: "JPEGXL",
    65000: "EER_V0",
    60001: "60001",  # not known, so not known to be without loss
}


@pytest.mark.parametrize("code", LOSSY)
def test_labels_are_stored_without_loss(tmp_path, code):
    "Whether imagecodecs is there or not: installing it is no remedy."
    tags = {256: 3, 257: 2, 258: 8, 259: code, 262: 1, 277: 1}
    with pytest.raises(InputError, match=f"(?s)x.tif.*{LOSSY[code]}.*without loss"):
        read_label(tiff(tmp_path / "x.tif", (tags, b"whatever")))


@pytest.mark.skipif(find_spec("imagecodecs") is None, reason="imagecodecs packs them")
@pytest.mark.parametrize("packing", ["zlib", "lzw", "packbits", "zstd", "lzma", "png"])
def test_packings_without_loss(tmp_path, packing):
    a = R.integers(0, 256, (32, 48), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", a, compression=packing, photometric="minisblack")
    assert np.array_equal(read_label(tmp_path / "x.tif").array, a)


def test_pages_of_several_kinds(tmp_path):
    base = {256: 3, 257: 2, 258: 8, 259: 1, 262: 1, 277: 1}
    page = (base, SMALL.tobytes())
    for other in ({262: 0}, {274: 3}):
        for n in (1, 9):  # the tenth page of many is looked at too
            pages = [page] * n + [({**base, **other}, SMALL.tobytes())] + [page] * n
            with pytest.raises(InputError, match="(?s)x.tif.*(page|images)"):
                read_image(tiff(tmp_path / "x.tif", *pages))
    table = [k * 80 for k in range(768)]
    pages = [({**base, 262: 3, 320: t}, SMALL.tobytes()) for t in (table, table[::-1])]
    with pytest.raises(InputError, match="page 2"):
        read_image(tiff(tmp_path / "x.tif", *pages))
    small = ({**base, 256: 1, 257: 1, 254: 1}, b"\1")  # a thumbnail is no second image
    assert np.array_equal(read_image(tiff(tmp_path / "x.tif", page, small)).array[0], SMALL)


@pytest.mark.parametrize("packings", [(8, 1, 8), (1, 8, 5), (5, 5, 1)])
def test_slices_that_are_packed_in_several_ways(tmp_path, packings):
    "They are slices in the order of the file; formats with a header promise one packing."
    stack = np.stack([SMALL + 10 * k for k in range(3)])
    base = {256: 3, 257: 2, 258: 8, 262: 1, 277: 1}
    pages = [({**base, 259: c}, PACK[c](plane.tobytes())) for c, plane in zip(packings, stack)]
    tiff(tmp_path / "x.tif", *pages)
    assert np.array_equal(read_image(tmp_path / "x.tif").array[0], stack)
    assert np.array_equal(read_label(tmp_path / "x.tif").array, stack)
    pages[0][0][270] = b"ImageJ=1.54f\nimages=3\nslices=3\n\0"
    with pytest.raises(InputError, match="(?s)x.tif.*compressed in several ways"):
        read_image(tiff(tmp_path / "x.tif", *pages))


def test_two_volumes_in_one_file(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as t:
        for _ in range(2):
            t.write(np.stack([SMALL] * 3), photometric="minisblack")
    with pytest.raises(
        InputError, match=r"(?s)x.tif.*2 images of one size.*: \(3, 2, 3\), \(3, 2, 3\)"
    ):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("first", [True, False])
def test_a_thumbnail_needs_no_decoder(tmp_path, packing, first):
    base = {256: 3, 257: 2, 258: 8, 262: 1, 277: 1}
    image = ({**base, 259: packing}, PACK[packing](SMALL.tobytes()))
    small = ({**base, 256: 1, 257: 1, 254: 1, 259: 34712}, b"JPEG 2000")
    p = tiff(tmp_path / "x.tif", *([small, image] if first else [image, small]))
    assert np.array_equal(read_image(p).array[0], SMALL)
    assert np.array_equal(read_label(p).array, SMALL)


def test_pages_that_say_too_little(tmp_path):
    full = {256: 3, 257: 2, 258: 8, 259: 1, 262: 1, 277: 1}
    bare = {k: v for k, v in full.items() if k != 262}
    for pages, words in (
        ([(bare, SMALL.tobytes())], "no photometric tag"),
        ([({257: 2}, b"")], "page 1 has no width"),
        ([(full, SMALL.tobytes()), ({257: 2}, b"")], "page 2 has no width"),
    ):
        with pytest.raises(InputError, match=f"(?s)x.tif.*{words}"):
            read_image(tiff(tmp_path / "x.tif", *pages))


def test_pyramid_in_sub_ifds(tmp_path):
    a = R.integers(0, 256, (64, 96), np.uint8)
    with tifffile.TiffWriter(tmp_path / "x.ome.tif", ome=True) as t:
        t.write(a, subifds=1, metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25})
        t.write(a[::2, ::2], subfiletype=1)
    im = read_image(tmp_path / "x.ome.tif")
    assert np.array_equal(im.array[0], a) and im.spacing == pytest.approx((0.00025, 0.0005))


def test_calibration_of_imagej(tmp_path):
    stored = np.array([[32768, 32769], [0, 65535]], np.uint16)
    note = "ImageJ=1.54f\ncf=0\nc0=-32768.0\nc1=1.0\nvunit=gray value\n"
    tifffile.imwrite(
        tmp_path / "x.tif", stored, description=note, metadata=None, photometric="minisblack"
    )
    assert read_image(tmp_path / "x.tif").array[0].tolist() == [[0, 1], [-32768, 32767]]
    stack = np.stack([stored] * 3)
    with tifffile.TiffWriter(tmp_path / "s.tif") as t:
        for k, plane in enumerate(stack):
            t.write(plane, description=note if k == 0 else None, metadata=None, contiguous=False)
    with pytest.raises(InputError, match="calibration"):
        open_volume(tmp_path / "s.tif")


@pytest.mark.parametrize("curve, told", [(1, False), (8, False), (21, False), (20, True)])
def test_curves_of_imagej(tmp_path, curve, told):
    "A polynomial, a gamma, a density: ImageJ shows other numbers than are stored. 20 is none."
    note = f"ImageJ=1.54f\nimages=3\nslices=3\ncf={curve}\nc0=1.0\nc1=2.0\nc2=3.0\n"
    stack = R.integers(0, 256, (3, 8, 9), np.uint8)
    tifffile.imwrite(
        tmp_path / "x.tif", stack, description=note, metadata=None, photometric="minisblack"
    )
    if told:
        assert np.array_equal(read_image(tmp_path / "x.tif").array[0], stack)
        assert np.array_equal(open_volume(tmp_path / "x.tif")[...][0], stack)
        return
    for read in (read_image, read_label, open_volume):
        with pytest.raises(InputError, match=f"(?s)x.tif.*curve.*cf={curve}"):
            read(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "unit, mm",
    [
        ("micron", 1e-3),
        ("\\u00B5m", 1e-3),
        ("\\u03bcm", 1e-3),
        ("\\u00C5", 1e-7),
        ("\\u212B", 1e-7),
        ("nm", 1e-6),
        ("inch", 25.4),
        ("cm", 10.0),
        ("pixel", None),
    ],
)
def test_units_of_imagej(tmp_path, unit, mm):
    tifffile.imwrite(
        tmp_path / "x.tif",
        np.zeros((4, 8, 8), np.uint8),
        imagej=True,
        resolution=(4, 2),
        metadata={"spacing": 3.0, "unit": unit, "axes": "ZYX"},
    )
    assert read_image(tmp_path / "x.tif").spacing == (
        None if mm is None else pytest.approx((3 * mm, mm / 2, mm / 4))
    )


@pytest.mark.parametrize(
    "per_cm", [28.3465, 28.35, 28, 37.795, 38, 39.37, 59.06, 118, 118.11, 236.2]
)
def test_dots_per_inch_counted_per_centimetre(tmp_path, per_cm):
    tifffile.imwrite(
        tmp_path / "x.tif", MASK, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER"
    )
    assert read_image(tmp_path / "x.tif").spacing is None


@pytest.mark.parametrize("per_cm", [1, 10, 20, 28.57, 40, 50, 100, 117.65, 400, 1000, 20000])
def test_pixels_per_centimetre(tmp_path, per_cm):
    tifffile.imwrite(
        tmp_path / "x.tif", MASK, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER"
    )
    assert read_image(tmp_path / "x.tif").spacing == pytest.approx((10 / per_cm,) * 2)


@pytest.mark.parametrize(
    "lines, spacing",
    [
        ("unit=micron\nzunit=mm\nspacing=2.0\n", (2.0, 0.0005, 0.00025)),
        ("unit=mm\nyunit=cm\nzunit=nm\nspacing=2.0\n", (2e-6, 5.0, 0.25)),
        ("unit=mm\n", (1.0, 0.5, 0.25)),  # ImageJ writes no depth of 1
        ("unit=mm\nzunit=pixel\nspacing=2.0\n", None),
        ("zunit=mm\nspacing=2.0\n", None),
    ],
)
def test_a_unit_an_axis_in_imagej(tmp_path, lines, spacing):
    note = "ImageJ=1.54f\nimages=3\nslices=3\n" + lines
    stack = R.integers(0, 256, (3, 8, 9), np.uint8)
    tifffile.imwrite(
        tmp_path / "x.tif",
        stack,
        description=note,
        metadata=None,
        photometric="minisblack",
        resolution=(4, 2),
    )
    want = spacing and pytest.approx(spacing)
    assert read_image(tmp_path / "x.tif").spacing == want
    assert open_volume(tmp_path / "x.tif").spacing == want


def ome(
    path,
    a,
    order="XYZCT",
    sizes=None,
    physical="",
    planes=None,
    head="",
    more="",
    uuid=None,
    images=1,
    **way,
):
    "An OME-TIFF with a header of its own; `a` (planes, H, W). `way`: how tifffile writes pages."
    sizes = sizes or {"Z": len(a), "C": 1, "T": 1}
    size = " ".join(f'Size{k}="{v}"' for k, v in sizes.items())
    data = planes if planes is not None else f'<TiffData IFD="0" PlaneCount="{len(a)}"/>'
    channels = "".join(
        f'<Channel ID="Channel:0:{k}" SamplesPerPixel="1"/>' for k in range(sizes["C"])
    )
    image = (
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="{order}" Type="uint8" '
        f'SizeX="{a.shape[2]}" SizeY="{a.shape[1]}" {size} {physical}>'
        f"{channels}{data}</Pixels></Image>"
    )
    xml = (
        f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
        f"{f' UUID={chr(34)}{uuid}{chr(34)}' if uuid else ''}>{head}{image * images}{more}</OME>"
    )
    with tifffile.TiffWriter(path) as t:
        for k, plane in enumerate(a):
            t.write(
                plane,
                description=xml.encode() if k == 0 else None,
                metadata=None,
                contiguous=False,
                **{"photometric": "minisblack", **way},
            )
    return path


@pytest.mark.parametrize(
    "unit, mm",
    [
        ("µm", 1e-3),
        ("nm", 1e-6),
        ("Å", 1e-7),
        ("mm", 1.0),
        ("cm", 10.0),
        ("m", 1e3),
        ("in", 25.4),
        ("thou", 0.0254),
        ("pt", 25.4 / 72),
        ("pm", 1e-9),
        ("km", 1e6),
        ("Mm", 1e9),
        ("pixel", None),
        ("reference frame", None),
    ],
)
def test_units_of_ome(tmp_path, unit, mm):
    sizes = " ".join(
        f'PhysicalSize{a}="{s}" PhysicalSize{a}Unit="{unit}"' for a, s in zip("XYZ", (0.5, 0.25, 2))
    )
    im = read_image(
        ome(tmp_path / "x.ome.tif", R.integers(0, 256, (3, 4, 5), np.uint8), physical=sizes)
    )
    assert im.spacing == (None if mm is None else pytest.approx((2 * mm, 0.25 * mm, 0.5 * mm)))


def test_sizes_of_ome_that_say_nothing(tmp_path):
    for size in ("0", "-1", "NaN", "INF"):
        assert (
            read_image(
                ome(
                    tmp_path / "x.tif",
                    SMALL[None],
                    physical=f'PhysicalSizeX="{size}" PhysicalSizeY=".5"',
                )
            ).spacing
            is None
        )
    other = (  # not this image
        '<Image ID="Image:9"><Pixels DimensionOrder="XYZCT" Type="uint8" SizeX="99" SizeY="99" '
        'SizeZ="1" SizeC="1" SizeT="1" PhysicalSizeX="7" PhysicalSizeY="7"/></Image>'
    )
    p = ome(
        tmp_path / "x.tif",
        SMALL[None],
        physical='PhysicalSizeX="1" PhysicalSizeY="2" PhysicalSizeXUnit="mm" '
        'PhysicalSizeYUnit="mm"',
        more=other,
    )
    assert read_image(p).spacing == (2.0, 1.0)


@pytest.mark.parametrize("order", ["XYZCT", "XYCZT", "XYTZC", "XYCTZ", "XYZTC", "XYTCZ"])
def test_order_of_planes_in_ome(tmp_path, order):
    full = R.integers(0, 256, (3, 2, 4, 5), np.uint8)  # Z, C, Y, X
    planes = []
    sizes = {"Z": 3, "C": 2, "T": 1}
    for last in range(sizes[order[4]]):
        for middle in range(sizes[order[3]]):
            for first in range(sizes[order[2]]):  # the first letter runs fastest
                at = dict(zip(order[2:], (first, middle, last)))
                planes.append(full[at["Z"], at["C"]])
    a = read_image(ome(tmp_path / "x.ome.tif", np.stack(planes), order, sizes)).array
    assert np.array_equal(a, full.swapaxes(0, 1))


def test_sets_of_ome_files(tmp_path):
    one, two = (f"urn:uuid:{str(k) * 8}" for k in (1, 2))
    a = R.integers(1, 256, (4, 6, 7), np.uint8)

    def planes(second):
        return (
            '<TiffData FirstZ="0" IFD="0" PlaneCount="2">'
            f'<UUID FileName="a.ome.tif">{one}</UUID></TiffData>'
            '<TiffData FirstZ="2" IFD="0" PlaneCount="2">'
            f'<UUID FileName="{second}">{two}</UUID></TiffData>'
        )

    def write(folder, second):
        folder.mkdir(exist_ok=True)
        for name, part, uuid in (("a.ome.tif", a[:2], one), ("b.ome.tif", a[2:], two)):
            ome(
                folder / name,
                part,
                sizes={"Z": 4, "C": 1, "T": 1},
                planes=planes(second),
                uuid=uuid,
            )
        return folder / "a.ome.tif"

    first = write(tmp_path / "set", "b.ome.tif")
    assert np.array_equal(read_image(first).array[0], a)
    assert np.array_equal(open_volume(first)[...][0], a)
    (tmp_path / "set" / "b.ome.tif").unlink()
    for read in (read_image, open_volume):
        with pytest.raises(InputError, match="(?s)a.ome.tif.*b.ome.tif"):
            read(first)
    write(tmp_path / "elsewhere", "b.ome.tif")
    for name in (
        "../elsewhere/b.ome.tif",
        str(tmp_path / "elsewhere" / "b.ome.tif"),
        "..\\elsewhere\\b.ome.tif",
        "C:b.ome.tif",
    ):
        first = write(tmp_path / "set", name)
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match="not opened"):
                read(first)


def pair(folder, second, names=("a.ome.tif", "b.ome.tif"), known=("urn:1", "urn:2"), told=None):
    "A set of two files of two slices each; `second` changes the second one; `told`: their roots."
    a = R.integers(1, 256, (4, 6, 7), np.uint8)
    planes = "".join(
        f'<TiffData FirstZ="{2 * k}" IFD="0" PlaneCount="2">'
        f'<UUID FileName="{n}">{u}</UUID></TiffData>'
        for k, (n, u) in enumerate(zip(("a.ome.tif", "b.ome.tif"), known))
    )
    for k, name in enumerate(names):
        way = dict(sizes={"Z": 4, "C": 1, "T": 1}, planes=planes, uuid=(told or known)[k])
        part = a[2 * k : 2 * k + 2]
        if k == 1:
            part = second.pop("pages", part)
            way |= second
        ome(folder / name, part, **way)
    return folder / "a.ome.tif", a


@pytest.mark.parametrize("told", [None, (None, None)])
def test_files_of_a_set_are_read_by_their_names(tmp_path, told):
    p, a = pair(tmp_path, {"compression": "zlib"}, told=told)
    for name in ("a.ome.tif", "b.ome.tif"):
        assert np.array_equal(read_image(tmp_path / name).array[0], a)


@pytest.mark.parametrize(
    "second, words",
    [
        ({"uuid": "urn:3"}, "another file.*urn:3.*urn:2"),  # of another acquisition
        ({"uuid": None}, "another file"),
        ({"photometric": "miniswhite"}, "photometric"),
        ({"pages": np.ones((2, 6, 8), np.uint8)}, "size or type"),
        ({"pages": np.ones((2, 6, 7), np.uint16)}, "size or type"),
    ],
)
def test_other_files_of_a_set_are_looked_at(tmp_path, second, words):
    p, _ = pair(tmp_path, second)
    for read in (read_image, read_label, open_volume):
        with pytest.raises(InputError, match=f"(?s)a.ome.tif: b.ome.tif.*{words}") as e:
            read(p)
        assert "damaged" not in str(e.value)


def test_files_of_a_set_that_are_no_tiff_packed_or_exchanged(tmp_path):
    p, a = pair(tmp_path, {})
    other = tmp_path / "b.ome.tif"
    whole = other.read_bytes()
    other.write_bytes(b"hello")
    with pytest.raises(InputError, match="(?s)a.ome.tif: b.ome.tif.*cannot be read"):
        read_image(p)
    with tifffile.TiffFile(io.BytesIO(whole)) as tif:
        header = tif.pages[0].description
    tags = {256: 7, 257: 6, 258: 8, 259: 5, 262: 1, 277: 1}
    pages = [(dict(tags), lzw(plane.tobytes())) for plane in a[2:]]
    pages[0][0][270] = header.encode() + b"\0"
    tiff(other, *pages)
    if find_spec("imagecodecs"):
        assert np.array_equal(read_image(p).array[0], a)
    else:
        with pytest.raises(InputError, match="(?s)a.ome.tif: b.ome.tif.*LZW.*imagecodecs"):
            read_image(p)
    pair(tmp_path, {}, names=("b.ome.tif", "a.ome.tif"))
    with pytest.raises(InputError, match="(?s)a.ome.tif.*another file.*own names"):
        read_image(p)


@pytest.mark.parametrize("known", [("urn:1", "urn:1"), ("urn:1", "")])
def test_files_of_a_set_that_have_no_uuid_of_their_own(tmp_path, known):
    "tifffile would take the planes of the first file twice."
    p, _ = pair(tmp_path, {}, known=known, told=(None, None))
    with pytest.raises(InputError, match="(?s)a.ome.tif.*b.ome.tif.*UUID of its own"):
        read_image(p)


@pytest.mark.parametrize("packing", [1, 5])
def test_a_renamed_file_without_uuid_of_its_own(tmp_path, packing):
    "All its planes are in one file, so that is this one, and not another of the old name."
    planes = '<TiffData IFD="0"><UUID FileName="old.ome.tif">urn:1</UUID></TiffData>'
    old = ome(tmp_path / "old.ome.tif", SMALL[None] + 9, planes=planes)
    with tifffile.TiffFile(old) as tif:
        header = tif.pages[0].description
    tags = {256: 3, 257: 2, 258: 8, 259: packing, 262: 1, 277: 1, 270: header.encode() + b"\0"}
    p = tiff(tmp_path / "new.ome.tif", (tags, PACK[packing](SMALL.tobytes())))
    assert np.array_equal(read_image(old).array[0], SMALL + 9)
    assert np.array_equal(read_image(p).array[0], SMALL)


def test_an_ome_file_that_was_renamed(tmp_path):
    own = "urn:uuid:1"
    p = ome(
        tmp_path / "new name.tif",
        SMALL[None],
        planes='<TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="old.ome.tif">{own}</UUID></TiffData>',
        uuid=own,
    )
    assert np.array_equal(read_image(p).array[0], SMALL)


def test_ome_headers_that_lack_something(tmp_path):
    with pytest.raises(InputError, match="(?s)x.tif.*all.companion.ome"):
        read_image(
            ome(
                tmp_path / "x.tif",
                SMALL[None],
                head='<BinaryOnly MetadataFile="all.companion.ome" UUID="urn:uuid:1"/>',
            )
        )
    half = '<TiffData FirstZ="0" IFD="0" PlaneCount="1"/>'
    with pytest.raises(InputError, match="(?s)x.tif.*planes"):
        read_image(
            ome(
                tmp_path / "x.tif",
                np.stack([SMALL] * 2),
                sizes={"Z": 4, "C": 1, "T": 1},
                planes=half + '<TiffData FirstZ="3" IFD="1" PlaneCount="1"/>',
            )
        )
    for read in (read_image, open_volume):
        tifffile.imwrite(
            tmp_path / "bad.tif",
            np.stack([SMALL] * 3),
            description=b"<OME><Image></OME>",
            metadata=None,
            photometric="minisblack",
        )
        with pytest.raises(InputError, match="(?s)bad.tif.*OME header"):
            read(tmp_path / "bad.tif")


def test_blocks_are_what_reading_gives(tmp_path):
    stack = R.integers(0, 4096, (4, 20, 30)).astype(np.uint16)
    for name, way in {
        "plain": {},
        "deflate": dict(compression="zlib"),
        "motorola": dict(byteorder=">"),
        "tiles": dict(tile=(16, 16), compression="zlib"),
        "pages": dict(metadata=None),
    }.items():
        tifffile.imwrite(
            tmp_path / "x.tif",
            stack,
            photometric="minisblack",
            resolution=(50, 100),
            resolutionunit=3,
            **way,
        )
        v = open_volume(tmp_path / "x.tif")
        im = read_image(tmp_path / "x.tif")
        assert (
            np.array_equal(v[...], im.array)
            and np.array_equal(v[:, 1:3, 4:9, 5:], im.array[:, 1:3, 4:9, 5:])
            and v.spacing == im.spacing
        ), name
    for name, change in {
        "MINISWHITE": {262: 0},
        "orientation": {274: 6},
        "PALETTE": {262: 3, 320: [0] * 768},
    }.items():
        page = ({256: 3, 257: 2, 258: 8, 259: 1, 262: 1, 277: 1, **change}, SMALL.tobytes())
        with pytest.raises(InputError, match=f"(?s)x.tif.*{name}"):
            open_volume(tiff(tmp_path / "x.tif", page, page))
    page = ({256: 3, 257: 2, 258: 4, 259: 1, 262: 1, 277: 1}, pack_bits(SMALL, 4))
    with pytest.raises(InputError, match="(?s)x.tif.*4 bits"):
        open_volume(tiff(tmp_path / "x.tif", page, page))
    page = ({256: 3, 257: 2, 258: 1, 259: 1, 262: 1, 277: 1}, pack_bits(SMALL % 2, 1))
    assert np.array_equal(
        open_volume(tiff(tmp_path / "x.tif", page, page))[...][0], np.stack([SMALL % 2] * 2)
    )
    page = ({256: 3, 257: 2, 258: 8, 259: 5, 262: 1, 277: 1}, lzw(SMALL.tobytes()))
    tiff(tmp_path / "x.tif", page, page)
    try:
        v = open_volume(tmp_path / "x.tif")
    except InputError as e:
        assert "imagecodecs" in str(e) and "damaged" not in str(e)
    else:
        assert np.array_equal(v[...], read_image(tmp_path / "x.tif").array)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, a, bits, colour=0, more=b""):
    "A PNG of rows without a filter; `more` are chunks before the data."
    a = a.reshape(a.shape[0], -1)
    rows = b"".join(
        b"\0" + (pack_bits(row[None], bits) if bits < 16 else row.astype(">u2").tobytes())
        for row in a
    )
    width = a.shape[1] // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", width, len(a), bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    "clear", [b"", chunk(b"tRNS", b"\0\1")]
)  # one grey is transparent: no reason to change numbers
def test_grey_png(tmp_path, bits, clear):
    a = R.integers(0, 2**bits, (5, 11)).astype(np.uint16)
    p = png(tmp_path / "x.png", a, bits, more=clear)
    if clear and (a == 1).any():  # in a label it may be the object, or not
        with pytest.raises(InputError, match="(?s)x.png.*alpha"):
            read_label(p)
    else:
        assert np.array_equal(read_label(p).array, a)
    seen = read_image(p).array[0]
    assert np.array_equal(
        seen, a * (255 // (2**bits - 1)) if bits in (2, 4) else a
    ) and seen.dtype == (bool if bits == 1 else np.uint16 if bits == 16 else np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_png(tmp_path, bits):
    colours = R.integers(0, 256, (2**bits, 3), np.uint8)
    a = R.integers(0, 2**bits, (5, 11)).astype(np.uint8)
    p = png(
        tmp_path / "x.png",
        a,
        bits,
        3,
        chunk(b"PLTE", colours.tobytes()) + chunk(b"tRNS", b"\0" * 2),
    )
    assert np.array_equal(read_label(p).array, a)
    assert np.array_equal(read_image(p).array, np.moveaxis(colours[a], -1, 0))


MASK = np.pad(np.full((3, 4), 255, np.uint8), ((1, 2), (1, 3)))
ALPHAS = {  # colour, alpha, and whether the colour alone says what is drawn
    "the same everywhere": (MASK, np.full_like(MASK, 7), True),
    "fully transparent": (MASK, np.zeros_like(MASK), True),
    "background is transparent": (MASK, MASK // 2, True),
    "white, drawn in alpha": (np.full_like(MASK, 255), MASK, False),
    "black, drawn in alpha": (np.zeros_like(MASK), MASK, False),
    "transparent white around black": (255 - MASK, MASK, False),
    "soft edge": (MASK, MASK // 255 * np.arange(8, dtype=np.uint8), False),
}


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_of_labels(tmp_path, name, channels):
    "A mask may be drawn in the alpha: then the numbers alone are no label."
    colour, alpha, told = ALPHAS[name]
    both = np.stack([colour] * channels + [alpha], -1)
    grey = channels == 1
    png(tmp_path / "x.png", both, 8, 4 if grey else 6)
    tags = {256: 8, 257: 6, 258: [8] * (channels + 1), 259: 5, 262: 1 if grey else 2}
    tags |= {277: channels + 1, 338: 2}
    tiff(tmp_path / "x.tif", (tags, lzw(both.tobytes())))
    paths = [tmp_path / "x.png", tmp_path / "x.tif"]
    if not grey:
        nib = pytest.importorskip("nibabel")
        pixels = both.view([(c, "u1") for c in "RGBA"])[..., 0].T
        nib.save(
            nib.Nifti1Image(np.ascontiguousarray(pixels)[:, :, None], None), tmp_path / "x.nii"
        )
        paths.append(tmp_path / "x.nii")
    for p in paths:
        assert np.array_equal(read_image(p).array.reshape(channels, 6, 8)[0], colour)
        if told:
            assert np.array_equal(read_label(p).array.reshape(6, 8), colour)
        else:
            with pytest.raises(InputError, match=f"(?s){p.name}.*alpha"):
                read_label(p)


@pytest.mark.parametrize("key, told", [(0, True), (255, False), (9, True)])
def test_a_transparent_grey_or_colour_of_labels(tmp_path, key, told):
    for colour, n in ((0, 1), (2, 3)):
        a = np.stack([MASK] * n, -1)
        clear = chunk(b"tRNS", struct.pack(">H", key) * n)
        p = png(tmp_path / "x.png", a, 8, colour, clear)
        if told:
            assert np.array_equal(read_label(p).array, MASK)
        else:
            with pytest.raises(InputError, match="(?s)x.png.*alpha"):
                read_label(p)


def test_other_png(tmp_path):
    rgba = R.integers(0, 256, (5, 7, 4), np.uint8)
    assert np.array_equal(
        read_image(png(tmp_path / "x.png", rgba, 8, 6)).array, np.moveaxis(rgba[..., :3], -1, 0)
    )
    assert np.array_equal(
        read_image(png(tmp_path / "x.png", rgba[..., :2], 8, 4)).array[0], rgba[..., 0]
    )
    for colour, n in ((2, 3), (4, 2), (6, 4)):
        with pytest.raises(InputError, match="(?s)x.png.*16-bit"):
            read_image(png(tmp_path / "x.png", rgba[..., :n].astype(np.uint16) * 257, 16, colour))
    frames = [Pillow.fromarray(np.full((4, 4), 90 * k, np.uint8)) for k in range(3)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="(?s)x.png.*3 frames"):
        read_image(tmp_path / "x.png")


def test_jpeg_of_four_colours(tmp_path):
    rgb = np.kron(R.integers(0, 256, (3, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    Pillow.fromarray(rgb).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    a = read_image(tmp_path / "x.jpg").array
    assert (
        a.shape == (3, 48, 64)
        and np.abs(
            a[:, 8::16, 8::16] - np.moveaxis(rgb, -1, 0)[:, 8::16, 8::16].astype(float)
        ).max()
        < 8
    )


def test_content_decides(tmp_path):
    a = R.integers(0, 256, (16, 24), np.uint8)
    Pillow.fromarray(a).save(tmp_path / "a.jpg")
    Pillow.fromarray(a).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", a)
    Pillow.fromarray(a).save(tmp_path / "a.bmp")
    jpeg = read_image(tmp_path / "a.jpg").array
    assert [detect_format(tmp_path / f"a{s}") for s in (".jpg", ".png", ".tif", ".bmp")] == [
        ".jpg",
        ".png",
        ".tif",
        "",
    ]
    for real in (".jpg", ".png", ".tif"):
        for name in ("x.png", "x.jpg", "x.tif", "x.tiff", "x.JPEG"):
            (tmp_path / name).write_bytes((tmp_path / f"a{real}").read_bytes())
            assert np.array_equal(
                read_image(tmp_path / name).array, jpeg if real == ".jpg" else a[None]
            )
            if real == ".jpg":
                with pytest.raises(InputError, match=f"(?s){name}.*JPEG"):
                    read_label(tmp_path / name)
            else:
                assert np.array_equal(read_label(tmp_path / name).array, a)
    (tmp_path / "x.png").write_bytes((tmp_path / "a.bmp").read_bytes())
    with pytest.raises(InputError, match="(?s)x.png.*neither PNG nor JPEG"):
        read_image(tmp_path / "x.png")


def test_large_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 1000)  # far below this picture
    a = R.integers(0, 256, (60, 70), np.uint8)
    Pillow.fromarray(a).save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png").array[0], a)
    Pillow.fromarray(a).save(tmp_path / "x.tif", compression="tiff_lzw")
    assert np.array_equal(read_image(tmp_path / "x.tif").array[0], a)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(InputError, match="(?s)x.png.*70 x 60 pixels.*memory") as e:
        read_image(tmp_path / "x.png")
    assert "damaged" not in str(e.value)


def test_units():
    assert (
        unit_length("Mm") == 1e9
        and unit_length("mm")
        == unit_length("MM")
        == unit_length("Millimeters")
        == unit_length("millimetre")
        == 1
    )
    assert (
        unit_length("µm")
        == unit_length("μm")
        == unit_length("um")
        == unit_length("micron")
        == pytest.approx(1e-3)
    )
    assert [unit_length(u) for u in ("pixel", "reference frame", "", None, "furlong")] == [None] * 5


def test_written_files_come_back(tmp_path):
    arrays = {
        "grey": R.integers(0, 256, (1, 8, 9), np.uint8),
        "deep": R.integers(0, 65536, (1, 8, 9)).astype(np.uint16),
        "colour": R.integers(0, 256, (3, 8, 9), np.uint8),
        "stack": R.integers(-99, 99, (1, 4, 8, 9)).astype(np.int16),
        "colour stack": R.integers(0, 256, (3, 4, 8, 9), np.uint8),
        "two channels": R.normal(size=(2, 4, 8, 9)).astype(np.float32),
        "five channels": R.integers(0, 9, (5, 8, 9)).astype(np.int32),
        "mask": R.random((1, 8, 9)) > 0.5,
    }
    for name, a in arrays.items():
        spacing = (3.0, 0.5, 0.25)[-(a.ndim - 1) :]
        for ending in (".tif", ".zarr", ".png"):
            if ending == ".png" and name not in ("grey", "deep", "colour", "mask"):
                continue
            write_image(tmp_path / f"{name}{ending}", Image(a, spacing))
            back = read_image(tmp_path / f"{name}{ending}")
            assert np.array_equal(back.array, a) and back.array.shape == a.shape, (name, ending)
            assert back.spacing == (None if ending == ".png" else pytest.approx(spacing))
            if a.ndim == 4 and ending == ".zarr" or name == "stack":
                v = open_volume(tmp_path / f"{name}{ending}")
                assert np.array_equal(v[...], a) and v.spacing == pytest.approx(spacing)
    for top in (1, 255, 256, 65535):
        y = R.integers(0, top + 1, (8, 9))
        for ending in (".png", ".tif", ".zarr"):
            write_label(tmp_path / f"y{ending}", y)
            assert np.array_equal(read_label(tmp_path / f"y{ending}").array, y)


def test_entries_of_a_folder(tmp_path):
    Pillow.fromarray(SMALL).save(tmp_path / "a.png")
    os.symlink("/nowhere/b.png", tmp_path / "b.png")
    os.symlink("a.png", tmp_path / "c.png")  # a link that leads somewhere is an image
    os.symlink("loop.tif", tmp_path / "loop.tif")
    os.symlink("/nowhere", tmp_path / "gone.zarr")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.zarr").write_bytes(b"")
    images, others = list_images(tmp_path)
    assert [p.name for p in images] == ["a.png", "c.png"]
    assert [p.name for p in others] == [
        "b.png",
        "file.zarr",
        "folder.png",
        "gone.zarr",
        "loop.tif",
        "pipe.png",
    ]  # every entry is named
    for name, cause in {
        "b.png": "link to /nowhere/b.png",
        "loop.tif": "link",
        "gone.zarr": "link",
        "pipe.png": "pipe",
        "folder.png": "folder",
        "file.zarr": "file",
    }.items():
        for read in (read_image, read_label, decode_file):
            with pytest.raises(InputError, match=f"(?s){name}.*{cause}") as e:
                read(tmp_path / name)
            assert "damaged" not in str(e.value)
    for name in ("b.png", "gone.zarr", "loop.tif"):
        with pytest.raises(InputError, match=f"(?s){name}.*link"):
            open_volume(tmp_path / name)


def test_what_may_not_be_read(tmp_path, monkeypatch):
    Pillow.fromarray(SMALL).save(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="(?s)a.png.*rights"):
        read_image(tmp_path / "a.png")
    from pathlib import Path

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot be listed"):
        list_images(tmp_path)


def dicom(path, name="1.2.3"):
    pydicom = pytest.importorskip("pydicom")
    s = pydicom.Dataset()
    s.file_meta = pydicom.dataset.FileMetaDataset()
    s.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    s.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    s.file_meta.MediaStorageSOPInstanceUID = name
    s.SOPClassUID = pydicom.uid.CTImageStorage
    s.SOPInstanceUID = name
    s.SeriesInstanceUID = "1.2"
    s.Rows = 2
    s.Columns = 3
    s.SamplesPerPixel = 1
    s.PhotometricInterpretation = "MONOCHROME2"
    s.BitsAllocated = 8
    s.BitsStored = 8
    s.HighBit = 7
    s.PixelRepresentation = 0
    s.PixelData = SMALL.tobytes()
    s.save_as(path, enforce_file_format=True)


def test_a_series_and_what_lies_beside_it(tmp_path):
    dicom(tmp_path / "1.dcm")
    assert _is_series(tmp_path) and find_dicom_files(tmp_path) == [tmp_path / "1.dcm"]
    (tmp_path / "notes.txt").write_text("a note")
    assert _is_series(tmp_path)
    os.symlink("/nowhere/2.dcm", tmp_path / "2.dcm")  # it may be a slice
    for read in (find_dicom_files, read_image):
        with pytest.raises(InputError, match="(?s)2.dcm.*link"):
            read(tmp_path)
    (tmp_path / "2.dcm").unlink()
    (tmp_path / "2.dcm").write_bytes(b"")  # cut to nothing
    with pytest.raises(InputError, match="(?s)2.dcm.*cut short"):
        find_dicom_files(tmp_path)
    (tmp_path / "2.dcm").unlink()
    Pillow.fromarray(SMALL).save(tmp_path / "a.png")
    assert not _is_series(tmp_path)
    images, others = list_images(tmp_path)
    assert [p.name for p in images] == ["1.dcm", "a.png"] and [p.name for p in others] == [
        "notes.txt"
    ]
    with pytest.raises(InputError, match="(?s)DICOM.*a.png"):
        read_image(tmp_path)


def test_names():
    assert [
        suffix_of(n)
        for n in (
            "a.nii.gz",
            "a.ZARR",
            "x.zarr/0",
            "x.zarr/labels/0",
            "x.zarr/a.tif",
            "a.b",
            ".zarr/0",
            "zarr/0",
        )
    ] == [".nii.gz", ".zarr", ".zarr", ".zarr", ".tif", "", "", ""]
    assert [
        stem_of(n) for n in ("f/a.nii.gz", "f/a.zarr", "f/a.zarr/0", "f/a.zarr/labels/0", "f/plain")
    ] == ["a", "a", "a_0", "a_labels_0", "plain"]


def test_axes_twice_or_unknown():
    for shape, axes in (((2, 3, 4, 5), "ZZYX"), ((4, 5), "YY"), ((4, 5, 2), "YX")):
        with pytest.raises(InputError):
            arrange(np.zeros(shape), axes)


def test_what_is_no_real_number(tmp_path):
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((5, 12, 16), np.complex64))
    for read in (read_image, read_label, open_volume):
        with pytest.raises(InputError, match="(?s)c.tif.*no real numbers"):
            read(tmp_path / "c.tif")


def test_a_fourth_colour_without_a_meaning_is_left_out(tmp_path):
    p = tmp_path / "a.tif"
    colours = np.random.default_rng(0).integers(0, 255, (12, 16, 4), np.uint8)
    tifffile.imwrite(p, colours, photometric="rgb", extrasamples=["unassalpha"])
    with tifffile.TiffFile(p) as tif:
        at = tif.pages[0].tags[338].offset
    data = bytearray(p.read_bytes())
    data[at : at + 2] = (33432).to_bytes(2, "little")  # no ExtraSamples any more
    p.write_bytes(data)
    assert np.array_equal(read_image(p).array, np.moveaxis(colours[..., :3], -1, 0))


def test_a_size_with_a_comma_is_named(tmp_path):
    text = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="16" '
        'SizeY="12" SizeC="1" SizeZ="1" SizeT="1" PhysicalSizeX="1,5" PhysicalSizeY="1">'
        "<TiffData/></Pixels></Image></OME>"
    )
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        np.zeros((12, 16), np.uint8),
        description=text.encode(),
        metadata=None,
    )
    with pytest.raises(InputError, match="(?s)a.ome.tif.*PhysicalSizeX='1,5'"):
        read_image(tmp_path / "a.ome.tif")


def test_the_files_of_a_set_are_one_image(tmp_path):
    "Its others are named, hashed, counted once in a folder, and never written to."
    from unpaired_kd.data.collections import Collection
    from unpaired_kd.data.formats.outputs import mark_files
    from unpaired_kd.inference.files import _plan_outputs, predict_path
    from unpaired_kd.inference.student import Recipe, Student
    from unpaired_kd.inference.volumes import predict_volume
    from unpaired_kd.networks.registry import make_network

    images = tmp_path / "images"
    labels = tmp_path / "labels"
    for f in (images, labels):
        f.mkdir()
    first, a = pair(images, {})
    second = images / "b.ome.tif"
    tifffile.imwrite(labels / "a.tif", (a > 128).astype(np.uint8), photometric="minisblack")
    assert list_companions(first) == [second] and list_companions(second) == [first]
    assert (
        list_companions(labels / "a.tif")
        == list_companions(images)
        == list_companions(tmp_path / "c.tif")
        == []
    )
    assert keep_first_of_sets([first, second, labels / "a.tif"]) == [first, labels / "a.tif"]

    def seen():
        c = Collection.from_folders(tmp_path, group="(.*)")
        assert [case.id for case in c.cases] == ["a"]
        return c.contents(), c.fingerprint(), mark_files(first)

    before = seen()
    assert set(before[0]) == {"images/a.ome.tif", "images/b.ome.tif", "labels/a.tif"}
    assert [p.name for p, _ in _plan_outputs(images, tmp_path / "out")[0]] == ["a.ome.tif"]
    kept = second.read_bytes()
    kinds = (
        ("unet", dict(in_channels=1, classes=1), 2, predict_path),
        ("light_unet", dict(levels=2), 3, predict_volume),
    )
    for name, config, dims, predict in kinds:
        net = make_network(name, dict(config, width=2))
        student = Student(net.eval(), Recipe(in_channels=1, dims=dims, patch=512))
        with pytest.raises(InputError, match="b.ome.tif is the input itself"):
            predict(student, first, second, overwrite=True)
    assert second.read_bytes() == kept
    second.write_bytes(kept[:-5] + bytes(b ^ 1 for b in kept[-5:]))
    assert all(x != y for x, y in zip(before, seen()))
