"Batches: pure functions of their address, cut where the plan says, paired as promised."

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from unpaired_kd.core import InputError, digest, rng
from unpaired_kd.data.collections import Collection, open_collection
from unpaired_kd.data.formats import images as image_files
from unpaired_kd.data.patches import Batch, Patches, Unpaired
from unpaired_kd.data.splits import split_groups


def made(n=9, shape=(40, 50), channels=1, dtype=np.uint8, classes=3, dims=2, name="made", **kw):
    "Random images; class k is a small box; every third image lacks the last class."
    images = []
    labels = []
    for i in range(n):
        r = rng(0, name, i)
        a = (
            r.integers(0, 256, (channels, *shape)).astype(dtype)
            if np.dtype(dtype).kind == "u"
            else r.random((channels, *shape)).astype(dtype)
        )
        y = np.zeros(shape, np.uint8)
        for k in range(1, classes - (i % 3 == 0)):
            at = [int(r.integers(0, s - 3)) for s in shape]
            y[tuple(slice(x, x + 3) for x in at)] = k
        images.append(a)
        labels.append(y)
    return Collection.from_arrays(
        images,
        labels,
        [f"p{i // 2}" for i in range(n)],
        [f"{i:02d}" for i in range(n)],
        ["abc"[i % 3] for i in range(n)],
        dims=dims,
        classes=[str(k) for k in range(classes)],
        label_kind="semantic",
        name=name,
        **kw,
    )


@pytest.mark.parametrize(
    "kw,size",
    [
        ({}, 16),
        (dict(channels=3), (8, 20)),
        (dict(dtype=np.uint16), 16),
        (dict(dtype=np.float32), 16),
        (dict(zoom=0.5), 12),
        (dict(invert=True), 16),
        (dict(zoom=0.5, invert=True, intensity="percentile"), 16),
        (dict(shape=(9, 30, 20), dims=3), (5, 16, 8)),
    ],
)
def test_patches_are_cut_where_the_plan_says(kw, size):
    c = made(**kw)
    p = Patches(c, size, 6, seed=3, stream="student")
    for step in range(5):
        b = p.batch(step)
        assert b.image.dtype == torch.float32 and b.label.dtype == torch.int64 and len(b) == 6
        for j, (i, corner) in enumerate(zip(b.plan.index, b.plan.corner)):
            cut = tuple(slice(a, a + s) for a, s in zip(corner, p.size))
            assert torch.equal(b.image[j], c[i].image[(slice(None), *cut)]) and torch.equal(
                b.label[j], c[i].label[cut]
            )
            assert b.ids[j] == c.ids[i] and b.label_groups[j] == c.label_groups[i]


@pytest.mark.parametrize(
    "shape,size,dims",
    [((20, 50), (32, 32), 2), ((6, 20, 20), (16, 16, 24), 3), ((1, 20, 20), (4, 16, 16), 3)],
)
def test_small_images_are_mirrored(shape, size, dims):
    c = made(shape=(max(shape[0], 4), *shape[1:]), dims=dims)
    if shape[0] == 1:
        c = Collection.from_arrays(
            [x.image[:, :1] for x in map(c.native, range(len(c)))],
            [x.label[:1] for x in map(c.native, range(len(c)))],
            dims=3,
            classes=c.classes,
        )
    b = Patches(c, size, 4, 0, "s").batch(0)
    assert b.image.shape[2:] == tuple(size) and b.label.shape[1:] == tuple(size)
    for j, i in enumerate(b.plan.index):
        assert set(b.image[j].unique().tolist()) <= set(c[i].image.unique().tolist())
        assert set(b.label[j].unique().tolist()) <= set(c[i].label.unique().tolist())


def sums(seed="0"):
    "A digest of some batches, drawn in an odd order."
    p = Patches(made(), 16, 5, int(seed), "student")
    out = {}
    for step in (7, 0, 3, 10**9):
        b = p.batch(step, rank=step % 2)
        out[step] = [
            b.ids,
            b.image.double().sum().item(),
            b.label.sum().item(),
            b.plan.corner.tolist(),
        ]
    return digest(out)


def test_batches_do_not_depend_on_the_process_or_on_history():
    folder = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); from test_unpaired import sums; print(sums())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONHASHSEED="7", CUDA_VISIBLE_DEVICES=""),
    )
    assert other.stdout.strip() == sums()
    p = Patches(made(), 16, 5, 0, "student")
    a = [p.batch(k) for k in range(4)]
    torch.manual_seed(5)
    np.random.seed(5)
    for k in (3, 1, 0, 2):
        assert torch.equal(p.batch(k).image, a[k].image)
    assert sums("1") != sums()


def test_another_address_is_another_batch():
    c = made(40)
    plans = [
        Patches(c, 16, 8, seed, stream).plan(step, rank)
        for seed in (0, 1)
        for stream in ("student", "teacher")
        for step in (0, 1)
        for rank in (0, 1)
    ]
    assert len({p.index.tobytes() + p.corner.tobytes() for p in plans}) == len(plans)
    assert len({p.address for p in plans}) == len(plans)


def test_cases_are_drawn_evenly_and_not_twice():
    c = made(9)
    p = Patches(c, 16, 6, 0, "s")
    counts = Counter()
    for k in range(600):
        index = p.plan(k).index
        assert len(set(index)) == 6
        counts.update(index.tolist())
    assert (
        min(counts.values()) > 340 and max(counts.values()) < 460
    )  # 400 expected, standard deviation 12
    assert Counter(Patches(c, 16, 20, 0, "s").plan(0).index.tolist()).most_common()[0][1] == 3


def test_foreground_finds_every_class_equally():
    c = made(12, shape=(96, 96))
    p = Patches(c, 16, 12, 0, "s", foreground=1.0)
    shown = Counter()
    for k in range(150):
        b = p.batch(k)
        for i, y in zip(b.plan.index, b.label):
            assert (y > 0).any()
            if i % 3:
                shown.update(set(y.unique().tolist()) - {0})  # images that hold both classes
    assert abs(shown[1] - shown[2]) < 0.15 * shown[1]
    bare = [
        (Patches(c, 16, 12, 0, "s", foreground=0.0).batch(k).label > 0)
        .any(-1)
        .any(-1)
        .float()
        .mean()
        for k in range(50)
    ]
    assert np.mean(bare) < 0.4


def test_patch_places_reach_both_ends():
    p = Patches(made(3, shape=(20, 24)), 16, 3, 0, "s", foreground=0.0)
    corners = np.concatenate([p.plan(k).corner for k in range(300)])
    assert set(corners[:, 0]) == set(range(5)) and set(corners[:, 1]) == set(range(9))


def test_images_without_foreground_are_drawn_too():
    c = Collection.from_arrays(
        [np.zeros((20, 20), np.uint8)] * 2, [np.zeros((20, 20), np.uint8)] * 2, classes=("b", "f")
    )
    assert Patches(c, 16, 2, 0, "s", foreground=1.0).batch(0).label.sum() == 0


def test_unlabelled_collections_never_open_labels(tmp_path, monkeypatch):
    from PIL import Image

    for d in ("images", "labels"):
        (tmp_path / d).mkdir()
    for i in range(3):
        Image.fromarray(made().native(i).image[0]).save(tmp_path / f"images/{i}.png")
        Image.fromarray(made().native(i).label.astype(np.uint8)).save(tmp_path / f"labels/{i}.png")

    def refuse(path, *a, **k):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(image_files, "read_label", refuse)
    for c in (
        Collection.from_folders(tmp_path, group=str, labels=False),
        Collection.from_folders(
            tmp_path, group=str, classes="ab", label_kind="semantic", labels=False
        ),
    ):
        b = Patches(c, 16, 2, 0, "s").batch(0)
        assert b.label is None and b.to("cpu").label is None
    monkeypatch.undo()
    whole = Collection.from_folders(tmp_path, group=str)
    monkeypatch.setattr(image_files, "read_label", refuse)
    assert Patches(whole.unlabelled(), 16, 2, 0, "s").batch(0).label is None


# pairing


def test_every_partner_has_the_label_group_and_nobody_is_held_out():
    """Acceptance check: same label group for every pair, no held-out patient, same pairs for the
    same seed."""
    student = made(12, name="student")
    teacher = made(15, name="teacher")
    split = split_groups(teacher, dict(train=5, test="rest"))
    train = teacher.subset(split["train"])
    held_out = set(teacher.subset(split["test"]).groups)

    def both(seed):
        return Unpaired(
            dict(
                student=Patches(student, 16, 4, seed, "student"),
                teacher=Patches(train, 16, 4, seed, "teacher"),
            ),
            "label_group",
        )

    groups = dict(zip(train.ids, train.groups))
    partners = set()
    for step in range(100):
        b = both(0).batch(step)
        assert b["student"].label_groups == b["teacher"].label_groups
        assert not {groups[i] for i in b["teacher"].ids} & held_out
        assert b["teacher"].ids == both(0).batch(step, names=["teacher"])["teacher"].ids
        partners |= set(zip(b["student"].ids, b["teacher"].ids))
    assert len(partners) > 20
    assert (
        both(1).batch(0)["teacher"].ids + both(1).batch(0)["student"].ids
        != both(0).batch(0)["teacher"].ids + both(0).batch(0)["student"].ids
    )


def test_a_missing_label_group_warns_once():
    student = made(9, name="student")
    teacher = made(9, name="teacher").subset(["00", "01", "03", "04"])  # only a and b
    u = Unpaired(
        dict(
            student=Patches(student, 16, 6, 0, "student"),
            teacher=Patches(teacher, 16, 6, 0, "teacher"),
        ),
        "label_group",
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for k in range(20):
            b = u.batch(k)
            for s, t in zip(b["student"].label_groups, b["teacher"].label_groups):
                assert s == t or s == "c"
    assert len(told) == 1 and "'c'" in str(told[0].message)


class Recorder:
    "Stands for an augmentation: adds a number from the generator that it is given."

    def __call__(self, image, label, generator):
        return image + torch.rand(1, generator=generator), label


def test_index_pairing_is_the_same_place_and_the_same_warp():
    a = made(6, name="a")
    b = Collection.from_arrays(
        [255 - a.native(i).image for i in range(6)],
        [a.native(i).label for i in range(6)],
        ids=[f"x{i}" for i in range(6)],
        classes=a.classes,
    )
    u = Unpaired(
        dict(
            student=Patches(a, 16, 4, 0, "student", augment=Recorder()),
            teacher=Patches(b, 16, 4, 5, "teacher", augment=Recorder()),
        ),
        "index",
    )
    for k in range(5):
        x = u.batch(k)
        assert torch.equal(x["student"].label, x["teacher"].label)
        shift = x["student"].image + x["teacher"].image - 1
        assert shift.std() < 1e-6 and shift.mean() > 0
    small = Collection.from_arrays(
        [np.zeros((20, 20), np.uint8)] * 6, [np.zeros((20, 20), np.uint8)] * 6, classes=a.classes
    )
    with pytest.raises(InputError, match="Registered"):
        [
            Unpaired(dict(student=Patches(a, 16, 4), teacher=Patches(small, 16, 4)), "index").batch(
                k
            )
            for k in range(9)
        ]


def test_random_patches_do_not_see_each_other():
    a = made(30, name="a")
    b = made(30, name="b")
    alone = Patches(a, 16, 4, 0, "student")
    u = Unpaired(dict(student=alone, teacher=Patches(b, 16, 4, 0, "teacher")))
    assert torch.equal(u.batch(3)["student"].image, alone.batch(3).image)
    assert list(u.batch(3, ["student"])) == ["student"]
    same = sum(
        x == y
        for k in range(300)
        for x, y in zip(u.patches["student"].plan(k).index, u.patches["teacher"].plan(k).index)
    )
    assert abs(same - 40) < 25  # 1200 pairs, one in thirty by chance


def test_lead_batch_is_the_same_under_every_pairing():
    "Changing the pairing must not change the student's batches: arms stay comparable."
    a = made(9, name="a")
    b = made(9, name="b")
    x = [
        Unpaired(
            dict(student=Patches(a, 16, 4, 0, "student"), teacher=Patches(b, 16, 4, 0, "teacher")),
            p,
        ).batch(4)["student"]
        for p in ("random", "label_group", "index")
    ]
    assert torch.equal(x[0].image, x[1].image) and torch.equal(x[0].image, x[2].image)


# other promises


def test_augmentation_is_part_of_the_function_and_not_of_validation():
    c = made()
    p = Patches(c, 16, 4, 0, "s", augment=Recorder())
    assert torch.equal(p.batch(2).image, p.batch(2).image)
    plain = Patches(c, 16, 4, 0, "s")
    assert not torch.equal(p.batch(2).image, plain.batch(2).image)
    for a, b in zip(p.eval_batches(), plain.eval_batches()):
        assert torch.equal(a.image, b.image)


def test_validation_batches_are_fixed_and_show_every_case():
    p = Patches(made(9), 16, 4, 0, "s")
    a = p.eval_batches()
    b = p.eval_batches()
    assert len(a) == 3 and {i for x in a for i in x.ids} == set(p.collection.ids)
    for x, y in zip(a, b):
        assert torch.equal(x.image, y.image) and torch.equal(x.label, y.label)
    assert len(p.eval_batches(7)) == 7 and torch.equal(p.eval_batches(7)[0].image, a[0].image)


def test_grey_is_repeated_after_augmentation():
    b = Patches(made(), 16, 4, 0, "s", augment=Recorder(), channels=3).batch(0)
    assert b.image.shape[1] == 3 and torch.equal(b.image[:, 0], b.image[:, 2])
    with pytest.raises(InputError, match="only grey"):
        Patches(made(channels=3), 16, 4, channels=1)


def test_what_is_refused():
    c = made()
    for wrong in (
        lambda: Patches(c, (16, 16, 16)),
        lambda: Patches(c, 0),
        lambda: Patches(c.subset([]), 16),
        lambda: Unpaired(dict(student=Patches(c, 16)), "index", lead="pupil"),
        lambda: Unpaired(dict(a=Patches(c, 16)), "disease"),
        lambda: Patches(c, 16).batch(0, pairing="none"),
        lambda: Unpaired(dict(a=Patches(c, 16))).batch(0, ["b"]),
        lambda: Unpaired(dict(a=Patches(c, 16), b=Patches(made(classes=4), 16))),
        lambda: Patches(c, 16).batch(0, like=Batch(torch.zeros(1), None, [], []), pairing="index"),
    ):
        with pytest.raises(InputError):
            wrong()
    half = c._with(c.unlabelled().cases[:4] + c.cases[4:])
    with pytest.raises(InputError, match="4 of 9"):
        Patches(half, 16)


DATA = Path(os.environ.get("UKD_DATA", Path(__file__).parents[2] / "shared/data"))


@pytest.mark.skipif(not (DATA / "abdomen_ct_mr").is_dir(), reason="the optional data are not here")
def test_real_volumes_show_every_organ():
    classes = ("background", "liver", "right kidney", "left kidney", "spleen")
    mr, ct = (
        open_collection(DATA / "abdomen_ct_mr", m, classes=classes, zoom=0.5) for m in ("mr", "ct")
    )
    mr = mr.subset(mr.ids[:3]).slices()
    ct = ct.subset(ct.ids[:2]).slices(keep="all")
    u = Unpaired(
        dict(student=Patches(ct, 96, 8, 0, "student"), teacher=Patches(mr, 96, 8, 0, "teacher"))
    )
    shown = Counter(
        k
        for step in range(30)
        for b in u.batch(step).values()
        for y in b.label
        for k in y.unique().tolist()
    )
    assert min(shown[k] for k in range(5)) > 30
    assert u.batch(0)["student"].image.shape == (8, 1, 96, 96)
