"""Properties of the bone phantoms that would not teach: purity, sizes, extreme knobs, bad input,
lean imports."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from unpaired_kd.core import InputError
from unpaired_kd.data.phantoms.bone import (
    BONE_GROUPS,
    FAR,
    PAINT,
    BoneKnobs,
    bone,
    bone_image,
    coverage,
    place_shapes,
    signed_distance,
)


@pytest.mark.parametrize("modality", PAINT)
def test_an_image_is_a_function_of_its_address(modality):
    image, instances = bone_image(modality, "covid", seed=3, patient=2, index=1)
    np.random.seed(1)  # the global state plays no part
    again = bone_image(modality, "covid", seed=3, patient=2, index=1)
    assert np.array_equal(image, again[0]) and np.array_equal(instances, again[1])
    for other in (dict(seed=4), dict(patient=3), dict(index=0)):
        changed = bone_image(modality, "covid", **{**dict(seed=3, patient=2, index=1), **other})
        assert not np.array_equal(instances, changed[1])


@pytest.mark.parametrize("modality, channels", [("histology", (3,)), ("microct", ())])
@pytest.mark.parametrize("size", [32, 96, 130])
def test_shapes_types_and_numbers(modality, channels, size):
    for group in BONE_GROUPS:
        image, instances = bone_image(modality, group, knobs=BoneKnobs(size=size))
        assert image.shape == (size, size) + channels and image.dtype == np.uint8
        assert instances.shape == (size, size) and instances.dtype == np.int32
        assert set(np.unique(instances)) == set(range(instances.max() + 1))  # no number is skipped


def test_the_number_of_lacunae_follows_the_area_and_the_knob():
    def count(**k):
        return np.mean(
            [
                bone_image("microct", "healthy", patient=p, knobs=BoneKnobs(**k))[1].max()
                for p in range(8)
            ]
        )

    assert 8 <= count() <= 20
    assert 2.8 < count(size=192) / count() < 5.2
    assert count(count=6) < 0.65 * count()


def test_instances_never_touch():
    for p in range(6):
        y = bone_image("microct", "covid", patient=p, knobs=BoneKnobs(count=60, gap=2.0))[1]
        for a, b in (
            (y[1:], y[:-1]),
            (y[:, 1:], y[:, :-1]),
            (y[1:, 1:], y[:-1, :-1]),
            (y[1:, :-1], y[:-1, 1:]),
        ):
            assert not ((a != b) & (a > 0) & (b > 0)).any()


@pytest.mark.parametrize("modality", PAINT)
def test_the_target_is_darker_than_what_surrounds_it(modality):
    from scipy.ndimage import binary_dilation

    for p in range(6):
        image, y = bone_image(modality, "healthy", patient=p)
        grey = image.reshape(96, 96, -1)[..., 0].astype(float)
        inside = y > 0
        around = binary_dilation(inside, iterations=4) & ~binary_dilation(inside, iterations=1)
        assert grey[inside].mean() < grey[around].mean()


def test_without_differences_between_patients_the_pixels_have_one_distribution():
    def means(**k):
        return np.std(
            [
                bone_image(
                    "microct", "healthy", patient=p, knobs=BoneKnobs(marrow=0, pores=0, **k)
                )[0].mean()
                for p in range(12)
            ]
        )

    assert means(patient=0) < 0.6 * means()


def test_knobs_at_their_limits_still_draw():
    nothing = dict(
        pores=0,
        marrow=0,
        specks=0,
        smears=0,
        marrow_cells=0,
        cracks=0,
        spots=0,
        count=0,
        rings=0,
        noise=0,
        drift=0,
        fringe=0,
        blur=0,
        mottle=0,
        wobble=0,
        gap=0,
    )
    crowd = dict(pores=8, marrow=1, specks=60, smears=30, cracks=20, spots=60, count=80, filled=1)
    for modality in PAINT:
        for knobs in (nothing, crowd):
            image, y = bone_image(modality, "healthy", knobs=BoneKnobs(**knobs))
            assert image.std() > 0 and y.max() >= 1


def test_place_keeps_clear_of_what_is_there_and_stops_in_time():
    row = np.array([[20.0, x, 4.0, 3.0, 0.0, 0.0, 0.0] for x in (10, 18, 26, 34)])
    free = np.full((40, 40), FAR, np.float32)
    assert len(place_shapes(row, free, 2.0, 99)[2]) == 2  # neighbours are 8 px apart, and touch
    assert len(place_shapes(row, free, 2.0, 1)[2]) == 1
    free[:, :16] = -1
    assert place_shapes(row, free, 2.0, 99)[2][0, 1] == 26
    near, number, kept = place_shapes(row[:0], free, 2.0, 99)
    assert (near == FAR).all() and not number.any() and not len(kept)


def test_the_area_of_a_shape_does_not_depend_on_where_it_falls_in_the_pixel_grid():
    grid = np.arange(40.0)
    area = [
        coverage(
            signed_distance(
                np.array([[20 + t, 20 - t, 7.0, 4.0, t, 0.1, 1.0]]), grid[:, None], grid
            )
        ).sum()
        for t in np.linspace(0, 1, 9)
    ]
    assert np.ptp(area) < 0.01 * np.mean(area)


def test_bone_is_a_collection_of_patients():
    c = bone(
        "histology", patients=4, images_per_patient=2, seed=5, knobs={"size": 64, "pixel": 0.5}
    )
    assert len(c) == 8 and len(set(c.ids)) == 8 and len(set(c.groups)) == 4
    assert {s.label_group for s in c} == set(BONE_GROUPS)
    s = c[0]
    assert tuple(s.image.shape) == (3, 64, 64) and 0 <= s.image.min() and s.image.max() <= 1
    assert set(s.label.unique().tolist()) == {0, 1} and s.instances.max() > 1
    assert s.spacing == (0.0005, 0.0005)
    image, instances = bone_image(
        "histology", s.label_group, seed=5, knobs=BoneKnobs(size=64, pixel=0.5)
    )
    assert np.array_equal(s.instances.numpy(), instances)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: bone_image("mr", "healthy"), "histology"),
        (lambda: bone_image("microct", "healty"), "healthy"),
        (lambda: BoneKnobs(size=16), "size"),
        (lambda: BoneKnobs(pore_radius=(-1.0, 5.0)), "pore_radius"),
        (lambda: BoneKnobs(faint=2), "faint"),
        (lambda: replace(BoneKnobs(), photons=0), "photons"),
        (lambda: bone("microct", knobs={"ring": 1}), "rings"),
        (lambda: bone("microct", images_per_patient=0), "images_per_patient"),
    ],
)
def test_bad_input_is_named(call, word):
    with pytest.raises(InputError, match=word):
        call()


def test_import_is_lean():
    code = """
import sys, unpaired_kd.data.phantoms.bone, unpaired_kd.data.augment
heavy = ("scipy", "matplotlib", "monai", "unpaired_kd.data.collections")
print([m for m in heavy if m in sys.modules])
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
