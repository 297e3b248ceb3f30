"""Outputs never destroy: what is refused before any work, what is replaced, what stays, and what
one bad file does to the others."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image as Pillow

from unpaired_kd.command import cli
from unpaired_kd.core import InputError, seeded
from unpaired_kd.data.formats import outputs
from unpaired_kd.data.formats.images import Image, read_label
from unpaired_kd.data.formats.outputs import (
    Notes,
    _list_parents,
    check_apart,
    check_format,
    check_names,
    check_new,
    check_room,
    is_ours,
    keep_notes,
    mark_files,
)
from unpaired_kd.data.formats.writing import write_image, write_label
from unpaired_kd.inference import files
from unpaired_kd.inference import student as inference
from unpaired_kd.inference.files import PartlyDone, predict_path
from unpaired_kd.inference.student import FILES, Recipe, Student, resolve_device
from unpaired_kd.inference.volumes import predict_volume
from unpaired_kd.networks.registry import build

R = np.random.default_rng(0)


def noise(*shape):
    return R.integers(1, 256, shape, np.uint8)


def flat(**recipe):
    "A small 2-D student with random weights."
    with seeded(0, "flat"):
        net = build("unet", dict(in_channels=1, classes=1, width=2))
    return Student(net, Recipe(channels=1, in_channels=1, patch=64, **recipe))


def deep():
    "A small 3-D student that works in blocks."
    with seeded(0, "deep"):
        net = build("light_unet", dict(width=2, levels=2))
    return Student(net, Recipe(in_channels=1, dims=3, patch=512))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    "A folder with the two students."
    home = tmp_path_factory.mktemp("students")
    flat().save(home / "flat")
    deep().save(home / "deep")
    return home


@pytest.fixture
def home(students, tmp_path):
    """Images, labels drawn by hand, a Zarr inside a Zarr, a DICOM series, a volume, students; the
    working folder."""
    shutil.copytree(students, tmp_path, dirs_exist_ok=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "empty").mkdir()
    for name in "abc":
        Pillow.fromarray(noise(32, 40)).save(tmp_path / "images" / f"{name}.png")
        write_label(tmp_path / "labels" / f"{name}.png", noise(32, 40))
    Pillow.fromarray(noise(32, 40)).save(tmp_path / "images" / "b_instances.png")
    write_image(tmp_path / "v.nii.gz", Image(noise(1, 4, 32, 40)))
    write_image(tmp_path / "exp.zarr" / "raw.zarr", Image(noise(1, 16, 16, 16)))
    write_image(tmp_path / "v.tif", Image(noise(1, 16, 16, 16)))
    os.link(tmp_path / "images" / "a.png", tmp_path / "hard.png")
    os.symlink(tmp_path / "images" / "a.png", tmp_path / "soft.png")
    os.symlink("/nowhere/x.png", tmp_path / "dangling.png")
    os.symlink(tmp_path / "images", tmp_path / "shortcut")
    os.symlink(tmp_path / "exp.zarr", tmp_path / "link.zarr")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.tif")
    (tmp_path / "p.zarr.part").mkdir()
    (tmp_path / "p.zarr.part" / "data.zarr").mkdir()
    (tmp_path / "p.zarr.part" / "data.zarr" / "mine").write_text("mine")
    with contextlib.chdir(tmp_path):
        yield tmp_path


def tree(folder):
    """Every file, link and folder under a folder: its bytes, where it points to, and when it was
    changed."""
    found = {}
    for p in sorted(folder.rglob("*")):
        name = str(p.relative_to(folder))
        if p.is_symlink():
            found[name] = os.readlink(p)
        elif p.is_file():
            found[name] = (p.read_bytes(), p.stat().st_mtime_ns)
        else:
            found[name] = None
    return found


# ---- before any work: one sentence, nothing changed

REFUSED = [  # student, input, output, options, what the message says
    # the output is, holds or lies in the input
    ("flat", "images/a.png", "images/a.png", "", "input itself"),
    ("flat", "images/a.png", "images/../images/a.png", "", "input itself"),
    ("flat", "images/a.png", "./images//a.png", "", "input itself"),
    ("flat", "images/a.png", "images", "", "input itself"),
    ("flat", "images/a.png", "images/", "", "input itself"),
    ("flat", "images/a.png", "shortcut/a.png", "", "input itself"),
    ("flat", "images/a.png", "hard.png", "", "input itself"),
    ("flat", "images/a.png", "soft.png", "", "input itself"),
    ("flat", "soft.png", "images/a.png", "", "input itself"),
    ("flat", "soft.png", "soft.png", "", "input itself"),
    ("flat", "images", "images", "", "input itself"),
    ("flat", "images", "shortcut", "", "input itself"),
    ("flat", "images", "images/labels", "", "lies in images, the input"),
    ("flat", "images", "shortcut/deep/labels", "", "lies in images, the input"),
    ("flat", "exp.zarr/raw.zarr", "exp.zarr", "", "holds exp.zarr/raw.zarr, the input"),
    ("flat", "exp.zarr/raw.zarr", "link.zarr", "", "holds exp.zarr/raw.zarr, the input"),
    ("flat", "link.zarr/raw.zarr", "exp.zarr", "", "holds link.zarr/raw.zarr, the input"),
    ("flat", "exp.zarr/raw.zarr", "exp.zarr/raw.zarr", "", "input itself"),
    (
        "flat",
        "exp.zarr/raw.zarr",
        "exp.zarr/raw.zarr/labels.zarr",
        "",
        "lies in exp.zarr/raw.zarr, the input",
    ),
    (
        "flat",
        "exp.zarr/raw.zarr",
        "exp.zarr/raw.zarr/0",
        "",
        "lies in exp.zarr/raw.zarr, the input",
    ),
    (
        "flat",
        "exp.zarr/raw.zarr",
        "exp.zarr/raw.zarr/labels/l.nii.gz",
        "",
        "lies in exp.zarr/raw.zarr, the input",
    ),
    ("deep", "exp.zarr/raw.zarr", "exp.zarr", "", "holds .*raw.zarr, the input"),
    ("deep", "exp.zarr/raw.zarr", "exp.zarr/raw.zarr", "--blocks", "input itself"),
    (
        "deep",
        "exp.zarr/raw.zarr",
        "exp.zarr/raw.zarr/0/labels.zarr",
        "--blocks",
        "lies in .*raw.zarr, the input",
    ),
    (
        "deep",
        "exp.zarr/raw.zarr",
        "link.zarr/raw.zarr/l.tif",
        "--tile 16",
        "lies in .*raw.zarr, the input",
    ),
    ("deep", "v.tif", "v.tif", "--blocks", "input itself"),
    # nor the student
    ("flat", "images/a.png", "flat/a.png", "", "lies in flat, the student's folder"),
    ("flat", "images", "flat", "", "lies in flat, the student's folder"),
    ("flat", "images/a.png", "flat/labels", "--instances", "lies in flat, the student's folder"),
    ("deep", "v.tif", "deep/l.zarr", "", "lies in .*deep, the student's folder"),
    ("deep", "v.tif", "deep/l.tif", "--blocks", "lies in .*deep, the student's folder"),
    # two outputs of one name, or an instance map in the place of a label map
    (
        "flat",
        "images",
        "new",
        "--instances",
        "b.png and images/b_instances.png would both be written",
    ),
    # there already
    ("flat", "images", "labels", "", "labels/a.png is there already, with 2 more of 4"),
    ("flat", "images/a.png", "labels", "", "labels/a.png is there already[^,]*$"),
    ("flat", "images/a.png", "labels/c.png", "", "is there already"),
    ("flat", "images/a.png", "dangling.png", "", "is there already"),
    ("flat", "images/a.png", "pipe.png", "", "is there already"),
    ("flat", "v.nii.gz", "link.zarr", "", "is there already"),
    ("deep", "v.tif", "exp.zarr", "", "is there already"),
    ("deep", "v.tif", "pipe.tif", "--blocks", "is there already"),
    ("deep", "v.tif", "p.zarr", "", "no unfinished work"),
    # not even with --overwrite
    (
        "flat",
        "v.nii.gz",
        "exp.zarr",
        "--overwrite",
        r"no label map of `ukd predict` \(raw.zarr lies in it\)",
    ),
    (
        "deep",
        "v.tif",
        "exp.zarr",
        "--overwrite",
        r"no label map of `ukd predict` \(raw.zarr lies in it\)",
    ),
    ("flat", "images/a.png", "pipe.png", "--overwrite", "not a file"),
    ("deep", "v.tif", "p.zarr", "--overwrite", "no unfinished work"),
    # formats, places, devices
    ("flat", "v.nii.gz", "v.png", "", "PNG holds no volumes"),
    ("flat", "images/a.png", "a.jpg", "", "JPEG changes pixel values"),
    ("flat", "images/a.png", "a.bmp", "", "not one we write"),
    ("flat", "images", "labels/a.png", "", "it is a file, and the input is a folder"),
    ("flat", "images/a.png", "labels/a.png/x.png", "", "labels/a.png is not a folder"),
    ("flat", "images", "v.nii.gz/new/labels", "", "v.nii.gz is not a folder"),
    ("flat", "images/a.png", "/proc/nobody/a.png", "", "cannot write into /proc/nobody"),
    ("deep", "v.tif", "/proc/nobody/a.zarr", "", "cannot write into /proc/nobody"),
    ("flat", "images/a.png", "n" * 250 + ".tiff.png", "", "too long"),
    (
        "flat",
        "images/a.png",
        "new/a.png",
        "--device cuda:99",
        "--device cuda:99.*This machine has cpu",
    ),
    (
        "flat",
        "images/a.png",
        "new/a.png",
        "--device potato",
        "--device potato.*This machine has cpu",
    ),
    ("flat", "images/a.png", "new/a.png", "--device meta", "--device meta.*This machine has cpu"),
    ("deep", "v.tif", "new/a.zarr", "--device potato", "--device potato.*This machine has cpu"),
    ("flat", "images/a.png", "new/a.png", "--precision fp8", "unknown precision 'fp8'"),
    ("deep", "v.tif", "new/a.zarr", "--precision fp8", "unknown precision 'fp8'"),
    # inputs and students that are none
    ("flat", "nowhere.png", "new", "", "nowhere.png does not exist"),
    (
        "flat",
        "dangling.png",
        "new",
        "",
        "dangling.png is a link to /nowhere/x.png, which is not there",
    ),
    ("flat", "pipe.png", "new", "", "pipe.png is neither a file nor a folder"),
    ("deep", "pipe.tif", "new.zarr", "--blocks", "pipe.tif is neither a file nor a folder"),
    ("flat", "empty", "new", "", "holds no images"),
    ("nobody", "images/a.png", "new", "", "nobody/weights.safetensors does not exist"),
    ("images", "images/a.png", "new", "", "images/weights.safetensors does not exist"),
    ("images/a.png", "images/a.png", "new", "", "a.png/weights.safetensors does not exist"),
]


@pytest.mark.parametrize(
    "student, source, output, options, said",
    REFUSED,
    ids=[f"{s}-{i}-{o[-30:]}-{x}".replace("/", "|") for s, i, o, x, _ in REFUSED],
)
def test_refused_before_any_work(home, capsys, monkeypatch, student, source, output, options, said):
    "Status 2, one sentence or two, no byte changed, no name new, no image segmented."
    monkeypatch.setattr(Student, "predict", lambda *a, **k: pytest.fail("it was segmented"))
    before = tree(home)
    assert cli.main(["predict", student, source, output, *options.split()]) == 2
    error = capsys.readouterr().err.strip()
    import re

    assert (
        re.search(said, error)
        and error.startswith("ukd predict: ")
        and error.count("\n") == 0
        and len(error) < 500
    )
    assert tree(home) == before


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in REFUSED
        if "input itself" in c[4] or "holds" in c[4] and "the input" in c[4] or "lies in" in c[4]
    ],
    ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}".replace("/", "|"),
)
def test_overwrite_allows_no_destruction(home, capsys, case):
    student, source, output, options, said = case
    before = tree(home)
    assert cli.main(["predict", student, source, output, *options.split(), "--overwrite"]) == 2
    assert tree(home) == before


def test_a_dicom_series_is_not_written_into(home):
    pytest.importorskip("pydicom")
    from test_images import dicom_series

    source = dicom_series(home / "series", R.integers(-1000, 1000, (3, 32, 32)).astype(np.int16))
    s = flat(intensity=(-1000, 1000))
    before = tree(home)
    for output in ("series", "series/labels", "series/l.nii.gz", "series/../series/deep/l.zarr"):
        with pytest.raises(InputError, match="lies in .*series, the input"):
            predict_path(s, source, home / output)
    assert tree(home) == before


def test_a_series_beside_pictures_is_named(home):
    pytest.importorskip("pydicom")
    from test_images import dicom_series

    for p in dicom_series(
        home / "series", R.integers(0, 200, (2, 32, 32)).astype(np.int16)
    ).iterdir():
        shutil.move(p, home / "images")
    with pytest.raises(
        InputError,
        match=r"holds DICOM files .* and other images: a.png, b.png, b_instances.png, c.png",
    ):
        predict_path(flat(), home / "images", home / "new")


# ---- what is replaced, and what is not


def test_overwrite_replaces_its_files_and_no_neighbour(home, capsys):
    (home / "labels" / "d.png").write_bytes(b"mine")
    (home / "labels" / "notes.txt").write_text("mine")
    os.remove(home / "images" / "b_instances.png")
    before = tree(home / "labels")
    assert cli.main(["predict", "flat", "images", "labels", "--overwrite", "--device", "cpu"]) == 0
    after = tree(home / "labels")
    assert after.keys() == before.keys() and [n for n in after if after[n] != before[n]] == [
        "a.png",
        "b.png",
        "c.png",
    ]
    for n in "abc":
        assert np.array_equal(
            read_label(home / "labels" / f"{n}.png").array,
            flat().predict(home / "images" / f"{n}.png"),
        )


def test_a_link_is_replaced_and_its_target_is_not(home):
    os.symlink(home / "labels" / "b.png", home / "out.png")
    kept = (home / "labels" / "b.png").read_bytes()
    with pytest.raises(InputError, match="there already"):
        predict_path(flat(), home / "images" / "a.png", home / "out.png")
    predict_path(flat(), home / "images" / "a.png", home / "out.png", overwrite=True)
    assert not (home / "out.png").is_symlink() and (home / "labels" / "b.png").read_bytes() == kept


@pytest.mark.parametrize("name", ["l.zarr", "l.tif"])
def test_blocks_replace_when_they_are_whole(home, name):
    write_label(home / name, np.full((16, 16, 16), 7, np.uint8))
    with pytest.raises(InputError, match="there already"):
        predict_volume("deep", "v.tif", name, tile=8)
    s = deep()

    def stop(*a):
        raise KeyboardInterrupt

    hook = s.network.bottom.register_forward_hook(
        lambda *a: (
            stop()
            if (home / f"{name}.part" / "blocks.log").exists()
            and len((home / f"{name}.part" / "blocks.log").read_text()) > 20
            else None
        )
    )
    with pytest.raises(KeyboardInterrupt):
        predict_volume(s, "v.tif", name, tile=8, overwrite=True)
    hook.remove()
    assert (read_label(home / name).array == 7).all() and (home / f"{name}.part").exists()
    t = predict_volume(s, "v.tif", name, tile=8, overwrite=True)
    assert (
        0 < t["resumed"] < t["blocks"]
        and not (home / f"{name}.part").exists()
        and not list(home.glob(".ukd*"))
    )
    predict_volume(s, "v.tif", "other" + name, tile=8)
    assert (
        np.array_equal(read_label(home / name).array, read_label(home / f"other{name}").array)
        and not (read_label(home / name).array == 7).all()
    )


def test_a_finished_job_is_an_output_like_any_other(home):
    for call in (
        lambda **k: predict_volume("deep", "v.tif", "p.tif", tile=16, **k),
        lambda **k: predict_path("flat", "v.nii.gz", "l.nii.gz", **k),
    ):
        call()
        before = tree(home)
        with pytest.raises(InputError, match="there already"):
            call()
        assert tree(home) == before
        call(overwrite=True)


def test_an_output_that_came_meanwhile_stays(home, monkeypatch):
    """Somebody writes the same name while we compute: theirs is kept, ours is named, the others are
    finished."""
    plain = Student.predict

    def slow(self, image, **k):
        (home / "new" / "b.png").write_bytes(b"theirs")
        return plain(self, image, **k)

    monkeypatch.setattr(Student, "predict", slow)
    with pytest.raises(PartlyDone, match=r"3 of 4 images(?s:.*)new/b.png is there already"):
        predict_path(flat(), home / "images", home / "new")
    assert (home / "new" / "b.png").read_bytes() == b"theirs" and (home / "new" / "c.png").exists()


# ---- one bad file


def test_one_bad_file_and_the_others(home, capsys, monkeypatch):
    """Each of eight faults is named in a line of its own, six good images are finished, the status
    is 1."""
    images = home / "images"
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:60])
    (images / "empty.png").write_bytes(b"")
    Pillow.fromarray(noise(32, 40, 3)).save(images / "rgb.png")
    Pillow.fromarray(noise(5, 5)).save(images / "tiny.png")
    os.symlink("/nowhere/b.png", images / "gone.png")
    os.symlink("loop.png", images / "loop.png")
    os.mkfifo(images / "pipe.png")
    (images / "text.tif").write_text("not a picture")
    (images / "broken.zarr").mkdir()
    (images / "list.csv").write_text("")
    os.mkfifo(images / "queue")
    assert cli.main(["predict", "flat", "images", "new", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    lines = said.err.strip().split("\n")
    lines = lines[
        [k for k, line in enumerate(lines) if "4 of 13 images were segmented; 9 were not:" in line][
            0
        ] :
    ]
    bad = [
        "broken.zarr",
        "cut.png",
        "empty.png",
        "gone.png",
        "loop.png",
        "pipe.png",
        "rgb.png",
        "text.tif",
        "tiny.png",
    ]
    assert len(lines) == 10 and all(f"images/{name}" in line for name, line in zip(bad, lines[1:]))
    assert "left out: list.csv, queue" in said.out and "Traceback" not in said.err
    assert sorted(p.name for p in (home / "new").iterdir()) == [
        "a.png",
        "b.png",
        "b_instances.png",
        "c.png",
    ]


@pytest.mark.parametrize(
    "fault, said",
    [
        (KeyError("bits"), "KeyError"),
        (MemoryError(), "more memory"),
        (RuntimeError("CUDA out of memory. Tried"), "more memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
            "more memory",
        ),
        (RecursionError("deep"), "RecursionError"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_any_fault_of_a_decoder_names_its_file(home, monkeypatch, fault, said):
    plain = files.read_image

    def read(path, *a):
        if path.name == "b.png":
            raise fault
        return plain(path, *a)

    monkeypatch.setattr(files, "read_image", read)
    with pytest.raises(PartlyDone, match=f"(?s)3 of 4 images.*images/b.png.*{said}"):
        predict_path(flat(), home / "images", home / "new")
    assert sorted(p.name for p in (home / "new").iterdir()) == ["a.png", "b_instances.png", "c.png"]
    with pytest.raises(InputError, match="images/b.png"):
        predict_path(flat(), home / "images" / "b.png", home / "x" / "b.png")
    assert not (home / "x").exists()


def test_a_file_that_may_not_be_read(home):
    os.chmod(home / "images" / "b.png", 0)
    if os.access(home / "images" / "b.png", os.R_OK):
        pytest.skip("root may read all")
    with pytest.raises(PartlyDone, match="3 of 4 (?s:.*)b.png may not be read"):
        predict_path(flat(), home / "images", home / "new")


def test_stopping_is_no_fault_of_an_image(home, monkeypatch):
    """Ctrl-C: what is finished stays, the same command goes on, and then nothing is left of the
    notes."""
    plain = Student.predict
    seen = []

    def predict(self, image, **k):
        seen.append(Path(image.path).name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(self, image, **k)

    monkeypatch.setattr(Student, "predict", predict)

    def call(**k):
        return predict_path("flat", home / "images", home / "new", "cpu", **k)

    with pytest.raises(KeyboardInterrupt):
        call()
    assert sorted(os.listdir(home / "new")) == [".ukd.notes", "a.png", "b.png"]
    with pytest.raises(InputError, match="there already"):
        predict_path(
            flat(invert=True), home / "images", home / "new", "cpu"
        )  # another student does not go on
    with pytest.raises(InputError, match="there already, with 1 more of 4"):
        call(precision="bf16")  # nor other settings
    call()
    assert seen == ["a.png", "b.png", "b_instances.png", "b_instances.png", "c.png"] and sorted(
        os.listdir(home / "new")
    ) == ["a.png", "b.png", "b_instances.png", "c.png"]


def test_nothing_is_left_of_a_job_in_which_all_failed(home):
    with pytest.raises(PartlyDone, match="0 of 4"):
        predict_path(
            Student(flat().network, Recipe(channels=1, in_channels=1, patch=64, zoom=0.1)),
            home / "images",
            home / "deep" / "er" / "new",
        )
    assert not (home / "deep" / "er").exists()


# ---- two at once


def test_two_jobs_into_one_folder(home):
    "The second is refused while the first is at work, whether it is a folder or a volume."
    with keep_notes(home / "new" / ".ukd.notes"):
        with pytest.raises(InputError, match="another process writes into .*new"):
            predict_path(flat(), home / "images", home / "new")
        predict_path(
            flat(), home / "images" / "a.png", home / "new" / "z.png"
        )  # another name is no conflict
    assert sorted(os.listdir(home / "new")) == ["z.png"]


TWICE = """
import sys, time
from unpaired_kd.inference import volumes
from unpaired_kd.inference.files import predict_path
from unpaired_kd.inference.student import Student
plain = volumes.write_block
def slow(*a): plain(*a); time.sleep(.2)
volumes.write_block = slow
from unpaired_kd.command import cli
sys.exit(cli.main(["predict", "deep", "v.tif", "out.zarr", "--tile", "8", "--device", "cpu"]))
"""


def test_two_jobs_on_one_zarr(home):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    said = [p.communicate()[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 2], said
    assert "another process is at work" in "".join(said) or "there already" in "".join(said)
    predict_volume("deep", "v.tif", "alone.zarr", tile=8, labels=True)
    assert (
        np.array_equal(read_label("out.zarr").array, read_label("alone.zarr").array)
        and not (home / "out.zarr.part").exists()
    )


# ---- the questions, by value


def test_formats_hold_what_they_hold():
    for output, shape, largest, good in (
        ("a.png", (9, 9), 65535, True),
        ("a.png", (9, 9), 65536, False),
        ("a.tif", (9, 9), 65536, True),
        ("a.png", (1, 9, 9), 1, False),
        ("a.PNG", (2, 9, 9), 1, False),
        ("a.nii", (5, 32767, 9), 1, True),
        ("a.nii.gz", (5, 32768, 9), 1, False),
        ("a.zarr", (5, 32768, 9), 10**6, True),
        ("a.jpeg", (9, 9), 1, False),
    ):
        with contextlib.nullcontext() if good else pytest.raises(InputError, match=output):
            check_format(output, shape, largest)


def test_more_objects_than_a_png_holds(home):
    "Found before the label map is written, so no half of the pair is left."

    class Dots(Student):
        def instances(self, image, **k):
            return np.arange(32 * 40, dtype=np.int32).reshape(32, 40) * 60

    with pytest.raises(
        InputError, match="a_instances.png: PNG holds numbers up to 65535, here are 76740"
    ):
        predict_path(
            Dots(flat().network, flat().recipe),
            home / "images" / "a.png",
            home / "new" / "a.png",
            instances=True,
        )
    assert not (home / "new").exists()


def test_room(home, monkeypatch):
    """One byte a voxel is asked for, five with instances; in blocks one a voxel, less what lies
    there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("Usage", (), dict(free=4 * 32 * 40)))
    predict_path(flat(), home / "v.nii.gz", home / "fits.nii.gz")
    before = tree(home)
    with pytest.raises(InputError, match=r"may need 0.0 MB, and 0.0 MB are free"):
        predict_path(flat(), home / "v.nii.gz", home / "too.nii.gz", instances=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("Usage", (), dict(free=16**3 - 1)))
    with pytest.raises(InputError, match="p2.tif may need 0.0 MB"):
        predict_volume("deep", "v.tif", "p2.tif", tile=16)
    with pytest.raises(InputError, match=r"x.zarr may need 12.5 MB, and 0.0 MB are free"):
        check_room(home / "x.zarr", 12.5e6)
    assert tree(home) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("Usage", (), dict(free=16**3)))
    predict_volume("deep", "v.tif", "p2.tif", tile=16)


def test_room_for_a_folder_is_foreseen(home, monkeypatch, capsys):
    """From headers: one byte a pixel of each plane, five with instances; a pipe is not opened, a
    broken header counts nothing."""
    from unpaired_kd.inference.files import _count_unpacked, _FileJob, _warn_of_room

    (home / "few").mkdir()
    write_image(home / "few" / "a.png", Image(np.zeros((1, 30, 41), np.uint8)))
    write_image(home / "few" / "b.nii.gz", Image(np.zeros((1, 3, 20, 50), np.uint8)))
    (home / "few" / "c.tif").write_bytes(b"no header")
    os.mkfifo(home / "few" / "d.png")
    names = ("a.png", "b.nii.gz", "c.tif", "d.png")

    def jobs(n):
        return [_FileJob(home / "few" / f, (home / "o" / f,) * n, "") for f in names]

    need = 30 * 41 + 20 * 50
    assert _count_unpacked(jobs(1)) == need and _count_unpacked(jobs(2)) == 5 * need
    for free, says in ((need, ""), (need - 1, "the disk may become full")):
        usage = type("Usage", (), dict(free=free))
        monkeypatch.setattr(shutil, "disk_usage", lambda p, usage=usage: usage)
        _warn_of_room(jobs(1))
        assert says in (said := capsys.readouterr().out) and bool(said) == bool(says)


def test_a_disk_that_is_full_leaves_nothing(home, monkeypatch):
    """The disk refuses a mapped file its room, or a block: one sentence; nothing is left if nothing
    was finished."""
    from unpaired_kd.inference import volumes

    before = tree(home)

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="(?s)p2.tif.*No space left.*Nothing of it is kept"):
        predict_volume("deep", "v.tif", "p2.tif", tile=8)
    monkeypatch.setattr(volumes, "write_block", full)
    with pytest.raises(InputError, match="(?s)q.zarr.*No space left.*Nothing of it is kept"):
        predict_volume("deep", "v.tif", "q.zarr", tile=8)
    assert tree(home) == before


def test_a_tiff_of_blocks_has_its_room_from_the_beginning(home, monkeypatch):
    from unpaired_kd.inference import volumes

    volumes.create_output(home / "big.tif", (8, 256, 256), (8, 64, 64))
    s = os.stat(home / "big.tif")
    assert s.st_size > 8 * 256 * 256 and s.st_blocks * 512 >= 8 * 256 * 256


def test_names_of_one_disk():
    check_names([("a", "x/a.png"), ("b", "x/b.png"), ("c", "y/a.png")])
    for first, second in (
        ("x/a.png", "x/a.png"),
        ("x/A.png", "x/a.PNG"),
        ("x/M\u00fcller.png", "x/Mu\u0308ller.png"),
    ):
        with pytest.raises(InputError, match="one and two would both be written"):
            check_names([("one", first), ("two", second)])


def test_lineage(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.symlink(tmp_path / "a", tmp_path / "s")

    def number(p):
        return (os.stat(p).st_dev, os.stat(p).st_ino)

    want = [number(tmp_path / "a" / "b"), number(tmp_path / "a"), number(tmp_path)]
    assert (
        _list_parents(tmp_path / "s" / "b")[:3] == want
        and _list_parents(tmp_path / "s" / "b" / "new" / "er")[:3] == want
    )
    os.symlink("/nowhere/at/all", tmp_path / "a" / "dead")
    with pytest.raises(InputError, match="holds"):
        check_apart([tmp_path / "a"], [(tmp_path / "a" / "dead", "the input")])
    check_apart([tmp_path / "a" / "b"], [(tmp_path / "a" / "dead", "the input")])


def test_notes_survive_a_torn_line(tmp_path):
    path = tmp_path / "notes"
    with pytest.raises(KeyboardInterrupt):
        with keep_notes(path) as notes:
            notes.add("begun", "m", "a.png")
            notes.add("done", "m", "a.png")
            raise KeyboardInterrupt
    with open(path, "a") as f:
        f.write("done m b.p")
    with pytest.raises(KeyboardInterrupt):
        with keep_notes(path) as notes:
            assert (
                notes.has("done", "m", "a.png")
                and not notes.has("done", "m", "b.p")
                and not notes.has("done", "n", "a.png")
            )
            notes.add("begun", "m", "c.png")
            raise KeyboardInterrupt
    assert Notes(path).has("begun", "m", "c.png") and Notes(path).has("done", "m", "a.png")
    with keep_notes(path):
        pass
    assert not path.exists()


def test_parts_of_a_killed_writer_go_and_those_of_a_live_one_stay(home):
    from unpaired_kd.core import PART, atomic

    (home / "new").mkdir()
    (home / "new" / f"{PART}old.png").write_bytes(b"half")
    with atomic(home / "new" / "live.png") as part:
        part.write_bytes(b"at work")
        predict_path(flat(), home / "images" / "a.png", home / "new" / "a.png")
        assert (
            sorted(os.listdir(home / "new")) == [part.name, "a.png"]
            and part.read_bytes() == b"at work"
        )
    (home / "flat" / f"{PART}weights.safetensors").write_bytes(b"half")
    flat().save(home / "flat")
    assert sorted(os.listdir(home / "flat")) == sorted(FILES)


def test_marks_follow_every_file(tmp_path):
    (tmp_path / "s" / "d").mkdir(parents=True)
    (tmp_path / "s" / "d" / "x").write_bytes(b"abc")
    (tmp_path / "s" / "y").write_bytes(b"a")
    one = mark_files(tmp_path / "s")
    assert mark_files(tmp_path / "s") == one
    (tmp_path / "s" / "d" / "x").write_bytes(b"abcd")
    two = mark_files(tmp_path / "s")
    (tmp_path / "s" / "d" / "x").rename(tmp_path / "s" / "d" / "z")
    assert len({one, two, mark_files(tmp_path / "s"), mark_files(tmp_path / "s" / "y")}) == 4


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [
        str(resolve_device(d)) for d in ("cpu", "cuda", "cuda:1", None, torch.device("cuda", 0))
    ] == ["cpu", "cuda", "cuda:1", "cuda", "cuda:0"]
    for wrong in ("cuda:2", "cuda:-1", "meta", "CPU ", "", "xla", 3.5, [1]):
        with pytest.raises(InputError, match="This machine has cpu, cuda:0, cuda:1"):
            resolve_device(wrong)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(resolve_device(None)) == "cpu"
    with pytest.raises(InputError, match="--device cuda: .* has cpu"):
        resolve_device("cuda")


# ---- students that come from anywhere


def edited(folder, **recipe):
    "Change entries of the recipe in config.json; without its digest, as who means harm would."
    c = json.loads((folder / "config.json").read_text())
    c["recipe"].update(recipe)
    c.pop("recipe_digest")
    (folder / "config.json").write_text(json.dumps(c))


def resaved(folder, change):
    "Change the weights, and give the config their right SHA-256."
    from safetensors.torch import load_file, save_file

    from unpaired_kd.core import file_sha256

    state = load_file(folder / FILES[0])
    save_file({k: v.contiguous() for k, v in change(state).items()}, folder / FILES[0])
    c = json.loads((folder / "config.json").read_text())
    c["weights_sha256"] = file_sha256(folder / FILES[0])
    (folder / "config.json").write_text(json.dumps(c))


CONFIG = dict(in_channels=1, classes=1, width=2)
HOSTILE = {
    "width of a terabyte": (dict(network_config=CONFIG | {"width": 16384}), "does not fit"),
    "beyond any network": (dict(network_config=CONFIG | {"width": 10**30}), "argument above"),
    "hidden in a list": (
        dict(
            network="ensemble",
            network_config=dict(members=[dict(network="unet", config=dict(width=10**6))]),
        ),
        "argument above",
    ),
    "member of nowhere": (
        dict(
            network="ensemble", network_config=dict(members=[dict(network="os.system", config={})])
        ),
        "unknown network",
    ),
    "half a member": (
        dict(network="ensemble", network_config=dict(members=[{}])),
        "cannot be built",
    ),
    "width nan": (dict(network_config=CONFIG | {"width": float("nan")}), "config.json"),
    "config a list": (dict(network_config=[1]), "network_config"),
    "config a path": (dict(network_config="/etc/passwd"), "network_config"),
    "network a path": (dict(network="../../x.py"), "unknown network"),
    "true channels": (dict(channels=True), "channels=True"),
    "text zoom": (dict(zoom="1.0"), "zoom='1.0'"),
    "huge zoom": (dict(zoom=1e9), "zoom=1000000000.0 is not possible"),
    "tiny zoom": (dict(zoom=1e-9), "zoom"),
    "endless zoom": (dict(zoom=float("inf")), "zoom"),
    "classes a text": (dict(classes="ab"), "classes='ab'"),
    "classes of numbers": (dict(classes=[0, 1]), "classes"),
    "classes of lists": (dict(classes=[["a"], ["b"]]), "classes"),
    "a fraction of a patch": (dict(patch=64.5), "patch=64.5"),
    "no patch": (dict(patch=None), "patch=None"),
    "invert a word": (dict(invert="no"), "invert='no'"),
    "window of one": (dict(intensity=[1]), "intensity"),
    "window upside down": (dict(intensity=[5, 1]), "low must be below high"),
    "window of names": (dict(intensity=["a", "b"]), "intensity"),
    "unknown rule": (dict(intensity="ct"), "intensity='ct'"),
    "instances a list": (dict(instances=["none"]), "instances"),
    "overlap nan": (dict(overlap=float("nan")), "overlap"),
    "min_size below 0": (dict(min_size=-1), "min_size"),
    "odd entry": (dict(weights="/etc/passwd"), "weights"),
}


@pytest.mark.parametrize("change, said", HOSTILE.values(), ids=HOSTILE)
def test_hostile_configs(home, change, said):
    "Quickly, by the file's name, and before any memory is taken."
    edited(home / "flat", **change)
    start = time.monotonic()
    with pytest.raises(InputError, match=said) as e:
        Student.load("flat", "cpu")
    assert time.monotonic() - start < 3 and "flat/" in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": ' + "1" * 5000 + "}",
        '{"format": 1, "recipe": {"zoom": 1e999}}',
        "\x00",
        "\udcff",
    ],
    ids=["deep", "long number", "infinity", "zero byte", "no UTF-8"],
)
def test_hostile_json(home, text):
    (home / "flat" / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="flat/config.json"):
        Student.load("flat", "cpu")


def test_hostile_weights(home):
    first = "conv1.0.weight"
    for change, said in (
        (lambda s: s | {first: s[first].double()}, "torch.float64"),
        (lambda s: s | {first: s[first].half()}, "torch.float16"),
        (lambda s: s | {first: s[first] * float("nan")}, "NaN or infinity"),
        (lambda s: s | {first: s[first][:1]}, "has shape"),
        (lambda s: {k.upper(): v for k, v in s.items()}, "is missing"),
    ):
        shutil.rmtree(home / "flat")
        flat().save(home / "flat")
        resaved(home / "flat", change)
        with pytest.raises(InputError, match=f"flat/weights.safetensors.*{said}"):
            Student.load("flat", "cpu")
    shutil.rmtree(home / "flat")
    flat().save(home / "flat")
    resaved(home / "flat", lambda s: s)
    Student.load("flat", "cpu")
    (home / "flat" / FILES[0]).unlink()
    os.mkfifo(home / "flat" / FILES[0])
    with pytest.raises(
        InputError, match="weights.safetensors is neither a file nor a folder, but a pipe"
    ):
        Student.load("flat", "cpu")


def test_a_student_behind_links_is_read(home):
    "Model hubs keep weights behind links."
    (home / "flat" / FILES[0]).rename(home / "blob")
    os.symlink(home / "blob", home / "flat" / FILES[0])
    assert np.array_equal(Student.load("flat", "cpu").predict(noise(32, 32)).shape, (32, 32))


def test_left_over_parts_are_no_inputs(home):
    "They would be cleared away, or put back to where they were, while they are read."
    from unpaired_kd.core import OLD, PART

    for name in (f"{PART}a.png", f"{OLD}exp.zarr/raw.zarr"):
        (home / name).parent.mkdir(exist_ok=True)
        shutil.copytree(home / "exp.zarr" / "raw.zarr", home / name) if name.endswith(
            "zarr"
        ) else shutil.copy(home / "images" / "a.png", home / name)
        before = tree(home)
        with pytest.raises(InputError, match="what a killed command left"):
            predict_path("flat", home / name, home / "new")
        assert tree(home) == before


def test_a_device_without_memory_is_named(home, monkeypatch):
    def full(*a):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(
        inference,
        "build",
        lambda *a, real=inference.build: (
            real(*a) if torch.get_default_device().type == "meta" else full()
        ),
    )
    with pytest.raises(InputError, match="flat/weights.safetensors needs more memory"):
        Student.load("flat", "cpu")


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("Nanny failed to start."),
        ValueError("bad codec"),
        RuntimeError("CUDA error: an illegal memory access"),
    ],
)
def test_a_fault_of_a_block_names_the_output(home, monkeypatch, fault):
    from unpaired_kd.inference import volumes

    before = tree(home)

    def broken(*a):
        raise fault

    monkeypatch.setattr(volumes, "compute_block", broken)
    with pytest.raises(InputError, match="(?s)q.zarr: a block failed.*Nothing of it is kept"):
        predict_volume("deep", "v.tif", "q.zarr", tile=8)
    assert tree(home) == before
    monkeypatch.setattr(volumes, "compute_block", lambda *a: no_such_name)  # noqa: F821, a mistake of ours
    with pytest.raises(NameError):
        predict_volume("deep", "v.tif", "q.zarr", tile=8)
    assert tree(home) == before


def test_a_volume_that_does_not_fit_is_named(home, monkeypatch):
    from unpaired_kd.inference import volumes

    def large(path):
        raise MemoryError

    monkeypatch.setitem(volumes.OPENERS, ".tif", large)
    with pytest.raises(InputError, match="v.tif needs more memory"):
        volumes.open_volume("v.tif")


def test_writers_leave_the_settings_of_zarr(home):
    """Many threads open at once: each writes its empty block to a file, and zarr's own setting is
    as before."""
    import concurrent.futures

    from unpaired_kd.inference.blocks import Block
    from unpaired_kd.inference.volume_files import create_output, write_block

    create_output(home / "z.zarr", (4, 4, 64), (4, 4, 4))
    blocks = [Block((0, 0, i), ((0, 4), (0, 4), (4 * i, 4 * i + 4)), None) for i in range(16)]
    before = zarr.config.get("array.write_empty_chunks")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda b: write_block(
                    home / "z.zarr", b, np.zeros((4, 4, 4), np.uint8), (4, 4, 64)
                ),
                blocks,
            )
        )
    assert zarr.config.get("array.write_empty_chunks") is before is False
    assert sorted(int(p.name) for p in (home / "z.zarr/0/c/0/0").iterdir()) == list(range(16))


def test_what_continues_is_said(home):
    "A stopped command says so where a folder's notes or the blocks of a volume lie."
    from unpaired_kd.command.arguments import read_arguments
    from unpaired_kd.command.cli import continues

    def stopped(out):
        return continues(read_arguments(["predict", "flat", "v.tif", out]))

    (home / "o.zarr.part").mkdir()
    (home / "folder").mkdir()
    assert stopped("o.zarr") and stopped("o.zarr/") and not stopped("folder") and not stopped("new")
    (home / "folder/.ukd.notes").touch()
    assert stopped("folder/")


def test_a_model_card_is_utf8_everywhere(home):
    "Under an ASCII locale, too; a class whose name is no text is written with its code."
    Student(
        flat().network,
        Recipe(channels=1, in_channels=1, patch=64, classes=("Hintergrund", "Drüse \udce9")),
    ).save(home / "umlaut")
    text = (home / "umlaut/README.md").read_bytes().decode("utf-8")
    assert "1 Drüse \\udce9" in text and "\r" not in text


# ---- talk is not the work: a reader who leaves, a full disk under a log, closed streams


def stream_of(kind):
    "A text stream that takes nothing: its reader has left, its disk is full, or there is none."
    if kind == "closed":
        return None
    if kind == "full":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1 if kind == "lines" else -1)


@pytest.fixture
def unheard(monkeypatch):
    "Runs `ukd` with such streams."

    def run(out, err, *argv):
        with monkeypatch.context() as m:
            m.setattr(sys, "stdout", stream_of(out))
            m.setattr(sys, "stderr", stream_of(err))
            return cli.main([str(a) for a in argv])

    return run


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full device")
@pytest.mark.parametrize(
    "out, err",
    [
        ("left", "left"),
        ("lines", "lines"),
        ("full", "full"),
        ("closed", "closed"),
        ("lines", "closed"),
    ],
)
def test_work_is_finished_though_nobody_listens(home, unheard, out, err):
    (home / "images" / "notes.txt").write_text("left out, and said so")
    assert unheard(out, err, "predict", "flat", "images", "new") == 0
    assert sorted(p.name for p in (home / "new").iterdir()) == [
        "a.png",
        "b.png",
        "b_instances.png",
        "c.png",
    ]
    assert unheard(out, err, "predict", "flat", "v.nii.gz", "l.nii.gz") == 0 and read_label(
        "l.nii.gz"
    ).array.shape == (4, 32, 40)
    assert (
        unheard(out, err, "predict", "deep", "v.tif", "l.zarr", "--tile", "16") == 0
        and not (home / "l.zarr.part").exists()
    )
    (home / "images" / "a.png").write_bytes(b"no picture")
    assert (
        unheard(out, err, "predict", "flat", "images", "some") == 1
        and len(list((home / "some").iterdir())) == 3
    )
    assert unheard(out, err, "predict", "flat", "images", "some") == 2  # they are there


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full device")
@pytest.mark.parametrize(
    "out, good, bad", [("left", 0, 1), ("lines", 0, 1), ("closed", 0, 1), ("full", 2, 2)]
)
def test_the_status_of_a_check_is_that_of_the_data(home, unheard, out, good, bad):
    "Where its table is lost to a full disk, the check has failed."
    (home / "images" / "b_instances.png").unlink()
    for name in "abc":
        write_label(home / "labels" / f"{name}.png", np.eye(32, 40, dtype=np.uint8))
    (home / "data").mkdir()
    (home / "images").rename(home / "data" / "images")
    (home / "labels").rename(home / "data" / "labels")
    assert (
        unheard(out, "closed", "check", "data", "--out", "pictures") == good
        and len(list((home / "pictures").iterdir())) == 1
    )
    (home / "data" / "images" / "a.png").write_bytes(b"no picture")
    assert unheard(out, "left", "check", "data") == bad


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="descriptors")
def test_a_run_and_a_sweep_without_any_stream(home):
    """A kernel inherits the streams; the next row of a sweep is run though nobody reads of the
    first."""
    cells = [
        'x: int = 1\nrun_folder: str = ""',
        'print(x)\nrows = f"arm,seed,case,group,dsc\\na,{x},c,c,0.5\\n"\n'
        'open(f"{run_folder}/metrics.csv", "w").write(rows)',
    ]
    body = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={"tags": ["parameters"][i:]},
            source=c,
            outputs=[],
            execution_count=None,
        )
        for i, c in enumerate(cells)
    ]
    Path("n.ipynb").write_text(
        json.dumps(dict(cells=body, metadata={}, nbformat=4, nbformat_minor=5))
    )
    Path("g.yaml").write_text("notebook: ./n.ipynb\ngrid: {x: [1, 2]}\n")
    code = "import sys; from unpaired_kd.command.cli import main; sys.exit(main(sys.argv[1:]))"
    ukd = f"{sys.executable} -u -c '{code}'"
    assert (
        subprocess.run(f"exec {ukd} run ./n.ipynb --out run <&- >&- 2>&-", shell=True).returncode
        == 0
    )
    assert (home / "run" / "metrics.csv").exists()
    reader, writer = os.pipe()
    os.close(reader)
    assert (
        subprocess.run(
            f"exec {ukd} sweep g.yaml --out many --workers 1",
            shell=True,
            stdout=writer,
            stderr=writer,
        ).returncode
        == 0
    )
    os.close(writer)
    assert (home / "many" / "results.csv").read_text().count("0.5") == 2


# ---- what lies in the way


@pytest.mark.parametrize(
    "make",
    [lambda p: os.symlink(p.parents[1] / "mine.txt", p), os.mkfifo, os.mkdir],
    ids=["link", "pipe", "folder"],
)
@pytest.mark.parametrize("source", ["images", "images/a.png"])
def test_notes_are_a_plain_file(home, capsys, make, source):
    "Refused at once, in a line of its own; nothing is read from it or written through it."
    (home / "mine.txt").write_text("x\n")
    (home / "new").mkdir()
    make(files._place_notes(home / "new" / "a.png", source != "images"))
    before = tree(home)
    assert cli.main(["predict", "flat", source, "new"]) == 2
    said = capsys.readouterr().err.replace("\r", "\n")
    assert (
        said.startswith("ukd predict: ") and "is no file of ours" in said and said.count("\n") == 1
    )
    assert tree(home) == before


@pytest.mark.parametrize("name", ["lock", "job.json", "blocks.log", "data.zarr"])
@pytest.mark.parametrize(
    "make", [lambda p: os.symlink("../mine.txt", p), os.mkfifo], ids=["link", "pipe"]
)
def test_the_files_of_blocks_are_plain_ones(home, capsys, name, make):
    (home / "mine.txt").write_text("x\n")
    (home / "l.zarr.part").mkdir()
    (home / "l.zarr.part" / "lock").touch()
    (home / "l.zarr.part" / name).unlink(missing_ok=True)
    make(home / "l.zarr.part" / name)
    before = tree(home)
    assert cli.main(["predict", "deep", "v.tif", "l.zarr", "--tile", "16"]) == 2
    assert (
        f"is no unfinished work of `ukd predict` ({name})" in capsys.readouterr().err
        and tree(home) == before
    )


@pytest.mark.parametrize(
    "student, source, output",
    [
        ("flat", "images", "exp.zarr"),
        ("flat", "images", "exp.zarr/labels"),
        ("flat", "images", "new.zarr"),
        ("flat", "images/a.png", "raw/labels/a.png"),
        ("flat", "images/a.png", "link/a.png"),
        ("deep", "v.tif", "exp.zarr/raw.zarr/labels.zarr"),
        ("deep", "v.tif", "raw/labels.tif"),
    ],
)
def test_nothing_is_written_into_a_zarr(home, capsys, student, source, output):
    "A Zarr by its name, or by what lies in it; also behind a link."
    write_image(home / "raw.zarr", Image(noise(1, 16, 16, 16)))
    (home / "raw.zarr").rename(home / "raw")
    os.symlink("raw", home / "link")
    before = tree(home)
    assert cli.main(["predict", student, source, output, "--overwrite"]) == 2
    assert "nothing is written into one" in capsys.readouterr().err and tree(home) == before


def test_only_a_signed_zarr_is_replaced(home, monkeypatch):
    "A raw volume looks as a label map does; the label map says that it is one."
    write_image("raw.zarr", Image(noise(1, 16, 16, 16)))
    write_label("mine.zarr", noise(16, 16, 16))
    predict_volume("deep", "v.tif", "blocks.zarr", tile=16, labels=True)
    with pytest.raises(InputError, match="raw.zarr is there and is no label map"):
        check_new(["raw.zarr"], True)
    check_new(["mine.zarr", "blocks.zarr"], True)
    for text in ("[]", '{"attributes": null}', '{"attributes": {"ome": {}}}'):
        (home / "mine.zarr" / "zarr.json").write_text(text)
        with pytest.raises(InputError, match="mine.zarr is there and is no label map"):
            check_new(["mine.zarr"], True)
    monkeypatch.setattr(outputs.os, "access", lambda folder, mode: Path(folder).name != "c")
    with pytest.raises(InputError, match="may not delete what lies in blocks.zarr/0/c"):
        check_new(["blocks.zarr"], True)


@pytest.mark.parametrize(
    "source, output",
    [
        ("images/a.png", "l.png"),
        ("v.nii.gz", "l.nii.gz"),
        ("v.tif", "l.tif"),
        ("exp.zarr/raw.zarr", "l.zarr"),
    ],
)
def test_what_comes_while_a_map_is_written_stays(home, monkeypatch, source, output):
    "Between the last look and the name. The notes say that it is not ours, also for the next try."
    from unpaired_kd.data.formats.images import suffix_of
    from unpaired_kd.data.formats.writing import WRITERS

    suffix = suffix_of(output)
    path = Path(output)
    write = WRITERS[suffix]

    def late(t, a, image):
        write(t, a, image)
        if suffix == ".zarr":
            path.mkdir()
        (path / "theirs" if suffix == ".zarr" else path).write_text("theirs")

    monkeypatch.setitem(WRITERS, suffix, late)
    with pytest.raises(InputError, match=f"{output} is there already.*--overwrite"):
        predict_path("flat", source, output, bars=False)
    monkeypatch.setitem(WRITERS, suffix, write)
    assert (path / "theirs" if suffix == ".zarr" else path).read_text() == "theirs"
    with pytest.raises(InputError, match="is there already"):
        predict_path("flat", source, output, bars=False)


def test_notes_tell_what_failed(tmp_path):
    with pytest.raises(KeyboardInterrupt), keep_notes(tmp_path / ".notes") as notes:
        for name in "ab":
            notes.add("begun", "f00d", name)
        notes.add("failed", "f00d", "b")
        raise KeyboardInterrupt
    notes = Notes(tmp_path / ".notes")
    assert [is_ours(notes, "f00d", name) for name in "abc"] == [True, False, False] and not is_ours(
        notes, "beef", "a"
    )


def test_a_tile_longer_than_the_volume_is_the_whole_axis(home):
    t = predict_volume("deep", "v.tif", "l.zarr", tile=10**9, labels=True)
    assert t["tile"] == (64, 64, 64) and t["blocks"] == 1
    predict_volume("deep", "v.tif", "m.zarr", tile=16, labels=True)
    assert (read_label("l.zarr").array == read_label("m.zarr").array).all()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}'])
def test_work_without_a_finished_block_is_begun_again(home, text):
    "There is nothing to lose, so nobody is asked to delete it."
    work = home / "l.zarr.part"
    (work / "data.zarr").mkdir(parents=True)
    (work / "lock").touch()
    (work / "job.json").write_text(text)
    assert predict_volume("deep", "v.tif", "l.zarr", tile=16)["resumed"] == 0 and not work.exists()


@pytest.mark.skipif(os.name != "posix", reason="a folder in use can be deleted")
def test_a_current_folder_that_is_gone_is_named(home, capsys):
    (home / "gone").mkdir()
    os.chdir(home / "gone")
    (home / "gone").rmdir()
    assert cli.main(["predict", str(home / "flat"), str(home / "images"), "new"]) == 2
    assert (
        capsys.readouterr().err
        == "ukd predict: the current folder is not there any more. Change to another one (cd).\n"
    )
    os.chdir(home)
