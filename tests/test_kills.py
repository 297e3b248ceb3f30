"""A prediction that is killed at any moment: whole outputs or none, the same command ends as if
nothing had happened, nothing is left.

Kills come before and after each call that changes the disk, and at random times. A few in every
run; UKD_KILLS=50 asks for fifty."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import zarr
from PIL import Image as Pillow

from unpaired_kd.core import seeded
from unpaired_kd.data.formats.images import Image
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.networks.registry import build

KILLS = int(os.environ.get("UKD_KILLS", 12))
ROADS = ("folder", "folder replaced", "p.zarr", "p.tif", "p.zarr replaced")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL"),
]

# One process imports torch and then forks for each job, so that a kill costs no second import.
SERVER = """
import contextlib, itertools, json, os, signal, sys, threading, time
import torch, zarr, nibabel, tifffile, skimage.segmentation
from unpaired_kd.inference.files import predict_path
from unpaired_kd.inference.volumes import predict_volume
import unpaired_kd.networks.volumes, unpaired_kd.networks.unet
torch.set_num_threads(1)
CALLS = ("replace", "fsync", "mkdir", "unlink", "rmdir")
counts = itertools.count()

def die(): os.kill(os.getpid(), signal.SIGKILL)

def armed(call, at):
    "The call, with a kill before (even) or after (odd) the one that is counted as at // 2."
    def wrapped(*a, **k):
        n = next(counts)
        if at == 2 * n: die()
        answer = call(*a, **k)
        if at == 2 * n + 1: die()
        return answer
    return wrapped

def work(order):
    "In the child: 0 done, 3 refused; 'calls' is how often the disk was changed."
    at = order.get("at", -1)
    for name in CALLS: setattr(os, name, armed(getattr(os, name), at))
    if "seconds" in order: threading.Timer(order["seconds"], die).start()
    from unpaired_kd.core import InputError
    start = time.monotonic()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            if order["road"].startswith("folder"):
                more = dict(bars=False, instances=True, overwrite=order["overwrite"])
                predict_path(order["student"], order["input"], order["output"], "cpu", **more)
            else:
                more = dict(tile=16, device="cpu", overwrite=order["overwrite"])
                predict_volume(order["student"], order["input"], order["output"], **more)
    except InputError as e:
        return dict(status=3, said=str(e))
    return dict(status=0, calls=next(counts), seconds=time.monotonic() - start)

for line in sys.stdin:
    order = json.loads(line)
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        with os.fdopen(into, "w") as f: json.dump(work(order), f)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as f: said = f.read()
    status = os.waitpid(child, 0)[1]
    answer = json.loads(said) if said else dict(status=status)
    if os.WIFSIGNALED(status): answer = dict(status=-9)
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A function: order -> what became of it."
    home = tmp_path_factory.mktemp("server")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as p:

        def ask(**order):
            p.stdin.write(json.dumps(order, default=str) + "\n")
            p.stdin.flush()
            return json.loads(p.stdout.readline())

        yield ask
        p.stdin.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder of images of four formats with a bad one, a volume, and two students."
    home = tmp_path_factory.mktemp("kills")
    r = np.random.default_rng(0)
    with seeded(0, "kills"):
        flat = build("unet", dict(in_channels=1, classes=1, width=2))
        deep = build("light_unet", dict(width=2, levels=2))
    Student(flat, Recipe(channels=1, in_channels=1, patch=64)).save(home / "flat")
    Student(deep, Recipe(in_channels=1, dims=3, patch=512)).save(home / "deep")
    (home / "images").mkdir()
    for name in "ab":
        Pillow.fromarray(r.integers(0, 256, (32, 40), np.uint8)).save(
            home / "images" / f"{name}.png"
        )
    for name in ("c.nii.gz", "d.tif", "e.zarr"):
        write_image(home / "images" / name, Image(r.integers(0, 256, (1, 2, 32, 32), np.uint8)))
    a = zarr.create_array(
        str(home / "v.zarr"), shape=(32, 30, 33), dtype="uint8", chunks=(16, 16, 16)
    )
    a[...] = r.integers(1, 256, a.shape, np.uint8)
    return home


def order(home, road, place):
    "What to do on a road, with the output in `place`."
    if road.startswith("folder"):
        return dict(
            road=road,
            student=home / "flat",
            input=home / "images",
            output=place / "out",
            overwrite="replaced" in road,
        )
    return dict(
        road=road,
        student=home / "deep",
        input=home / "v.zarr",
        output=place / road.split()[0],
        overwrite="replaced" in road,
    )


def old(road, place):
    """What lay there before: a label map of zeros under each name that will be replaced, and a
    neighbour."""
    place.mkdir(parents=True)
    (place / "neighbour.txt").write_text("mine")
    if "replaced" not in road:
        return
    names = (
        ["p.zarr"]
        if road.startswith("p")
        else ["out/a.png", "out/c.nii.gz", "out/e.zarr", "out/e_instances.zarr"]
    )
    for name in names:
        write_label(
            place / name, np.zeros((32, 40) if name.endswith("png") else (2, 32, 32), np.uint8)
        )


def tree(folder):
    """Every file under a folder and its bytes, every empty folder, hidden ones too; a .zarr counts
    as one file."""
    found = {}
    for p in sorted(folder.rglob("*")):
        name = str(p.relative_to(folder))
        if p.is_dir() and not any(p.iterdir()):
            found[name + "/"] = b""
        if p.is_file():
            found[name] = p.read_bytes()
    return found


def items(found):
    "The same by output: a .zarr is one."
    by = {}
    for name, data in found.items():
        parts = name.split("/")
        ends = [k for k, part in enumerate(parts, 1) if part.endswith(".zarr")]
        by.setdefault("/".join(parts[: ends[0]]) if ends else name, {})[name] = data
    return by


def visible(found):
    "Outputs by their names: no hidden files, no work folders."
    return {
        k: v
        for k, v in items(found).items()
        if not any(part.startswith(".") or part.endswith(".part") for part in k.split("/"))
    }


@pytest.mark.parametrize("road", ROADS)
def test_kills(server, home, tmp_path, road):
    old(road, tmp_path / "whole")
    before = items(tree(tmp_path / "whole"))
    done = server(**order(home, road, tmp_path / "whole"))
    assert done["status"] == 0, done
    want = tree(tmp_path / "whole")
    assert (
        not [n for n in want if ".ukd" in n or ".part" in n or "lock" in n]
        and want["neighbour.txt"] == b"mine"
    )
    share = -(-KILLS // len(ROADS))
    r = np.random.default_rng([KILLS, ROADS.index(road)])
    moments = [
        dict(at=int(n)) for n in np.unique(r.integers(0, 2 * done["calls"], max(1, share * 4 // 5)))
    ]
    if KILLS >= 50:  # the last steps are the ones in which an output takes its name
        moments += [dict(at=2 * done["calls"] - n) for n in range(2, 6)]
    moments += [
        dict(seconds=float(r.uniform(0, done["seconds"])))
        for _ in range(max(1, share - len(moments)))
    ]
    killed = 0
    for k, moment in enumerate(moments):
        place = tmp_path / str(k)
        old(road, place)
        job = order(home, road, place)
        first = server(**job, **moment)
        killed += first["status"] == -9
        there = visible(tree(place))
        for name, files in there.items():  # nothing under a final name is half or mixed
            assert files in (items(want).get(name), before.get(name)), (moment, name)
        complete = all(there.get(n) == f for n, f in items(want).items())
        again = server(**job)
        assert again["status"] == 0 or (complete and "there already" in again["said"]), (
            moment,
            again,
        )
        assert tree(place) == want, (
            moment,
            sorted(tree(place).keys() ^ want.keys()),
            [n for n, d in tree(place).items() if want.get(n, d) != d],
        )
    print(f"{road}: {killed} kills, {len(moments)} moments out of {2 * done['calls']}")
    assert killed >= len(moments) // 2
