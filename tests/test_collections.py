"""Collections: every fault of a folder is named, splits keep patients whole, listing order never
matters."""

import csv
import hashlib
import os
import pickle
import random
import re
import shutil
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from unpaired_kd.core import InputError, file_sha256, read_json, rng, write_json
from unpaired_kd.data.collections import Collection, open_collection
from unpaired_kd.data.formats import images as image_files
from unpaired_kd.data.labels import infer_labels
from unpaired_kd.data.layouts import Case
from unpaired_kd.data.matching import match_labels
from unpaired_kd.data.resampling import prepare
from unpaired_kd.data.splits import Split, _deal_groups, choose_labelled, kfold_groups, split_groups


def picture(k, shape=(20, 24)):
    r = rng(0, "test", k)
    label = np.zeros(shape, np.uint8)
    label[4:10, 5:12] = 1
    return r.integers(0, 256, shape, dtype=np.uint8), label


def save(path, array):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def ward(tmp_path):
    "Six images of three patients: images/, labels/ (0 and 255), groups.csv, and a manifest."
    rows = []
    for k in range(6):
        a, y = picture(k)
        save(tmp_path / f"images/p{k // 2}_{k}.png", a)
        save(tmp_path / f"labels/p{k // 2}_{k}.png", y * 255)
        name = f"p{k // 2}_{k}"
        rows.append(
            dict(
                modality="grey",
                id=name,
                image=f"images/{name}.png",
                label=f"labels/{name}.png",
                group=f"p{k // 2}",
                sha256_image=file_sha256(tmp_path / f"images/{name}.png"),
                sha256_label=file_sha256(tmp_path / f"labels/{name}.png"),
            )
        )
    with open(tmp_path / "manifest.csv", "w", newline="") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    with open(tmp_path / "groups.csv", "w", newline="") as f:
        f.write(
            "id,group,label_group\n"
            + "".join(f"{r['id']},{r['group']},{'ab'[r['group'] == 'p2']}\n" for r in rows)
        )
    return tmp_path


def arrays(sizes, strata=None):
    "A collection of tiny arrays: `sizes[g]` images of group g."
    cases = [(g, k) for g, n in sizes.items() for k in range(n)]
    return Collection.from_arrays(
        [np.full((4, 4), i % 251, np.uint8) for i in range(len(cases))],
        groups=[g for g, _ in cases],
        ids=[f"{g}/{k}" for g, k in cases],
        label_groups=[strata[g] if strata else "" for g, _ in cases],
    )


def test_three_ways_into_one_folder(ward):
    a = open_collection(ward, "grey")
    b = Collection.from_folders(ward)
    c = Collection.from_folders(ward, group=lambda i: i[:2])
    assert a.groups == b.groups == c.groups == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert b.label_groups == list("aaaabb")
    for i in range(6):
        image, label = picture(i)
        for x in (a, b, c):
            np.testing.assert_array_equal(
                x[i].image[0].numpy(), (image / np.float32(255)).astype(np.float32)
            )
            np.testing.assert_array_equal(x[i].label.numpy(), label)
    assert a.check() == {"background": 6, "foreground": 6}


# bad input: each names the file or argument and the way out


def fault(ward, edit, words, opener=lambda d: Collection.from_folders(d), check=True):
    edit(ward)
    with pytest.raises(InputError) as e:
        c = opener(ward)
        if check:
            c.check()
    for w in words:
        assert w in str(e.value), str(e.value)
    return str(e.value)


def accused(text):
    "The cases that a message names: the sound ones must not be among them."
    return set(re.findall(r"p\d_\d", text))


def test_image_without_label(ward):
    fault(
        ward, lambda d: (d / "labels/p1_2.png").unlink(), ["p1_2.png", "no label", "labels=False"]
    )
    assert not Collection.from_folders(ward, labels=False).has_labels


def test_manifest_without_label(ward):
    text = (ward / "manifest.csv").read_text()
    (ward / "manifest.csv").write_text(text.replace("labels/p1_2.png", ""))
    assert accused(
        fault(ward, lambda d: None, ["p1_2", "no label"], lambda d: open_collection(d, "grey"))
    ) == {"p1_2"}


def test_label_of_another_size(ward):
    assert accused(
        fault(
            ward,
            lambda d: save(d / "labels/p1_2.png", np.zeros((20, 20), np.uint8)),
            ["labels", "p1_2.png", "(20, 20)", "(20, 24)"],
        )
    ) == {"p1_2"}


def test_label_outside_the_classes(ward):
    assert accused(
        fault(
            ward,
            lambda d: save(d / "labels/p1_2.png", np.full((20, 24), 3, np.uint8)),
            ["p1_2.png", "[3]", "classes"],
        )
    ) == {"p1_2"}


def test_antialiased_label(ward):
    assert accused(
        fault(
            ward,
            lambda d: save(
                d / "labels/p1_2.png", np.array([[0, 128, 255]] * 20, np.uint8).repeat(8, 1)
            ),
            ["p1_2.png", "128"],
        )
    ) == {"p1_2"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_image(ward, value):
    import tifffile

    def edit(d):
        for p in sorted((d / "images").iterdir()):
            a = picture(0)[0].astype(np.float32) / 255
            if p.stem == "p1_2":
                a[3, 3] = value
            tifffile.imwrite(p.with_suffix(".tif"), a)
            p.unlink()

    assert accused(fault(ward, edit, ["p1_2.tif", "NaN"])) == {"p1_2"}


def test_truncated_png(ward):
    def edit(d):
        p = d / "images/p1_2.png"
        p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2])

    assert accused(fault(ward, edit, ["p1_2.png"])) == {"p1_2"}


def test_truncated_nifti(tmp_path):
    import nibabel as nib

    for k in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        nib.save(
            nib.Nifti1Image(rng(0, "v", k).integers(0, 255, (9, 8, 7)).astype(np.uint8), np.eye(4)),
            tmp_path / f"images/v{k}.nii.gz",
        )
    whole = (tmp_path / "images/v1.nii.gz").read_bytes()
    (tmp_path / "images/v1.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert "v0" not in fault(
        tmp_path,
        lambda d: None,
        ["v1.nii.gz"],
        lambda d: Collection.from_folders(d, group=lambda i: i),
    )


def test_rgb_where_grey_is_expected(ward):
    assert accused(
        fault(
            ward,
            lambda d: save(d / "images/p1_2.png", np.zeros((20, 24, 3), np.uint8)),
            ["p1_2.png", "3 channels", "1 are expected"],
        )
    ) == {"p1_2"}
    with pytest.raises(InputError, match="3 are expected"):
        Collection.from_folders(ward, channels=3)


def test_all_faults_are_listed_together(ward):
    save(ward / "images/p0_0.png", np.zeros((20, 24), np.uint8))
    save(ward / "labels/p0_1.png", np.zeros((9, 9), np.uint8))
    save(ward / "labels/p1_2.png", np.full((20, 24), 9, np.uint8))
    with pytest.raises(InputError) as e:
        open_collection(ward, "grey", classes=("background", "cell"), label_kind="semantic").check()
    assert "SHA-256" in str(e.value) and str(e.value).startswith("3 faults")
    for name in ("p0_0.png", "p0_1.png", "p1_2.png"):
        assert name in str(e.value)


def test_checksum_of_the_manifest(ward):
    assert accused(
        fault(
            ward,
            lambda d: save(d / "labels/p2_5.png", np.zeros((20, 24), np.uint8)),
            ["labels", "p2_5.png", "SHA-256"],
            lambda d: open_collection(d, "grey"),
        )
    ) == {"p2_5"}


def test_empty_places(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="no images"):
        Collection.from_folders(tmp_path)
    (tmp_path / "manifest.csv").write_text("modality,id,image\n")
    with pytest.raises(InputError, match="no rows") as e:
        open_collection(tmp_path, "ct")
    assert str(tmp_path / "manifest.csv") in str(e.value)
    with pytest.raises(InputError, match="not a folder") as e:
        open_collection(tmp_path / "nothing", "ct")
    assert str(tmp_path / "nothing") in str(e.value)
    with pytest.raises(InputError, match="empty"):
        Collection([])


def test_absent_class(ward):
    c = Collection.from_folders(
        ward, classes=("background", "cell", "ghost"), label_kind="semantic"
    )
    for k in range(6):
        save(ward / f"labels/p{k // 2}_{k}.png", picture(k)[1])
    with pytest.raises(InputError, match="'ghost'"):
        c.check()
    assert (
        Collection.from_folders(ward, classes=("background", "cell", "ghost")).check(strict=False)[
            "ghost"
        ]
        == 0
    )


def test_unknown_names_are_answered_with_the_known(ward):
    with pytest.raises(InputError, match="Did you mean 'grey'"):
        open_collection(ward, "gray")
    c = Collection.from_folders(ward)
    with pytest.raises(InputError, match="p0_1"):
        c.subset(["p0_9"])
    with pytest.raises(InputError, match="p2"):
        c.of_groups(["p7"])
    assert c.subset(["p0_1"]).ids == ["p0_1"] and c.of_groups(["p2"]).ids == ["p2_4", "p2_5"]
    with pytest.raises(InputError, match="semantic"):
        Collection.from_folders(ward, label_kind="instances")
    with pytest.raises(InputError, match="bracket"):
        Collection.from_folders(ward, group=r"^p\d")


def test_missing_groups_are_a_warning(ward):
    (ward / "groups.csv").unlink()
    with pytest.warns(UserWarning, match="groups.csv"):
        c = Collection.from_folders(ward)
    assert c.groups == c.ids
    (ward / "ct").mkdir()
    for d in ("images", "labels"):
        (ward / d).rename(ward / "ct" / d)
    (ward / "groups.csv").write_text("id,group\n")
    with pytest.warns(UserWarning, match="ct has no groups.csv.*groups.csv is not read"):
        Collection.from_folders(ward / "ct")


# labels and intensities


def test_instance_labels_are_recognised(ward):
    "Twenty squares, numbered in steps of 30: too many for classes of a picture, each in one piece."
    y = np.zeros((20, 24), np.uint16)
    for n in range(20):
        y[4 * (n // 5) : 4 * (n // 5) + 3, 4 * (n % 5) : 4 * (n % 5) + 3] = 30 * (n + 1)
    for k in range(6):
        save(ward / f"labels/p{k // 2}_{k}.png", y)
    c = Collection.from_folders(ward)
    assert c.label_kind == "instance" and c.classes == ("background", "foreground")
    assert c[0].instances.max() == 600 and set(c[0].label.unique().tolist()) == {0, 1}
    assert c.native(0).instances.dtype == np.int32


@pytest.mark.parametrize(
    "zoom,invert,intensity",
    [(1, True, "dtype"), (0.5, False, "dtype"), (0.5, True, "percentile"), (1, False, (20, 200))],
)
def test_a_sample_is_what_inference_prepares(ward, zoom, invert, intensity):
    c = Collection.from_folders(ward, zoom=zoom, invert=invert, intensity=intensity)
    np.testing.assert_array_equal(
        c[2].image.numpy(), prepare(picture(2)[0][None], intensity, invert, zoom)
    )
    assert c[2].label.shape == c[2].image.shape[1:]
    np.testing.assert_array_equal(c.native(2).image[0], picture(2)[0])
    np.testing.assert_array_equal(c.native(2).label, picture(2)[1])


@pytest.mark.filterwarnings("ignore:the decoded images")
def test_memory_is_bounded_and_does_not_change_results(ward, monkeypatch):
    reads = []
    true = image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda p: reads.append(p) or true(p))
    rich = Collection.from_folders(ward)
    poor = Collection.from_folders(ward, cache_gb=0)
    for c, most in ((rich, 6), (poor, 1000)):
        reads.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                for i in range(6):
                    np.testing.assert_array_equal(c[i].image[0].numpy() * 255, picture(i)[0])
        assert bool(told) == (c is poor) and all("cache_gb=0" in str(w.message) for w in told)
        assert len(reads) <= most
    assert len(reads) >= 18 and poor._store.used == 0
    small = Collection.from_folders(ward, cache_gb=2500 / 2**30)
    for i in range(6):
        small[i]
    assert 0 < small._store.used <= 2500


def test_a_collection_survives_pickling(ward):
    c = Collection.from_folders(ward)
    c[0]
    again = pickle.loads(pickle.dumps(c))
    assert again.ids == c.ids and (again[3].image == c[3].image).all()
    assert len(pickle.dumps(c)) < 10_000  # what was decoded stays here


# volumes


def volumes(tmp_path):
    import nibabel as nib

    for d in ("images", "labels"):
        (tmp_path / d).mkdir()
    for k in range(2):
        y = np.zeros((10, 8, 6), np.int16)  # file order: x, y, z
        y[2:5, 3:6, 2:4] = 1 + k
        grid = np.diag([1.5, 2.0, 5.0, 1])
        nib.save(
            nib.Nifti1Image(rng(0, "vol", k).integers(0, 255, y.shape).astype(np.uint8), grid),
            tmp_path / f"images/v{k}.nii.gz",
        )
        nib.save(nib.Nifti1Image(y, grid), tmp_path / f"labels/v{k}.nii.gz")
    return Collection.from_folders(tmp_path, group=lambda i: i)


def test_slices_keep_their_patient_and_are_read_once(tmp_path, monkeypatch):
    c = volumes(tmp_path)
    assert (
        c.dims == 3
        and c[0].image.shape == (1, 6, 8, 10)
        and c.classes == ("background", "class 1", "class 2")
    )
    reads = []
    true = image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda p: reads.append(p) or true(p))
    flat = c.slices()
    assert flat.ids == ["v0/z002", "v0/z003", "v1/z002", "v1/z003"] and flat.groups == [
        "v0",
        "v0",
        "v1",
        "v1",
    ]
    assert flat[0].spacing == (2.0, 1.5) and flat.dims == 2
    for i, (v, z) in enumerate([(0, 2), (0, 3), (1, 2), (1, 3)]):
        assert (flat[i].image == c[v].image[:, z]).all() and (flat[i].label == c[v].label[z]).all()
        assert (flat.native(i).image == c.native(v).image[:, z]).all()
    assert len(reads) <= 2
    assert len(c.slices(axis=2, keep="all")) == 20 and len(c.slices(keep="all")) == 12
    assert len(split_groups(flat, dict(a=1, b=1))["a"]) == 2
    half = c.resampled(zoom=0.5)
    assert half.slices()[0].image.shape == (1, 4, 5) and half[0].spacing == (5.0, 4.0, 3.0)
    with pytest.raises(InputError, match="only volumes"):
        flat.slices()
    with pytest.raises(InputError, match="labelled"):
        c.slices(keep="labeled")


# the LOTUS layout


def test_lotus_layout_of_the_readme(tmp_path):
    for p in ("OSTEO_1", "OSTEO_2", "HTY_10"):
        save(tmp_path / f"bonesai-microct/{p}/tissue images/microct.tif", picture(1)[0])
        save(tmp_path / f"bonesai-microct/{p}/mask binary/mask.png", picture(1)[1] * 255)
    c = open_collection(tmp_path, "bonesai-microct")
    assert sorted(zip(c.groups, c.label_groups)) == [
        ("HTY_10", "HTY"),
        ("OSTEO_1", "OSTEO"),
        ("OSTEO_2", "OSTEO"),
    ]
    c.check()
    (tmp_path / "bonesai-microct/OSTEO_2/mask binary/mask.png").unlink()
    with pytest.raises(InputError, match="OSTEO_2"):
        open_collection(tmp_path, "bonesai-microct")


def test_lotus_layout_of_deepliif_keeps_altered_copies_together(tmp_path):
    for split, tiles in dict(
        train=["Bladder_1", "Bladder_1_neg", "Bladder_1_1.10_0.90"], val=["Lung_2"]
    ).items():
        for t in tiles:
            save(tmp_path / f"DeepLIIF-mm/ihc/{split}/tissue images/{t}.png", picture(1)[0])
            save(tmp_path / f"DeepLIIF-mm/ihc/{split}/masks/{t}.png", picture(1)[1])
    c = open_collection(tmp_path / "DeepLIIF-mm", "ihc")
    assert Counter(c.groups) == {"Bladder_1": 3, "Lung_2": 1}
    assert len(Collection.from_lotus(tmp_path / "DeepLIIF-mm", "ihc", split="train")) == 3


# splits


def test_listing_order_does_not_matter(ward, monkeypatch):
    "Group sets are disjoint, and the same on a tree that is listed in another order."
    before = Collection.from_folders(ward)
    true = Path.iterdir

    def shuffled(self):
        found = sorted(true(self), reverse=True)
        random.Random(1).shuffle(found)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", shuffled)
    after = Collection.from_folders(ward)
    assert [p.name for p in (ward / "images").iterdir()] != sorted(os.listdir(ward / "images"))
    assert before.ids == after.ids and before.fingerprint() == after.fingerprint()
    assert [f.hash for f in kfold_groups(before, 3)] == [f.hash for f in kfold_groups(after, 3)]
    assert choose_labelled(before, 4) == choose_labelled(after, 4)


@pytest.mark.parametrize("seed", range(12))
def test_splits_are_by_group_complete_and_stratified(seed):
    r = rng(seed, "sizes")
    strata = {f"g{i}": "abc"[int(r.integers(3))] for i in range(int(r.integers(9, 40)))}
    c = arrays({g: int(r.integers(1, 6)) for g in strata}, strata)
    c = c.subset([c.ids[i] for i in r.permutation(len(c))])
    n = len(strata)
    counts = Counter(strata.values())
    splits = [split_groups(c, dict(train=0.7, val=0.1, test=0.2), seed)] + kfold_groups(
        c, 5, seed, valid=1
    )
    for s in splits:
        assert sorted(i for ids in s.parts.values() for i in ids) == sorted(c.ids)
        groups = {p: set(x.groups) for p, x in s.apply(c).items()}
        assert sum(map(len, groups.values())) == n  # no group in two parts
        if "val" in groups and s is not splits[0]:
            continue
        for g in groups.values():
            for k in counts:
                assert abs(sum(strata[x] == k for x in g) - counts[k] * len(g) / n) < 2
    tested = Counter(i for s in splits[1:] for i in s["test"])
    assert set(tested.values()) == {1} and len(tested) == len(c)


def test_sizes_of_parts():
    c = arrays({f"g{i}": 2 for i in range(10)})

    def size(**parts):
        return {k: len(set(x.groups)) for k, x in split_groups(c, parts).apply(c).items()}

    assert size(train=0.8, val=0.1, test=0.1) == dict(train=8, val=1, test=1)
    assert size(train=3, val=2, test="rest") == dict(train=3, val=2, test=5)
    assert size(train=2, test=0.5) == dict(train=2, test=5)
    assert size(train=0.95, test=0.05) == dict(train=9, test=1)
    for wrong in (
        dict(a=11),
        dict(a=0.9, b=0.3),
        dict(a="half"),
        dict(a=9, b=0.2),
        dict(a="rest", b="rest"),
        dict(a=-1),
    ):
        with pytest.raises(InputError):
            split_groups(c, wrong)
    with pytest.raises(InputError, match="10 groups"):
        kfold_groups(c, 11)


def test_a_split_file_is_not_trusted(tmp_path):
    c = arrays({"a": 2, "b": 2, "c": 2})
    s = split_groups(c, dict(train=2, test=1))
    s.save(tmp_path / "s.json")
    assert Split.load(tmp_path / "s.json", c).parts == s.parts
    with pytest.raises(InputError, match="'b'.*two parts"):
        Split(dict(train=["a/0", "b/0"], test=["b/1"])).verify(c)
    with pytest.raises(InputError, match="twice"):
        Split(dict(train=["a/0", "a/0"])).verify(c)
    text = (tmp_path / "s.json").read_text()
    moved = dict(s.parts, train=s["train"][:-1])
    (tmp_path / "t.json").write_text(text.replace(s["train"][-1], s["train"][0]))
    with pytest.raises(InputError):
        Split.load(tmp_path / "t.json", c)
    Split(moved, s.data).save(tmp_path / "u.json")
    edited = (tmp_path / "u.json").read_text().replace(Split(moved, s.data).hash, s.hash)
    (tmp_path / "u.json").write_text(edited)
    with pytest.raises(InputError, match="changed after"):
        Split.load(tmp_path / "u.json", c)
    other = Collection.from_arrays([np.zeros((4, 4), np.uint8)] * 6, groups=c.groups, ids=c.ids)
    with pytest.raises(InputError, match="other data"):
        Split.load(tmp_path / "s.json", other)
    with pytest.raises(InputError, match="not in collection"):
        Split.load(tmp_path / "s.json", c.subset(c.ids[:4]))
    (tmp_path / "v.json").write_text(
        '{"parts": {"train": ["a/0"], "test": ["b/0"]}}'
    )  # written by hand
    assert Split.load(tmp_path / "v.json", c)["test"] == ["b/0"]


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_nested_and_go_round_the_patients(seed):
    strata = {f"g{i}": "ab"[i % 2] for i in range(8)}
    c = arrays({g: 1 + i % 4 for i, g in enumerate(strata)}, strata)
    for unit, most in (("images", len(c)), ("groups", 8)):
        chosen = [choose_labelled(c, n, unit, seed) for n in range(1, most + 1)]
        for a, b in zip(chosen, chosen[1:]):
            assert b[: len(a)] == a
        assert sorted(chosen[-1]) == sorted(c.ids)
    assert len(set(c.subset(choose_labelled(c, 8, seed=seed)).groups)) == 8
    assert len({choose_labelled(c, 1, seed=s)[0] for s in range(20)}) > 3
    assert sorted(
        Counter(strata[g] for g in _deal_groups(strata, rng(seed, "d"))[:4]).values()
    ) == [2, 2]


# what the labels' numbers mean


def drawn(*numbers, pieces=1):
    "64 x 64 pixels: each number as `pieces` separate squares of 5 x 5."
    y = np.zeros((64, 64), np.int64)
    places = [(6 * i, 6 * j) for i in range(10) for j in range(10)]
    for k, n in enumerate(n for n in numbers for _ in range(pieces)):
        a, b = places[k]
        y[a : a + 5, b : b + 5] = n
    return y


FORMATS = [
    ("png", np.uint8),
    ("png", np.uint16),
    ("tif", np.uint8),
    ("tif", np.int8),
    ("tif", np.uint16),
    ("tif", np.int16),
    ("tif", np.uint32),
    ("tif", np.int32),
    ("tif", np.int64),
    ("tif", np.float32),
    ("tif", np.float64),
    ("nii.gz", np.uint8),
    ("nii.gz", np.int16),
    ("nii.gz", np.uint16),
    ("nii.gz", np.int32),
    ("nii.gz", np.float64),
    ("zarr", np.uint8),
    ("zarr", np.uint16),
    ("zarr", np.int32),
]


def stored(folder, labels, ending, dtype):
    "The labels as files of this format and type, with images."
    import nibabel as nib
    import tifffile
    import zarr

    for k, y in enumerate(labels):
        save(
            folder / f"images/{k}.png",
            rng(0, "stored", k).integers(0, 255, y.shape).astype(np.uint8),
        )
        path = folder / f"labels/{k}.{ending}"
        path.parent.mkdir(exist_ok=True)
        y = y.astype(dtype)
        if ending == "png":
            save(path, y)
        elif ending == "tif":
            tifffile.imwrite(path, y)
        elif ending == "zarr":
            zarr.create_array(str(path), data=y, config={"write_empty_chunks": True})
        else:
            nib.save(nib.Nifti1Image(y.T, np.eye(4), dtype=y.dtype), path)
    return folder


def meaning(folder, **kw):
    "(kind, number of classes), or a word of the error."
    try:
        c = Collection.from_folders(folder, group=str, **kw)
    except InputError as e:
        assert "labels/" in str(e) and "label_kind='instance'" in str(e)
        return "ignore" if "ignore" in str(e) else "asked"
    assert c.describe_labels() == Collection.from_folders(folder, group=str, **kw).describe_labels()
    return c.label_kind, len(c.classes)


@pytest.mark.parametrize("ending,dtype", FORMATS)
def test_a_number_means_the_same_in_every_container(tmp_path, ending, dtype):
    "Classes, masks, objects and ignore values, in all bit depths of all formats."
    wide = ending != "nii.gz" and np.dtype(dtype).name in ("uint16", "int16", "int32", "uint32")
    sets = {
        "mask": [drawn(1), drawn(1)],
        "classes": [drawn(1, 2, 3, pieces=2), drawn(1, 3)],
        "organs": [drawn(1, 2, 3)] * 2,
        "objects": [drawn(*range(1, n)) for n in (30, 40)],
        "few objects": [drawn(*range(1, n)) for n in (3, 5, 6)],
        "ignore": [drawn(1, 2), drawn(1, 2, 255)],
        "ignore alone": [drawn(1, 2), drawn(255)],
        "mask and ignore": [drawn(1, 255)],
    }
    want = {
        "mask": ("semantic", 2),
        "classes": ("semantic", 4),
        "organs": "asked" if wide else ("semantic", 4),
        "objects": ("instance", 2),
        "few objects": ("instance", 2) if wide else "asked",
        "ignore": "ignore",
        "ignore alone": "ignore",
        "mask and ignore": "ignore",
    }
    if dtype == np.int8:
        sets = {k: v for k, v in sets.items() if "ignore" not in k}
    for name, labels in sets.items():
        stored(tmp_path / name, labels, ending, dtype)
    assert {name: meaning(tmp_path / name) for name in sets} == {name: want[name] for name in sets}
    assert meaning(tmp_path / "organs", label_kind="semantic") == ("semantic", 4)
    assert meaning(tmp_path / "organs", classes="abcd") == ("semantic", 4)
    assert meaning(tmp_path / "few objects", label_kind="instance") == ("instance", 2)
    c = Collection.from_folders(tmp_path / "classes", group=str)
    assert np.array_equal(c[0].label.numpy(), drawn(1, 2, 3, pieces=2)) and c[0].instances is None
    c = Collection.from_folders(tmp_path / "objects", group=str)
    assert np.array_equal(c[1].instances.numpy(), drawn(*range(1, 40)))


@pytest.mark.parametrize("mark", [254, 255, 65535])
@pytest.mark.parametrize(
    "ending,dtype",
    [("png", np.uint16), ("tif", np.int32), ("nii.gz", np.int32), ("zarr", np.uint16)],
)
def test_every_ignore_value_is_refused(tmp_path, mark, ending, dtype):
    assert meaning(stored(tmp_path / "a", [drawn(1, 2, mark)], ending, dtype)) == "ignore"
    assert meaning(stored(tmp_path / "b", [drawn(mark), drawn(mark)], ending, dtype)) == (
        "semantic",
        2,
    )  # white, not ignored


@pytest.mark.parametrize(
    "ending,dtype",
    [("tif", np.int16), ("tif", np.float32), ("nii.gz", np.int16), ("nii.gz", np.float32)],
)
def test_minus_one_is_refused(tmp_path, ending, dtype):
    with pytest.raises(InputError, match=r"labels/0.*-1"):
        Collection.from_folders(stored(tmp_path, [drawn(1, -1)], ending, dtype), group=str)


def test_arrays_keep_their_meaning():
    y = drawn(1, 2, pieces=2)
    for label in (y, y.astype(np.uint8), y.astype(np.float32), y.astype(np.uint16)):
        c = Collection.from_arrays([np.zeros((64, 64), np.uint8)], [label])
        assert len(c.classes) == 3 and np.array_equal(c[0].label.numpy(), y)
    c = Collection.from_arrays([np.zeros((64, 64), np.uint8)], [y > 0])
    assert len(c.classes) == 2 and np.array_equal(c[0].label.numpy(), y > 0)
    with pytest.raises(InputError, match="'0000'.*whole numbers"):
        Collection.from_arrays([np.zeros((64, 64), np.uint8)], [y / 2])


def test_volumes_of_organs_and_of_cells():
    "A hundred organs with gaps are classes; forty cells, numbered without a gap, may be either."
    organs = np.stack([drawn(*range(3, 100, 2))] * 3)
    cells = np.stack([drawn(*range(1, 41))] * 3)
    m = infer_labels([("a", organs, False)])
    assert (m.kind, len(m.classes), m.values) == ("semantic", 100, tuple(range(3, 100, 2)))
    assert infer_labels([("a", cells, True)]).kind == "instance"
    for y, wide in ((cells, False), (organs, True)):
        with pytest.raises(InputError, match="classes or objects"):
            infer_labels([("a", y, wide)])


@pytest.mark.parametrize("kind", [None, "semantic"])
def test_few_of_many_numbers_are_no_classes(kind):
    "1, 2 and 99: nobody means 99 classes; the label that holds 99 is named."

    def volumes(*last):
        return [
            (name, np.stack([drawn(*v)] * 3), False)
            for name, v in zip("abc", [(1, 2), last, (1, 2)])
        ]

    for mark in (99, 128, 253):
        with pytest.raises(InputError, match=rf"^b: .* 1-2, {mark} .*leave out"):
            infer_labels(volumes(1, mark), kind=kind)
    assert len(infer_labels(volumes(1, 4), kind=kind).classes) == 5


def test_one_odd_label_does_not_decide():
    "Wherever the label stands that differs from the others, it is the one that is named."

    def meaning_of(labels):
        return infer_labels([(name, drawn(*v), False) for name, v in zip("abcde", labels)])

    for at in range(5):
        labels = [(1, 2)] * 5
        labels[at] = (255,)
        with pytest.raises(InputError, match=f"^{'abcde'[at]}: the label holds 255 beside 1-2"):
            meaning_of(labels)
        masks = [(255,)] * 5
        masks[at] = (1, 2)
        assert meaning_of(masks).classes == ("background", "foreground")
    assert (
        meaning_of([(255,), (1,)]).classes
        == meaning_of([(), (255,), ()]).classes
        == ("background", "foreground")
    )
    c = Collection.from_arrays(
        [np.eye(24, dtype=np.uint8)] * 4,
        [drawn(*v)[:24, :24] for v in [(1, 2), (255,), (255,), (255,)]],
    )
    with pytest.raises(InputError, match=r"1 fault.*\n.*'0000'.*\[2\]"):
        c.check()


def test_the_decision_is_told(tmp_path):
    c = Collection.from_folders(
        stored(tmp_path, [drawn(1, 2), drawn(2)], "png", np.uint8), group=str
    )
    assert c.describe_labels() == dict(
        kind="semantic",
        classes=["background", "class 1", "class 2"],
        why="the labels hold 1-2, with gaps",
        values="1-2",
        read=2,
        labelled=2,
        images=2,
    )
    assert (
        c.describe()["labels"] == c.describe_labels()
        and c.subset(["0"]).describe_labels()["images"] == 1
    )
    given = Collection.from_folders(
        tmp_path, group=str, classes="abc", label_kind="semantic"
    ).describe_labels()
    assert (given["why"], given["values"], given["read"]) == ("as given", "", 0)


@pytest.mark.parametrize(
    "labels,why",
    [
        ([[[0, 1]]], "the labels hold 0 and 1"),
        ([[[1, 1]]], "the labels hold 1"),
        ([[[0, 0]]], "the labels hold 0"),
        ([[[255, 255]]] * 3, "labels are 255 only"),
        ([[[255, 255]], [[255, 255]], [[0, 255]]], "labels are 0 and 255 only"),
        ([[[77, 77]]], "the labels hold 77"),
        ([[[77, 77]], [[77, 0]]], "the labels hold 0 and 77"),
    ],
)
def test_the_reason_names_no_0_that_is_not_there(labels, why):
    assert infer_labels([("a", np.array(y, np.uint8), False) for y in labels]).why == why


def test_two_ways_of_marking_the_foreground():
    images = [np.eye(8, dtype=np.uint8)] * 2
    mixed = Collection.from_arrays(images, [np.eye(8, dtype=np.uint8) * v for v in (1, 255)])
    assert mixed.check() == {"background": 2, "foreground": 2}
    odd = Collection.from_arrays(
        images, [np.eye(8, dtype=np.uint8) * v for v in (1, 2)], classes="ab", label_kind="semantic"
    )
    with pytest.raises(InputError, match="foreground by 1-2"):
        odd.check()


# names

NFC, NFD = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("on_disk,in_table", [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_names_in_both_unicode_forms(ward, on_disk, in_table):
    for d in ("images", "labels"):
        (ward / f"{d}/p1_2.png").rename(ward / f"{d}/{on_disk if d == 'images' else in_table}.png")
    for t in ("groups.csv", "manifest.csv"):
        (ward / t).write_text((ward / t).read_text().replace("p1_2", in_table), encoding="utf-8")
    a = Collection.from_folders(ward)
    b = open_collection(ward, "grey")
    for c in (a, b):
        assert NFC in c.ids and c.groups[c.ids.index(NFC)] == "p1"
        assert np.array_equal(c[c.ids.index(NFC)].label.numpy(), picture(2)[1])
    assert a.subset([NFC])[0].id == NFC


def test_labels_match_whatever_their_case(ward):
    (ward / "labels/p1_2.png").rename(ward / "labels/P1_2_Mask.png")
    assert Path(Collection.from_folders(ward).cases[2].label).name == "P1_2_Mask.png"
    save(ward / "images/P1_2.png", picture(7)[0])  # now it belongs to another image
    (ward / "groups.csv").write_text((ward / "groups.csv").read_text() + "P1_2,p1,a\n")
    with pytest.raises(InputError, match="images/p1_2.png has no label"):
        Collection.from_folders(ward)


@pytest.mark.parametrize(
    "image,label",
    [
        (".ome.tif", ".png"),
        (".ome.tif", "_mask.ome.tif"),
        (".OME.TIFF", ".ome.png"),
        (".png", ".ome.tif"),
        (".ome.tif", ".ome.tif"),
    ],
)
def test_ome_is_part_of_the_ending(tmp_path, image, label):
    import tifffile

    for d, ending in (("images", image), ("labels", label)):
        (tmp_path / d).mkdir()
        for i in range(2):
            path = tmp_path / d / f"cell{'AB'[i]}{ending}"
            a = picture(i)[d == "labels"]
            save(path, a) if path.suffix == ".png" else tifffile.imwrite(
                path, a, ome=True, photometric="minisblack"
            )
    (tmp_path / "groups.csv").write_text("id,group\ncellA,a\ncellB.ome.tif,b\n")
    c = Collection.from_folders(tmp_path)
    assert (c.ids, c.groups) == (["cellA", "cellB"], ["a", "b"])
    for i in range(2):
        assert np.array_equal(c[i].label.numpy(), picture(i)[1])


@pytest.mark.parametrize(
    "edit,words",
    [
        (
            lambda d: shutil.copy(d / "labels/p1_2.png", d / "labels/p1_2_mask.png"),
            ["images/p1_2.png has 2 labels", "p1_2.png, p1_2_mask.png"],
        ),
        (
            lambda d: save(d / "labels/p1_2.tif", picture(2)[1]),
            ["images/p1_2.png has 2 labels", "p1_2.png, p1_2.tif"],
        ),
        (
            lambda d: save(d / "images/p1_2.tif", picture(2)[0]),
            ["2 images of one name", "p1_2.png, p1_2.tif"],
        ),
        (
            lambda d: shutil.copy(d / "images/p1_2.png", d / "images/ p1_2.png"),
            ["2 images of one name", "p1_2"],
        ),
        (
            lambda d: (
                (d / "images/p0_0.png").unlink()
                or (d / "images/p0_0.png").symlink_to(d / "images/p2_5.png")
            ),
            ["p2_5.png", "group 'p0'", "group 'p2'"],
        ),
        (
            lambda d: (
                (d / "images/p0_0.png").unlink() or (d / "images/p0_0.png").symlink_to("gone.png")
            ),
            ["images/p0_0.png is a link to gone.png"],
        ),
        (
            lambda d: (
                (d / "labels/p0_0.png").unlink() or (d / "labels/p0_0.png").symlink_to("gone.png")
            ),
            ["labels/p0_0.png is a link to gone.png"],
        ),
        (
            lambda d: (d / "labels/p0_0.png").unlink() or os.mkfifo(d / "labels/p0_0.png"),
            ["labels/p0_0.png is neither"],
        ),
        (
            lambda d: (d / "groups.csv").write_text("id,group\np0_0,a\np0_0,b\n"),
            ["groups.csv, line 3", "'p0_0'"],
        ),
        (
            lambda d: (d / "groups.csv").write_text("id,group,Label group\np0_0,a,x\n"),
            ["groups.csv: column 'label group'", "Did you mean 'label_group'?"],
        ),
        (
            lambda d: (d / "groups.csv").write_text("id,group,label_grup\np0_0,a,x\n"),
            ["groups.csv: column 'label_grup'", "Did you mean 'label_group'?"],
        ),
        (
            lambda d: (d / "groups.csv").rename(d / "Groups.csv"),
            ["Groups.csv is not read", "groups.csv"],
        ),
        (
            lambda d: (d / "groups.csv").write_text("id,group\np0_0,\n"),
            ["groups.csv names no group", "'p0_0'", "5 more"],
        ),
    ],
)
def test_folders_that_are_not_clear(ward, edit, words):
    fault(ward, edit, words)


def test_numbers_in_names_need_a_number(tmp_path):
    for name in ("images/cat", "images/dog_1", "labels/cow", "labels/ape_1"):
        save(tmp_path / f"{name}.png", picture(1)[1])
    with pytest.raises(InputError, match="images/cat.png has no label"):
        Collection.from_folders(tmp_path, group=str)


def matched(images, labels):
    "What `match_labels` finds for names without endings: image -> label."
    pairs = zip(
        images,
        match_labels(
            [Path(f"images/{i}.png") for i in images], [Path(f"labels/{i}.png") for i in labels]
        ),
    )
    return {i: y and y.stem for i, y in pairs}


@pytest.mark.parametrize(
    "pairs",
    [  # names as people write them; image before label
        "img_001 mask_001, img_002 mask_002, img_010 mask_010",
        "img_001 label_001, img_002 label_002",
        "001 001_mask, 002 002_mask",
        "case_0001_0000 case_0001, case_0002_0000 case_0002",
        "p1_s2_img p1_s2_seg, p2_s1_img p2_s1_seg",
        "image1 gt1, image2 gt2, image12 gt12",
        "IMG_1 IMG_1_segmentation, IMG_2 IMG_2_segmentation",
        "sub-01_T1w sub-01_T1w_label, sub-02_T1w sub-02_T1w_label",
        "sub-01_T1w sub-01_dseg, sub-02_T1w sub-02_dseg",
        "T1w T1w_label",
        "T1w label",
        "imaging segmentation",
        "histo mask",
        "volume-0 segmentation-0, volume-1 segmentation-1",
        "Image_01L Image_01L_1stHO, Image_01R Image_01R_1stHO",
        "01_test 01_test_manual1, 02_test 02_test_manual1, 21_test 21_test_manual1",
        "left_1 gt_left_01, right_2 gt_right_02",
        "a_img_1 a_mask_1, a_img_2 a_mask_2, b_img_1 b_mask_1",
        "scan-1 tumour_1, scan-2 tumour_2",
        "a1 a1, a2 a2_gt, a3 Seg.a3",
        "x_1 x_1_gt, x_01 x_01_gt",
        "1 v2_1, 2 v2_2, 3 v2_3",
        "Left-Eye_1 left_eye_1x, Right-Eye_1 right_eye_1x",
    ],
)
def test_labels_are_matched_as_a_person_would(pairs):
    wanted = dict(p.split() for p in pairs.split(", "))
    assert matched(wanted, [*wanted.values()][::-1]) == wanted


@pytest.mark.parametrize(
    "images,labels",
    [
        ("left_1 right_2", "right_1_gt left_2_gt"),
        ("left_1 right_2", "right_1_x left_2_x"),
        ("p1_s2 p2_s1", "s1_p2_gt s2_p1_gt"),
        ("liver", "kidney"),
        ("ct_1 ct_2", "mr_1 mr_2"),
        ("dog_1", "ape_1"),
        ("left_1 left_2", "right_mask_1 right_mask_2"),
        ("x_1 x_01", "x_001_mask"),
        ("left_1 right_2 mid_3", "right_1_gt left_2_gt mid_3_gt"),
    ],
)
def test_numbers_alone_are_no_match(images, labels):
    "The first image and the label that it might get are named, and what to do."
    with pytest.raises(InputError) as e:
        matched(images.split(), labels.split())
    image = images.split()[0]
    label = labels.split()[0]
    for words in (
        f"images/{image}.png and labels/{label}.png",
        f"call the label {image}.png",
        "manifest.csv",
    ):
        assert words in str(e.value)


@pytest.mark.parametrize(
    "images,labels",
    [
        ("p1_s1 p1_s2", "p2_s1_seg p2_s2_seg"),  # another patient, whatever the rule
        ("1 2", "1_1 1_2"),  # both may belong to 1
        ("case_1_0000 case_1_0001", "case_1"),  # two channels
        ("sub-01_T1w sub-02_T1w", "sub-01_T2w_seg sub-02_T2w_seg"),
        ("cat dog", "cow ape"),
        ("scan_1", "mask_2"),
        ("का_1 का_2", "कि_1x कि_2x"),  # vowel signs are letters
    ],
)
def test_names_that_do_not_agree_are_not_matched(images, labels):
    try:
        found = matched(images.split(), labels.split())
    except InputError:
        return
    assert not any(found.values()), found


def test_ten_thousand_names_take_no_time():
    import time

    names = [f"case_{k // 7:04d}_z{k % 7}" for k in range(10_000)]
    start = time.perf_counter()
    assert matched([f"{n}_0000" for n in names], names) == {f"{n}_0000": n for n in names}
    assert time.perf_counter() - start < 10


def row(d, old, new):
    text = (d / "manifest.csv").read_text()
    assert old in text
    (d / "manifest.csv").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "edit,words",
    [
        (lambda d: row(d, "grey,p1_2,", "grey,,"), ["manifest.csv, line 4", "'id' is empty"]),
        (
            lambda d: row(d, "grey,p1_2,images/p1_2.png", "grey,p1_2,"),
            ["manifest.csv, line 4", "'image' is empty"],
        ),
        (lambda d: row(d, "grey,p1_2,", ",p1_2,"), ["manifest.csv, line 4", "'modality' is empty"]),
        (lambda d: row(d, "grey,p1_2,", "grey,p0_0,"), ["'p0_0'", "more than once"]),
        (
            lambda d: row(d, "labels/p1_2.png,p1,", "labels/p1_2.png,,"),
            ["manifest.csv, line 4", "p1_2.png has no group"],
        ),
        (
            lambda d: row(d, "images/p1_2.png", "images/p0_0.png"),
            ["p0_0.png", "'p0'", "'p1'", "one group"],
        ),
        (
            lambda d: row(
                d, "p0_1,images/p0_1.png,labels/p0_1.png", "p0_1,images/p0_0.png,labels/p0_0.png"
            ),
            ["images/p0_0.png is listed twice", "'p0_0'", "'p0_1'"],
        ),
        (
            lambda d: row(d, "labels/p1_2.png", "labels/p0_0.png"),
            ["labels/p0_0.png belongs", "'p0'", "'p1'"],
        ),
        (lambda d: row(d, "images/p1_2.png", "../p1_2.png"), ["manifest.csv, line 4", "leads out"]),
        (
            lambda d: row(d, "images/p1_2.png", "images/P1_2.png"),
            [
                "manifest.csv, line 4",
                "images/P1_2.png does not exist. Did you mean images/p1_2.png?",
            ],
        ),
        (
            lambda d: (d / "manifest.csv").rename(d / "Manifest.csv"),
            ["Manifest.csv is not read", "manifest.csv"],
        ),
        (lambda d: row(d, ",p1,", ",p1\ngrey,short\n,"), ["manifest.csv, line 4", "header"]),
        (
            lambda d: (
                (d / "images/p1_2.png").unlink() or (d / "images/p1_2.png").symlink_to("gone.png")
            ),
            ["p1_2.png", "link to gone.png"],
        ),
    ],
)
def test_manifests_that_are_not_clear(ward, edit, words):
    fault(ward, edit, words, lambda d: open_collection(d, "grey"))


def test_a_manifest_from_windows(ward):
    text = (ward / "manifest.csv").read_text()
    want = open_collection(ward, "grey")
    (ward / "manifest.csv").write_bytes(
        text.replace("/", "\\").replace(",", ";").replace("\n", "\r\n").encode("utf-16")
    )
    again = open_collection(ward, "grey")
    assert (
        again.ids == want.ids
        and again.groups == want.groups
        and again.fingerprint() == want.fingerprint()
    )


def test_unknown_options_and_nnunet(tmp_path, ward):
    with pytest.raises(InputError, match="unknown option 'zoo'.*'zoom'"):
        open_collection(ward, "grey", zoo=2)
    (tmp_path / "nn/imagesTr").mkdir(parents=True)
    with pytest.raises(InputError, match="nnU-Net"):
        open_collection(tmp_path / "nn", "ct")


# contents


def test_contents_name_the_file_that_changed(ward):
    c = open_collection(ward, "grey")
    before = c.contents()
    old = c.fingerprint()
    assert sorted(before) == sorted(
        [f"{d}/p{k // 2}_{k}.png" for d in ("images", "labels") for k in range(6)]
    )
    assert (
        before["labels/p1_3.png"]
        == hashlib.sha256((ward / "labels/p1_3.png").read_bytes()).hexdigest()[:16]
    )
    stat = (ward / "labels/p1_3.png").stat()
    raw = bytearray((ward / "labels/p1_3.png").read_bytes())
    raw[-20] ^= 1  # one bit; size and time stay
    (ward / "labels/p1_3.png").write_bytes(raw)
    os.utime(ward / "labels/p1_3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [f for f, h in c.contents().items() if h != before[f]] == ["labels/p1_3.png"]
    assert (
        c.fingerprint() != old
        and len(old) == 16
        and c.unlabelled().fingerprint() not in (old, c.fingerprint())
    )


def test_the_fingerprint_knows_what_counts(ward, tmp_path_factory):
    c = Collection.from_folders(ward)
    elsewhere = tmp_path_factory.mktemp("other") / "ward"
    shutil.copytree(ward, elsewhere)
    assert (
        Collection.from_folders(elsewhere).fingerprint() == c.fingerprint()
        and Collection.from_folders(elsewhere).contents() == c.contents()
    )
    marks = {
        c.fingerprint(),
        *(
            c._with(
                [Case(**(vars(x) | {k: "other"})) if x.id == "p0_1" else x for x in c.cases]
            ).fingerprint()
            for k in ("id", "group", "label_group")
        ),
    }
    assert len(marks) == 4


def test_arrays_have_contents():
    a = np.eye(8, dtype=np.uint8)
    y = np.eye(8, dtype=np.uint8)
    c = Collection.from_arrays([a, a + 1], [y, 1 - y], ids=["u", "v"])
    assert list(c.contents()) == ["u (image)", "u (label)", "v (image)", "v (label)"]
    other = Collection.from_arrays([a, a + 1], [y, y], ids=["u", "v"])
    assert [k for k, h in other.contents().items() if h != c.contents()[k]] == [
        "v (label)"
    ] and other.fingerprint() != c.fingerprint()


def test_verify_lists_every_file_of_another_checksum(ward):
    row(ward, file_sha256(ward / "images/p0_1.png"), file_sha256(ward / "images/p0_1.png").upper())
    c = open_collection(ward, "grey")
    c.verify()
    save(ward / "labels/p1_3.png", np.zeros((20, 24), np.uint8))
    save(ward / "images/p0_0.png", np.zeros((20, 24), np.uint8))
    (ward / "images/p2_5.png").unlink()
    with pytest.raises(InputError, match="^3 faults") as e:
        c.verify()
    assert accused(str(e.value)) == {"p1_3", "p0_0", "p2_5"} and "labels/p1_3.png" in str(e.value)


def test_small_images_are_found_by_name_without_reading(ward, monkeypatch):
    c = Collection.from_folders(ward, zoom=0.5)
    save(ward / "images/p1_2.png", np.zeros((9, 24), np.uint8))
    monkeypatch.setattr(image_files, "read_image", None)  # nothing is decoded
    c.check_sizes(4)
    with pytest.raises(InputError, match="^1 fault") as e:
        c.check_sizes(8)
    assert accused(str(e.value)) == {"p1_2"} and "4 x 12 pixels (zoom 0.5)" in str(e.value)
    with pytest.raises(InputError, match="^6 faults"):
        c.check_sizes(16)


def test_splits_of_earlier_fingerprints_are_read_with_a_word(ward):
    "A split saved with 12 digits, as they were made: ids, groups and sizes in bytes, no labels."
    from unpaired_kd.core import digest

    c = Collection.from_folders(ward)
    old = digest(
        sorted(
            [x.id, x.group, x.label_group, str((ward / f"images/{x.id}.png").stat().st_size)]
            for x in c.cases
        )
    )
    split = Split(split_groups(c, dict(train=2, test=1)).parts, old)
    split.save(ward / "s.json")
    with pytest.warns(UserWarning, match="s.json is older.*labels"):
        assert Split.load(ward / "s.json", c).hash == split.hash
    write_json(
        ward / "t.json",
        read_json(ward / "s.json") | {"data": "0" * 12, "hash": Split(split.parts, "0" * 12).hash},
    )
    with pytest.raises(InputError, match="other data"):
        Split.load(ward / "t.json", c)
    new = split_groups(c, dict(train=2, test=1))
    save(ward / "labels/p0_0.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(InputError, match="other data"):
        new.verify(c)


DATA = Path(os.environ.get("UKD_DATA", Path(__file__).parents[2] / "shared/data"))


@pytest.mark.skipif(not (DATA / "nuclei_he_fluo").is_dir(), reason="the optional data are not here")
def test_real_folders():
    he = open_collection(DATA / "nuclei_he_fluo", "histology_he")
    assert (
        len(he) == 73
        and len(set(he.groups)) == 17
        and he.channels == 3
        and he.label_kind == "instance"
    )
    assert he.check() == {"background": 73, "foreground": 73}
    classes = ("background", "liver", "right kidney", "left kidney", "spleen")
    ct = open_collection(DATA / "abdomen_ct_mr", "ct", classes=classes, zoom=0.5)
    assert (
        ct.dims == 3
        and ct[0].image.shape == (1, 49, 128, 128)
        and ct[0].spacing[0] == pytest.approx(5)
    )
    flat = ct.subset(ct.ids[:2]).slices()
    assert set(flat.groups) == {"ct_000", "ct_001"} and flat[0].label.max() > 0
    assert open_collection(DATA / "retina_fundus_octa", "octa").subset(["oc_003"]).check() == {
        "background": 1,
        "foreground": 1,
    }
    for f in kfold_groups(he, 5):
        f.verify(he)


# the API: what is refused, and by which word


def toy(n=2):
    return [np.eye(8, dtype=np.uint8)] * n


API = [
    (lambda d: Collection([]), "is empty"),
    (lambda d: Collection.from_arrays(toy(), ids=["a", "a"]), "'a' occurs more than once"),
    (lambda d: Collection.from_arrays(toy(), toy(3)), "labels: 3 values for 2 images"),
    (lambda d: Collection.from_arrays(toy(), groups=["a"]), "groups: 1 values for 2 images"),
    (lambda d: Collection.from_arrays(toy(), toy(), classes=["bone"]), "two names or more"),
    (lambda d: Collection.from_arrays(toy(), toy(), classes=["bone", "bone"]), "all different"),
    (lambda d: Collection.from_arrays(toy(), toy(), classes=["bone", 1]), "two names or more"),
    (
        lambda d: Collection.from_arrays(toy(), toy(), label_kind="objects"),
        "unknown label_kind 'objects'",
    ),
    (lambda d: Collection.from_arrays(toy(), [a * 0.5 for a in toy()]), "label of image '0000'"),
    (lambda d: Collection.from_arrays(toy(), [a * np.int16(-1) for a in toy()]), "negative values"),
    (lambda d: Collection.from_arrays([np.zeros((2, 8, 8, 5))]), "has shape"),
    (lambda d: Collection.from_folders(d / "gone"), "gone is not a folder"),
    (lambda d: Collection.from_folders(d, group="("), "no regular expression"),
    (lambda d: Collection.from_folders(d, group="x(y)"), "finds no group in image name"),
    (lambda d: Collection.from_manifest(d, "xray"), "unknown modality 'xray'"),
    (
        lambda d: Collection.from_manifest(d, "grey", split="tset"),
        "no row of modality 'grey' has split 'tset'",
    ),
    (lambda d: open_collection(d, "grey", zom=2), "unknown option 'zom'"),
    (lambda d: open_collection("phantom:bone", "xray"), "xray"),
    (lambda d: open_collection(d / "manifest.csv", "grey"), "is not a folder"),
    (lambda d: Collection.from_folders(d).subset(["p9"]), "unknown id 'p9'"),
    (lambda d: Collection.from_folders(d).of_groups(["p9"]), "unknown group 'p9'"),
    (lambda d: Collection.from_folders(d).slices(), "only volumes can be cut"),
    (
        lambda d: split_groups(Collection.from_folders(d), dict(train=0.9, test=0.9)),
        "sum to at most 1",
    ),
    (lambda d: kfold_groups(Collection.from_folders(d), k=99), "k=99"),
]


@pytest.mark.filterwarnings("ignore:.*groups.csv")
@pytest.mark.parametrize("k", range(len(API)))
def test_the_api_refuses_in_a_sentence(ward, k):
    call, words = API[k]
    with pytest.raises(InputError, match=re.escape(words)) as e:
        call(ward)
    assert len(re.findall(r"[.?!] +[A-Z]", str(e.value))) < 3, str(e.value)


def test_a_manifest_without_patients_is_told(ward):
    text = (ward / "manifest.csv").read_text()
    (ward / "manifest.csv").write_text(text.replace("group", "patient", 1))
    with pytest.warns(UserWarning, match="manifest.csv names no groups"):
        c = open_collection(ward, "grey")
    assert c.groups == c.ids


def test_columns_that_are_nearly_ours(ward):
    text = (ward / "manifest.csv").read_text()
    (ward / "manifest.csv").write_text(text.replace("label", "labels", 1))
    with pytest.raises(InputError, match="column 'labels' is not known. Did you mean 'label'"):
        open_collection(ward, "grey")
