"""OME-Zarr: every version and order of axes, groups that hold several images, and chunks that are
lost or damaged."""

import json
import os

import numpy as np
import pytest

zarr = pytest.importorskip("zarr")

from unpaired_kd.core import InputError
from unpaired_kd.data.formats.geometry import lay_on
from unpaired_kd.data.formats.images import Image, list_images, read_image, read_label
from unpaired_kd.data.formats.ngff import _list_chunks, _read_spacing, open_zarr, split_zarr_path
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.inference.volume_files import open_volume

R = np.random.default_rng(0)
V = R.integers(1, 60000, (6, 20, 30)).astype(np.uint16)  # z, y, x


def axes_of(letters, unit="micrometer"):
    kinds = {"t": {"type": "time", "unit": "second"}, "c": {"type": "channel"}}
    return [
        {"name": a, **kinds.get(a, {"type": "space", **({"unit": unit} if unit else {})})}
        for a in letters
    ]


def save(path, a, axes=None, scale=None, whole=None, version="0.5", chunks=None, more=()):
    "A group with one level; `more` are further transformations of the level."
    g = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    add(g, a, axes, scale, whole, version, chunks, more)
    return path


def add(g, a, axes=None, scale=None, whole=None, version="0.5", chunks=None, more=()):
    g.create_array("0", data=a, chunks=chunks or a.shape)
    level = {"path": "0"}
    if scale is not None:
        level["coordinateTransformations"] = [{"type": "scale", "scale": list(scale)}, *more]
    entry = {"version": version, "datasets": [level]}
    if axes is not None:
        entry["axes"] = axes
    if whole is not None:
        entry["coordinateTransformations"] = [{"type": "scale", "scale": list(whole)}]
    if version == "0.5":
        g.attrs["ome"] = {"version": "0.5", "multiscales": [entry]}
    else:
        g.attrs["multiscales"] = [entry]


def same(path, array, spacing, name=None):
    "Every road gives this array (C,Z,Y,X) and this spacing."
    im = read_image(path)
    v = open_volume(path)
    assert np.array_equal(im.array, array), name
    assert np.array_equal(v[...], array) and np.array_equal(
        v[:, 2:4, 5:9, 1:], array[:, 2:4, 5:9, 1:]
    ), name
    want = None if spacing is None else pytest.approx(spacing)
    assert im.spacing == want and v.spacing == want, name


@pytest.mark.parametrize("order", ["zyx", "xyz", "yxz", "zxy", "xzy", "yzx"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_axes_in_any_order(tmp_path, order, version):
    step = {"z": 5, "y": 2, "x": 0.5}
    a = V.transpose(*("zyx".index(k) for k in order))
    p = save(tmp_path / "a.zarr", a, axes_of(order), [step[k] for k in order], version=version)
    same(p, V[None], (0.005, 0.002, 0.0005), order)


@pytest.mark.parametrize("order", ["czyx", "cxyz", "zyxc", "zcyx", "xyzc", "tczyx", "ctzyx"])
def test_channels_and_time_anywhere(tmp_path, order):
    full = np.stack([V, V // 2])[None]  # t, c, z, y, x
    step = {"t": 9, "c": 1, "z": 5, "y": 2, "x": 0.5}
    a = full.transpose(*("tczyx".index(k) for k in order), *(() if "t" in order else (0,)))
    a = a if "t" in order else a[..., 0]
    p = save(tmp_path / "a.zarr", a, axes_of(order), [step[k] for k in order])
    same(p, full[0], (0.005, 0.002, 0.0005), order)


def test_versions(tmp_path):
    five = V[None, None]
    for version in ("0.1", "0.2"):  # no axes: t, c, z, y, x
        same(save(tmp_path / "a.zarr", five, version=version), V[None], None, version)
    same(save(tmp_path / "a.zarr", V[None], ["c", "z", "y", "x"], version="0.3"), V[None], None)
    same(save(tmp_path / "a.zarr", V.T, ["x", "y", "z"], version="0.3"), V[None], None)


def test_scales_multiply_and_translations_do_nothing(tmp_path):
    move = [{"type": "translation", "translation": [7.0, 8, 9]}]
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [5, 2, 0.5], whole=[2, 2, 4], more=move)
    same(p, V[None], (0.01, 0.004, 0.002))
    same(
        save(
            tmp_path / "a.zarr",
            V,
            axes_of("zyx"),
            [1, 1, 1],
            whole=[2, 2, 4],
            more=[{"type": "identity"}],
        ),
        V[None],
        (0.002, 0.002, 0.004),
    )
    same(
        save(tmp_path / "a.zarr", V, axes_of("zyx"), None, whole=[2, 2, 4]),
        V[None],
        (0.002, 0.002, 0.004),
    )
    same(save(tmp_path / "a.zarr", V, axes_of("zyx")), V[None], None)


@pytest.mark.parametrize(
    "unit, mm",
    [
        ("micrometer", 1e-3),
        ("µm", 1e-3),
        ("nanometer", 1e-6),
        ("angstrom", 1e-7),
        ("millimeter", 1.0),
        ("centimeter", 10.0),
        ("inch", 25.4),
        ("picometer", 1e-9),
        (None, None),
        ("pixel", None),
    ],
)
def test_units(tmp_path, unit, mm):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx", unit), [5, 2, 0.5])
    same(p, V[None], None if mm is None else (5 * mm, 2 * mm, 0.5 * mm))


def test_what_is_refused(tmp_path):
    p = tmp_path / "a.zarr"
    bad = {
        "affine": dict(scale=[1, 1, 1], more=[{"type": "affine", "affine": [[1]]}]),
        "scale with 3": dict(scale=[1, 1]),
        "positive": dict(scale=[1, 0, 1]),
        "not positive": dict(scale=[-1, 1, 1]),
    }
    for words, way in bad.items():
        save(p, V, axes_of("zyx"), **way)
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match=f"(?s)a.zarr.*{words}"):
                read(p)
    save(p, V, axes_of("zy") + [{"name": "angle"}], [1, 1, 1])
    with pytest.raises(InputError, match="(?s)a.zarr.*angle"):
        read_image(p)
    save(p, V, axes_of("yx"), [1, 1])
    with pytest.raises(InputError, match="(?s)a.zarr.*3 axes"):
        read_image(p)
    save(p, np.stack([V] * 2), axes_of("tzyx"), [1, 1, 1, 1])
    with pytest.raises(InputError, match="one time point"):
        read_image(p)


def test_a_film_has_no_depth(tmp_path):
    p = save(tmp_path / "a.zarr", V, axes_of("tyx"), [9, 2, 0.5])
    assert (
        np.array_equal(read_image(p).array, V[None])
        and read_image(p).spacing is None
        and open_volume(p).spacing is None
    )


def bioformats(path, n, version="0.4"):
    root = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    if version == "0.5":
        root.attrs["ome"] = {"version": "0.5", "bioformats2raw.layout": 3}
    else:
        root.attrs["bioformats2raw.layout"] = 3
    for k in range(n):
        add(
            root.create_group(str(k)),
            (V + k)[None, None],
            axes_of("tczyx"),
            [1, 1, 5, 2, 0.5],
            version=version,
        )
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_the_output_of_bioformats2raw(tmp_path, version):
    one = bioformats(tmp_path / "one.zarr", 1, version)
    for inside in ("", "0", "0/0"):
        same(one / inside, V[None], (0.005, 0.002, 0.0005), inside)
    two = bioformats(tmp_path / "two.zarr", 2, version)
    for read in (read_image, open_volume):
        with pytest.raises(InputError, match="(?s)two.zarr.*2 images: 0, 1.*two.zarr/0"):
            read(two)
    for k in (0, 1):
        same(two / str(k), V[None] + k, (0.005, 0.002, 0.0005))
        same(
            two / str(k) / "0", V[None] + k, (0.005, 0.002, 0.0005)
        )  # the array, with what its group says
    zarr.open_group(str(two), mode="r+").create_group("OME").attrs.update(
        {"series": ["1"]} if version == "0.4" else {"ome": {"series": ["1"]}}
    )  # the one image
    same(two, V[None] + 1, (0.005, 0.002, 0.0005))


def test_plates_wells_and_labels(tmp_path):
    root = zarr.open_group(str(tmp_path / "p.zarr"), mode="w", zarr_format=2)
    root.attrs["plate"] = {"wells": [{"path": "A/1"}, {"path": "B/2"}]}
    for well in ("A/1", "B/2"):
        g = root.create_group(well)
        g.attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}]}
        for k in "01":
            add(g.create_group(k), V, axes_of("zyx"), [5, 2, 0.5], version="0.4")
    with pytest.raises(InputError, match="(?s)p.zarr.*4 images: A/1/0, A/1/1, B/2/0"):
        read_image(tmp_path / "p.zarr")
    with pytest.raises(InputError, match="(?s)2 images: 0, 1.*p.zarr/A/1/0"):
        read_image(tmp_path / "p.zarr/A/1")
    same(tmp_path / "p.zarr/B/2/1", V[None], (0.005, 0.002, 0.0005))
    save(tmp_path / "l.zarr", V, axes_of("zyx"), [5, 2, 0.5])
    g = zarr.open_group(str(tmp_path / "l.zarr"), mode="r+").create_group("labels")
    g.attrs["labels"] = ["cells", "nuclei"]
    for name in ("cells", "nuclei"):
        add(g.create_group(name), V % 7, axes_of("zyx"), [5, 2, 0.5])
    with pytest.raises(InputError, match="(?s)l.zarr/labels.*cells, nuclei"):
        read_image(tmp_path / "l.zarr/labels")
    y = read_label(tmp_path / "l.zarr/labels/nuclei")
    assert np.array_equal(y.array, V % 7) and y.spacing == pytest.approx((0.005, 0.002, 0.0005))
    same(tmp_path / "l.zarr", V[None], (0.005, 0.002, 0.0005))  # its labels are not in the way


def test_arrays_inside_a_group(tmp_path):
    root = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    with pytest.raises(InputError, match="(?s)g.zarr.*no array"):
        read_image(tmp_path / "g.zarr")
    root.create_array("raw", data=V)
    root.create_group("deep").create_array("more", data=V // 2)
    with pytest.raises(InputError, match="(?s)g.zarr.*g.zarr/raw"):
        read_image(tmp_path / "g.zarr")
    same(tmp_path / "g.zarr/raw", V[None], None)
    same(tmp_path / "g.zarr/deep/more", V[None] // 2, None)
    with pytest.raises(InputError, match="(?s)g.zarr/none does not exist"):
        read_image(tmp_path / "g.zarr/none")


def test_levels(tmp_path):
    g = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    levels = [
        {
            "path": f"s{k}",
            "coordinateTransformations": [{"type": "scale", "scale": [5, 2 * 2**k, 0.5 * 2**k]}],
        }
        for k in range(2)
    ]
    for k in range(2):
        g.create_array(f"s{k}", data=V[:, :: 2**k, :: 2**k])
    g.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes_of("zyx"), "datasets": levels}],
    }
    same(tmp_path / "a.zarr", V[None], (0.005, 0.002, 0.0005))
    same(tmp_path / "a.zarr/s1", V[None, :, ::2, ::2], (0.005, 0.004, 0.001))


@pytest.mark.parametrize(
    "name", ["../out", "/etc", "a/../../out", "file:///tmp/x", "..\\out", "", ".", ".//etc"]
)
def test_nothing_outside_is_opened(tmp_path, name):
    zarr.create_array(str(tmp_path / "out"), data=V)
    g = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    g.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes_of("zyx"), "datasets": [{"path": name}]}],
    }
    for read in (read_image, open_volume):
        with pytest.raises(InputError, match="(?s)a.zarr.*not opened"):
            read(tmp_path / "a.zarr")
    g.attrs["ome"] = {"bioformats2raw.layout": 3, "plate": {"wells": [{"path": name}]}}
    with pytest.raises(InputError, match="(?s)a.zarr.*not opened"):
        read_image(tmp_path / "a.zarr")
    g.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes_of("zyx"), "datasets": [{"path": "9"}]}],
    }
    with pytest.raises(InputError, match="(?s)a.zarr.*'9'.*not there"):
        read_image(tmp_path / "a.zarr")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("what", ["flipped", "empty", "short"])
def test_a_damaged_chunk_is_named(tmp_path, version, what):
    p = save(
        tmp_path / "a.zarr",
        np.repeat(V, 2, 0),
        axes_of("zyx"),
        [1, 1, 1],
        version=version,
        chunks=(4, 20, 30),
    )
    chunk = p / ("0/c/1/0/0" if version == "0.5" else "0/1.0.0")
    chunk = chunk if chunk.exists() else p / "0/1/0/0"
    data = chunk.read_bytes()
    chunk.write_bytes(
        {
            "flipped": bytes(b ^ 255 for b in data[:20]) + data[20:],
            "empty": b"",
            "short": data[: len(data) // 2],
        }[what]
    )
    with pytest.raises(InputError, match=f"(?s)a.zarr.*chunk {os.path.relpath(chunk, p)}"):
        read_image(p)
    with pytest.raises(InputError, match=f"(?s)a.zarr.*chunk {os.path.relpath(chunk, p)}"):
        open_volume(p)[...]


def test_headers_that_cannot_be_read(tmp_path):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [1, 1, 1])
    for text in ("", "{", "[]", '{"zarr_format": 9}'):
        (p / "zarr.json").write_text(text)
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match="a.zarr"):
                read(p)
    for note in (
        {"multiscales": {}},
        {"multiscales": [{}]},
        {"multiscales": [3]},
        {"multiscales": [{"datasets": []}]},
        {"plate": 3},
        {"labels": 3},
        "text",
    ):
        (p / "zarr.json").write_text(
            json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"ome": note}})
        )
        with pytest.raises(InputError, match="a.zarr"):
            read_image(p)
        with pytest.raises(InputError):
            open_zarr(p)
    os.symlink("/nowhere", tmp_path / "gone.zarr")
    for path in ("gone.zarr", "none.zarr", "a.zarr/none"):
        with pytest.raises(InputError, match=path):
            open_zarr(tmp_path / path)


def test_parts_of_a_path():
    assert [
        split_zarr_path(p)[1]
        for p in ("a.zarr", "f/a.zarr/0", "a.zarr/b/c", "f/a.tif", ".zarr/x", "a.zarr/b.zarr/0")
    ] == ["", "0", "b/c", "", "", "0"]
    assert str(split_zarr_path("f/A.ZARR/0")[0]) == "f/A.ZARR"


def test_a_zarr_in_a_folder(tmp_path):
    write_image(tmp_path / "a.zarr", Image(V[None], (5.0, 2.0, 0.5)))
    assert [p.name for p in list_images(tmp_path)[0]] == ["a.zarr"]
    same(tmp_path / "a.zarr", V[None], (5.0, 2.0, 0.5))
    write_image(tmp_path / "a.zarr/made", Image(V[None] % 5, (5.0, 2.0, 0.5)))  # into it
    same(tmp_path / "a.zarr/made", V[None] % 5, (5.0, 2.0, 0.5))
    same(tmp_path / "a.zarr", V[None], (5.0, 2.0, 0.5))


def test_rgb_and_two_dimensions(tmp_path):
    rgb = R.integers(0, 256, (3, 8, 9), np.uint8)
    assert np.array_equal(
        read_image(save(tmp_path / "a.zarr", rgb, axes_of("cyx"), [1, 2, 0.5])).array, rgb
    )
    assert np.array_equal(
        read_image(
            save(tmp_path / "b.zarr", np.moveaxis(rgb, 0, -1), axes_of("yxc"), [2, 0.5, 1])
        ).array,
        rgb,
    )
    im = read_image(save(tmp_path / "c.zarr", rgb[0].T, axes_of("xy"), [0.5, 2]))
    assert np.array_equal(im.array[0], rgb[0]) and im.spacing == pytest.approx((0.002, 0.0005))


def test_a_label_map_of_an_image_inside_a_zarr_has_a_name_of_its_own():
    from pathlib import Path

    from unpaired_kd.inference.files import _name_instances, _name_output

    assert (
        _name_output(Path("f/a.zarr/0")) == "a_0.zarr"
        and _name_output(Path("f/a.zarr")) == "a.zarr"
    )
    assert _name_instances(Path("f/a.zarr")) == Path("f/a_instances.zarr")


def test_a_header_may_promise_any_number_of_chunks(tmp_path):
    """The first one that is not there is found by its name, in no time and no memory; places come
    last axis fastest."""
    import time

    import zarr

    from unpaired_kd.data.formats.ngff import _find_absent_chunk, _list_places

    assert list(_list_places((range(2), range(3)))) == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ] and list(_list_places(())) == [()]
    a = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=(4, 4, 4), chunks=(2, 2, 4), dtype="uint8"
    )
    a[...] = 1
    assert _find_absent_chunk(a) is None
    file = tmp_path / "a.zarr/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(shape=[10**9] * 3)))
    start = time.monotonic()
    assert (
        _find_absent_chunk(zarr.open_array(str(tmp_path / "a.zarr"), mode="r"))
        == tmp_path / "a.zarr/c/0/0/1"
    )
    assert time.monotonic() - start < 2


def test_only_the_chunks_of_a_box_are_sought(tmp_path):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [1, 1, 1], chunks=(2, 10, 10))
    z = open_zarr(p)[0]
    box = (slice(1, 4), slice(10, 11), slice(19, 20))
    names = [str(file.relative_to(p)) for _, file in _list_chunks(z, box)]
    assert names == ["0/c/0/1/1", "0/c/1/1/1"]
    assert len(list(_list_chunks(z))) == 3 * 2 * 3
    (p / "0/c/1/1/1").write_bytes(b"no chunk")
    volume = open_volume(p)
    assert np.array_equal(volume[:, :2], V[None, :2])
    with pytest.raises(InputError, match="(?s)a.zarr.*chunk 0/c/1/1/1"):
        volume[:, 1:4, 10:11, 19:20]


def move(*by):
    return [{"type": "translation", "translation": list(by)}]


def test_a_label_at_another_translation_is_refused(tmp_path):
    y = (V > 30000).astype(np.uint8)
    image = read_image(
        save(tmp_path / "i.zarr", V, axes_of("zyx"), [4, 2, 0.5], more=move(5, 6, 7))
    )
    assert image.header.origin == pytest.approx((0.005, 0.006, 0.007))
    for by, lies in (
        ((5, 6, 7), True),
        ((6, 6.5, 7.2), True),
        ((5, 7, 7), False),
        ((0, 0, 0), False),
    ):
        p = save(tmp_path / "l.zarr", y.T, axes_of("xyz"), [0.5, 2, 4], more=move(*by[::-1]))
        if lies:
            assert np.array_equal(lay_on(read_label(p), image), y)
        else:
            with pytest.raises(InputError, match="(?s)l.zarr.*elsewhere.*0.005 x 0.006 x 0.007"):
                lay_on(read_label(p), image)
    bare = save(tmp_path / "b.zarr", y)  # says nothing of place
    assert np.array_equal(lay_on(read_label(bare), image), y)
    p = save(tmp_path / "s.zarr", y, axes_of("zyx"), [4, 2, 0.5])  # no translation: at zero
    with pytest.raises(InputError, match="elsewhere"):
        lay_on(read_label(p), image)


def test_scales_after_a_translation_move_it():
    level = {"coordinateTransformations": [{"type": "scale", "scale": [1, 2]}, *move(3, 4)]}
    entry = {"axes": axes_of("xy", "millimeter")}
    entry["coordinateTransformations"] = [{"type": "scale", "scale": [10, 5]}, *move(1, 1)]
    letters, spacing, origin = _read_spacing(entry, level, (7, 8))
    assert (letters, spacing, origin) == ("xy", (10.0, 10.0), (21.0, 31.0))


def test_a_translation_is_written_back(tmp_path):
    y = (V > 30000).astype(np.uint8)
    image = read_image(
        save(tmp_path / "i.zarr", V, axes_of("zyx"), [4, 2, 0.5], more=move(5, 6, 7))
    )
    write_label(tmp_path / "l.zarr", y, like=image)
    label = read_label(tmp_path / "l.zarr")
    assert label.header.origin == pytest.approx((0.005, 0.006, 0.007))
    assert np.array_equal(lay_on(label, image), y)
    two = Image(np.stack([V, V]), image.spacing, None, "", image.header)
    write_image(tmp_path / "c.zarr", two)
    note = json.loads((tmp_path / "c.zarr/zarr.json").read_text())["attributes"]["ome"]
    steps = note["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert steps[1]["translation"] == pytest.approx([0, 0.005, 0.006, 0.007])


def test_an_affine_of_its_own_fits_the_scales_or_is_refused(tmp_path):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [4, 2, 0.5])
    affine = np.diag([0.0005, 0.002, 0.004, 1])
    for bad, words in (
        (np.diag([1.0, 2, 4, 1]), "give the spacing"),
        (np.eye(3), "4 x 4"),
        ([[1, 0, 0, 0]] * 4, "4 x 4"),
        ("text", "4 x 4"),
    ):
        zarr.open_group(str(p)).attrs["affine"] = (
            bad if isinstance(bad, str) else np.array(bad).tolist()
        )
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match=f"(?s)a.zarr.*({words})"):
                read(p)
    zarr.open_group(str(p)).attrs["affine"] = affine.tolist()
    for image in (read_image(p), open_volume(p)):
        assert np.allclose(image.affine, affine)
        assert image.spacing == pytest.approx((0.004, 0.002, 0.0005))
    p = save(tmp_path / "b.zarr", V)  # no scale: that of the affine
    zarr.open_group(str(p)).attrs["affine"] = affine.tolist()
    assert read_image(p).spacing == pytest.approx((0.004, 0.002, 0.0005))


def test_versions_to_come_are_refused(tmp_path):
    p = save(tmp_path / "a.zarr", V, None, [4, 2, 0.5])
    note = dict(zarr.open_group(str(p)).attrs["ome"])
    note["version"] = "0.6"
    note["multiscales"][0]["coordinateSystems"] = [{"name": "physical", "axes": axes_of("zyx")}]
    zarr.open_group(str(p)).attrs["ome"] = note
    for read in (read_image, open_volume):
        with pytest.raises(InputError, match="(?s)a.zarr.*0.5"):
            read(p)


@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3")
def test_what_is_no_number_is_refused(tmp_path):
    for k, a in enumerate((V.astype(np.complex64), np.full(V.shape, "ab"))):
        p = save(tmp_path / f"{k}.zarr", a, axes_of("zyx"), [1, 1, 1])
        for read in (read_image, read_label, open_volume):
            with pytest.raises(InputError, match=f"(?s){k}.zarr.*no real numbers"):
                read(p)


def test_the_lengths_of_refused_axes_are_told_in_blocks(tmp_path):
    p = save(tmp_path / "a.zarr", np.stack([V, V]), axes_of("tzyx"), [1, 1, 1, 1])
    with pytest.raises(InputError, match=r"(?s)a.zarr.*TZYX.*\(2, 6, 20, 30\)"):
        open_volume(p)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "names", ["zyx", "xyz", "yxc", "cxyz", "tczyx", "XY", ["channel", "y", "x"]]
)
def test_a_plain_array_is_read_by_the_names_of_its_axes(tmp_path, names, version):
    full = np.stack([V, V // 2])[None]  # t, c, z, y, x
    letters = "".join(n[0] for n in names).lower()
    seen = full[tuple(slice(None) if k in letters else 0 for k in "tczyx")]
    order = [k for k in "tczyx" if k in letters]
    a = seen.transpose([order.index(k) for k in letters])
    said = {"dimension_names": list(names)} if version == 3 else {}
    z = zarr.create_array(str(tmp_path / "a.zarr"), data=a, zarr_format=version, **said)
    if version == 2:
        z.attrs["_ARRAY_DIMENSIONS"] = list(names)  # as xarray does
    want = seen[0] if "t" in letters else seen
    image = read_image(tmp_path / "a.zarr")
    assert np.array_equal(image.array, want if "c" in letters else want[None])
    assert image.spacing is None
    if "z" in letters:
        same(tmp_path / "a.zarr", image.array, None)


def test_names_that_are_not_ours_or_contradict_are_refused(tmp_path):
    def plain(names):
        return zarr.create_array(
            str(tmp_path / "a.zarr"), data=V, dimension_names=names, overwrite=True
        )

    for names in (["a", "b", "c"], ["z", "y", None], ["y", "y", "x"], ["z", "y", "c"]):
        plain(names)
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match="(?s)a.zarr.*its axes are"):
                read(tmp_path / "a.zarr")
    plain([None] * 3)  # none is said
    same(tmp_path / "a.zarr", V[None], None)
    five = zarr.create_array(str(tmp_path / "5.zarr"), data=V[None, None])
    with pytest.raises(InputError, match="(?s)5.zarr.*5 axes without names"):
        read_image(tmp_path / "5.zarr")
    five.attrs["_ARRAY_DIMENSIONS"] = 3  # no list: nothing is said
    with pytest.raises(InputError, match="(?s)5.zarr.*5 axes without names"):
        read_image(tmp_path / "5.zarr")


@pytest.mark.parametrize("names,fits", [("zyx", True), ("xyz", False), (["a", "b", "c"], True)])
def test_an_array_may_not_contradict_its_group(tmp_path, names, fits):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [5, 2, 0.5])
    file = p / "0/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dimension_names": list(names)}))
    if fits:
        same(p, V[None], (0.005, 0.002, 0.0005))
    for read in () if fits else (read_image, open_volume):
        with pytest.raises(InputError, match="(?s)a.zarr.*axes are zyx in 'multiscales' and xyz"):
            read(p)


@pytest.mark.parametrize("what", ["array", "group", "rows", "labels", "row of chunks"])
def test_a_folder_that_is_a_link_out_is_not_opened(tmp_path, what):
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    root.attrs["ome"] = {"plate": {"wells": [{"path": "A/1"}]}, "labels": ["A/1/0"]}
    well = root.create_group("A/1")
    well.attrs["ome"] = {"well": {"images": [{"path": "0"}]}}
    add(well.create_group("0"), V, axes_of("zyx"), [5, 2, 0.5], chunks=(2, 10, 10))
    same(tmp_path / "a.zarr", V[None], (0.005, 0.002, 0.0005))
    if what == "labels":
        root.attrs["ome"] = {"labels": ["A/1/0"]}
    inside = {"array": "A/1/0/0", "group": "A/1/0", "rows": "A", "row of chunks": "A/1/0/0/c/1"}
    folder = tmp_path / "a.zarr" / inside.get(what, "A/1/0")
    folder.rename(tmp_path / "out")
    folder.symlink_to(tmp_path / "out")
    for path in ("a.zarr", "a.zarr/A/1/0", "a.zarr/A/1/0/0"):
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match="(?s)a.zarr.*its folder A.* leads out of a.zarr"):
                read(tmp_path / path)
        with pytest.raises(InputError, match="leads out"):
            open_zarr(tmp_path / path, absent="empty")


def test_links_of_files_and_of_the_whole_are_followed(tmp_path):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [5, 2, 0.5], chunks=(2, 10, 10))
    (tmp_path / "kept").mkdir()
    for k, file in enumerate(sorted(f for f in p.rglob("*") if f.is_file())):  # as git-annex does
        file.rename(tmp_path / "kept" / str(k))
        file.symlink_to(os.path.relpath(tmp_path / "kept" / str(k), file.parent))
    same(p, V[None], (0.005, 0.002, 0.0005))
    (p / "alias").symlink_to("0")  # a folder, but inside
    same(p / "alias", V[None], None)
    p.rename(tmp_path / "b.zarr")
    p.symlink_to(tmp_path / "b.zarr")
    same(p, V[None], (0.005, 0.002, 0.0005))
    same(p / "0", V[None], (0.005, 0.002, 0.0005))


@pytest.mark.parametrize("name", ["./0", "0/", "0/.", "././0"])
def test_a_path_in_a_header_may_be_written_in_another_way(tmp_path, name):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [5, 2, 0.5])
    note = dict(zarr.open_group(str(p)).attrs["ome"])
    note["multiscales"][0]["datasets"][0]["path"] = name
    zarr.open_group(str(p)).attrs["ome"] = note
    for path in (p, p / "0"):
        same(path, V[None], (0.005, 0.002, 0.0005))


@pytest.mark.parametrize("absent", ["error", "empty"])
@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("version", [2, 3])
def test_chunks_with_another_separator_than_the_header_says(tmp_path, version, separator, absent):
    p = tmp_path / "a.zarr"
    wrong = {"/": ".", ".": "/"}[separator]
    keys = {"name": "v2" if version == 2 else "default", "separator": separator}
    root = zarr.open_group(str(p), mode="w", zarr_format=version)
    root.create_array("raw", data=V, chunks=(3, 10, 10), chunk_key_encoding=keys)
    file = p / "raw" / (".zarray" if version == 2 else "zarr.json")
    said = file.read_text()
    head = json.loads(said)
    if version == 3:
        head["chunk_key_encoding"]["configuration"]["separator"] = wrong
    elif wrong == ".":
        head.pop("dimension_separator")  # as NestedDirectoryStore wrote it
    else:
        head["dimension_separator"] = wrong
    file.write_text(json.dumps(head))
    key = "dimension_separator" if version == 2 else "separator"
    words = f'(?s)a.zarr.*Set "{key}" to "[{separator}]" in {file.name}'
    for read in (read_image, open_volume):
        with pytest.raises(InputError, match=words):
            read(p / "raw", absent=absent)
    file.write_text(said)  # what the message asks for
    same(p / "raw", V[None], None)


def test_absent_chunks_may_be_empty_with_either_separator(tmp_path):
    for separator in "/.":
        p = tmp_path / f"{ord(separator)}.zarr"
        keys = {"name": "v2", "separator": separator}
        zarr.create_array(
            str(p), data=V, chunks=(3, 20, 30), zarr_format=2, chunk_key_encoding=keys
        )
        (p / f"0{separator}0{separator}0").unlink()
        (p / "notes.1.txt").write_text("no chunk")
        with pytest.raises(InputError, match="(?s)chunk 0.0.0 is not there.*absent='empty'"):
            read_image(p)
        assert np.array_equal(read_image(p, absent="empty").array[0, 3:], V[3:])
        assert not read_image(p, absent="empty").array[0, :3].any()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("name", ["sample", "s2.ngff"])
def test_a_zarr_of_another_name_is_not_passed_over(tmp_path, capsys, name, version):
    from unpaired_kd.data.check import check_data
    from unpaired_kd.data.collections import Collection
    from unpaired_kd.inference.files import _plan_outputs

    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [5, 2, 0.5], version=version)
    p = p.rename(tmp_path / name)
    words = f"(?s){name}: the folder {name} is a Zarr.*Rename it to {name}.zarr"
    for read in (read_image, read_label, open_volume, open_zarr):
        with pytest.raises(InputError, match=words):
            read(p)
        with pytest.raises(InputError, match=f"(?s){name}/0: the folder {name} is a Zarr"):
            read(p / "0")
    assert list_images(tmp_path) == ([p], [])
    with pytest.raises(InputError, match=words):
        Collection.from_folders(tmp_path, labels=False)
    assert check_data(tmp_path) == 1
    assert f"fault: {p}: the folder {name} is a Zarr" in capsys.readouterr().out
    assert [pair[0] for pair in _plan_outputs(p, tmp_path / "out")[0]] == [p]
    assert [pair[0] for pair in _plan_outputs(tmp_path, tmp_path / "out")[0]] == [p]
    (tmp_path / "link.zarr").symlink_to(p)  # as the message proposes
    same(tmp_path / "link.zarr", V[None], (0.005, 0.002, 0.0005))


def test_a_path_from_inside_a_zarr(tmp_path, monkeypatch):
    p = save(tmp_path / "a.zarr", V, axes_of("zyx"), [5, 2, 0.5])
    monkeypatch.chdir(p)
    assert np.array_equal(read_image("0").array, V[None])


@pytest.mark.parametrize("version", [2, 3])
def test_a_group_without_a_header_names_what_it_holds(tmp_path, version):
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=version)
    for k in range(2):  # as bioformats2raw, without its attribute
        g = root.create_group(f"row/{k}")
        add(g, V + k, axes_of("zyx"), [5, 2, 0.5], version="0.5" if version == 3 else "0.4")
    for inside, words in (("", "It holds row. .*a.zarr/row"), ("row", "It holds 0, 1. .*row/0")):
        for read in (read_image, open_volume):
            with pytest.raises(InputError, match=f"(?s)a.zarr.*{words}[.]$"):
                read(tmp_path / "a.zarr" / inside)
    same(tmp_path / "a.zarr/row/1", V[None] + 1, (0.005, 0.002, 0.0005))
    for k in range(9):
        root.create_array(f"{k}", data=V)
    with pytest.raises(
        InputError, match="It holds 0, 1, 2, 3, 4, 5, 6, 7 and 2 more[.] .*a.zarr/0[.]$"
    ):
        read_image(tmp_path / "a.zarr")
