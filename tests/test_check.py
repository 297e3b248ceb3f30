"""`ukd check`: every fault of a data set is one line that names the file; the other files are still
looked at."""

import os
import re
import shutil
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest

from unpaired_kd.command import cli
from unpaired_kd.core import InputError, file_sha256, rng
from unpaired_kd.data.check import _most_frequent
from unpaired_kd.data.collections import open_collection
from unpaired_kd.data.examine import _hash_pixels, examine, find_leaks, list_cases, list_modalities


def save(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def picture(k):
    y = np.zeros((32, 40), np.uint8)
    y[4:12, 5 + k : 15 + k] = 1
    y[20:28, 5:12] = 2
    return rng(0, "check", k).integers(0, 255, y.shape).astype(np.uint8), y


@pytest.fixture
def ward(tmp_path):
    "Two modalities of four patients: ct/, mr/ with images/, labels/, groups.csv."
    for m in ("ct", "mr"):
        for i in range(4):
            x, y = picture(i + 10 * (m == "mr"))
            save(tmp_path / f"ward/{m}/images/{m}{i}.png", x)
            save(tmp_path / f"ward/{m}/labels/{m}{i}.png", y % 3)
        (tmp_path / f"ward/{m}/groups.csv").write_text(
            "id,group\n" + "".join(f"{m}{i},{m}-{i}\n" for i in range(4))
        )
    return tmp_path / "ward"


def listed(ward):
    "The same as a manifest."
    rows = ["modality,id,image,label,group,sha256_image,sha256_label"]
    for m in ("ct", "mr"):
        for i in range(4):
            a, b = (f"{m}/{d}/{m}{i}.png" for d in ("images", "labels"))
            rows.append(
                f"{m},{m}{i},{a},{b},{m}-{i},{file_sha256(ward / a)},{file_sha256(ward / b)}"
            )
    (ward / "manifest.csv").write_text("\n".join(rows) + "\n")


def run(capsys, *args):
    "(exit status, lines of faults, lines of notes, everything)"
    status = cli.main(["check", *map(str, args)])
    out = capsys.readouterr().out
    found = [
        [line.strip() for line in out.splitlines() if line.strip().startswith(k)]
        for k in ("fault: ", "note: ")
    ]
    return status, *found, out


def snapshot(folder):
    return {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(folder).rglob("*") if p.is_file()
    }


def test_a_sound_folder(ward, capsys):
    before = snapshot(ward)
    status, faults, notes, out = run(capsys, ward)
    assert (status, faults, notes) == (0, [], []) and snapshot(ward) == before
    for words in (
        "images        4, of 4 groups",
        "labels        4 with, 0 without",
        "size          32 x 40",
        "not stated",
        "numbers       uint8, 0 to 254\n",
        "colours       grey\n",
        "label numbers 1-2\n",
        "classes (3 with background: class 1, class 2), because the labels hold 1-2",
        "found in      1 (4), 2 (4)\n",
        "no faults",
    ):
        assert words in out, out
    assert (
        out.index("\nct") < out.index("\nmr")
        if out.startswith("\n")
        else out.startswith("ct\n") and "\nmr\n" in out
    )
    assert run(capsys, ward, "mr")[3].startswith("mr\n") and "ct" not in run(capsys, ward, "mr")[3]
    assert run(capsys, ward / "ct")[0] == 0


def blank(path):
    save(path, np.full((32, 40), 7, np.uint8))


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def link(path):
    path.unlink()
    path.symlink_to("nowhere.png")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def text(path):
    path.write_text("this is no picture")


def tiny(path):
    save(path, np.eye(8, dtype=np.uint8))
    save(path.parents[1] / "labels" / path.name, np.eye(8, dtype=np.uint8))


def ignore(path):
    save(path, picture(2)[1] + (np.arange(40) > 38).astype(np.uint8) * 255)


FAULTS = [
    (lambda d: cut(d / "ct/images/ct2.png"), "ct/images/ct2.png", "cut short"),
    (lambda d: text(d / "ct/images/ct2.png"), "ct/images/ct2.png", "neither PNG nor JPEG"),
    (lambda d: text(d / "ct/labels/ct2.png"), "ct/labels/ct2.png", "neither PNG nor JPEG"),
    (lambda d: link(d / "ct/images/ct2.png"), "ct/images/ct2.png", "link to nowhere.png"),
    (lambda d: link(d / "ct/labels/ct2.png"), "ct/labels/ct2.png", "link to nowhere.png"),
    (lambda d: pipe(d / "ct/images/ct2.png"), "ct/images/ct2.png", "neither a file nor a folder"),
    (lambda d: pipe(d / "ct/labels/ct2.png"), "ct/labels/ct2.png", "neither a file nor a folder"),
    (lambda d: folder(d / "ct/labels/ct2.png"), "ct/labels/ct2.png", "is a folder"),
    (lambda d: folder(d / "ct/images/ct2.png"), "ct/images/ct2.png", "is a folder"),
    (
        lambda d: shutil.copy(d / "ct/labels/ct2.png", d / "ct/labels/CT2.png"),
        "ct/images/ct2.png",
        "2 labels",
    ),
    (lambda d: shutil.copytree(d / "ct/labels", d / "ct/masks"), "labels and masks", "Keep one"),
    (lambda d: (d / "ct/labels/ct2.png").unlink(), "ct/images/ct2.png", "no label"),
    (lambda d: blank(d / "ct/images/ct2.png"), "ct/images/ct2.png", "every pixel is 7"),
    (lambda d: tiny(d / "ct/images/ct2.png"), "ct/images/ct2.png", "8 x 8 pixels"),
    (
        lambda d: save(d / "ct/labels/ct2.png", np.zeros((32, 32), np.uint8)),
        "ct/labels/ct2.png",
        "(32, 32)",
    ),
    (lambda d: ignore(d / "ct/labels/ct2.png"), "ct/labels/ct2.png", "ignore"),
    (
        lambda d: save(
            d / "ct/labels/ct2.png", np.stack([picture(2)[1], 0 * picture(2)[1], picture(0)[1]], -1)
        ),
        "ct/labels/ct2.png",
        "3 channels",
    ),
    (
        lambda d: save(
            d / "ct/images/ct2.png", np.stack([picture(2)[0], picture(0)[0], picture(1)[0]], -1)
        ),
        "ct/images/ct2.png",
        "3 channels",
    ),
    (
        lambda d: shutil.copy(d / "ct/labels/ct2.png", d / "ct/labels/ct2_mask.png"),
        "ct/images/ct2.png",
        "2 labels",
    ),
    (
        lambda d: shutil.copy(d / "ct/images/ct2.png", d / "ct/images/ct2.tif"),
        "ct/images",
        "2 images of one name",
    ),
    (
        lambda d: shutil.copy(d / "ct/images/ct2.png", d / "ct/images/ct1.png"),
        "ct1.png and",
        "same pixels",
    ),
    (
        lambda d: shutil.copy(d / "ct/images/ct2.png", d / "mr/images/mr1.png"),
        "mr1.png",
        "same pixels",
    ),
    (
        lambda d: (d / "ct/groups.csv").write_text("id,group\nct0,a\nct1,b\nct3,c\n"),
        "ct/groups.csv",
        "no group for image 'ct2'",
    ),
    (
        lambda d: (d / "ct/groups.csv").write_bytes("id,group\nct0,Müller\n".encode("cp1252")),
        "ct/groups.csv",
        "UTF-8",
    ),
    (
        lambda d: (d / "ct/groups.csv").write_text("id,group\nct0\n"),
        "ct/groups.csv, line 2",
        "header",
    ),
    (
        lambda d: [save(p, np.zeros((32, 40), np.uint8)) for p in (d / "ct/labels").iterdir()],
        "ct:",
        "every label is empty",
    ),
    (
        lambda d: [
            save(p, (picture(0)[1] > 0) * np.uint8(20 + k))
            for k, p in enumerate(sorted((d / "ct/labels").iterdir()))
        ],
        "ct",
        "20-23",
    ),
]


@pytest.mark.parametrize("k", range(len(FAULTS)))
def test_one_fault_is_one_line_and_the_rest_is_looked_at(ward, capsys, k):
    edit, where, words = FAULTS[k]
    edit(ward)
    before = snapshot(ward)
    status, faults, notes, out = run(capsys, ward)
    assert status == 1 and len(faults) == 1 and where in faults[0] and words in faults[0], out
    assert snapshot(ward) == before and out.rstrip().splitlines()[-1].startswith("1 fault;")
    assert "mr\n  images        4, of 4 groups\n" in out  # the other modality is whole


LISTED = [
    (lambda d: save(d / "ct/labels/ct2.png", picture(3)[1]), "ct/labels/ct2.png", "SHA-256"),
    (
        lambda d: (d / "ct/images/ct2.png").unlink(),
        "manifest.csv, line 4",
        "ct2.png does not exist",
    ),
    (lambda d: row(d, "ct/images/ct2.png", "../ct2.png"), "manifest.csv, line 4", "leads out"),
    (lambda d: row(d, "ct,ct2,", "ct,,"), "manifest.csv, line 4", "'id' is empty"),
    (
        lambda d: row(d, "ct/labels/ct2.png,ct-2", "ct/labels/ct2.png,"),
        "manifest.csv, line 4",
        "no group",
    ),
    (lambda d: row(d, "ct,ct2,", "ct,ct1,"), "manifest.csv", "'ct1' occurs more than once"),
    (lambda d: row(d, "ct/labels/ct2.png", ""), "ct/images/ct2.png", "no label"),
]


def row(d, old, new):
    text = (d / "manifest.csv").read_text()
    assert text.count(old) == 1
    (d / "manifest.csv").write_text(text.replace(old, new))


@pytest.mark.parametrize("k", range(len(LISTED)))
def test_one_fault_of_a_manifest_is_one_line(ward, capsys, k):
    edit, where, words = LISTED[k]
    listed(ward)
    assert run(capsys, ward)[0] == 0
    edit(ward)
    status, faults, _, out = run(capsys, ward)
    assert status == 1 and len(faults) == 1 and where in faults[0] and words in faults[0], out
    assert "mr\n  images        4, of 4 groups\n" in out


def test_what_cannot_be_looked_at_at_all(ward, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nn/imagesTr").mkdir(parents=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/manifest.csv").write_bytes("modality;id;image\nct;1;ü\n".encode("cp1252"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/manifest.csv").symlink_to("gone.csv")
    for args, words in (
        ([tmp_path / "gone"], "is not a folder"),
        ([tmp_path / "empty"], "no images"),
        ([tmp_path / "nn"], "nnU-Net"),
        ([tmp_path / "cut"], "CSV UTF-8"),
        ([tmp_path / "linked"], "manifest.csv"),
        ([ward, "pet"], "unknown modality 'pet'"),
        (["phantom:boat"], "unknown phantom 'boat'"),
        (["phantom:bone", "ct"], "unknown modality 'ct'"),
        ([ward / "ct/groups.csv"], "is not a folder"),
        ([ward, "--out", ward / "ct/groups.csv"], "ct/groups.csv is not a folder"),
        ([ward, "--out", ward / "ct/images"], "--out.*lies in"),
        ([ward, "--out", ward], "--out.*lies in"),
        ([ward, "--out", ""], "--out: the name is empty"),
        ([ward, "--out", "/proc/x"], "cannot write into /proc/x"),
    ):
        assert cli.main(["check", *map(str, args)]) == 2
        err = capsys.readouterr().err
        assert re.search(words, err) and err.count("\n") == 1 and err.startswith("ukd check: "), err


def test_pictures_are_written_once_and_over_nothing(ward, tmp_path, capsys):
    from PIL import Image

    status, *_ = run(capsys, ward, "--out", tmp_path / "new/pictures")
    assert status == 0 and sorted(p.name for p in (tmp_path / "new/pictures").iterdir()) == [
        "ct.png",
        "mr.png",
    ]
    with Image.open(tmp_path / "new/pictures/ct.png") as im:
        shown = np.asarray(im.convert("RGB")).reshape(-1, 3).astype(int)
    orange = (np.abs(shown - (0xE6, 0x9F, 0)).max(1) < 12).sum()
    assert orange > 500  # outlines of eight squares
    before = snapshot(tmp_path)
    assert cli.main(["check", str(ward), "--out", str(tmp_path / "new/pictures")]) == 2
    assert "ct.png is there already" in capsys.readouterr().err and snapshot(tmp_path) == before
    assert run(capsys, ward / "ct", "--out", tmp_path / "one")[0] == 0 and [
        p.name for p in (tmp_path / "one").iterdir()
    ] == ["ct.png"]


def test_options_answer_what_is_asked(ward, capsys):
    squares = (
        np.arange(32)[:, None] // 4 * 10 + np.arange(40)[None] // 4
    ) % 20  # 20 numbers, 4 squares of each
    for p in (ward / "ct/labels").iterdir():
        save(p, squares.astype(np.uint8) * 7)
    status, faults, _, out = run(capsys, ward, "ct")
    assert (
        status == 1
        and len(faults) == 1
        and "classes or objects" in faults[0]
        and "label numbers 7, 14, 21" in out
    )
    assert run(capsys, ward, "ct", "--label-kind", "instance")[0] == 0
    status, faults, _, out = run(capsys, ward, "mr", "--classes", "nothing", "liver", "kidney")
    assert status == 0 and "3 with background: liver, kidney), because as given" in out
    status, faults, *_ = run(
        capsys, ward, "mr", "--classes", "nothing", "liver", "--label-kind", "semantic"
    )
    assert status == 1 and len(faults) == 4 and all("[2]" in f for f in faults)
    (ward / "mr/labels/mr0.png").unlink()
    assert run(capsys, ward, "mr")[0] == 1
    status, _, _, out = run(capsys, ward, "mr", "--some-labels")
    assert status == 0 and "3 with, 1 without" in out
    (ward / "mr/groups.csv").unlink()
    assert "each image counts as its own patient" in run(capsys, ward, "mr", "--some-labels")[2][0]
    assert "of 1 group\n" in run(capsys, ward, "mr", "--some-labels", "--group", "^(mr)")[3]
    assert run(capsys, ward, "mr", "--group", "^x")[0] == 1


def other_names(d):
    for k in range(4):
        (d / f"ct/labels/ct{k}.png").rename(d / f"ct/labels/rat{'abcd'[k]}.png")


def no_files(d):
    [p.unlink() for p in (d / "ct/labels").iterdir()]


def no_group(d):
    other_names(d) or (d / "ct/groups.csv").write_text(
        "id,group\n" + "".join(f"ct{i},{i}\n" for i in range(3))
    )


@pytest.mark.parametrize(
    "edit,n",
    [
        (other_names, 4),
        (no_files, 4),
        (no_group, 5),
        (lambda d: (d / "ct/labels/ct2.png").unlink(), 1),
        (lambda d: (d / "ct/labels/ct2.png").rename(d / "ct/labels/ratb.png"), 1),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_check_finds_what_a_study_refuses(ward, capsys, edit, n, alone):
    "A label folder that fits no image, or not all: a study's first fault is among the check's."
    edit(ward)
    with pytest.raises(InputError) as e:
        open_collection(ward, "ct")
    status, faults, _, out = run(capsys, *([ward / "ct"] if alone else [ward, "ct"]))
    assert (
        status == 1
        and len(faults) == n
        and "fault: " + str(e.value).split(" (")[0] in [f.split(" (")[0] for f in faults]
    ), out
    assert "images        4, of 4 groups" in out or edit is no_group
    few = n - sum("has no label" in f for f in faults)
    assert len(run(capsys, ward, "ct", "--some-labels")[1]) == few == (edit is no_group)
    shutil.rmtree(ward / "ct/labels")
    assert len(run(capsys, ward, "ct")[1]) == few


def test_a_manifest_that_names_a_label_for_some(ward, capsys):
    listed(ward)
    row(ward, "ct/labels/ct2.png", "")
    with pytest.raises(
        InputError, match="manifest.csv, line 4: .*ct/images/ct2.png has no label"
    ) as e:
        open_collection(ward, "ct")
    status, faults, _, out = run(capsys, ward)
    assert faults == [f"fault: {e.value}"] and "labels        3 with, 1 without" in out
    assert run(capsys, ward, "--some-labels")[:2] == (0, [])


def test_notes_are_no_faults(ward, capsys):
    shutil.copy(ward / "ct/labels/ct2.png", ward / "ct/labels/ct9.png")
    (ward / "ct/protocol.pdf").write_bytes(b"x")
    save(ward / "mr/labels/mr1.png", np.zeros((32, 40), np.uint8))
    (ward / "mr/groups.csv").write_text("id,group\nmr0,P1\nmr1,p01\nmr2,P 10\nmr3,P101\n")
    status, faults, notes, out = run(capsys, ward)
    assert (status, faults) == (0, []) and len(notes) == 3, out
    assert "1 of 4 labels are empty" in notes[0]
    assert "'P1', 'p01' have nearly the same name" in "".join(notes) and "P101" not in "".join(
        notes
    )
    assert "2 files are not used: ct/protocol.pdf, ct/labels/ct9.png" in "".join(notes)


def test_labels_without_background_are_told(ward, capsys):
    save(ward / "ct/labels/ct2.png", np.full((32, 40), 2, np.uint8))
    note = f"labels hold no 0 (background), as {ward}/ct/labels/ct2.png; is all of the image meant?"
    assert run(capsys, ward)[1:3] == ([], [f"note: 1 of 4 {note}"])
    for k in range(4):
        save(ward / f"ct/labels/ct{k}.png", np.full((32, 40), 255, np.uint8))
    status, faults, notes, out = run(capsys, ward)
    assert (
        notes[0] == f"note: 4 of 4 {note.replace('ct2', 'ct0')}"
        and "because labels are 255 only\n" in out
    )


def test_a_patient_with_two_names_in_two_modalities(ward, capsys):
    from unpaired_kd.study.config import ImagesConfig
    from unpaired_kd.study.parts import open_both

    for m, names in (("ct", "P01 P02 x y"), ("mr", "p1 P02 p-10 z")):
        (ward / f"{m}/groups.csv").write_text(
            "id,group\n" + "".join(f"{m}{i},{g}\n" for i, g in enumerate(names.split()))
        )
    assert run(capsys, ward)[1:3] == (
        [],
        ["note: ct, mr: groups 'P01', 'p1' have nearly the same name; are they one patient?"],
    )
    config = ImagesConfig(data=str(ward), teacher="ct", student="mr")
    with pytest.warns(
        UserWarning, match="groups 'P01', 'p1' have nearly the same name. If they are one patient"
    ) as told:
        open_both(config)
    assert len(told) == 1
    (ward / "mr/groups.csv").write_text(
        (ward / "mr/groups.csv").read_text().replace("p1", "P01").replace("z", "p10")
    )
    assert [n.split(";")[0] for n in run(capsys, ward)[2]] == [
        "note: mr: groups 'p-10', 'p10' have nearly the same name"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # within one modality nothing is kept apart
        open_both(config)


def test_tables_that_nobody_reads_are_named(ward, capsys):
    shutil.copy(ward / "ct/groups.csv", ward / "groups.csv")
    assert run(capsys, ward)[2] == [f"note: {ward}: 1 file is not used: groups.csv"]
    listed(ward)
    assert run(capsys, ward)[2] == [
        f"note: {ward}: 3 files are not used: groups.csv, ct/groups.csv, mr/groups.csv"
    ]
    (ward / "manifest.csv").unlink()
    (ward / "ct/groups.csv").rename(ward / "ct/Groups.csv")
    status, faults, _, out = run(capsys, ward)
    assert (
        status == 1
        and len(faults) == 1
        and "ct/Groups.csv is not read" in faults[0]
        and "mr\n  images        4, of 4 groups" in out
    )


def test_what_a_mac_adds_is_no_modality(ward, capsys):
    shutil.copytree(ward / "ct", ward / "__MACOSX/ct")
    for p in [p for p in (ward / "__MACOSX").rglob("*") if p.is_file()]:
        p.rename(p.with_name("._" + p.name))
    assert list_modalities(ward) == ["ct", "mr"] and run(capsys, ward)[:3] == (0, [], [])


def test_copies_in_other_formats_and_groups_are_leaks(ward):
    import tifffile

    tifffile.imwrite(ward / "ct/images/ct3.tif", picture(0)[0])
    (ward / "ct/images/ct3.png").unlink()
    f = examine("ct", *list_cases(ward, "ct"))
    faults, notes = find_leaks([f])
    assert len(faults) == 1 and "'ct-0' (ct) and 'ct-3' (ct)" in faults[0]
    (ward / "ct/groups.csv").write_text("id,group\nct0,a\nct1,b\nct2,c\nct3,a\n")
    faults, notes = find_leaks([examine("ct", *list_cases(ward, "ct"))])
    assert not faults and "both are of group 'a'" in notes[0]


def as_type(name):
    return lambda x: (x.astype(name), np.eye(4))


def as_rgb(x):
    return np.stack([x] * 3, -1), None


@pytest.mark.parametrize("copy", [as_type("uint16"), as_type("int16"), as_type("float32"), as_rgb])
def test_copies_of_another_type_are_leaks(ward, copy):
    import tifffile

    (ward / "ct/images/ct3.png").unlink()
    tifffile.imwrite(
        ward / "ct/images/ct3.tif",
        copy(picture(0)[0])[0],
        photometric="rgb" if copy is as_rgb else "minisblack",
    )
    faults, _ = find_leaks([examine("ct", *list_cases(ward, "ct"))])
    assert (
        len(faults) == 1
        and "ct0.png and" in faults[0]
        and "ct3.tif show the same pixels" in faults[0]
    )


def turned(axes, signs):
    "A volume (x, y, z) with its axes in another order and direction, and the affine that says so."

    def store(x):
        a = x.transpose(axes)
        affine = np.zeros((4, 4))
        for j, (k, s) in enumerate(zip(axes, signs)):
            affine[k, j], affine[k, 3] = (
                s * (k + 1.0),
                affine[k, 3] + (s < 0) * (k + 1.0) * (x.shape[k] - 1),
            )
        affine[3, 3] = 1
        return a[tuple(slice(None, None, s) for s in signs)], affine

    return store


@pytest.mark.parametrize(
    "copy",
    [
        turned((0, 1, 2), (1, 1, 1)),
        turned((0, 1, 2), (-1, 1, 1)),
        turned((0, 1, 2), (-1, -1, 1)),
        turned((2, 0, 1), (1, -1, 1)),
        turned((1, 2, 0), (-1, -1, -1)),
        as_type("float32"),
        as_type("int32"),
        lambda x: (x, np.diag([-1.0, 1, 1, 1])),
    ],
)
@pytest.mark.parametrize("least", [0, -700])
def test_volumes_are_known_however_they_are_stored(tmp_path, copy, least):
    import nibabel as nib

    x = rng(0, "stored").integers(least, 200, (20, 22, 18)).astype(np.int16)
    rows = ["modality,id,image,group"]
    for name, (a, affine) in dict(
        a=turned((0, 1, 2), (1, 1, 1))(x),
        b=copy(x),
        c=(x + 1, np.eye(4)),
        d=(x[:, :, ::-1], np.diag([1.0, 2, 3, 1])),
    ).items():
        nib.save(nib.Nifti1Image(a, affine), tmp_path / f"{name}.nii.gz")
        rows.append(f"ct,{name},{name}.nii.gz,{name}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    faults, _ = find_leaks([examine("ct", *list_cases(tmp_path, "ct"))])
    assert (
        len(faults) == 1
        and "a.nii.gz and" in faults[0]
        and "b.nii.gz show the same pixels" in faults[0]
    ), faults


def test_marks_stand_for_values():
    half = np.array([[[0, 0.5], [1, 2]]])
    assert (
        _hash_pixels(half, None)
        == _hash_pixels(half.astype(np.float32), None)
        != _hash_pixels(half.astype(np.uint8), None)
    )
    a = np.arange(-5, 7).reshape(1, 3, 4)
    assert (
        len({_hash_pixels(a.astype(t), None) for t in (np.int8, np.int32, np.float32, np.int64)})
        == 1
    )
    assert _hash_pixels(a, None) == _hash_pixels(a[:, None], None) != _hash_pixels(a + 1, None)
    big = np.float32([[[0, 1e30]]])
    assert (
        _hash_pixels(big, None) != _hash_pixels(big * 2, None)
        and len(_hash_pixels(a[:, None], np.diag([1, -1, 1, 1]))) == 2
    )
    for singular in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        assert _hash_pixels(a[:, None], singular) == _hash_pixels(a, None)
    rgb = np.stack([a[0], a[0], a[0] + 1])
    assert _hash_pixels(rgb, None) != _hash_pixels(a, None)


def test_volumes_and_scanner_units(tmp_path, capsys):
    import nibabel as nib

    for k in range(2):
        y = np.zeros((40, 32, 5), np.uint8)
        y[5:15, 4:12, 2] = 1
        y[20:30, 4:12, 3] = 2
        x = rng(0, "vol", k).normal(0, 300, y.shape).astype(np.int16)
        for d, a in (("images", x), ("labels", y)):
            (tmp_path / "data/ct" / d).mkdir(parents=True, exist_ok=True)
            nib.save(
                nib.Nifti1Image(a, np.diag([0.7, 0.7, 5, 1])), tmp_path / f"data/ct/{d}/v{k}.nii.gz"
            )
    status, faults, notes, out = run(
        capsys, tmp_path / "data", "--out", tmp_path / "out", "--group", "(v.)"
    )
    assert status == 0 and "5 x 32 x 40" in out and "5 x 0.7 x 0.7" in out and "int16" in out
    assert (
        len(notes) == 1
        and "intensity=percentile" in notes[0]
        and (tmp_path / "out/ct.png").stat().st_size > 5000
    )


@pytest.mark.parametrize("phantom", ["bone", "vessels"])
def test_phantoms_are_sound(phantom, capsys):
    names = list_modalities(f"phantom:{phantom}")
    status, faults, _, out = run(capsys, f"phantom:{phantom}", names[0])
    assert (status, faults) == (0, []) and out.startswith(names[0] + "\n")


def test_names_of_a_mac_and_a_narrow_terminal(ward, capsys, monkeypatch):
    "Files in decomposed form, a table in composed form."
    composed, decomposed = (unicodedata.normalize(f, "ctä") for f in ("NFC", "NFD"))
    for d in ("images", "labels"):
        (ward / f"ct/{d}/ct2.png").rename(ward / f"ct/{d}/{decomposed}.png")
    (ward / "ct/groups.csv").write_text(
        (ward / "ct/groups.csv").read_text().replace("ct2", composed), encoding="utf-8"
    )
    assert run(capsys, ward)[:3] == (0, [], [])


def test_a_pattern_that_is_none_and_one_that_means_nothing(ward, capsys):
    status, faults, *_ = run(capsys, ward, "ct", "--group", "(")
    assert status == 1 and "'(' is no regular expression" in faults[0]
    listed(ward)
    status, faults, *_ = run(capsys, ward, "ct", "--group", "^(ct)")
    assert status == 1 and len(faults) == 1 and "name the patients" in faults[0]


def test_a_name_that_is_no_text(ward, capsys):
    try:
        shutil.copy(ward / "ct/images/ct1.png", ward / "ct/images" / os.fsdecode(b"\xfc.png"))
    except OSError:
        pytest.skip("this disk takes text only")
    status, faults, _, out = run(capsys, ward)
    assert status == 1 and len(faults) == 1 and r"b'\xfc.png'" in faults[0], out
    assert "ct\n  images        4, of 4 groups" in out


def test_common():
    assert (
        _most_frequent("aabbbcd") == "b (3), a (2), c (1), d (1)"
        and _most_frequent("aa") == "a"
        and _most_frequent("abcdef") == "a (1), b (1), c (1), d (1) and 2 more"
    )


def test_a_modality_that_may_not_be_listed_stops_no_other(ward, capsys, monkeypatch):
    whole = Path.iterdir

    def listing(self):
        if self == ward / "ct":
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self)

    monkeypatch.setattr(Path, "iterdir", listing)
    assert cli.main(["check", str(ward)]) == 1
    said = capsys.readouterr().out
    assert f"fault: {ward / 'ct'} cannot be listed (Permission denied)" in said
    assert "4, of 4 groups" in said and "\n1 fault" in said


def test_labels_are_no_modality_and_a_file_is_no_folder_of_images(ward):
    ct = ward / "ct"
    shutil.rmtree(ct / "images")
    with pytest.raises(InputError, match="holds no images"):
        list_modalities(ct)
    (ct / "images").write_text("../elsewhere/images")  # what git leaves where links are off
    with pytest.raises(InputError, match=f"{ct / 'images'} should be the folder of the images"):
        list_modalities(ct)
