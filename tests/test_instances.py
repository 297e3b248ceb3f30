"""Objects from class maps: properties of the cut, decisions about organs and cells, and the road
from a student to its instance maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from unpaired_kd.core import InputError, rng
from unpaired_kd.data.collections import Collection
from unpaired_kd.data.formats.images import Image, read_label
from unpaired_kd.data.formats.writing import write_image
from unpaired_kd.data.instances import INSTANCES, find_instances, number_objects
from unpaired_kd.data.layouts import Case
from unpaired_kd.data.phantoms.nuclei import toy_nuclei
from unpaired_kd.inference.files import predict_path
from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.metrics.segmentation import components, instance_scores
from unpaired_kd.study.scoring import evaluate


def disc(*centre, radius=10, shape=(48, 64)):
    grid = np.indices(shape)
    return sum((g - c) ** 2 for g, c in zip(grid, centre)) <= radius**2


PAIR = disc(24, 20) | disc(24, 38)  # two discs that touch
KINDS = ("background", "positive", "negative")


def random_map(seed, shape=(40, 50), classes=3):
    noise = ndimage.gaussian_filter(
        rng(seed, "map").standard_normal((classes, *shape)), (0, *[2] * len(shape))
    )
    return noise.argmax(0)


@pytest.mark.parametrize("method", list(INSTANCES))
@pytest.mark.parametrize("seed, shape", [(0, (40, 50)), (1, (33, 7)), (2, (10, 16, 18))])
def test_every_object_has_one_class_one_number_and_one_piece(method, seed, shape):
    y = random_map(seed, shape)
    found = number_objects(y, method)
    assert found.dtype == np.int32 and found.shape == y.shape
    assert (np.unique(found) == np.arange(found.max() + 1)).all()  # 1..n without gaps
    assert ((found > 0) == (y > 0)).all()  # no pixel lost or invented
    for n in range(1, found.max() + 1):
        assert len(np.unique(y[found == n])) == 1
        if method != "none":
            assert components(found == n).max() == 1
    assert (number_objects(y.copy(), method) == found).all()  # deterministic


def test_the_default_is_what_components_were():
    for seed in range(3):
        y = random_map(seed, classes=2)
        assert (number_objects(y) == components(y)).all()
        for size in (0, 1, 2, 30):
            assert (number_objects(y, min_size=size) == components(y, size)).all()


def test_the_watershed_parts_touching_discs_and_components_do_not():
    truth = np.where(disc(24, 20), 1, 2 * disc(24, 38))
    assert number_objects(PAIR).max() == 1 and number_objects(PAIR, "watershed").max() == 2
    assert instance_scores(number_objects(PAIR, "watershed"), truth)["aji"] > 0.97
    p, t = toy_nuclei(60, 320, seed=5)
    scores = [
        instance_scores(number_objects(t > 0, m), t)["aji"] for m in ("components", "watershed")
    ]
    assert scores[1] > scores[0] + 0.1 and scores[1] > 0.93


@pytest.mark.parametrize(
    "mask", [np.zeros((8, 9), bool), np.ones((8, 9), bool), np.eye(6, dtype=bool), np.array([[1]])]
)
def test_the_watershed_on_odd_masks(mask):
    found = number_objects(mask, "watershed")
    assert ((found > 0) == (mask > 0)).all()
    if not mask.any():
        assert found.max() == 0 and found.dtype == np.int32


def test_a_small_cell_beside_a_large_one_keeps_its_marker():
    y = disc(24, 24, radius=14) | disc(
        24, 42, radius=2
    )  # not connected, but closer than the large radius
    assert components(y).max() == 2 and number_objects(y, "watershed", min_distance=30).max() == 2


def test_classes_stay_apart_and_can_be_chosen():
    y = np.where(disc(24, 20), 2, np.where(disc(24, 38), 1, 0))
    found = number_objects(y)
    assert found.max() == 2 and found[24, 38] == 1 and found[24, 20] == 2  # class 1 first
    assert (number_objects(y, classes=(2,)) > 0).sum() == (y == 2).sum()
    assert number_objects(y, classes=(7,)).max() == 0
    with pytest.raises(InputError, match="classes"):
        number_objects(y, classes=(0, 1))


def test_small_objects_go_and_numbers_close_up():
    y = np.zeros((9, 20), int)
    y[1, 1:3] = 1
    y[1:5, 6:10] = 1
    y[6:8, 12:14] = 2
    y[1:4, 15:19] = 2
    found = number_objects(y, min_size=5)
    assert (
        np.unique(found).tolist() == [0, 1, 2]
        and found[2, 7] == 1
        and found[2, 16] == 2
        and found[1, 1] == 0
        and found[6, 12] == 0
    )


def test_holes_are_filled_only_if_small_and_free():
    y = disc(24, 24, radius=15).astype(int)
    y[20:22, 20:22] = 0
    y[26:34, 20:28] = 0
    y[15, 24] = 2
    assert number_objects(y)[20, 20] == 0
    found = number_objects(y, max_hole=4)
    assert found[20, 20] == 1 and found[30, 24] == 0  # 4 px filled, 64 px not
    assert found[15, 24] == 2  # another class is no hole


def test_probabilities_tensors_and_refusals():
    y = random_map(3)
    p = np.moveaxis(np.eye(3)[y], -1, 0) * 0.8 + 0.2 / 3
    assert (number_objects(p) == number_objects(y)).all() and (
        number_objects(torch.tensor(p)) == number_objects(y)
    ).all()
    for bad, words in (
        (p[1], "p > 0.5"),
        (p * 2, "sum to 1"),
        (-y, "negative"),
        (y.astype(float), "neither"),
    ):
        with pytest.raises(InputError, match=words):
            number_objects(bad)
    for settings in (
        dict(min_size=-1),
        dict(max_hole=-1),
        dict(min_distance=float("nan")),
        dict(spacing=(1, 0)),
        dict(spacing=(1, 1, 1)),
        dict(method="water"),
    ):
        with pytest.raises(InputError):
            number_objects(y, **settings)


def test_thick_slices_are_measured_in_millimetres():
    z, y, x = np.indices((8, 40, 80)) * np.array([5.0, 1, 1])[:, None, None, None]

    def ball(c):
        return (z - 20) ** 2 + (y - 20) ** 2 + (x - c) ** 2 <= 14**2

    both = ball(20) | ball(45)
    assert number_objects(both, "watershed", spacing=(5, 1, 1)).max() == 2
    assert (
        number_objects(both, "watershed", spacing=(0.5, 0.1, 0.1))
        == number_objects(both, "watershed", spacing=(5, 1, 1))
    ).all()  # only ratios


def test_long_cells_are_cut_as_the_chapter_says():
    bar = np.zeros((20, 70), int)
    bar[8:13, 3:67] = 1
    assert (
        number_objects(bar, "components").max() == 1
        and number_objects(bar, "watershed", min_distance=70).max() == 1
    )


# who decides what is an object


def test_organs_and_cells():
    y = np.array([[1, 1, 0, 1, 0, 2]])
    assert find_instances(y, KINDS) is y  # organs, as always
    assert (
        find_instances(y, KINDS, has_objects=True).max() == 3
        and find_instances(y, KINDS, method="watershed").max() == 3
    )
    assert find_instances(y, KINDS, method="watershed", has_objects=False) is y
    assert (
        find_instances(y > 0, KINDS[:2]).max() == 3
        and find_instances((y > 0) * 1, KINDS[:2], method="none").max() == 1
    )
    assert (
        find_instances((y > 0) * 1, KINDS[:2], has_objects=False).max() == 3
    )  # two classes: always objects


def three_classes(n=2, **kw):
    y = np.where(disc(24, 20), 1, np.where(disc(24, 38), 2, 0))
    y[40:46, 2:12] = 1
    return Collection(
        [Case(f"c{i}", group=f"c{i}", image=y.astype(np.uint8)[None], label=y) for i in range(n)],
        name="toy",
        classes=KINDS,
        **kw,
    )


def stub(instances="components", predict=lambda x: x[0], classes=KINDS):
    return SimpleNamespace(
        predict=predict, recipe=SimpleNamespace(classes=classes, min_size=0, instances=instances)
    )


def test_evaluate_has_a_dice_for_each_of_three_classes():
    def half(x):
        return np.where(x[0] == 2, 0, x[0])  # misses class 2

    row = evaluate(stub(predict=half), three_classes(), "a", 0)[0]
    assert row["dsc_positive"] == 1 and row["dsc_negative"] == 0 and row["dsc"] == 0.5
    assert row["aji"] < 1 and 0 < row["pq"] < 1


def test_evaluate_follows_the_recipe_and_cells():
    def merge(x):
        return np.where(x[0] > 0, 1, 0)  # all cells positive: two of three still apart

    organ = evaluate(stub(predict=merge), three_classes(), "a", 0)[0]
    cells = evaluate(stub(predict=merge), three_classes(), "a", 0, has_objects=True)[0]
    water = evaluate(stub("watershed", predict=merge), three_classes(), "a", 0)[0]
    assert (
        water["aji"] > 0.97 > cells["aji"] and water["pq"] > 0.97
    )  # three objects found, whatever their class
    assert organ["pq"] != cells["pq"] and water["dsc"] == organ["dsc"]


def test_drawn_cells_are_the_truth_and_the_recipe_cuts_the_prediction():
    drawn = np.where(disc(24, 20), 1, np.where(disc(24, 38), 2, 0))
    c = Collection(
        [Case("c", group="c", image=(drawn > 0).astype(np.uint8)[None], label=drawn)],
        name="cells",
        classes=("background", "cell"),
        label_kind="instance",
    )
    score = {
        m: evaluate(stub(m, classes=c.classes), c, "a", 0)[0]["pq"]
        for m in ("components", "watershed", "none")
    }
    assert (
        score["watershed"] > 0.97 and score["components"] < 0.5 and score["none"] == 1
    )  # nothing cut: one region against one region
    assert (
        evaluate(SimpleNamespace(predict=lambda x: x[0]), c, "a", 0)[0]["pq"] == score["components"]
    )  # no recipe: the default


# students


class Brightness(torch.nn.Module):
    "Three scores from the grey value: background below a third, then positive, then negative."

    stride = 1

    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.tensor([0.0, 0.5, 1.0]))

    def forward(self, x):
        return -((x[:, :1] - self.at[:, None, None]) ** 2) * 99


def grey():
    return np.where(disc(24, 20), 128, np.where(disc(24, 38), 255, 0)).astype(np.uint8)


def test_a_student_numbers_its_objects(tmp_path):
    def make(**kw):
        return Student(
            Brightness(), Recipe(channels=1, in_channels=1, classes=KINDS, patch=64, **kw)
        )

    student = make(instances="watershed")
    label = student.predict(grey())
    found = student.instances(grey())
    assert found.dtype == np.int32 and found.max() == 2 and ((found > 0) == (label > 0)).all()
    assert make(instances="watershed", min_size=10**4).instances(grey()).max() == 0
    assert (make(min_size=10**4).instances(grey()) == label).all()  # organs: no size limit
    assert make().instances(grey(), has_objects=True).max() == 2
    write_image(tmp_path / "a.tif", Image(grey()[None], (0.5, 0.5)))
    assert (student.instances(tmp_path / "a.tif") == found).all()
    done = predict_path(student, tmp_path / "a.tif", tmp_path / "out", bars=False, instances=True)
    assert [p.name for p in done] == ["a.tif"] and (
        read_label(tmp_path / "out" / "a_instances.tif").array == found
    ).all()
    predict_path(student, tmp_path / "a.tif", tmp_path / "plain", bars=False)
    assert [p.name for p in (tmp_path / "plain").iterdir()] == ["a.tif"]
    write_image(tmp_path / "in" / "a.tif", Image(grey()[None], None))
    write_image(tmp_path / "in" / "a_instances.tif", Image(grey()[None], None))
    with pytest.raises(InputError, match="a_instances"):
        predict_path(student, tmp_path / "in", tmp_path / "both", bars=False, instances=True)


def test_old_recipes_load_and_wrong_methods_do_not():
    assert Recipe.load({"min_size": 3}).instances == "components"
    with pytest.raises(InputError, match="watershed"):
        Recipe.load({"instances": "watersheds"})
    with pytest.raises(InputError):
        Recipe(instances=None)


def test_the_command_writes_instance_maps(tmp_path):
    from unpaired_kd.command import cli
    from unpaired_kd.networks.unet import UNet

    torch.manual_seed(0)
    net = UNet(in_channels=3, classes=1, width=4)
    image = rng(0, "a").integers(0, 255, (40, 50)).astype(np.uint8)
    student = Student(net, Recipe(patch=32, network_config=net.config, instances="watershed"))
    p = student.probabilities(image)[1]
    with torch.no_grad():
        [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)][-1].bias -= float(
            np.log(np.median(p) / (1 - np.median(p)))
        )  # half foreground
    student.save(tmp_path / "student")
    write_image(tmp_path / "a.tif", Image(image[None], None))
    assert (
        cli.main(
            [
                "predict",
                str(tmp_path / "student"),
                str(tmp_path / "a.tif"),
                str(tmp_path / "out.tif"),
                "--device",
                "cpu",
                "--instances",
            ]
        )
        == 0
    )
    student = Student.load(tmp_path / "student", "cpu")
    assert student.recipe.instances == "watershed"
    label, found = (read_label(tmp_path / n).array for n in ("out.tif", "out_instances.tif"))
    assert label.any() and (found == number_objects(label, "watershed")).all()
