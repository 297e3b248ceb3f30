"""Whole volumes in blocks: exact, resumable, and refused where they cannot be."""

import itertools
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
import torch
import zarr

from unpaired_kd.command import cli
from unpaired_kd.core import InputError, digest, file_sha256, seeded
from unpaired_kd.data.formats.images import Image, read_image, read_label
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.inference import volumes
from unpaired_kd.inference.blocks import (
    block_logits,
    choose_tile,
    cut_blocks,
    limit_voxels,
    measure_memory,
    measure_receptive_field,
    mirror_index,
)
from unpaired_kd.inference.resuming import hold_folder
from unpaired_kd.inference.student import Recipe, Student, logits, pad_to
from unpaired_kd.inference.volume_files import open_volume, read_block, to_bytes
from unpaired_kd.inference.volumes import (
    _settle_blocks,
    goes_in_blocks,
    predict_volume,
    read_triple,
    run_pipeline,
)
from unpaired_kd.networks.registry import build
from unpaired_kd.networks.volumes import LightUNet

R = np.random.default_rng(0)


def settled(**config):
    "A light student with random weights and full BatchNorm statistics."
    with seeded(0, "light"):
        net = LightUNet(**{"width": 2, **config}).train()
        for m in net.modules():
            m.momentum = 1.0
        with torch.no_grad():
            net(torch.rand(2, 1, 32, 32, 32))
    return net.eval()


def student(intensity="dtype", classes=("background", "vessel"), **config):
    return Student(
        settled(classes=1 if len(classes) == 2 else len(classes), **config),
        Recipe(in_channels=1, dims=3, patch=512, intensity=intensity, classes=classes),
    )


def whole(s, raw):
    "The bytes that the plain prediction in one piece would give."
    return to_bytes(torch.from_numpy(s.probabilities(raw)[1])).numpy().astype(int)


def noise(*shape, kind=np.uint8):
    return R.integers(0, np.iinfo(kind).max, shape, kind)


def store(path, raw, **kw):
    "A plain Zarr array."
    a = zarr.create_array(
        str(path),
        shape=raw.shape,
        dtype=raw.dtype,
        chunks=(16, 24, 32)[-raw.ndim :],
        config={"write_empty_chunks": True},
        **kw,
    )
    a[...] = raw
    return path


def tree(path):
    "A fingerprint of all bytes of a file or folder."
    return (
        file_sha256(path)
        if path.is_file()
        else digest(
            {str(f.relative_to(path)): file_sha256(f) for f in path.rglob("*") if f.is_file()}
        )
    )


def assembled(net, v, tile, halo, rim=None):
    "All blocks of an array, joined."
    strides = net.strides
    out = torch.full((1, net.config["classes"], *v.shape), float("nan"))
    for b in cut_blocks(v.shape, tile, halo, strides):
        index = [
            mirror_index(n, -(-n // s) * s)[slice(*r)] for n, s, r in zip(v.shape, strides, b.read)
        ]
        x = torch.from_numpy(v[np.ix_(*index)])[None, None]
        out[(..., *(slice(*c) for c in b.core))] = block_logits(
            net, x, [(a - r, e - r) for (a, e), (r, _) in zip(b.core, b.read)], rim
        )
    return out


def stopped(s, n):
    "Raise at the n-th block, as a kill would; a context."
    count = itertools.count(1)

    def hook(layer, inputs, output):
        if inputs[0][0, 0].numel() > 100 and next(count) > n:
            raise KeyboardInterrupt

    return s.network.bottom.register_forward_hook(hook)


# ---- exactness


@pytest.fixture(scope="module")
def odd():
    "A network, a volume of odd size, and its scores in one piece."
    net = settled()
    v = R.random((97, 51, 43), np.float32)
    with torch.inference_mode():
        return net, v, logits(net, torch.from_numpy(v)[None, None], 512)


@pytest.mark.parametrize(
    "halo, rim, good",
    [
        (48, None, True),
        (48, (16, 16, 16), True),
        (48, (8, 8, 8), False),
        (40, None, False),
        (16, None, False),
    ],
)
def test_blocks_equal_one_piece(odd, halo, rim, good):
    net, v, z = odd
    with torch.inference_mode():
        error = (
            (assembled(net, v, (48, 32, 32), (halo,) * 3, rim) - z).abs().max() / z.std()
        ).item()
    assert (error < 1e-5) == good, error


def test_an_origin_off_the_stride_fails():
    net = settled()
    x = torch.rand(1, 1, 16, 16, 256)
    with torch.inference_mode():
        z = net(x)[..., 64:192]

        def error(a):
            return (
                (net(x[..., a : a + 248])[..., 64 - a : 192 - a] - z).abs().max() / z.std()
            ).item()

        assert error(8) < 1e-5 and error(4) > 0.01


@pytest.mark.parametrize(
    "size", [(97, 113, 131), (5, 200, 64), (1, 1, 1), (8, 16, 24), (7, 9, 300)]
)
@pytest.mark.parametrize("strides", [(8, 8, 8), (2, 8, 8)])
def test_every_voxel_has_one_block_and_origins_fit(size, strides):
    count = np.zeros(size, np.uint8)
    for b in cut_blocks(size, (64, 32, 48), (16, 48, 8), strides):
        count[tuple(slice(*c) for c in b.core)] += 1
        for (a, e), (o, end), s, n in zip(b.core, b.read, strides, size):
            assert (
                o % s == 0 and (end - o) % s == 0 and o <= a < e <= n and e <= end <= -(-n // s) * s
            )
    assert (count == 1).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 15])
def test_the_table_is_the_padding(n):
    x = torch.rand(1, 1, n, 9, 2)
    assert torch.equal(
        pad_to(x, 8),
        x[0, 0][np.ix_(*(mirror_index(k, -(-k // 8) * 8) for k in x.shape[2:]))][None, None],
    )


@pytest.mark.parametrize("flat, classes", [(0, 1), (2, 3)])
def test_looks_agrees_with_the_layers(flat, classes):
    net = LightUNet(width=2, flat=flat, classes=classes)
    assert measure_receptive_field(net) == tuple(
        -(-r // s) * s for r, s in zip(net.reach, net.strides)
    )
    net.train()
    measure_receptive_field(net)
    assert net.training  # tried out on a copy


def test_looks_refuses_networks_without_an_end():
    with pytest.raises(InputError, match="BatchNorm"):
        measure_receptive_field(
            torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.InstanceNorm3d(2))
        )
    assert measure_receptive_field(
        torch.nn.Sequential(torch.nn.Conv3d(1, 1, (3, 5, 1), padding=(1, 2, 0)))
    ) == (
        1,
        2,
        0,
    )


# ---- files in, files out


class Same(torch.nn.Module):
    "Logits whose sigmoid is the input: the volume must come back."

    stride = 8

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.logit(x, 1e-7) + self.w


@pytest.mark.parametrize("size", [(97, 113, 131), (20, 30, 40), (3, 50, 17), (1, 9, 9)])
@pytest.mark.parametrize("out", ["p.zarr", "p.tif"])
def test_identity_returns_the_volume(tmp_path, size, out):
    "Every byte in its place, odd sizes, volumes smaller than a tile or the stride."
    raw = noise(*size)
    t = predict_volume(
        Student(Same(), Recipe(in_channels=1, dims=3, patch=64)),
        store(tmp_path / "v.zarr", raw),
        tmp_path / out,
        tile=64,
        halo=16,
    )
    got = read_image(tmp_path / out).array
    assert (
        got.dtype == np.uint8
        and got.reshape(size).shape == size
        and (got.reshape(size) == raw).all()
    )
    assert (
        t["blocks"] == np.prod([-(-n // 64) for n in size])
        and t["computed"] == t["blocks"]
        and not (tmp_path / f"{out}.part").exists()
    )


def test_identity_to_1e_5():
    "Before the rounding to bytes, block reading gives the volume itself."
    raw = R.random((33, 41, 29), np.float32)
    net = Same()

    class V:
        shape = (1, *raw.shape)

        def read(self, box):
            return raw[None][(slice(None), *(slice(a, b) for a, b in box))]

        path = "v"

    for b in cut_blocks(raw.shape, (16, 16, 16), (8, 8, 8), (8, 8, 8)):
        x = torch.from_numpy(read_block(V(), b, (8, 8, 8)))[None]
        z = block_logits(
            net, x, [(a - o, e - o) for (a, e), (o, _) in zip(b.core, b.read)]
        ).sigmoid()
        assert np.abs(z[0, 0].detach().numpy() - raw[tuple(slice(*c) for c in b.core)]).max() < 1e-5


def stored(path, kind, raw):
    "The same volume in one of many forms."
    if kind == "nii":
        write_image(path / "v.nii", Image(raw[None]))
        return path / "v.nii"
    if kind == "nii.gz":
        write_image(path / "v.nii.gz", Image(raw[None]))
        return path / "v.nii.gz"
    if kind == "tif":
        tifffile.imwrite(path / "v.tif", raw)
        return path / "v.tif"
    if kind == "big-endian tif":
        tifffile.imwrite(path / "v.tif", raw, byteorder=">")
        return path / "v.tif"
    if kind == "compressed tif":
        tifffile.imwrite(path / "v.tif", raw, compression="zlib")
        return path / "v.tif"
    if kind == "ome":
        write_image(path / "v.zarr", Image(raw[None], (0.005, 0.002, 0.002)))
        return path / "v.zarr"
    if kind == "zarr v2":
        return store(path / "v.zarr", raw, zarr_format=2)
    if kind == "sharded":
        zarr.create_array(
            str(path / "v.zarr"),
            shape=raw.shape,
            dtype=raw.dtype,
            chunks=(8, 8, 8),
            shards=(16, 32, 16),
        )[...] = raw
        return path / "v.zarr"
    group = zarr.open_group(
        str(path / "v.zarr"), mode="w"
    )  # stored t, c, x, y, z: transposed, not contiguous
    group.create_array(
        "s0", shape=(1, 1, *raw.shape[::-1]), dtype=raw.dtype, chunks=(1, 1, 8, 16, 8)
    )[...] = raw.T[None, None]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": n} for n in "tcxyz"],
                "datasets": [{"path": "s0", "coordinateTransformations": []}],
            }
        ],
    }
    return path / "v.zarr"


@pytest.mark.parametrize(
    "kind",
    [
        "nii",
        "nii.gz",
        "tif",
        "big-endian tif",
        "compressed tif",
        "ome",
        "zarr v2",
        "sharded",
        "tcxyz",
    ],
)
def test_every_form_gives_the_same_boxes(tmp_path, kind):
    raw = noise(21, 34, 55, kind=np.uint16)
    v = open_volume(stored(tmp_path, kind, raw))
    assert v.shape == (1, *raw.shape) and v.dtype.itemsize == 2
    for box in (
        ((0, 21), (0, 34), (0, 55)),
        ((3, 4), (33, 34), (5, 40)),
        ((20, 21), (0, 1), (54, 55)),
    ):
        got = v.read(box)
        assert (
            (got[0] == raw[tuple(slice(*b) for b in box)]).all()
            and got.dtype == np.uint16
            and got.dtype.isnative
        )


def test_uint16_goes_through_as_the_plain_prediction(tmp_path):
    "uint16, percentile window, non-contiguous Zarr: blocks are the plain prediction, to one byte."
    raw = noise(30, 70, 41, kind=np.uint16)
    s = student("percentile")
    predict_volume(s, stored(tmp_path, "tcxyz", raw), tmp_path / "p.zarr", tile=32)
    off = np.abs(read_image(tmp_path / "p.zarr").array[0].astype(int) - whole(s, raw))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3
    predict_volume(s, tmp_path / "v.zarr", tmp_path / "l.tif", tile=32, labels=True)
    label = read_label(tmp_path / "l.tif").array
    assert (
        label == (read_image(tmp_path / "p.zarr").array[0] >= 128)
    ).all() and 0 < label.mean() < 1


def test_classes_have_a_layer_each(tmp_path):
    raw = noise(20, 40, 33)
    s = student(classes=("background", "artery", "vein"))
    store(tmp_path / "v.zarr", raw)
    for out in ("p.zarr", "p.tif"):
        predict_volume(s, tmp_path / "v.zarr", tmp_path / out, tile=32)
        got = read_image(tmp_path / out).array.astype(int)
        assert (
            got.shape == (3, *raw.shape)
            and np.abs(got - to_bytes(torch.from_numpy(s.probabilities(raw))).numpy()).max() <= 1
        )
    predict_volume(s, tmp_path / "v.zarr", tmp_path / "l.zarr", tile=32, labels=True)
    assert (read_label(tmp_path / "l.zarr").array == s.predict(raw)).mean() > 0.999


def test_bytes_and_labels_agree():
    p = torch.cat(
        [
            torch.linspace(0, 1, 5001),
            torch.tensor([0.5, np.nextafter(np.float32(0.5), np.float32(1))]),
        ]
    )
    assert ((to_bytes(p) >= 128) == (p > 0.5)).all() and (
        to_bytes(p).float() / 255 - p
    ).abs().max() <= 0.5 / 255 + 1e-6


def test_flat_students_take_thin_stacks(tmp_path):
    raw = noise(5, 40, 48)
    s = student(flat=2)
    assert s.network.strides == (2, 8, 8)
    predict_volume(s, store(tmp_path / "v.zarr", raw), tmp_path / "p.zarr", tile=(2, 16, 16))
    assert np.abs(read_image(tmp_path / "p.zarr").array[0].astype(int) - whole(s, raw)).max() <= 1


def test_spacing(tmp_path, capsys):
    raw = noise(16, 16, 16)
    s = Student(Same(), Recipe(in_channels=1, dims=3, patch=64))
    write_image(
        tmp_path / "v.zarr",
        Image(raw[None], (0.005, 0.002, 0.002), np.diag([0.002, 0.002, 0.005, 1])),
    )
    predict_volume(s, tmp_path / "v.zarr", tmp_path / "a.zarr", tile=16)
    a = read_image(tmp_path / "a.zarr")
    assert (
        a.spacing == (0.005, 0.002, 0.002)
        and np.allclose(a.affine, np.diag([0.002, 0.002, 0.005, 1]))
        and "assumed" not in capsys.readouterr().out
    )
    predict_volume(s, store(tmp_path / "w.zarr", raw), tmp_path / "b.tif", tile=16)
    assert (
        read_image(tmp_path / "b.tif").spacing is None and "is assumed" in capsys.readouterr().out
    )
    predict_volume(s, tmp_path / "v.zarr", tmp_path / "c.tif", tile=16, spacing="1,2,.5")
    assert read_image(tmp_path / "c.tif").spacing == (1, 2, 0.5)


def test_empty_blocks_are_skipped(tmp_path):
    raw = noise(32, 32, 32)
    s = student()
    raw[16:] = 9
    t = predict_volume(
        s, store(tmp_path / "v.zarr", raw), tmp_path / "p.zarr", tile=16, halo=0, empty=9
    )
    got = read_image(tmp_path / "p.zarr").array[0]
    assert t["skipped"] == 4 and t["computed"] == 4 and not got[16:].any() and got[:16].any()
    assert (
        len([f for f in (tmp_path / "p.zarr").rglob("c/*/*/*")]) == 8
    )  # a file that is absent was never computed
    t = predict_volume(s, tmp_path / "v.zarr", tmp_path / "q.zarr", tile=16, halo=16, empty=9)
    assert t["skipped"] == 0  # the halo is not empty


def test_an_empty_core_beside_a_bright_one_is_computed(tmp_path):
    """Emptiness is of core and halo together: where the halo is bright, the values are those of a
    job that skips nothing."""
    raw = noise(32, 16, 16)
    s = student(levels=2)
    raw[16:] = 9
    store(tmp_path / "v.zarr", raw)
    predict_volume(s, tmp_path / "v.zarr", tmp_path / "all.zarr", tile=16)
    t = predict_volume(s, tmp_path / "v.zarr", tmp_path / "some.zarr", tile=16, empty=9)
    every, some = (read_image(tmp_path / n).array[0] for n in ("all.zarr", "some.zarr"))
    assert t["skipped"] == 0 and every[16:].any() and (some == every).all()


def test_a_missing_chunk_is_named(tmp_path):
    s = Student(Same(), Recipe(in_channels=1, dims=3, patch=64))
    raw = noise(32, 32, 32)
    store(tmp_path / "v.zarr", raw)
    (tmp_path / "v.zarr" / "c" / "1" / "0" / "0").unlink()
    with pytest.raises(InputError, match="(?s)v.zarr.*c/1/0/0"):
        predict_volume(s, tmp_path / "v.zarr", tmp_path / "p.zarr", tile=32)
    assert not list(tmp_path.glob("p.zarr*"))
    predict_volume(s, tmp_path / "v.zarr", tmp_path / "p.zarr", tile=32, absent="empty")
    got = read_image(tmp_path / "p.zarr").array[0]
    assert (got[:16] == raw[:16]).all() and not got[16:, :24].any()


# ---- jobs that are killed

WORK = """
import itertools, sys, time, torch
torch.set_num_threads(1)
from unpaired_kd.inference import volumes
plain, calls = volumes.write_block, itertools.count()
def half(*a):
    if next(calls) == 12: time.sleep(900) # until somebody kills us
    plain(*a)
volumes.write_block = half
volumes.predict_volume(sys.argv[1], sys.argv[2], sys.argv[3], tile=16)
"""


@pytest.mark.parametrize("out", ["p.zarr", "p.tif"])
def test_a_killed_job_continues(tmp_path, out):
    "SIGKILL half-way; the same call again gives the bytes of a job that was never stopped."
    raw = noise(64, 30, 33)
    s = student(levels=2)
    store(tmp_path / "v.zarr", raw)
    s.save(tmp_path / "student")
    run = [str(tmp_path / n) for n in ("student", "v.zarr")]
    child = subprocess.Popen(
        [sys.executable, "-c", WORK, *run, str(tmp_path / out)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / f"{out}.part" / "blocks.log"
    while child.poll() is None and not (log.exists() and len(log.read_text().split("\n")) > 8):
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process is at work"):
        predict_volume(*run, tmp_path / out, tile=16)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / out).exists()
    with open(log, "ab") as f:
        f.write(b"3 \xff 0\n3 0")  # a damaged and a torn line
    t = predict_volume(*run, tmp_path / out, tile=16)
    assert 3 <= t["resumed"] < t["blocks"] and t["resumed"] + t["computed"] == t["blocks"]
    other = tmp_path / "whole" / out
    other.parent.mkdir()
    predict_volume(*run, other, tile=16)
    assert tree(tmp_path / out) == tree(other) and not log.parent.exists()


@pytest.mark.parametrize("out", ["p.zarr", "p.tif"])
def test_a_block_is_logged_when_it_is_on_the_disk(tmp_path, monkeypatch, out):
    """At the moment of its note, the block's voxels are in the file, and for Zarr file and folder
    have been synced."""
    raw = R.integers(1, 256, (32, 30, 33), np.uint8)
    synced = set()
    notes = []
    sync = os.fsync
    log = volumes.log_block

    def syncing(handle):
        synced.add(
            os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
        )
        sync(handle)

    def logging(file, block):
        data = tmp_path / f"{out}.part" / f"data{out[1:]}"
        now = (
            zarr.open_array(str(data / "0"), mode="r")[...]
            if out == "p.zarr"
            else np.array(tifffile.memmap(data, mode="r"))
        )
        core = tuple(slice(*c) for c in block.core)
        assert (now[core] == raw[core]).all()
        shard = data / "0" / "c" / "/".join(map(str, block.at))
        if out == "p.zarr":
            assert {
                str(p)
                for p in (shard, shard.parent, shard.parents[1], shard.parents[2], data / "0")
            } <= synced
        notes.append(block.at)
        log(file, block)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(volumes, "log_block", logging)
    predict_volume(
        Student(Same(), Recipe(in_channels=1, dims=3, patch=64)),
        store(tmp_path / "v.zarr", raw),
        tmp_path / out,
        tile=16,
        halo=0,
    )
    assert sorted(notes) == list(np.ndindex(2, 2, 3))


def test_work_of_another_job_is_refused(tmp_path):
    raw = noise(32, 48, 48)
    s = student()
    other = student()
    with torch.no_grad():
        other.network.head.bias += 1
    v = store(tmp_path / "v.zarr", raw)
    hook = stopped(s, 1)
    with pytest.raises(KeyboardInterrupt):
        predict_volume(s, v, tmp_path / "p.zarr", tile=32)
    hook.remove()
    for kw, said in (
        (dict(student=other), "weights"),
        (dict(tile=16), "tile"),
        (dict(labels=True), "labels"),
        (dict(empty=3), "empty"),
        (dict(spacing=2), "spacing"),
    ):
        with pytest.raises(InputError, match=f"(?s)unfinished work of another job.*{said}"):
            predict_volume(
                **{"student": s, "input": v, "output": tmp_path / "p.zarr", "tile": 32} | kw
            )
    array = zarr.open_array(str(v), mode="r+")
    array[0, 0, 0] = 255 - raw[0, 0, 0]
    with pytest.raises(InputError, match="(?s)another job.*mark"):
        predict_volume(s, v, tmp_path / "p.zarr", tile=32)


def test_outputs_that_cannot_be(tmp_path):
    s = student()
    v = store(tmp_path / "v.zarr", noise(16, 16, 16))
    (tmp_path / "there.tif").write_text("mine")
    for out, said in (
        ("there.tif", "there already"),
        ("v.zarr", "input itself"),
        ("p.nii.gz", "Choose one of these"),
        ("p", "Choose one of these"),
    ):
        with pytest.raises(InputError, match=said):
            predict_volume(s, v, tmp_path / out, tile=16)
    assert (tmp_path / "there.tif").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        predict_volume(s, v, tmp_path / "file" / "p.zarr", tile=16)
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        return  # root may write anywhere
    with pytest.raises(InputError, match="cannot write"):
        predict_volume(s, v, closed / "p.zarr", tile=16)


def test_two_processes_cannot_share_a_folder(tmp_path):
    with hold_folder(tmp_path / "w"), pytest.raises(InputError, match="another process"):
        with hold_folder(tmp_path / "w"):
            pass
    with hold_folder(tmp_path / "w"):
        pass


def test_an_error_in_any_stage_stops_the_others():
    def boom(*a):
        return 1 / 0

    def ok(*a):
        return 1

    for stages in ((boom, ok, ok), (ok, boom, ok), (ok, ok, boom)):
        with pytest.raises(ZeroDivisionError):
            run_pipeline(range(50), *stages)
    seen = []
    assert set(run_pipeline(range(5), ok, lambda i, _: i, lambda i, v: seen.append((i, v)))) == {
        "read",
        "compute",
        "write",
    } and seen == [(i, i) for i in range(5)]


def test_nan_is_named_with_its_block(tmp_path):
    raw = R.random((32, 32, 32), np.float32)
    raw[20, 3, 3] = np.nan
    with pytest.raises(InputError, match=r"(?s)v.zarr.*\(16, 0, 0\).*NaN"):
        predict_volume(
            student(levels=2), store(tmp_path / "v.zarr", raw), tmp_path / "p.zarr", tile=16, halo=0
        )
    assert not (tmp_path / "p.zarr").exists()


# ---- settings


def test_tiles_fit_memory_and_the_stride():
    for size, halo, strides in (
        ((512, 512, 512), (48, 48, 48), (8, 8, 8)),
        ((30, 4000, 4000), (8, 48, 48), (2, 8, 8)),
        ((20, 20, 20), (48, 48, 48), (8, 8, 8)),
    ):
        tile = choose_tile(size, halo, strides, 8e6)
        assert all(t % s == 0 for t, s in zip(tile, strides))
        assert (
            max(np.prod([e - a for a, e in b.read]) for b in cut_blocks(size, tile, halo, strides))
            <= 8e6
        )

    def work(tile):
        return sum(
            np.prod([e - a for a, e in b.read])
            for b in cut_blocks((512, 512, 512), tile, (48,) * 3, (8,) * 3)
        )

    assert work(choose_tile((512,) * 3, (48,) * 3, (8,) * 3, 3e7)) < work(
        choose_tile((512,) * 3, (48,) * 3, (8,) * 3, 8e6)
    )
    with pytest.raises(InputError, match="memory"):
        choose_tile((512,) * 3, (48,) * 3, (8,) * 3, 100)


def test_memory_is_shared_out():
    "Half a gigabyte is kept for Python and torch; the rest is for blocks, by bytes a voxel."
    net = settled(width=8)
    rim = (16, 16, 16)
    down = measure_memory(net, rim=rim)
    up = measure_memory(net)
    assert np.allclose(limit_voxels(1.5e9, net, 1, rim), (1e9 / down, 1e9 / up))
    assert np.allclose(limit_voxels("700MB", net, 1, rim), (0.2e9 / down, 0.2e9 / up))
    assert limit_voxels("0.5GB", net, 1, rim) == (0, 0)


def test_the_decoder_needs_memory_too():
    """The tile that is chosen fits twice: core and halo in the encoder, core and rim in the
    decoder. The second limit is the one that binds here."""
    s = Student(settled(width=8), Recipe(in_channels=1, dims=3, patch=512))
    size = (512, 512, 512)

    def most(tile, rim):
        blocks = cut_blocks(size, tile, rim, (8,) * 3)
        return max(np.prod([e - a for a, e in b.read]) for b in blocks)

    for memory in (1e9, 1.5e9, 2.5e9):
        tile, halo, rim = _settle_blocks(s, size, None, None, memory)
        reads, boxes = limit_voxels(memory, s.network, 1, rim)
        assert rim == (16,) * 3
        assert most(tile, halo) <= reads
        assert most(tile, rim) <= boxes
        free = choose_tile(size, halo, (8,) * 3, 64 * boxes, rim)
        held = choose_tile(size, halo, (8,) * 3, 64 * boxes, rim, boxes)
        assert most(free, rim) > boxes >= most(held, rim)


def test_memory_and_triples():
    net = settled()
    assert (
        limit_voxels("1.5GB", net, 1, None)
        == limit_voxels(1.5e9, net, 1, None)
        == limit_voxels(None, net, 1, None)
        > limit_voxels("800 MB", net, 1, None)
        > (0, 0)
    )
    for bad in ("much", "GB", "-3GB"):
        with pytest.raises(InputError, match="1.5GB"):
            limit_voxels(bad, net, 1, None)
    assert (
        read_triple("64", "tile") == read_triple(64, "tile") == (64,) * 3
        and read_triple("8,16,24", "tile") == (8, 16, 24)
        and read_triple(0, "halo") == (0, 0, 0)
    )
    for bad in ("a", "1,2", 0, -8, "1,2,3,4", "1.5", float("inf")):
        with pytest.raises(InputError, match="tile="):
            read_triple(bad, "tile")
    with pytest.raises(InputError, match="multiples"):
        read_triple("64,64,60", "tile", (8, 8, 8))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(zoom=0.5), "zoom"),
        (
            dict(standard=dict(landmarks=(0, 1, 2), clip=2.0, percentiles=(1, 50, 99), volumes=2)),
            "standard",
        ),
    ],
)
def test_recipes_that_need_the_whole_volume(tmp_path, change, said):
    s = Student(settled(), Recipe(in_channels=1, dims=3, patch=64))
    object.__setattr__(s.recipe, *next(iter(change.items())))
    with pytest.raises(InputError, match=said):
        predict_volume(s, store(tmp_path / "v.zarr", noise(16, 16, 16)), tmp_path / "p.zarr")


def test_a_2d_student_keeps_its_way(tmp_path):
    s = Student(build("unet", dict(in_channels=3, width=4)).eval(), Recipe(patch=32))
    s.save(tmp_path / "student")
    write_image(tmp_path / "v.zarr", Image(noise(4, 32, 32)[None]))
    with pytest.raises(InputError, match="2-D"):
        predict_volume(s, tmp_path / "v.zarr", tmp_path / "p.zarr")
    assert not goes_in_blocks(tmp_path / "student", tmp_path / "v.zarr", tmp_path / "p.zarr")
    assert (
        cli.main(
            [
                "predict",
                str(tmp_path / "student"),
                str(tmp_path / "v.zarr"),
                str(tmp_path / "p.zarr"),
            ]
        )
        == 0
    )
    assert read_label(tmp_path / "p.zarr").array.shape == (4, 32, 32)


# ---- the command


def test_command(tmp_path, capsys):
    raw = noise(40, 33, 24)
    s = student()
    s.save(tmp_path / "student")
    store(tmp_path / "v.zarr", raw)
    tifffile.imwrite(tmp_path / "v.tif", raw)

    def at(*names):
        return [str(tmp_path / n) for n in names]

    assert (
        cli.main(["predict", *at("student", "v.zarr", "l.zarr")]) == 0
        and "voxels a second" in capsys.readouterr().out
    )
    assert (read_label(tmp_path / "l.zarr").array == s.predict(raw)).mean() > 0.999
    assert (
        cli.main(
            [
                "predict",
                *at("student", "v.tif", "p.tif"),
                "--probabilities",
                "--tile",
                "32",
                "--halo",
                "48",
                "--memory",
                "1GB",
                "--empty",
                "0",
                "--spacing",
                "3,2,1",
            ]
        )
        == 0
    )
    p = read_image(tmp_path / "p.tif")
    assert p.spacing == (3, 2, 1) and np.abs(p.array[0].astype(int) - whole(s, raw)).max() <= 1
    assert (
        cli.main(["predict", *at("student", "v.tif", "plain.tif")]) == 0
        and "voxels a second" not in capsys.readouterr().out.split("label map")[-1]
    )
    assert (
        not goes_in_blocks(*at("student", "v.tif", "x.tif"))
        and goes_in_blocks(*at("student", "v.tif", "x.tif"), memory=1000)
        and not goes_in_blocks(*at("student", "v.zarr", "x.nii.gz"))
    )
    for options, said in (
        (["--tile", "30"], "multiples"),
        (["--blocks", "--instances"], "--instances"),
        (["--memory", "x"], "1.5GB"),
        (
            ["--scheduler", "http://here"],
            "scheduler" if find_spec("distributed") else "unpaired_kd[scale]",
        ),
    ):
        assert (
            cli.main(["predict", *at("student", "v.zarr", "no.zarr"), *options]) == 2
            and said in capsys.readouterr().err
        )
    assert not (tmp_path / "no.zarr").exists()


def test_cluster(tmp_path):
    "Blocks on a Dask cluster: the same bytes; a TIFF and a student in memory are refused."
    import distributed

    raw = noise(32, 30, 33)
    s = student(levels=2)
    s.save(tmp_path / "student")
    store(tmp_path / "v.zarr", raw)
    predict_volume(tmp_path / "student", tmp_path / "v.zarr", tmp_path / "here.zarr", tile=16)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as there:
        t = predict_volume(
            tmp_path / "student",
            tmp_path / "v.zarr",
            tmp_path / "there.zarr",
            tile=16,
            scheduler=there.scheduler_address,
        )
        with pytest.raises(InputError, match=".zarr"):
            predict_volume(
                tmp_path / "student",
                tmp_path / "v.zarr",
                tmp_path / "there.tif",
                scheduler=there.scheduler_address,
            )
        with pytest.raises(InputError, match="folder of a saved student"):
            predict_volume(
                s, tmp_path / "v.zarr", tmp_path / "x.zarr", scheduler=there.scheduler_address
            )
        with torch.no_grad():
            s.network.head.bias += 1
        s.save(tmp_path / "student")  # other weights in the same folder: the workers must see it
        predict_volume(
            tmp_path / "student",
            tmp_path / "v.zarr",
            tmp_path / "other.zarr",
            tile=16,
            scheduler=there.scheduler_address,
        )
    assert (
        read_image(tmp_path / "other.zarr").array.mean()
        > read_image(tmp_path / "there.zarr").array.mean() + 5
    )
    assert (
        t["computed"] == t["blocks"] == 12
        and t["compute"] > 0
        and tree(tmp_path / "here.zarr") == tree(tmp_path / "there.zarr")
    )


def test_an_output_keeps_the_translation_of_its_input(tmp_path):
    pytest.importorskip("zarr")
    from unpaired_kd.data.formats.images import read_label
    from unpaired_kd.inference.volume_files import create_output

    for shape in ((6, 8, 10), (2, 6, 8, 10)):
        p = tmp_path / f"{len(shape)}.zarr"
        create_output(p, shape, (8, 8, 16), (0.004, 0.002, 0.001), origin=(0.5, 0.0, -0.25))
        volume = open_volume(p, "empty")  # nothing is written yet
        assert volume.origin == pytest.approx((0.5, 0, -0.25)) and volume.spacing == pytest.approx(
            (0.004, 0.002, 0.001)
        )
    assert read_label(tmp_path / "3.zarr", "empty").header.origin == pytest.approx((0.5, 0, -0.25))
    create_output(
        tmp_path / "zero.zarr", (6, 8, 10), (8, 8, 16), (1.0, 1, 1), origin=(0.0, 0.0, 0.0)
    )
    assert "translation" not in (tmp_path / "zero.zarr/zarr.json").read_text()
