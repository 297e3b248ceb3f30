"""Inference by value: every number that a student or a block should give, worked out by hand."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from torch import nn

from unpaired_kd.core import InputError
from unpaired_kd.data.formats.images import Image, read_image
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.inference import volume_files, volumes
from unpaired_kd.inference.blocks import (
    Block,
    block_logits,
    choose_tile,
    cut_blocks,
    limit_voxels,
    measure_memory,
    measure_receptive_field,
    measure_rim,
    mirror_index,
)
from unpaired_kd.inference.files import mark_weights, predict_path
from unpaired_kd.inference.resuming import (
    compare_records,
    hold_folder,
    is_renamed,
    keep_finished,
    log_block,
    read_log,
    resume_job,
)
from unpaired_kd.inference.student import (
    Recipe,
    Student,
    channels_first,
    check_scores,
    evaluating,
    half_precision,
    logits,
    pad_to,
    probabilities,
    strides_of,
)
from unpaired_kd.inference.volume_files import (
    create_output,
    open_volume,
    read_block,
    to_bytes,
    write_block,
)
from unpaired_kd.inference.volumes import (
    Job,
    compute_block,
    predict_volume,
    read_triple,
    remote_block,
    run_pipeline,
)


class Echo(nn.Module):
    "Scores that are a fixed function of the input, so that they can be worked out by hand."

    def __init__(self, f, stride=1):
        super().__init__()
        self.f = f
        self.stride = stride
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.f(x)


class Halves(nn.Module):
    "A stem, one level below it, and a decoder that sees one voxel of either: all weights are 1."

    strides = (2, 2, 2)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 1, 3, padding=1, bias=False)
        self.low = nn.Conv3d(1, 1, 3, padding=1, bias=False)
        self.join = nn.Conv3d(2, 1, 3, padding=1, bias=False)
        for p in self.parameters():
            nn.init.ones_(p)

    def encode(self, x):
        skip = self.stem(x)
        return self.low(nn.functional.avg_pool3d(skip, 2)), [skip]

    def decode(self, x, skips):
        x = nn.functional.interpolate(x, scale_factor=2)
        return self.join(torch.cat([x, skips[0]], 1))

    def forward(self, x):
        return self.decode(*self.encode(x))


def tied(f, stride=1, dims=2, **recipe):
    "A student around `Echo`."
    recipe = {"channels": 1, "in_channels": 1, "dims": dims, **recipe}
    return Student(Echo(f, stride), Recipe(**recipe))


# ---------------------------------------------------------------- one image
def test_padding_by_hand():
    "Mirrored at the far end without the edge, then the last plane of the mirror; axes in order."
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert pad_to(x, (3, 4))[0, 0].tolist() == [[0, 1, 2, 1], [3, 4, 5, 4], [0, 1, 2, 1]]
    assert pad_to(x, 5)[0, 0, :, 0].tolist() == [0, 3, 0, 0, 0]
    assert pad_to(x, 5)[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
    assert pad_to(x, (2, 3)) is x


def test_strides_by_hand():
    "`strides` first, then `stride` along every axis, then 1."
    net = nn.Identity()
    assert strides_of(net, 3) == (1, 1, 1)
    net.stride = 4
    assert strides_of(net, 2) == (4, 4)
    net.strides = [2, 8]
    assert strides_of(net, 2) == (2, 8)


def test_one_tile_is_one_pass():
    "An image that fits is given to the network once, padded, and cut back."
    seen = []
    net = Echo(lambda t: seen.append(tuple(t.shape)) or 3 * t, stride=4)
    x = torch.rand(1, 1, 7, 5, dtype=torch.float64)
    assert torch.equal(logits(net, x, 64), 3 * x) and seen == [(1, 1, 8, 8)]


def test_probabilities_by_hand():
    "One score: sigmoid, background first. Several: softmax over them."
    z = torch.tensor([-1.0, 0.0, 2.0]).reshape(1, 1, 1, 3)
    p = probabilities(z)[0, :, 0]
    for i, v in enumerate((-1.0, 0.0, 2.0)):
        one = 1 / (1 + math.exp(-v))
        assert p[1, i].item() == pytest.approx(one, abs=1e-6)
        assert p[0, i].item() == pytest.approx(1 - one, abs=1e-6)
    z = torch.tensor([[1.0, 2.0, 4.0]]).reshape(1, 3, 1, 1)
    total = sum(math.exp(v) for v in (1, 2, 4))
    want = [math.exp(v) / total for v in (1, 2, 4)]
    assert probabilities(z)[0, :, 0, 0].tolist() == pytest.approx(want, abs=1e-6)
    assert probabilities(z.half()).dtype == torch.float32


def test_label_is_the_most_probable_class():
    "Above one half, not at it; and the largest of three."
    raw = np.array([[0.4, 0.5, 0.6]], np.float32)
    assert tied(lambda x: x - 0.5).predict(raw).tolist() == [[0, 0, 1]]

    def three(x):
        return torch.cat([0 * x + 0.45, x, 1 - x], 1)

    s = tied(three, classes=("a", "b", "c"))
    assert s.predict(np.array([[0.4, 0.5, 0.6]], np.float32)).tolist() == [[2, 1, 1]]
    assert s.predict(raw).dtype == np.uint8


@pytest.mark.parametrize(
    "entries, want",
    [
        (dict(intensity="dtype"), [0.0, 51 / 255, 1.0]),
        (dict(intensity=(0, 102)), [0.0, 0.5, 1.0]),
        (dict(intensity=(51, 306)), [0.0, 0.0, 0.8]),
        (dict(intensity=(0, 102), invert=True), [1.0, 0.5, 0.0]),
    ],
)
def test_the_network_sees_the_recipe(entries, want):
    "uint8 0, 51, 255 under each rule of intensity."
    raw = np.array([[0, 51, 255]], np.uint8)
    assert tied(lambda x: x, **entries).prepare(raw)[0, 0, 0].tolist() == pytest.approx(want)


def test_grey_is_replicated_and_slices_are_a_batch():
    raw = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    s = Student(Echo(lambda x: x), Recipe(channels=1, in_channels=3))
    x = s.prepare(raw[None])
    assert x.shape == (2, 3, 4, 3)
    for k in range(2):
        for c in range(3):
            assert np.allclose(x[k, c].numpy() * 255, raw[k])


def test_volume_and_classes_come_back_in_order():
    "Two slices, three classes: the probabilities are (classes,D,H,W) and the labels (D,H,W)."
    raw = np.zeros((2, 4, 3), np.float32)
    raw[0, 1, 2] = raw[1, 3, 0] = 1

    def f(x):
        return torch.cat([0 * x + 0.5, x, 0 * x - 9], 1)

    s = tied(f, classes=("a", "b", "c"))
    p = s.probabilities(raw[None])
    assert p.shape == (3, 2, 4, 3)
    base = math.exp(0.5) + math.exp(1) + math.exp(-9)
    assert p[1, 0, 1, 2] == pytest.approx(math.exp(1) / base, abs=1e-6)
    assert p[0, 0, 1, 2] == pytest.approx(math.exp(0.5) / base, abs=1e-6)
    assert np.argwhere(s.predict(raw[None])).tolist() == [[0, 1, 2], [1, 3, 0]]


def test_probabilities_are_resampled_not_scores():
    "At half size four pixels (p of +4, -4) come back as eight: linear in p, half-pixel centres."
    raw = np.zeros((8, 8), np.float32)
    raw[:, 4:] = 1
    s = tied(lambda x: 8 * (x > 0.5) - 4.0, zoom=0.5)
    found = s.probabilities(raw)[1, 0]
    low, high = (1 / (1 + math.exp(-v)) for v in (-4, 4))
    want = [low, low, low, 0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high, high, high, high]
    # the antialiased half-size image is 1/8 and 7/8 beside the step, still one and zero
    assert found.tolist() == pytest.approx(want, abs=1e-5)


def test_a_volume_keeps_its_sides_under_zoom():
    "A stack of 3 slices of 8 x 12 at half size comes back as 3 x 8 x 12."
    raw = np.zeros((3, 8, 12), np.float32)
    raw[1] = 1
    s = tied(lambda x: x - 0.5, zoom=0.5)
    assert s.prepare(raw[None]).shape == (3, 1, 4, 6)
    label = s.predict(raw[None])
    assert label.shape == (3, 8, 12) and label[1].all() and not label[0].any()


def test_layouts_by_hand():
    a = np.arange(4 * 5 * 3).reshape(4, 5, 3)
    assert np.array_equal(channels_first(a)[2], a[..., 2])
    assert channels_first(a, dims=3).shape == (1, 4, 5, 3)
    assert channels_first(np.zeros((5, 4, 4, 3))).shape == (3, 5, 4, 4)
    for bad in (np.zeros((5, 4, 4, 1)), np.zeros(3), np.zeros((2, 2, 2, 2, 2))):
        with pytest.raises(InputError, match="not an image"):
            channels_first(bad)


def test_scores_must_fit_the_classes():
    for k, good in ((1, True), (2, True), (3, False), (0, False)):
        z = torch.zeros(1, k, 2, 2)
        with contextlib.nullcontext() if good else pytest.raises(InputError, match="scores a pix"):
            check_scores(z, ("a", "b"))


def test_precision_and_mode():
    "bf16 and fp16 are what they say; fp32 changes nothing; eval mode within, then as before."
    a = torch.ones(2, 2)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, kind in kinds.items():
        with half_precision(torch.device("cpu"), name):
            assert (a @ a).dtype == kind
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())
    net[1].eval()
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == [True, True, False]


def test_few_slices_at_a_time():
    "On the CPU at most 2^16 pixels are computed together."
    seen = []
    s = tied(lambda x: seen.append(len(x)) or x, patch=512)
    s.predict(np.zeros((1, 5, 128, 256), np.float32))
    assert seen == [2, 2, 1]


# ---------------------------------------------------------------- the plan
def test_receptive_field_by_hand():
    "Halves: 1 of the stem, then 2 pooled voxels around one, then 1; counted for every voxel."
    net = Halves()
    x = torch.zeros(1, 1, 2, 2, 64)
    base = net(x)
    x[..., 32:34] = 1  # one stride
    touched = (net(x) != base).flatten(0, 3).any(0).nonzero()[:, 0].tolist()
    far = max(32 - touched[0], touched[-1] - 33)
    assert far == 5  # stem 1, pooled pair 1 more, low conv 2, join 1
    assert measure_receptive_field(net) == (6, 6, 6)  # whole strides
    assert measure_receptive_field(net, decoder=True) == measure_rim(net, 1) == (2, 2, 2)
    assert measure_rim(nn.Conv3d(1, 1, 3), 1) is None
    plain = nn.Sequential(nn.Conv3d(1, 1, (1, 3, 7), padding=(0, 1, 3)))
    assert measure_receptive_field(plain) == (0, 1, 3)
    plain = nn.Sequential(nn.Conv2d(2, 1, (3, 5), padding=(1, 2)))
    assert measure_receptive_field(plain, 2, 2) == (1, 2)


def test_one_sided_receptive_fields():
    "What is seen on one side only counts as well."
    left = nn.Sequential(nn.ConstantPad3d((3, 0, 0, 0, 0, 0), 0), nn.Conv3d(1, 1, (1, 1, 4)))
    right = nn.Sequential(nn.ConstantPad3d((0, 3, 0, 0, 0, 0), 0), nn.Conv3d(1, 1, (1, 1, 4)))
    assert measure_receptive_field(left) == measure_receptive_field(right) == (0, 0, 3)


def test_mirror_by_hand():
    assert mirror_index(4, 9).tolist() == [0, 1, 2, 3, 2, 1, 0, 0, 0]
    assert mirror_index(1, 3).tolist() == [0, 0, 0]


def test_blocks_by_hand():
    "An axis of 21 (24 padded) in cores of 8 with a halo of 4, stride 4; another of 5 in one."
    blocks = cut_blocks((21, 5, 8), (8, 8, 8), (4, 8, 0), (4, 4, 4))
    assert [b.at for b in blocks] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert [b.core[0] for b in blocks] == [(0, 8), (8, 16), (16, 21)]
    assert [b.read[0] for b in blocks] == [(0, 12), (4, 20), (12, 24)]
    assert {b.core[1] for b in blocks} == {(0, 5)} and {b.read[1] for b in blocks} == {(0, 8)}
    order = [b.at for b in cut_blocks((4, 8, 8), (4, 4, 4), (0,) * 3, (4,) * 3)]
    assert order == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_a_core_is_what_the_whole_network_gives():
    "Every core of a small volume, with and without the rim, in float64: equal to one piece."
    net = Halves().double()
    x = torch.from_numpy(np.random.default_rng(0).random((1, 1, 20, 16, 12)))
    whole = net(x)
    halo = measure_receptive_field(net)
    assert halo == (6, 6, 6)
    for rim in (None, (2, 2, 2)):
        for b in cut_blocks((20, 16, 12), (4, 6, 8), halo, (2, 2, 2)):
            part = x[(..., *(slice(*r) for r in b.read))]
            core = [(a - o, e - o) for (a, e), (o, _) in zip(b.core, b.read)]
            found = block_logits(net, part, core, rim)
            assert torch.allclose(found, whole[(..., *(slice(*c) for c in b.core))], atol=1e-9)


def test_the_decoder_runs_on_core_and_rim_only():
    "What is decoded is the core in whole strides and the rim around it, cut off at the border."
    net = Halves()
    seen = []
    plain = net.decode
    net.decode = lambda z, skips: seen.append((z.shape[2:], skips[0].shape[2:])) or plain(z, skips)
    block_logits(net, torch.zeros(1, 1, 20, 20, 20), [(7, 11), (0, 4), (16, 20)], (2, 2, 2))
    assert seen == [((5, 3, 3), (10, 6, 6))]


def test_memory_by_hand():
    "A network that doubles its channels once: input and output are alive together, plus a quarter."
    net = nn.Sequential(nn.Conv3d(2, 6, 1))
    weights = 4 * (2 * 6 + 6)
    voxels = 128**3
    want = 1.25 * (4 * (2 + 6) * voxels) / voxels
    assert measure_memory(net, 2) == pytest.approx(want, abs=2 * weights / voxels)
    chain = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Conv3d(4, 3, 1), nn.Conv3d(3, 1, 1))
    assert measure_memory(chain) == pytest.approx(1.25 * 4 * (1 + 4 + 3), rel=1e-6)  # first freed


def test_half_a_gigabyte_is_kept():
    net = nn.Sequential(nn.Conv3d(1, 3, 1))
    each = 1.25 * 4 * (1 + 3)
    for memory, free in (("1.5GB", 1e9), (2e9, 1.5e9), ("700 MB", 0.2e9), (None, 1e9), (1e8, 0)):
        assert limit_voxels(memory, net, 1, None) == pytest.approx((free / each,) * 2, rel=1e-6)
    assert limit_voxels("1.5TiB", net, 1, None)[0] == pytest.approx((1.5e12 - 5e8) / each)
    for bad in ("much", "1.2.3GB", [], "-1GB"):
        with pytest.raises(InputError, match="1.5GB"):
            limit_voxels(bad, net, 1, None)


def test_the_decoder_has_a_limit_of_its_own():
    "With a rim the two limits differ: the encoder's is the larger one here."
    net = Halves()
    reads, boxes = limit_voxels("1.5GB", net, 1, (2, 2, 2))
    up = measure_memory(net)
    assert boxes == pytest.approx(1e9 / up) and reads > boxes


def least_work(size, halo, strides, voxels, rim, joined, unit):
    "All combinations of sides, by loops."
    best = None
    found = []
    for n, s in zip(size, strides):
        u = math.lcm(unit, s)
        found.append([t for t in range(u, 2000, u) if t < n + u and t <= 1024 // u * u + u])
    for a in found[0]:
        for b in found[1]:
            for c in found[2]:
                most = [0, 0]
                work = 0
                for block in cut_blocks(size, (a, b, c), halo, strides):
                    most[0] = max(most[0], math.prod(e - s for s, e in block.read))
                    work += math.prod(e - s for s, e in block.read)
                for block in cut_blocks(size, (a, b, c), rim, strides):
                    most[1] = max(most[1], math.prod(e - s for s, e in block.read))
                    work += math.prod(e - s for s, e in block.read)
                if most[0] <= voxels and most[1] <= joined and (best is None or work < best[0]):
                    best = (work, (a, b, c))
    return best and best[1]


@pytest.mark.parametrize(
    "size, voxels, joined, unit",
    [
        ((130, 70, 200), 2.5e6, math.inf, 64),
        ((136, 102, 102), 3.1e6, 7e5, 64),  # by the encoder alone it were another tile
        ((130, 70, 200), 1.2e6, 4e5, 32),
        ((130, 70, 200), 1.2e6, 2e5, 32),
        ((130, 70, 200), 2e5, math.inf, 16),
    ],
)
def test_the_tile_has_the_least_work(size, voxels, joined, unit):
    halo = (16, 16, 24)
    rim = (8, 8, 4)
    strides = (8, 8, 4)
    units = [u for u in (64, 32, 16) if u >= unit]
    want = [least_work(size, halo, strides, voxels, rim, joined, u) for u in units]
    assert want[:-1] == [None] * (len(units) - 1)
    assert choose_tile(size, halo, strides, voxels, rim, joined) == want[-1] is not None


# ---------------------------------------------------------------- volumes on disk
def test_bytes_by_hand():
    "Nearest of 255 p, down at the half; 128 exactly above one half."
    p = torch.tensor([0.0, 0.5, 0.5001, 1.0, 127.5 / 255, 100.4 / 255, 100.6 / 255])
    assert to_bytes(p).tolist() == [0, 127, 128, 255, 127, 100, 101]


def test_a_box_by_hand(tmp_path):
    raw = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) * 7
    for name in ("v.zarr", "v.tif", "v.nii"):
        write_image(tmp_path / name, Image(raw[None], (3.0, 2.0, 1.0)))
        v = open_volume(tmp_path / name)
        assert v.shape == (1, 4, 5, 6) and v.spacing == (3, 2, 1) and v.dtype == np.int16
        assert np.array_equal(v.read(((1, 3), (0, 2), (4, 6)))[0], raw[1:3, 0:2, 4:6])
        assert np.array_equal(v[:, 1:4:2, :, 5:], raw[None, 1:4:2, :, 5:])


@pytest.mark.parametrize("axes", ["zyx", "tyx", "czyx", "zcyx", "tzyx"])
def test_axes_of_a_zarr(tmp_path, axes):
    "Channels and depth where the file says; a time of one is no depth."
    length = dict(z=4, t=1 if "z" in axes else 4, c=2, y=5, x=6)
    raw = np.random.default_rng(0).integers(0, 255, [length[a] for a in axes], np.uint8)
    group = zarr.open_group(str(tmp_path / "v.zarr"), mode="w")
    a = group.create_array("0", shape=raw.shape, dtype="uint8", chunks=raw.shape)
    a[...] = raw
    kinds = dict(c="channel", t="time")
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": n, "type": kinds.get(n, "space")} for n in axes],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [1.0] * len(axes)}
                        ],
                    }
                ],
            }
        ],
    }
    want = np.moveaxis(raw, axes.index("c"), 0) if "c" in axes else raw[None]
    want = want.reshape(-1, 4, 5, 6)
    v = open_volume(tmp_path / "v.zarr")
    assert v.shape == want.shape
    assert np.array_equal(v.read(((1, 3), (2, 5), (0, 4))), want[:, 1:3, 2:5, 0:4])


def test_a_block_is_padded_as_the_volume(tmp_path):
    raw = np.random.default_rng(0).integers(0, 255, (5, 6, 7), np.uint8)
    write_image(tmp_path / "v.tif", Image(raw[None]))
    v = open_volume(tmp_path / "v.tif")
    block = Block((0, 0, 0), ((4, 5), (0, 4), (4, 7)), ((4, 8), (0, 8), (0, 8)))
    found = read_block(v, block, (4, 4, 4))[0]
    zs, ys, xs = [4, 3, 2, 1], [0, 1, 2, 3, 4, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6, 5]
    for i, z in enumerate(zs):
        for j, y in enumerate(ys):
            assert found[i, j].tolist() == [raw[z, y, x] for x in xs]


def test_outputs_say_where_their_voxels_are(tmp_path):
    "OME-Zarr: axes, units, scale, origin, one shard a core; TIFF: physical sizes. Block by block."
    shape, tile, spacing = (3, 10, 12, 20), (8, 12, 16), (0.5, 0.25, 0.125)
    affine = np.diag([0.125, 0.25, 0.5, 1.0])
    create_output(tmp_path / "p.zarr", shape, tile, spacing, affine, "m", (1.0, 2.0, 3.0))
    create_output(tmp_path / "p.tif", shape, tile, spacing)
    attributes = json.loads((tmp_path / "p.zarr" / "zarr.json").read_text())["attributes"]
    image = attributes["ome"]["multiscales"][0]
    mm = dict(type="space", unit="millimeter")
    assert image["axes"] == [dict(name="c", type="channel"), *(dict(name=n, **mm) for n in "zyx")]
    scale, shift = image["datasets"][0]["coordinateTransformations"]
    assert scale == dict(type="scale", scale=[1.0, 0.5, 0.25, 0.125])
    assert shift == dict(type="translation", translation=[0.0, 1.0, 2.0, 3.0])
    assert attributes["affine"] == affine.tolist()
    array = zarr.open_array(str(tmp_path / "p.zarr" / "0"), mode="r")
    assert array.shards == (3, 8, 12, 16) and array.chunks == (1, 8, 12, 16)
    with tifffile.TiffFile(tmp_path / "p.tif") as f:
        assert f.is_bigtiff and f.series[0].axes == "CZYX"
        for word in ('PhysicalSizeZ="0.5"', 'PhysicalSizeX="0.125"', 'PhysicalSizeYUnit="mm"'):
            assert word in f.ome_metadata
    want = np.random.default_rng(1).integers(0, 255, shape, np.uint8)
    for name in ("p.zarr", "p.tif"):
        for b in cut_blocks(shape[1:], tile, (4, 4, 4), (4, 4, 4)):
            part = want[(slice(None), *(slice(*c) for c in b.core))]
            write_block(tmp_path / name, b, part, shape)
        assert np.array_equal(read_image(tmp_path / name).array, want)
        assert read_image(tmp_path / name).spacing == pytest.approx(spacing)


def test_without_a_spacing_nothing_is_claimed(tmp_path):
    create_output(tmp_path / "p.zarr", (8, 8, 8), (8, 8, 8))
    ome = json.loads((tmp_path / "p.zarr" / "zarr.json").read_text())["attributes"]["ome"]
    assert all("unit" not in a for a in ome["multiscales"][0]["axes"])


def test_an_empty_block_has_a_file(tmp_path):
    "A file that is absent was never computed."
    create_output(tmp_path / "p.zarr", (8, 8, 16), (8, 8, 8))
    first, second = cut_blocks((8, 8, 16), (8, 8, 8), (0,) * 3, (8,) * 3)
    write_block(tmp_path / "p.zarr", second, np.zeros((8, 8, 8), np.uint8), (8, 8, 16))
    files = [f for f in (tmp_path / "p.zarr" / "0" / "c").rglob("*") if f.is_file()]
    assert [f.relative_to(tmp_path / "p.zarr" / "0" / "c").as_posix() for f in files] == ["0/0/1"]


def test_a_block_and_its_folders_are_forced_to_the_disk(tmp_path, monkeypatch):
    "For Zarr the file and every folder up to the array."
    seen = []
    monkeypatch.setattr(volume_files, "sync", lambda p: seen.append(Path(p)))
    create_output(tmp_path / "p.zarr", (8, 8, 8), (8, 8, 8))
    (block,) = cut_blocks((8, 8, 8), (8, 8, 8), (0,) * 3, (8,) * 3)
    write_block(tmp_path / "p.zarr", block, np.ones((8, 8, 8), np.uint8), (8, 8, 8))
    root = tmp_path / "p.zarr" / "0"
    assert seen == [root / "c/0/0/0", root / "c/0/0", root / "c/0", root / "c", root]


# ---------------------------------------------------------------- resuming
def test_the_log_by_hand(tmp_path):
    block = Block((3, 0, 12), ((0, 1),) * 3, ((0, 1),) * 3)
    with open(tmp_path / "blocks.log", "a") as log:
        log.write("1 2")  # torn
        log_block(log, block)
        log.write("9 9 9")  # torn as well: without its end it may be 9 9 95
    assert read_log(tmp_path) == {(3, 0, 12)}
    (tmp_path / "blocks.log").write_bytes(b"\n0 0 1\n\xff\xfe 1 2\n1 2 3 4\n-1 0 0\n")
    assert read_log(tmp_path) == {(0, 0, 1)}
    assert read_log(tmp_path / "nowhere") == set()


def test_a_job_begins_goes_on_or_is_refused(tmp_path):
    work = tmp_path / "o.tif.part"
    data = work / "data.tif"
    made = []

    def create():
        made.append(not (work / "job.json").exists())
        data.write_bytes(b"12345")

    with hold_folder(work):
        assert resume_job(work, data, {"a": (1, 2)}, create) == set() and made == [True]
        assert json.loads((work / "job.json").read_text()) == {"a": [1, 2]}
        assert resume_job(work, data, {"a": (1, 2)}, create) == set() and made == [True] * 2
        (work / "blocks.log").write_text("\n0 0 0\n")
        assert resume_job(work, data, {"a": (1, 2)}, create) == {(0, 0, 0)} and len(made) == 2
        assert compare_records(work, {"a": (1, 2)}) == []
        assert compare_records(work, {"a": (1, 3), "b": 1}) == [
            "  a: [1, 2] there, [1, 3] now",
            "  b: None there, 1 now",
        ]
        with pytest.raises(InputError, match=r"another job:\n  a: \[1, 2\] there, 5 now"):
            resume_job(work, data, {"a": 5}, create)
        data.unlink()
        assert resume_job(work, data, {"a": 5}, create) == set() and len(made) == 3
        assert read_log(work) == set()
        (work / "job.json").unlink()
    assert not work.exists()


def test_what_a_fault_leaves(tmp_path):
    "With a finished block the work stays, without one it goes; the message says which."
    for finished in (True, False):
        work = tmp_path / f"{finished}.part"
        with pytest.raises(InputError, match="lies in" if finished else "Nothing of it is kept"):
            with hold_folder(work), keep_finished(work, tmp_path / "o"):
                (work / "job.json").write_text("{}")
                if finished:
                    (work / "blocks.log").write_text("\n0 0 0\n")
                raise OSError(28, "full")
        assert work.exists() == finished
    for fault, word in (
        (MemoryError(), "--memory"),
        (RuntimeError("CUDA out of memory"), "--memory"),
        (RuntimeError("odd"), "a block failed"),
        (ValueError("odd"), "a block failed"),
    ):
        with pytest.raises(InputError, match=word), keep_finished(tmp_path, tmp_path / "o"):
            raise fault
    with pytest.raises(KeyboardInterrupt), keep_finished(tmp_path, tmp_path / "o"):
        raise KeyboardInterrupt


def test_a_job_that_has_its_name_is_known(tmp_path):
    work = tmp_path / "w"
    work.mkdir()
    data = work / "data.tif"
    output = tmp_path / "o.tif"
    assert not is_renamed(work, data, output)
    output.write_bytes(b"1")
    assert not is_renamed(work, data, output)
    (work / "job.json").write_text("{}")
    assert is_renamed(work, data, output)  # the data is gone
    data.write_bytes(b"1")
    assert not is_renamed(work, data, output)  # another file of that name
    data.unlink()
    data.hardlink_to(output)
    assert is_renamed(work, data, output)


# ---------------------------------------------------------------- the job
def job_of(student, **changes):
    "A job of one block of 4 x 4 x 4."
    settings = dict(input="v", mark="m", weights="w", data="d.tif", shape=(4, 4, 4))
    settings |= dict(strides=(1, 1, 1), rim=None, rule="dtype", empty=None, labels=False)
    return Job(**{**settings, "precision": "fp32", **changes})


ONE = Block((0, 0, 0), ((2, 3), (0, 2), (0, 2)), ((0, 4), (0, 3), (0, 2)))


def raw_block():
    raw = np.zeros((1, 4, 3, 2), np.uint8)
    raw[0, 2, :2] = [[0, 51], [102, 255]]
    return raw


@pytest.mark.parametrize(
    "recipe, change, want",
    [
        ({}, {}, [0.0, 0.2, 0.4, 1.0]),
        (dict(invert=True), {}, [1.0, 0.8, 0.6, 0.0]),
        ({}, dict(rule=(51.0, 102.0)), [0.0, 0.0, 1.0, 1.0]),
        (dict(invert=True), dict(rule=(7.0, 7.0)), [1.0, 1.0, 1.0, 1.0]),
        ({}, dict(rule=(7.0, 7.0)), [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_a_block_sees_what_the_plain_prediction_sees(recipe, change, want):
    "The scores are ten times the input less five; the core is the third plane."
    s = tied(lambda x: 10 * x - 5, dims=3, **recipe)
    found = compute_block(s, job_of(s, **change), ONE, raw_block())
    assert found.shape == (1, 2, 2)
    bytes_ = [255 / (1 + math.exp(5 - 10 * v)) for v in want]
    assert np.abs(found.ravel() - np.array(bytes_)).max() <= 0.5 + 1e-3
    label = compute_block(s, job_of(s, labels=True, **change), ONE, raw_block())
    assert label.ravel().tolist() == [int(v > 0.5) for v in want]


def test_a_block_of_three_classes_and_three_channels():
    def three(x):
        return torch.cat([0 * x[:, :1] + 1, 4 * x[:, 1:2], 0 * x[:, :1]], 1)

    s = Student(Echo(three), Recipe(in_channels=3, dims=3, classes=("a", "b", "c")))
    found = compute_block(s, job_of(s), ONE, raw_block())
    assert found.shape == (3, 1, 2, 2)
    for i, v in enumerate((0.0, 0.2, 0.4, 1.0)):
        scores = [math.exp(1), math.exp(4 * v), 1.0]
        for k in range(3):
            want = 255 * scores[k] / sum(scores)
            assert abs(found[k].ravel()[i] - want) <= 0.5 + 1e-3
    label = compute_block(s, job_of(s, labels=True), ONE, raw_block())
    assert label.ravel().tolist() == [0, 0, 1, 1]


def test_background_is_of_core_and_halo():
    "Nothing above `empty` in core and halo: background. One bright voxel in the halo: computed."
    s = tied(lambda x: x + 9, dims=3)
    dark = np.full((1, 4, 3, 2), 40, np.uint8)
    assert (compute_block(s, job_of(s), ONE, dark) > 250).all()
    assert (compute_block(s, job_of(s, empty=39.0), ONE, dark) > 250).all()
    assert (compute_block(s, job_of(s, empty=40.0), ONE, dark) == 0).all()
    dark[0, 0, 2, 1] = 41
    assert (compute_block(s, job_of(s, empty=40.0), ONE, dark) > 250).all()
    many = tied(lambda x: torch.cat([x] * 3, 1), dims=3, classes=("a", "b", "c"))
    empty = compute_block(many, job_of(many, empty=99.0), ONE, dark)
    assert (empty[0] == 255).all() and (empty[1:] == 0).all()
    label = compute_block(many, job_of(many, empty=99.0, labels=True), ONE, dark)
    assert label.shape == (1, 2, 2) and not label.any()


def test_stages_in_order_and_the_first_error():
    done = []
    spent = run_pipeline(
        range(5), lambda i: i * 10, lambda i, d: d + 1, lambda i, v: done.append((i, v))
    )
    assert done == [(i, 10 * i + 1) for i in range(5)]
    assert set(spent) == {"read", "compute", "write"}

    def fail(*a):
        raise ZeroDivisionError

    for stage in range(3):
        steps = [lambda *a: None] * 3
        steps[stage] = fail
        with pytest.raises(ZeroDivisionError):
            run_pipeline(range(3), *steps)


def test_three_numbers():
    assert read_triple("8,16,24", "tile") == (8, 16, 24) and read_triple(8, "tile") == (8, 8, 8)
    assert read_triple(0, "halo") == (0, 0, 0) and read_triple(None, "tile") is None
    assert read_triple("0.5,1,2", "spacing", kind=float) == (0.5, 1.0, 2.0)
    for bad in ("1,2", 0, 1.5, -1, "inf", "a"):
        with pytest.raises(InputError, match="tile="):
            read_triple(bad, "tile")
    with pytest.raises(InputError, match="multiples of the network's stride, 2, 4, 8"):
        read_triple((2, 4, 4), "tile", (2, 4, 8))


@pytest.fixture
def small(tmp_path):
    "A student that sees three voxels, and a volume of 6 x 10 x 12 with a bright half."
    net = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1))
    with torch.no_grad():
        net[0].weight.fill_(1 / 27)
        net[0].bias.fill_(-0.4)
    raw = np.random.default_rng(0).integers(100, 4000, (6, 10, 12)).astype(np.uint16)
    raw[:, :, 6:] = 50
    write_image(tmp_path / "v.tif", Image(raw[None], (3.0, 2.0, 1.0)))
    s = Student(net, Recipe(in_channels=1, dims=3, patch=64, intensity="percentile"))
    return s, raw, tmp_path


def by_hand(raw, empty_from=None):
    "Bytes of the mean of 27 voxels (zeros outside), between the percentiles .5 and 99.5."
    low, high = np.percentile(raw.astype(np.float64), (0.5, 99.5))
    x = np.clip((raw - low) / (high - low), 0, 1)
    padded = np.pad(x, 1)
    out = np.zeros(raw.shape)
    for dz in range(3):
        for dy in range(3):
            for dx in range(3):
                shifted = padded[dz : dz + 6, dy : dy + 10, dx : dx + 12]
                out += shifted / 27
    return 255 / (1 + np.exp(-(out - 0.4)))


def test_a_volume_by_hand(small):
    "Every byte of an output, and what the call says of it."
    s, raw, folder = small
    t = predict_volume(s, folder / "v.tif", folder / "p.zarr", tile=4)
    made = read_image(folder / "p.zarr")
    assert made.spacing == (3, 2, 1)
    assert np.abs(made.array[0] - by_hand(raw)).max() <= 0.5 + 1e-2
    assert t["halo"] == (1, 1, 1) and t["tile"] == (4, 4, 4)
    assert (t["blocks"], t["computed"], t["skipped"], t["resumed"]) == (18, 18, 0, 0)
    assert t["voxels_per_second"] == pytest.approx(720 / t["seconds"])
    how = dict(labels=True, spacing="1,1,4", halo=2)
    labels = predict_volume(s, folder / "v.tif", folder / "l.tif", **how)
    made = read_image(folder / "l.tif")
    assert np.array_equal(made.array[0], by_hand(raw) > 127.5) and made.spacing == (1, 1, 4)
    assert labels["halo"] == (2, 2, 2)
    assert labels["tile"] == (64, 64, 64)  # the whole axis, in whole units


def test_empty_blocks_by_hand(small):
    "Cores of 4 with a halo of 1: only the last column of blocks has nothing bright in sight."
    s, raw, folder = small
    t = predict_volume(s, folder / "v.tif", folder / "p.zarr", tile=4, empty=50)
    found = read_image(folder / "p.zarr").array[0]
    assert (t["skipped"], t["computed"]) == (6, 12)
    assert np.abs(found[..., :8] - by_hand(raw)[..., :8]).max() <= 0.5 + 1e-2
    assert not found[..., 8:].any()


def test_blocks_are_logged_after_they_are_written(small, monkeypatch):
    "At its note, a block's voxels are in the output; a failed write leaves no note."
    s, raw, folder = small
    order = []
    write = volumes.write_block
    log = volumes.log_block

    def writing(path, block, values, shape):
        write(path, block, values, shape)
        order.append(("write", block.at))

    def logging(file, block):
        order.append(("log", block.at))
        log(file, block)

    monkeypatch.setattr(volumes, "write_block", writing)
    monkeypatch.setattr(volumes, "log_block", logging)
    predict_volume(s, folder / "v.tif", folder / "p.zarr", tile=8)
    blocks = [b.at for b in cut_blocks(raw.shape, (8, 8, 8), (1, 1, 1), (1, 1, 1))]
    assert order == [step for at in blocks for step in (("write", at), ("log", at))]


def test_a_killed_job_computes_the_rest(small, monkeypatch):
    s, raw, folder = small
    log = volumes.log_block
    noted = []

    def stop(file, block):
        if len(noted) == 3:
            raise KeyboardInterrupt
        log(file, block)
        noted.append(block.at)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(volumes, "log_block", stop)
        predict_volume(s, folder / "v.tif", folder / "p.tif", tile=4)
    seen = []
    monkeypatch.setattr(volumes, "log_block", lambda f, b: seen.append(b.at) or log(f, b))
    t = predict_volume(s, folder / "v.tif", folder / "p.tif", tile=4)
    assert (t["resumed"], t["computed"]) == (3, 15)
    assert not set(noted) & set(seen)
    assert np.abs(read_image(folder / "p.tif").array[0] - by_hand(raw)).max() <= 0.5 + 1e-2
    assert not (folder / "p.tif.part").exists()


def test_a_worker_does_the_same(small, monkeypatch):
    "The task of a cluster: read, compute, write one block, and say whether it was empty."
    s, raw, folder = small
    monkeypatch.setattr(volumes, "_load_student", lambda *a: s)
    volumes._open_once.cache_clear()
    shape = raw.shape
    create_output(folder / "p.zarr", shape, (4, 4, 4))
    low, high = np.percentile(raw.astype(np.float64), (0.5, 99.5))
    job = job_of(
        s,
        input=str(folder / "v.tif"),
        data=str(folder / "p.zarr"),
        shape=shape,
        rule=(low, high),
        empty=50.0,
    )
    skipped = []
    for b in cut_blocks(shape, (4, 4, 4), (1, 1, 1), (1, 1, 1)):
        answer = remote_block("folder", None, job, b)
        assert min(answer[k] for k in ("read", "compute", "write")) >= 0
        skipped.append(answer["skipped"])
    found = read_image(folder / "p.zarr").array[0]
    assert np.abs(found[..., :8] - by_hand(raw)[..., :8]).max() <= 0.5 + 1e-2
    assert skipped == [False, False, True] * 6


# ---------------------------------------------------------------- a folder of images
class Threshold(nn.Module):
    "What is above one half, as a network."

    stride = 1

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.5))
        self.seen = []
        self.stop_at = None

    def forward(self, x):
        self.seen.append(float(x.max()))
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        return x - self.level


def folder_of_images(tmp_path):
    "Three grey images in a folder `in`, by name."
    (tmp_path / "in").mkdir()
    images = {}
    for k, name in enumerate(("a.png", "b.png", "c.tif")):
        images[name] = np.random.default_rng(k).integers(0, 200 + 20 * k, (6, 8), np.uint8)
        write_image(tmp_path / "in" / name, Image(images[name][None]))
    return images


def test_one_bad_image_of_three(tmp_path, capsys):
    "Labels of each good image under its name; the bad one and what is no image are named."
    images = folder_of_images(tmp_path)
    (tmp_path / "in" / "b.png").write_bytes(b"damaged")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    s = Student(Threshold(), Recipe(channels=1, in_channels=1))
    with pytest.raises(InputError, match=r"2 of 3 images were segmented; 1 were not:\n  .*b.png"):
        predict_path(s, tmp_path / "in", tmp_path / "out", bars=False)
    assert "left out: notes.txt" in capsys.readouterr().out
    for name in ("a.png", "c.tif"):
        label = read_image(tmp_path / "out" / name).array[0]
        assert np.array_equal(label > 0, images[name] / 255 > 0.5)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.tif"]


def test_a_killed_folder_goes_on(tmp_path, capsys):
    "The same command computes what is missing and nothing else; another student is refused."
    images = folder_of_images(tmp_path)
    net = Threshold()
    s = Student(net, Recipe(channels=1, in_channels=1))
    net.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        predict_path(s, tmp_path / "in", tmp_path / "out", bars=False)
    other = Student(Threshold(), Recipe(channels=1, in_channels=1, invert=True))
    with pytest.raises(InputError, match="there already"):
        predict_path(other, tmp_path / "in", tmp_path / "out", bars=False)
    net.stop_at = None
    net.seen.clear()
    done = predict_path(s, tmp_path / "in", tmp_path / "out", bars=False)
    want = [images[name].max() / 255 for name in ("b.png", "c.tif")]
    assert net.seen == pytest.approx(want)
    assert [p.name for p in done] == ["a.png", "b.png", "c.tif"]
    said = capsys.readouterr().out
    assert "3 label maps in" in said and "1 of them from before" in said
    for name, raw in images.items():
        label = read_image(tmp_path / "out" / name).array[0]
        assert np.array_equal(label > 0, raw / 255 > 0.5)
    with pytest.raises(InputError, match="there already"):  # finished: an output like any other
        predict_path(s, tmp_path / "in", tmp_path / "out", bars=False)


def test_objects_beside_labels(tmp_path):
    raw = np.zeros((6, 8), np.uint8)
    raw[1, 1] = raw[4, 5] = raw[4, 6] = 255
    write_image(tmp_path / "a.png", Image(raw[None]))
    s = Student(Threshold(), Recipe(channels=1, in_channels=1))
    predict_path(s, tmp_path / "a.png", tmp_path / "l.png", bars=False, instances=True)
    objects = read_image(tmp_path / "l_instances.png").array[0]
    assert objects[1, 1] == 1 and objects[4, 5] == objects[4, 6] == 2 and (objects > 0).sum() == 3


def test_two_students_have_two_marks():
    "One weight, or one entry of the recipe."
    from unpaired_kd.inference.files import _mark_student

    a, b = (Student(Threshold(), Recipe(channels=1, in_channels=1)) for _ in range(2))
    assert mark_weights(a) == mark_weights(b) and _mark_student(a) == _mark_student(b)
    c = Student(b.network, Recipe(channels=1, in_channels=1, min_size=5))
    assert mark_weights(a) == mark_weights(c) and _mark_student(a) != _mark_student(c)
    with torch.no_grad():
        b.network.level.add_(1e-3)
    assert mark_weights(a) != mark_weights(b) and _mark_student(a) != _mark_student(b)


# ---------------------------------------------------------------- tiles (they import MONAI)
def gauss(n):
    "MONAI's weight along an axis of n pixels: a Gaussian with sigma n / 8 around the middle."
    at = [i - (n - 1) / 2 for i in range(n)]
    return [math.exp(-(a * a) / (2 * (n / 8) ** 2)) for a in at]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap, starts", [(0.25, (0, 6, 8)), (0.5, (0, 4, 8)), (0.0, (0, 8))])
def test_tiles_are_blended_by_their_weights(blend, overlap, starts):
    "Each tile has scores of its own (its mean), so the weights can be read off the blend."
    x = torch.arange(16.0, dtype=torch.float64).reshape(1, 1, 1, 16).repeat(1, 1, 8, 1) ** 2
    net = Echo(lambda t: t.mean((2, 3), keepdim=True) + 0 * t)
    found = logits(net, x, 8, overlap, blend)[0, 0]
    weight = gauss(8) if blend == "gaussian" else [1.0] * 8
    if blend == "gaussian":  # the product of two axes, and nothing below a thousandth
        rows = [[max(a * b, 1e-3) for b in weight] for a in weight]
    else:
        rows = [[1.0] * 8] * 8
    for y in range(8):
        for i in range(16):
            top = below = 0.0
            for s in starts:
                if s <= i < s + 8:
                    mean = sum(k * k for k in range(s, s + 8)) / 8
                    top += rows[y][i - s] * mean
                    below += rows[y][i - s]
            assert abs(found[y, i].item() - top / below) < 2e-5 * (top / below)
