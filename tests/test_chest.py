"Properties of the chest phantoms: purity, independence of the modalities, sizes, contrast,"

"readers, bad input."

import subprocess
import sys
import zlib

import numpy as np
import pytest

from unpaired_kd.core import InputError
from unpaired_kd.data.collections import open_collection
from unpaired_kd.data.phantoms.chest import (
    CHEST_RENDERERS,
    TISSUES,
    ChestKnobs,
    Person,
    ReaderKnobs,
    chest,
    draw_chest,
    draw_scene,
    ellipsoid,
    simulate_readers,
    voxel_positions,
)

PATIENTS = 12


@pytest.fixture(scope="module")
def drawn():
    return {m: [draw_chest(m, patient=p) for p in range(PATIENTS)] for m in CHEST_RENDERERS}


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("modality", CHEST_RENDERERS)
def test_a_patient_is_a_function_of_the_address(modality, drawn):
    np.random.seed(1)  # the global state plays no part
    image, label, _ = draw_chest(modality, patient=2)
    assert np.array_equal(image, drawn[modality][2][0]) and np.array_equal(
        label, drawn[modality][2][1]
    )
    for other in (dict(seed=1), dict(patient=3)):
        assert not np.array_equal(label, draw_chest(modality, **{**dict(patient=2), **other})[1])


def test_another_process_draws_the_same_and_the_import_is_light(drawn):
    code = """import sys, zlib
from unpaired_kd.data.phantoms.chest import draw_chest
heavy = ("scipy", "matplotlib", "monai", "skimage", "unpaired_kd.data.collections")
print(*[m for m in heavy if m in sys.modules])
print(*[zlib.crc32(draw_chest(m, patient=1)[0].tobytes()) for m in ("ct", "mr")])"""
    heavy, found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "" and found.split() == [
        str(zlib.crc32(drawn[m][1][0].tobytes())) for m in ("ct", "mr")
    ]


def test_a_smaller_set_is_the_beginning_of_a_larger_one():
    small = chest("mr", patients=1)
    large = chest("mr", patients=3)
    assert np.array_equal(small[0].image, large[0].image) and large.ids[:1] == small.ids


def test_the_modalities_have_no_patient_in_common(drawn):
    place = {
        m: np.stack([y.any(0).ravel() for _, y, _ in v]).astype(float) for m, v in drawn.items()
    }
    together = np.corrcoef(place["ct"], place["mr"])[:PATIENTS, PATIENTS:]
    same = np.diag(together)
    other = together[~np.eye(PATIENTS, dtype=bool)]
    assert abs(same.mean() - other.mean()) < 4 * other.std() / PATIENTS**0.5 and same.max() < 0.95
    outline = {m: [(q["body"] < 0).sum() for _, _, q in v] for m, v in drawn.items()}
    assert all(a != b for a, b in zip(outline["ct"], outline["mr"]))  # not even the body
    assert not set(chest("ct", 2).groups) & set(chest("mr", 2).groups)


@pytest.mark.parametrize("modality", CHEST_RENDERERS)
def test_values_and_tumours(modality, drawn):
    for image, label, parts in drawn[modality]:
        assert (
            image.shape == label.shape == (10, 64, 64)
            and image.dtype == np.float32
            and label.dtype == np.uint8
        )
        assert (
            np.isfinite(image).all()
            and 0 <= image.min()
            and image.max() <= 1
            and image.std() > 0.05
        )
        assert (
            set(np.unique(label)) == {0, 1} and label.sum() >= 30 and label.any((1, 2)).sum() >= 3
        )
        assert all(np.isfinite(d).all() for d in parts.values())
        inside = label > 0
        for organ in ("spine", "windpipe"):
            assert not (parts[organ][inside] < 0).any()  # bone and air stay as they are
        assert (parts["cavity"][inside] <= 3).all()  # not beyond the wall
    touching = np.mean(
        [
            np.abs(q["lung"][y > 0]).min() < 3 and (q["lung"][y > 0] > 0).any()
            for _, y, q in drawn[modality]
        ]
    )
    assert touching > 0.5  # most tumours touch mediastinum or wall


def test_the_collection_is_one_of_volumes():
    c = open_collection("phantom:chest", "ct", patients=2)
    assert (
        c.dims == 3
        and c.channels == 1
        and c.classes == ("background", "tumour")
        and c.label_kind == "semantic"
    )
    assert c[0].spacing == (5.0, 3.0, 3.0) and c.groups == c.ids and len(c.slices(keep="all")) == 20
    assert (
        c[0].image.max() <= 1 and c[0].label.shape == (10, 64, 64) and c.native(0).image.min() >= 0
    )
    assert (
        c.fingerprint()
        == chest("ct", patients=2).fingerprint()
        != chest("mr", patients=2).fingerprint()
    )
    assert open_collection("phantom:chest", "ct", patients=2, classes=("rest", "lesion"), zoom=0.5)[
        0
    ].image.shape == (1, 10, 32, 32)
    thin = chest("mr", patients=1, knobs=dict(size=48, slices=8, thickness=4.0, pixel=4.0))
    assert thin[0].image.shape == (1, 8, 48, 48) and thin[0].spacing == (4.0, 4.0, 4.0)


def test_the_contrast_of_mr_is_several_times_that_of_ct(drawn):
    ratio = {}
    for m, volumes in drawn.items():
        found = []
        for image, _, q in volumes:
            clear = np.all(
                [
                    q[n] > 3
                    for n in ("lung", "spine", "ribs", "windpipe", "nodes", "collapse", "fluid")
                ],
                axis=0,
            ) & (q["body"] < -14)
            t = image[q["tumour"] < -1.5]
            s = image[clear & (q["tumour"] > 3) & (q["tumour"] < 12)]
            if len(s) > 20:
                found.append((t.mean() - s.mean()) / ((t.var() + s.var()) / 2) ** 0.5)
        ratio[m] = np.mean(found)
    assert ratio["mr"] > 3 * abs(ratio["ct"]) and abs(ratio["ct"]) < 1.5
    for image, _, q in drawn["ct"]:
        assert (
            image[q["tumour"] < -1.5].mean()
            - image[(q["lung"] < -9) & (q["tumour"] > 9) & (q["vessels"] > 6)].mean()
            > 0.3
        )


def test_a_knob_changes_what_it_names_and_nothing_else(drawn):
    image, label, _ = draw_chest("ct", patient=2, knobs=ChestKnobs(ct_tumour=150.0))
    assert np.array_equal(label, drawn["ct"][2][1])
    change = image - drawn["ct"][2][0]
    assert (
        change[drawn["ct"][2][2]["tumour"] < -3].mean() == pytest.approx(93 / 1500, abs=0.01)
        and np.abs(change[drawn["ct"][2][2]["tumour"] > 12]).max() < 1e-3
    )
    still = [draw_chest("mr", patient=p, knobs=ChestKnobs(patient=0))[2]["cavity"] for p in (0, 1)]
    assert np.array_equal(*still)
    quiet = ChestKnobs(second=0, nodes=0, lookalike=0, collapse=0, effusion=0, branches=0)
    parts = draw_scene(Person(0, "ct", 0), quiet)
    assert all((parts[n] > 0).all() for n in ("nodes", "collapse", "fluid", "vessels")) and set(
        TISSUES
    ) - {"air", "fat", "muscle"} <= set(parts)


@pytest.mark.parametrize(
    "knobs",
    [
        dict(size=32, pixel=6.0),
        dict(slices=5),
        dict(radius=(6, 7)),
        dict(radius=(20, 40)),
        dict(wobble=1.0),
        dict(free=1.0, wall=0),
        dict(second=1.0),
        dict(wall=1.0, free=0.0),
    ],
)
def test_extreme_knobs_still_give_a_tumour(knobs):
    for p in range(2):
        image, label, _ = draw_chest("ct", seed=5, patient=p, knobs=ChestKnobs(**knobs))
        assert np.isfinite(image).all() and label.any()


def test_the_distance_to_a_sphere_is_exact():
    z, y, x = voxel_positions(ChestKnobs())
    assert np.allclose(
        ellipsoid((z, y, x), (5, 3, 1), (12, 12, 12), 0.7),
        np.maximum(np.sqrt((z - 5) ** 2 + (y - 3) ** 2 + (x - 1) ** 2) - 12, -12),
        atol=1e-2,
    )


def test_readers_agree_about_as_much_as_people(drawn):
    pairs = []
    for p, (_, label, _) in enumerate(drawn["mr"]):
        m = simulate_readers(label, case=p)
        assert m.shape == (5, *label.shape) and m.dtype == bool and m.any((1, 2, 3)).all()
        pairs += [dice(m[i], m[j]) for i in range(5) for j in range(i)]
    assert 0.7 < np.mean(pairs) < 0.95 and np.mean(pairs) < 0.9


def test_readers_are_a_function_of_their_seed(drawn):
    label = drawn["ct"][0][1]
    first = simulate_readers(label, seed=1)
    assert (
        np.array_equal(first, simulate_readers(label, seed=1))
        and not np.array_equal(first, simulate_readers(label, seed=2))
        and not np.array_equal(first, simulate_readers(label, seed=1, case=1))
    )
    assert np.array_equal(
        first[:2], simulate_readers(label, number=2, seed=1)
    )  # a further reader changes no other
    assert (
        simulate_readers(label, knobs=ReaderKnobs(bias=0, shake=0, extent=0)) == (label > 0)
    ).all()


def test_a_habit_is_the_same_in_all_cases(drawn):
    wide = np.array(
        [
            [
                m.sum() / y.sum()
                for m in simulate_readers(y, case=p, knobs=ReaderKnobs(shake=0, extent=0, bias=3.0))
            ]
            for p, (_, y, _) in enumerate(drawn["ct"][:4])
        ]
    )
    assert (
        (wide > 1.02).all(0) | (wide < 0.98).all(0) | (np.abs(wide - 1) < 0.1).all(0)
    ).all() and np.ptp(wide.mean(0)) > 0.2


def test_readers_of_one_slice_and_of_a_structure_at_the_border():
    square = np.zeros((40, 40), int)
    square[:12, 10:30] = 1
    m = simulate_readers(square, number=3, spacing=(3.0, 3.0))
    assert m.shape == (3, 40, 40) and all(dice(a, square > 0) > 0.7 for a in m)
    assert simulate_readers(np.ones((4, 8, 8)), number=2).any((1, 2, 3)).all()
    dot = np.zeros((3, 9, 9))
    dot[1, 4, 4] = 1
    assert simulate_readers(dot, number=8).any((1, 2, 3)).all()  # nobody returns an empty mask


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: chest("pet"), "Known: ct, mr"),
        (lambda: draw_chest("CT"), "unknown modality"),
        (lambda: chest("ct", patients=0), "patients=0"),
        (lambda: chest("ct", knobs={"ct_nois": 1}), "ct_noise"),
        (lambda: ChestKnobs(size=8), "at least 32"),
        (lambda: ChestKnobs(ct_noise=-1), "ct_noise"),
        (lambda: ChestKnobs(wobble=2), "share"),
        (lambda: ChestKnobs(free=0.8, wall=0.8), "together"),
        (lambda: ChestKnobs(radius=(20, 10)), "smallest"),
        (lambda: ChestKnobs(radius=(10, 100)), "field of view"),
        (lambda: ReaderKnobs(shake=-1), "shake"),
        (lambda: ReaderKnobs(extent=1.5), "probability"),
        (lambda: simulate_readers(np.zeros((3, 9, 9))), "shows the structure"),
        (lambda: simulate_readers(np.ones(9)), "shape"),
        (lambda: simulate_readers(np.ones((2, 9, 9)), number=0), "number=0"),
        (lambda: simulate_readers(np.ones((2, 9, 9)), spacing=(3.0, 3.0)), "axes"),
        (lambda: open_collection("phantom:lung", "ct"), "bone, chest"),
        (lambda: open_collection("/no/such/place", "ct"), "phantom:chest"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises(InputError, match=says):
        call()
