"Views of volumes: projections, slices, errors; shapes, spacing, reading in slabs, faults."

import sys

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from unpaired_kd.analysis.volume_views import (
    ERROR_COLOURS,
    _plan,
    browse_slices,
    classify_errors,
    colour_errors,
    project_errors,
    project_volume,
    show_errors,
    show_projections,
    show_slices,
)
from unpaired_kd.core import InputError, rng

AXES = ("z", "y", "x")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def volume():
    return rng(0, "volume").integers(0, 255, (5, 7, 9), dtype=np.uint8)


def masks(shape=(6, 7, 8)):
    r = rng(0, "masks", *shape)
    return r.random(shape) > 0.6, r.random(shape) > 0.6


class Disk:
    "A lazy volume that writes down what is read."

    def __init__(self, a, chunks=None):
        self.a = a
        self.shape = a.shape
        self.dtype = a.dtype
        self.chunks = chunks
        self.asked = []

    def __getitem__(self, where):
        part = self.a[where]
        self.asked.append(part.shape)
        return part


@pytest.mark.parametrize("slab", [None, 1, 2, 5, 100])
def test_projections_are_maxima(volume, slab):
    for v in (
        volume,
        volume[None],
        volume.astype(np.float32) / 255,
        volume > 100,
        -volume.astype(int),
        torch.from_numpy(volume),
        torch.from_numpy(volume)[None].bfloat16(),
    ):
        p = project_volume(v, slab=slab)
        a = v.float().numpy() if isinstance(v, torch.Tensor) else v
        for axis, k in enumerate(AXES):
            assert np.array_equal(p[k], a.reshape(volume.shape).max(axis))


def test_projections_keep_the_type(volume):
    assert (
        project_volume(volume)["y"].dtype == np.uint8
        and project_volume(volume.astype(np.uint16))["z"].dtype == np.uint16
    )


def test_square_pixels(volume):
    p = project_volume(volume)
    q = project_volume(volume, (5, 1, 1))
    assert q["z"].shape == (7, 9) and q["y"].shape == (25, 9) and q["x"].shape == (25, 7)
    assert np.array_equal(q["y"], p["y"].repeat(5, 0)) and np.array_equal(q["z"], p["z"])
    odd = project_volume(volume, (0.3, 0.2, 0.2))
    assert odd["x"].shape == (8, 7) and set(map(tuple, odd["x"])) == set(map(tuple, p["x"]))
    assert project_volume(volume, (1, 1, 2))["z"].shape == (7, 18)


def test_slabs_are_read_not_the_volume(volume):
    disk = Disk(volume)
    project_volume(disk, slab=2)
    assert disk.asked == [(2, 7, 9), (2, 7, 9), (1, 7, 9)]
    wide = Disk(np.zeros((40, 1024, 1024), np.uint8), chunks=(3, 64, 64))
    assert project_volume(wide)["z"].shape == (1024, 1024) and {s[0] for s in wide.asked[:-1]} == {
        15
    }  # whole chunks, at most 16 million voxels
    disk = Disk(volume)
    show_slices(disk, (1, 2, 3))
    assert disk.asked == [(7, 9), (5, 9), (5, 7)]
    four = Disk(volume[None])
    assert (
        np.array_equal(project_volume(four, slab=3)["x"], volume.max(2))
        and max(map(len, four.asked)) == 3
    )
    p, t = masks()
    dp = Disk(p.astype(np.uint8), chunks=(2, 7, 8))
    dt = Disk(t)
    assert project_errors(dp, dt)[1] == project_errors(p, t)[1] and dp.asked


def test_zarr(volume, tmp_path):
    zarr = pytest.importorskip("zarr")
    z = zarr.create_array(
        str(tmp_path / "v.zarr"), shape=(1, *volume.shape), chunks=(1, 2, 4, 4), dtype="u1"
    )
    z[:] = volume[None]
    for axis, k in enumerate(AXES):
        assert np.array_equal(project_volume(z)[k], volume.max(axis))
    assert (
        show_projections(z, z, (5, 1, 1)) is not None
        and show_slices(z, (4, 6, 8)) is not None
        and browse_slices(z) is not None
    )
    assert show_errors(z, z, volume) is not None


def images(fig):
    return [np.asarray(i.get_array()) for ax in fig.axes for i in ax.images]


@pytest.mark.parametrize("spacing", [None, (5, 1, 1), (1, 1, 1), (0.001, 0.004, 0.002)])
def test_drawings_have_the_proportions_of_the_tissue(volume, spacing):
    fig = show_projections(volume, volume > 200, spacing, width=4)
    for shown, p in zip(images(fig), ("z", "y", "x")):
        m = project_volume(volume)[p]
        assert np.array_equal(shown, m.T if p == "x" else m)
    d, h, w = np.array(volume.shape) * (spacing or (1, 1, 1))
    inches = fig.get_size_inches()
    for ax, (wide, high) in zip([a for a in fig.axes if a.images], ((w, h), (w, d), (d, h))):
        size = ax.get_position().size * inches
        assert size[0] / size[1] == pytest.approx(wide / high, rel=1e-6)
        assert ax.images[0].get_extent() == pytest.approx([0, wide, high, 0])
    assert ("voxels" if spacing is None else "mm") in fig.axes[1].get_xlabel() and inches[0] <= 4.01


def test_thin_volumes_can_be_drawn():
    for shape in ((1, 8, 8), (8, 8, 1), (1, 1, 1), (2, 400, 3)):
        v = np.ones(shape, np.uint8)
        for fig in (show_slices(v, label=v), show_errors(None, v, v)):
            fig.set_dpi(10)
            fig.draw_without_rendering()
    (w, d), (h, _) = _plan((10, 20, 40), (1, 1, 1), 4)
    assert w / d == pytest.approx(4) and h / d == pytest.approx(2)


def test_a_thin_stack_keeps_its_legend_apart():
    for shape, image in (((10, 200, 200), True), ((2, 60, 60), False), ((64, 64, 64), True)):
        v = np.ones(shape, np.uint8)
        fig = show_errors(v if image else None, v, v)
        fig.draw_without_rendering()
        box = (fig.legends[0] if fig.legends else fig.axes[-1].get_legend()).get_window_extent()
        assert (
            not any(a.images and box.overlaps(a.get_tightbbox()) for a in fig.axes)
            and box.y0 >= 0
            and box.x0 >= 0
            and box.x1 <= fig.bbox.x1 + 8
        )


def test_orthogonal_slices(volume):
    fig = show_slices(volume, (4, 0, 8), volume > 100)
    for shown, m in zip(images(fig), (volume[4], volume[:, 0], volume[:, :, 8].T)):
        assert np.array_equal(shown, m)
    z = fig.axes[0]
    assert {round(float(line.get_xdata()[0]), 3) for line in z.lines} >= {8.5} and {
        round(float(line.get_ydata()[0]), 3) for line in z.lines
    } >= {0.5}
    assert [a.get_title() for a in fig.axes[:3]] == ["slice z = 4", "slice y = 0", "slice x = 8"]
    assert np.array_equal(images(show_slices(volume))[0], volume[2])
    assert images(show_slices(np.zeros((3, 3, 3)), window=(0, 1)))[0].max() == 0


def test_errors_have_one_colour_each():
    pred = np.array([[0, 1], [1, 0]])
    target = np.array([[0, 1], [0, 1]])
    rgb = colour_errors(pred, target)
    assert rgb.shape == (2, 2, 3) and rgb.dtype == np.float32 and 0 <= rgb.min() and rgb.max() <= 1
    assert (
        rgb[0, 0].tolist() == [0, 0, 0]
        and np.allclose(rgb[0, 1], ERROR_COLOURS["correct"])
        and np.allclose(rgb[1, 0], ERROR_COLOURS["extra"])
        and np.allclose(rgb[1, 1], ERROR_COLOURS["missed"])
    )
    assert np.array_equal(
        colour_errors(torch.tensor(pred), torch.tensor(target) > 0), rgb
    ) and np.array_equal(colour_errors(pred.astype(float), target * 254), rgb)
    light = sorted(
        np.dot(c, (0.2126, 0.7152, 0.0722)) for c in (*ERROR_COLOURS.values(), (0, 0, 0))
    )
    assert min(np.diff(light)) > 0.15  # told apart without colour
    p, t = masks()
    assert (
        colour_errors(p, t).shape == (6, 7, 8, 3)
        and not (colour_errors(t, t) != colour_errors(t, t)[..., :1]).any()
    )


def test_error_projections_show_the_most_frequent_kind():
    p, t = masks((6, 5, 4))
    c = classify_errors(p, t)
    maps, counts = project_errors(p[None], torch.from_numpy(t))
    for axis, k in enumerate(AXES):
        n = np.stack([(c == i).sum(axis) for i in (3, 2, 1)])
        want = np.where(n.sum(0) > 0, np.array([3, 2, 1])[n.argmax(0)], 0)
        assert np.array_equal(maps[k], want) and maps[k].dtype == np.uint8
    assert counts == {
        "background": (~p & ~t).sum(),
        "correct": (p & t).sum(),
        "extra": (p & ~t).sum(),
        "missed": (~p & t).sum(),
    }
    line = np.zeros((6, 1, 1), int)
    for kinds, want in (
        ((1, 1, 3), 1),
        ((1, 3), 3),
        ((1, 2), 2),
        ((2, 3), 3),
        ((1, 2, 2, 3), 2),
        ((), 0),
    ):
        pred = line.copy()
        target = line.copy()
        for i, kind in enumerate(kinds):
            pred[i] = kind in (1, 2)
            target[i] = kind in (1, 3)
        assert project_errors(pred, target)[0]["z"].item() == want


def test_show_errors(volume):
    p, t = masks(volume.shape)
    assert (
        len(images(show_errors(volume, p, t, (5, 1, 1)))) == 6
        and len(images(show_errors(None, p, t))) == 3
    )
    for fig in (show_errors(volume, p, t), show_errors(None, p, t, width=8)):
        (legend,) = [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]
        text = [x.get_text() for x in legend.get_texts()]
        assert text == [
            f"correct: {(p & t).sum():,} voxels",
            f"missed: {(~p & t).sum():,} voxels",
            f"extra: {(p & ~t).sum():,} voxels",
        ]
    flat = show_errors(volume[0], p[0], t[0])
    assert (
        np.array_equal(images(flat)[1], colour_errors(p[0], t[0]))
        and len(images(show_errors(None, torch.from_numpy(p[0]), t[0]))) == 1
    )
    flat.canvas.draw()


def test_browse(volume):
    pytest.importorskip("ipywidgets")
    axis, place, picture = browse_slices(volume, volume > 200, (5, 1, 1)).children
    seen = {picture.value}
    for k, n in zip(("x", "y", "z"), (9, 7, 5)):
        axis.value = k
        assert place.max == n - 1 and place.value < n
        place.value = n - 1
        seen.add(picture.value)
    assert len(seen) == 4 and not plt.get_fignums()
    for k in ("x", "z", "y"):
        axis.value = k  # from the last slice of a long axis to a short one


def test_browse_without_widgets(volume, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(browse_slices(volume), plt.Figure)


def bad(volume):
    nan = volume.astype(float)
    nan[1, 2, 3] = np.nan
    p, t = masks(volume.shape)
    return {
        "give one volume": lambda: project_volume(volume[0]),
        "give one volume ": lambda: project_volume(np.stack([volume, volume])),
        "empty": lambda: project_volume(volume[:0]),
        "volume holds NaN": lambda: project_volume(nan),
        "volume holds NaN ": lambda: project_volume(torch.from_numpy(nan)),
        "volume holds NaN  ": lambda: show_slices(nan, (1, 0, 0)),
        "image holds NaN": lambda: show_errors(nan, p, t),
        "spacing=.*three numbers": lambda: project_volume(volume, (5, 1)),
        "spacing=": lambda: project_volume(volume, (0, 1, 1)),
        "spacing": lambda: show_projections(volume, spacing=(1, 1, float("nan"))),
        "slab": lambda: project_volume(volume, slab=0),
        "label has shape": lambda: show_projections(volume, volume[1:]),
        "at=": lambda: show_slices(volume, (5, 0, 0)),
        "at=.*counted from 0": lambda: show_slices(volume, (0, -1, 0)),
        "at=.": lambda: show_slices(volume, (0, 0)),
        "pred has shape": lambda: colour_errors(p, t[1:]),
        "threshold": lambda: colour_errors(volume / 255, t),
        "threshold ": lambda: colour_errors(p, np.where(t, np.nan, 0)),
        "are empty": lambda: colour_errors(p[:0], t[:0]),
        "pred has shape.*target": lambda: show_errors(volume, p[1:], t),
        "image has shape": lambda: show_errors(volume[1:], p, t),
        "image has shape ": lambda: show_errors(volume[0, 1:], p[0], t[0]),
        "give numbers": lambda: project_volume(volume.astype(str)),
        "give a mask": lambda: colour_errors(p.astype(str), t),
        "label has shape.": lambda: browse_slices(volume, volume[1:]),
    }


@pytest.mark.parametrize("words", list(bad(np.zeros((5, 7, 9)))))
def test_faults(volume, words):
    with pytest.raises(InputError, match=words.strip()):
        bad(volume)[words]()
