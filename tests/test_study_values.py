"""What a study decides, by value: who is in which part, what an arm learns from, which arms of two
runs are one, what a finished training is. Tiny sets, no training."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import write_modality, write_pair

from unpaired_kd.core import InputError, digest
from unpaired_kd.networks.registry import weights_digest
from unpaired_kd.study.arms import Arm, list_arms, merge_arms
from unpaired_kd.study.building import draw_patches
from unpaired_kd.study.checks import check_study
from unpaired_kd.study.config import PatchConfig, StudyConfig
from unpaired_kd.study.joined import equal_data, explain_differences, join_runs
from unpaired_kd.study.parts import contents, open_both
from unpaired_kd.study.records import (
    check_data,
    check_table,
    keep_record,
    keep_tables,
    read_sealed,
    verified,
    write_sealed,
)
from unpaired_kd.study.rows import comparable_rows, find_guests, save_rows
from unpaired_kd.study.statistics import Paired, compare
from unpaired_kd.study.study import Study
from unpaired_kd.study.tables import evidence, published_table, summarise
from unpaired_kd.study.tasks import ArmTask, needs_expert
from unpaired_kd.study.trainings import TeacherTask, finished, pretrained_name

PEOPLE = [f"s{i}" for i in range(10)]
USUAL = dict(
    student="t1",
    teacher="t2",
    student_labels=2,
    label_unit="groups",
    test=3,
    teacher_test=1,
    patch=32,
    batch=2,
    steps=1,
    epochs=2,
    width=2,
    pairing="random",
    precision="fp32",
    data_options={"labels": "some"},
)


@pytest.fixture
def folder(tmp_path):
    "Ten people on the student's side, the last of them without one label; five others teach."
    place = write_pair(tmp_path / "set", list("abcde"), PEOPLE)
    (tmp_path / "set/t1/labels/s91.png").unlink()
    return place


def study_of(folder, arms=None, **changes):
    arms = arms or {"alone": {"method": "single"}}
    return Study(StudyConfig.from_flat(data=folder, arms=arms, **(USUAL | changes)))


# ---------------------------------------------------------------- parts
def groups(collection):
    return set(collection.groups)


def test_everybody_is_in_one_part(folder):
    data = study_of(folder, validation=1).data(0)
    parts = [data.student_train, data.student_valid, data.student_test, data.student_rest]
    assert [len(groups(c)) for c in parts] == [2, 1, 3, 4]
    assert sorted(g for c in parts for g in groups(c)) == PEOPLE
    assert "s9" in groups(data.student_rest)  # whoever lacks a label is only learned from
    assert [len(groups(c)) for c in (data.teacher_train, data.teacher_test)] == [4, 1]
    assert [len(c) for c in parts] == [4, 2, 6, 8]


def test_no_label_is_in_reach_where_none_is_used(folder):
    rest = study_of(folder).data(0).student_rest
    assert all(case.label is None and case.label_group == "" for case in rest.cases)


def test_a_limit_to_those_without_labels(folder):
    all_of_them = study_of(folder).data(0).student_rest
    few = study_of(folder, unlabelled=2).data(0).student_rest
    first = list(dict.fromkeys(all_of_them.groups))[:2]
    assert list(few.groups) == [g for g in all_of_them.groups if g in first]
    with pytest.raises(InputError, match="unlabelled=9: only 5 training groups"):
        study_of(folder, unlabelled=9).data(0)


def test_settings_are_chosen_on_training_patients(folder):
    test = study_of(folder).data(0)
    valid = study_of(folder, score_on="validation").data(0)
    scored = groups(valid.student_test)
    shown = groups(valid.student_rest)
    told = [g for g in dict.fromkeys(test.student_rest.groups) if g != "s9"]
    assert len(told) == 4 and len(scored) == 2 and scored == set(told[1::2])
    assert shown == set(told[::2]) | {"s9"}  # every second one may be learned from
    assert not scored & (groups(test.student_test) | groups(test.student_train))


@pytest.mark.parametrize("value,number", [(0.5, 4), (0.24, 2), (0.3, 3), (4, 4)])
def test_a_share_becomes_a_number_of_people(folder, value, number):
    assert len(groups(study_of(folder, test=value).data(0).student_test)) == number  # of nine


def test_data_are_what_files_hold(folder, tmp_path):
    config = study_of(folder).config
    before = contents(config.images)
    assert len(before) == 2 * (20 + 10) - 1 + 30  # files, and whose each image is
    write_modality(tmp_path / "more", ["x"], negative=True, images=1)
    (tmp_path / "more/images/x0.png").replace(tmp_path / "set/t1/images/s00.png")
    now = contents(config.images)  # opened anew
    assert {k for k in now if now[k] != before[k]} == {"t1/images/s00.png"}


def test_both_modalities_must_fit(folder, tmp_path):
    with pytest.raises(InputError, match="classes"):
        open_both(study_of(folder, classes=["background"]).config.images)


# ---------------------------------------------------------------- patches of a study
def test_brightness_stays_where_only_places_may_move(folder):
    data = study_of(folder).data(0).student_train
    turned = {"rotate": 0.0, "scale": 0.0, "shift": 0.0, "flip": 0.0, "rot90": False}
    config = PatchConfig(patch=32, batch=4, augment={**turned, "noise": 0.2})
    moved, still = (draw_patches(config, data, 0, "student", 1, m).batch(0) for m in (False, True))
    plain = draw_patches(
        PatchConfig(patch=32, batch=4, augment=turned), data, 0, "student", 1, True
    )
    assert not torch.equal(moved.image, still.image)
    assert torch.equal(still.image, plain.batch(0).image)
    assert len(still.image.unique()) == 2  # the two grey values of the pictures


def test_a_study_draws_what_its_arm_names(folder):
    arms = {"taught": {"method": "lotus"}, "alone": {"method": "single"}}
    study = study_of(folder, arms)
    found = ArmTask("taught", 0).patches(study)
    data = study.data(0)
    assert groups(found["student"].collection) == groups(data.student_train)
    assert groups(found["teacher"].collection) == groups(data.teacher_train)
    assert found["student"].stream == "student" and found["teacher"].stream == "teacher"
    assert "unlabelled" not in found
    alone = ArmTask("alone", 0).patches(study)["student"]  # every arm sees the same batches
    assert torch.equal(alone.batch(3).image, found["student"].batch(3).image)
    hidden = ArmTask("a", 0).patches(study_of(folder, {"a": {"method": "vpbsd"}}))["unlabelled"]
    assert groups(hidden.collection) == groups(data.student_rest)


def test_weights_of_an_arm_reach_its_loss(folder, tmp_path):
    arms = {"a": {"method": "lotus", "teacher": "placebo", "weights": {"ifv": 7.0}}}
    study = study_of(folder, arms)
    study.folder = tmp_path / "run"
    learner = ArmTask("a", 0).learner(study, "cpu", lambda row: None)
    assert learner.weights["ifv"] == 7.0
    assert learner.settings.epochs == 2 and learner.settings.steps == 1


def test_who_needs_an_expert():
    kinds = {
        "alone": dict(method="single"),
        "fine-tuned": dict(method="single", start="teacher"),
        "distilled": dict(method="lotus"),
        "placebo": dict(method="lotus", teacher="placebo"),
        "shuffled": dict(method="lotus", teacher="shuffled"),
        "peer": dict(method="cmedl"),
    }
    arms = list_arms(kinds)
    assert [a.name for a in arms if needs_expert(a)] == ["fine-tuned", "distilled", "shuffled"]


def test_teachers_are_shared_by_number(folder):
    study = study_of(folder, {"a": {"method": "lotus"}}, teachers=2)
    assert [ArmTask("a", s).before(study) for s in (0, 1, 2)] == [
        [TeacherTask(seed=0)],
        [TeacherTask(seed=1)],
        [TeacherTask(seed=0)],
    ]
    assert TeacherTask(seed=1).tested(study).ids == study.data(0).teacher_test.ids


def test_arms_share_a_teacher_that_was_trained_in_the_same_way(folder):
    arms = {
        "a": {"method": "vpbsd"},
        "b": {"method": "vpbsd", "weights": {"semi": 0.0}},
        "c": {"method": "vpbsd", "options": {"codes": 8}},
        "d": {"method": "vpbsd", "teacher": "placebo"},
        "e": {"method": "single"},
    }
    study = study_of(folder, arms)
    names = [pretrained_name(study, arm) for arm in study.config.arms]
    assert names[0] == names[1] != names[2] and names[3:] == ["", ""] and "" not in names[:3]


# ---------------------------------------------------------------- arms
def test_an_arm_that_reuses_a_training_has_its_options_and_its_own():
    options = {"width": 4, "blocks": 2}
    base, other = list_arms(
        {
            "R00": dict(method="cmedl", options=options, weights={"hint": 2.0}),
            "R25": dict(reuses="R00", options={"infer": "teacher_on_fake"}),
        }
    )
    assert other == Arm(
        "R25",
        "cmedl",
        options={**options, "infer": "teacher_on_fake"},
        weights={"hint": 2.0},
        reuses="R00",
    )
    for wrong in (dict(options={"width": 8}), dict(weights={"hint": 0.0}), dict(options={})):
        with pytest.raises(InputError, match="R25"):
            list_arms({"R00": base.record(), "R25": dict(reuses="R00", **wrong)})


def test_what_an_arm_does_not_say_its_base_says():
    base = dict(method="lotus", start="teacher", options={"tau": 4.0}, weights={"kl": 2.0})
    arms = merge_arms(
        {},
        {
            "more": dict(options={"stride": 2}, weights={"ifv": 0.0}),
            "other": dict(method="ummkd"),
            "blank": dict(teacher="placebo"),
            "gone": None,
        },
        base,
    )
    assert arms["more"] == dict(
        method="lotus",
        start="teacher",
        options={"tau": 4.0, "stride": 2},
        weights={"kl": 2.0, "ifv": 0.0},
    )
    assert arms["other"] == dict(method="ummkd", start="teacher")  # another method: no options
    assert (arms["blank"]["teacher"], arms["blank"]["start"]) == ("placebo", "placebo")
    assert arms["gone"] is None


# ---------------------------------------------------------------- checks
@pytest.mark.parametrize(
    "arms,changes,words",
    [
        ({"a": {"method": "lotus", "weights": {"klx": 1.0}}}, {}, "arm 'a'.*klx"),
        ({"a": {"method": "lotus", "start": "teacher"}}, {"teacher_width": 4}, "width 4.*width 2"),
        ({"a": {"method": "single"}}, {"early_stop": 2}, "early_stop needs validation"),
        ({"a": {"method": "single"}}, {"dims": 3}, "2-D images"),
        ({"a": {"method": "single"}}, {"patch": 30}, "multiple of 16"),
        ({"a": {"method": "single"}}, {"augment": {"flipp": 1.0}}, "Did you mean 'flip'"),
    ],
)
def test_what_would_fail_later(folder, arms, changes, words):
    study = study_of(folder, arms, **changes)
    with pytest.raises(InputError, match=words):
        check_study(study, [0])


def test_all_faults_of_the_images_are_found_before_the_first_epoch(folder, tmp_path):
    for name in ("t2/labels/b1.png", "t1/labels/s20.png"):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "set" / name)
    with pytest.raises(InputError) as e:
        check_study(study_of(folder, classes=["background", "square"]), [0])
    assert "b1.png" in str(e.value) and "s20.png" in str(e.value)  # all at once


# ---------------------------------------------------------------- records
def trained(place, name="alone", seed=0, **facts):
    "A finished training of two files."
    place = place / "checkpoints" / f"{name}-{seed}"
    place.mkdir(parents=True)
    (place / "last.pt").write_bytes(b"weights")
    (place / "metrics.csv").write_text("arm\nalone\n")
    usual = dict(cases=["a"], weights="w", data="d", study="s", lessons={}, arm=None)
    keep_record(place, ["last.pt", "metrics.csv"], ("arm", name, seed), **(usual | facts))
    return place


def test_a_finished_training_has_every_file_as_it_was(tmp_path):
    place = trained(tmp_path)
    task = ("arm", "alone", 0)
    assert verified(place, task)["cases"] == ["a"]
    with pytest.raises(InputError, match="another training, alone 0"):
        verified(place, ("arm", "alone", 1))
    (place / "last.pt").write_bytes(b"wEights")
    with pytest.raises(InputError, match="last.pt is not what it was"):
        verified(place, task)
    (place / "last.pt").unlink()
    assert verified(place, task) is None


def test_a_seal_is_over_everything(tmp_path):
    write_sealed(tmp_path / "a.json", {"lr": 0.1, "seeds": [0]})
    assert read_sealed(tmp_path / "a.json", "lr") == {"lr": 0.1, "seeds": [0]}
    with pytest.raises(InputError, match="holds no 'arms'"):
        read_sealed(tmp_path / "a.json", "arms")
    for change in ({"lr": 0.2}, {"more": 1}, {"seal": "0"}):
        record = json.loads((tmp_path / "a.json").read_text()) | change
        (tmp_path / "b.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="changed after it was written"):
            read_sealed(tmp_path / "b.json")


def test_a_student_of_another_teacher_is_not_finished(tmp_path):
    trained(tmp_path, "teacher", 0, weights="first")
    trained(tmp_path, "taught", 0, lessons={"teacher-0": "first"})
    assert finished(tmp_path, ArmTask("taught", 0))
    trained(tmp_path, "late", 0, lessons={"teacher-0": "second"})
    with pytest.raises(InputError, match="learned from other weights than those of .*teacher-0"):
        finished(tmp_path, ArmTask("late", 0))


def test_changes_of_the_data_are_listed(tmp_path):
    before = {f"f{i}": "1" for i in range(9)}
    write_sealed(tmp_path / "data.json", {"contents": before})
    assert check_data(tmp_path, before) and not check_data(tmp_path / "empty", before)
    now = {k: "2" for k in before} | {"new": "1"}
    now.pop("f8")
    with pytest.raises(InputError) as e:
        check_data(tmp_path, now)
    text = "8 changed: f0, f1, f2, f3, f4 and 3 more; 1 added: new; 1 removed: f8"
    assert text in str(e.value)


def test_a_training_of_other_data_is_refused(tmp_path):
    now = {"f": "1"}
    write_sealed(tmp_path / "data.json", {"contents": now})
    trained(tmp_path, data=digest(now, 64))
    assert check_data(tmp_path, now)
    trained(tmp_path, "late", data=digest({"f": "2"}, 64))
    with pytest.raises(InputError, match="late-0 was trained with other data"):
        check_data(tmp_path, now)


def test_a_table_is_as_it_was(tmp_path):
    for name in ("metrics.csv", "history.csv"):
        (tmp_path / name).write_text("arm\na\n")
    check_table(tmp_path / "metrics.csv")
    keep_tables(tmp_path)
    check_table(tmp_path / "metrics.csv")
    (tmp_path / "history.csv").write_text("arm\nb\n")
    with pytest.raises(InputError, match="history.csv is not what it was"):
        check_table(tmp_path / "history.csv")


# ---------------------------------------------------------------- two runs in one table
ROW = dict(arm="alone", seed=0, collection="t1", case="a", group="p", dsc=0.5)
ARM = Arm("x", "single").record()


def run_of(place, rows, arm=ARM, lr=0.001, data="d"):
    place.mkdir()
    record = {"study": {"data": data, "lr": lr}, "arms": {"alone": arm}, "seeds": [0, 1]}
    write_sealed(place / "config.json", record)
    write_sealed(place / "data.json", {"contents": {"a": data}})
    save_rows(place / "metrics.csv", rows)
    return place, rows


def names(runs):
    return [(r["arm"], r["seed"], r["dsc"]) for r in join_runs(dict(runs))]


def test_the_same_arm_of_two_runs_is_one(tmp_path):
    a = run_of(tmp_path / "a", [ROW])
    b = run_of(tmp_path / "b", [ROW | {"seed": 1, "dsc": 0.6}])
    assert names([a, b]) == [("alone", 0, 0.5), ("alone", 1, 0.6)]


@pytest.mark.parametrize(
    "other,why",
    [
        (dict(lr=0.002), "other lr"),
        (dict(arm={**ARM, "weights": {"seg": 2.0}}), "other arm"),
        (dict(data="e"), "other images"),
        (dict(rows=[ROW | {"dsc": 0.9}]), "other scores"),
    ],
)
def test_arms_that_differ_are_told_apart(tmp_path, other, why):
    rows = other.pop("rows", [ROW | {"seed": 1, "dsc": 0.6}])
    a = run_of(tmp_path / "a", [ROW])
    b = run_of(tmp_path / "b", rows, **other)
    assert [name for name, *_ in names([a, b])] == ["alone", "alone (b)"]
    assert f"'alone (b)' is not 'alone': {why}" in " ".join(explain_differences(dict([a, b])))


def test_what_a_run_lacks_is_named(tmp_path):
    run = run_of(tmp_path / "a", [ROW])
    assert explain_differences(dict([run])) == [
        f"{run[0]}: arm 'alone' has no scores of seed 1 yet."
    ]
    trained(run[0], cases=["a", "b", "c"])
    assert (
        "metrics.csv lacks 2 of 3 cases of alone 0, e.g. b" in explain_differences(dict([run]))[1]
    )


def test_runs_without_a_record_are_the_same_if_their_scores_are(tmp_path):
    a = (tmp_path / "a", [ROW])
    b = (tmp_path / "b", [ROW, ROW | {"case": "b"}])
    c = (tmp_path / "c", [ROW | {"case": "z"}])  # nothing in common: nothing says so
    assert [r["arm"] for r in join_runs(dict([a, b, c]))] == ["alone", "alone", "alone (c)"]
    with pytest.raises(InputError, match="two scores of case 'a'"):
        join_runs({tmp_path / "a": [ROW, ROW | {"dsc": 0.1}]})


def test_nan_is_nan():
    assert equal_data({"a": math.nan}, {"a": math.nan}) and not equal_data(
        {"a": math.nan}, {"a": 1.0}
    )


# ---------------------------------------------------------------- rows and statistics
def rows_of(values, arm, **more):
    "A row for each {(seed, case): score}; the case's first letter is its patient."
    return [
        dict(arm=arm, seed=s, case=c, group=c[0], collection="t1", dsc=v, **more)
        for (s, c), v in values.items()
    ]


ALONE = {
    (0, "a1"): 0.1,
    (0, "a2"): 0.3,
    (0, "b1"): 0.6,
    (1, "a1"): 0.3,
    (1, "a2"): 0.5,
    (1, "b1"): 0.8,
}
TAUGHT = {key: value + 0.1 + 0.1 * (key[1][0] == "b") for key, value in ALONE.items()}


def test_means_are_made_in_the_right_order():
    keys = sorted(ALONE)
    seeds, cases = (np.array(part) for part in zip(*keys))
    values = np.array([[ALONE[k] for k in keys]])
    paired = Paired(["alone"], values, seeds, cases, np.array([c[0] for c in cases]))
    assert paired.by("case")[0] == pytest.approx([0.2, 0.4, 0.7])  # over seeds
    assert paired.by("group")[0] == pytest.approx([0.3, 0.7])
    assert paired.by("seed")[0] == pytest.approx([0.4, 0.6])  # each patient once
    assert paired.by("both")[0] == pytest.approx(np.array([[0.2, 0.4], [0.6, 0.8]]))


def test_a_comparison_by_hand():
    rows = rows_of(ALONE, "alone") + rows_of(TAUGHT, "taught")
    base, found = compare(rows, "alone")
    assert base["mean"] == pytest.approx((0.2 + 0.4 + 0.7) / 3)
    assert found["difference"] == pytest.approx(0.15)  # patients: 0.1 and 0.2
    half = 12.706204736 * 0.05  # Student's t for one degree of freedom, standard error 0.05
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.15 - half, 0.15 + half))
    assert found["p_t"] == pytest.approx(0.2048327647)  # t = 3
    assert found["seed_differences"] == pytest.approx([0.15, 0.15])
    assert (found["n_cases"], found["n_groups"], found["n_seeds"]) == (3, 2, 2)


def test_evidence_has_both_questions():
    some = rows_of(TAUGHT | {(1, "a1"): 0.7}, "taught")
    rows = rows_of(ALONE, "alone") + some + rows_of({(0, "x1"): 0.9}, "teacher")
    (found,) = evidence(rows, "alone", ("dsc",))
    assert found["p_t"] == compare(rows_of(ALONE, "alone") + some, "alone")[1]["p_t"]
    both = compare(rows_of(ALONE, "alone") + some, "alone", unit="both")[1]
    assert found["p_both"] == both["p_t"] != found["p_t"]


def test_summary_by_hand():
    assert summarise(rows_of(ALONE, "a"), "dsc") == pytest.approx(
        (1.3 / 3, float(np.std([0.2, 0.4, 0.7], ddof=1)), 3)
    )
    holes = rows_of(ALONE | {(0, "a1"): math.nan}, "a")
    assert summarise(holes, "dsc")[0] == pytest.approx((0.3 + 0.4 + 0.7) / 3)


def test_gains_beside_published_ones():
    rows = rows_of(ALONE, "alone") + rows_of(TAUGHT, "taught")
    text = published_table(rows, {"alone": {"dsc": 50.0}, "taught": {"dsc": 47.5}})
    line = next(x for x in text.splitlines() if x.startswith("| taught"))
    texts = [x.strip() for x in line.strip("|").split("|")]
    assert texts[1] == "56.7" and texts[2].startswith("+15.0 [") and texts[4:] == ["47.50", "-2.50"]
    assert "+1.00" not in text and "-1.00" in text  # the order is the other way round


def test_who_can_be_compared():
    rows = rows_of(ALONE, "alone") + rows_of({(0, "a1"): 0.5}, "part")
    rows += rows_of({(0, "x1"): 0.5}, "teacher")
    assert find_guests(rows, "alone") == {"teacher": "t1"}
    rows = rows_of(ALONE, "alone") + rows_of(ALONE | {(0, "a2"): math.nan}, "taught")
    some, shared, holes = comparable_rows(rows, "alone", "dsc")
    assert holes == {(0, "a2", "a")} and len(shared) == 5 and len(some) == 12
    none = rows_of(dict.fromkeys(ALONE, math.nan), "empty")
    assert comparable_rows(rows + none, "alone", "dsc")[0] == some  # left out itself


def test_a_student_that_reuses_a_training_is_asked_in_its_own_way(folder, tmp_path):
    arms = {
        "R00": dict(method="cmedl", options={"width": 2, "blocks": 1, "cx_on": "teacher"}),
        "R25": dict(reuses="R00", options={"infer": "teacher_on_fake"}),
    }
    study = study_of(folder, arms)
    study.folder = tmp_path / "run"
    kinds = {}
    for name in arms:
        task = ArmTask(name, 0)
        learner = task.learner(study, "cpu", lambda row: None)
        assert learner.folder == tmp_path / "run/checkpoints/R00-0"
        learner.best_student = lambda: None
        kinds[name] = task.student(study, learner).network
    assert weights_digest(kinds["R00"]) != weights_digest(kinds["R25"])
