"Two modalities of the same people: whom a study keeps from the teacher, and the rows R31 to R34."

import pytest
from small_sets import write_pair

from unpaired_kd.core import InputError
from unpaired_kd.methods.published import arm_of, row_of
from unpaired_kd.study.checks import check_study
from unpaired_kd.study.config import StudyConfig
from unpaired_kd.study.run import run_study
from unpaired_kd.study.study import Study
from unpaired_kd.study.trainings import TeacherTask

PEOPLE = [f"p{i}" for i in range(8)]
SIZES = {"width": 2, "blocks": 1, "seg": "common", "cx_on": "teacher"}


@pytest.fixture
def both(tmp_path):
    "t1/ and t2/ of the same eight people, two images each."
    return write_pair(tmp_path / "set", PEOPLE, PEOPLE)


def study_of(data, arms, **changes):
    usual = dict(
        student="t1",
        teacher="t2",
        student_labels=2,
        test=3,
        patch=32,
        batch=2,
        steps=1,
        epochs=2,
        teacher_epochs=1,
        width=2,
        pairing="random",
        precision="fp32",
    )
    return StudyConfig.from_flat(data=data, arms=arms, **(usual | changes))


@pytest.mark.parametrize("score_on", ["test", "validation"])
def test_only_whom_the_student_is_tested_on_is_kept_from_the_teacher(both, score_on):
    arms = {"alone": {"method": "single"}}
    config = study_of(both, arms, teacher_test=0, validation=1, score_on=score_on)
    for seed in (0, 1):
        data = Study(config).data(seed)
        scored = set(data.student_test.groups) | set(data.student_valid.groups)
        tested = set(Study(config.change(score_on="test")).data(seed).student_test.groups)
        assert set(data.teacher_train.groups) == set(PEOPLE) - scored - tested
        assert set(data.student_train.groups) <= set(data.teacher_train.groups)
    tests = [Study(config).data(seed).student_test.groups for seed in (0, 1)]
    assert tests[0] != tests[1]


def test_a_share_of_those_that_are_left(both):
    config = study_of(both, {"alone": {"method": "single"}}, teacher_test=0, teacher_share=0.4)
    assert len(set(Study(config).data(0).teacher_train.groups)) == 2  # of five


def test_nobody_left_for_the_teacher(both):
    config = study_of(both, {"alone": {"method": "single"}}, test=6, teacher_test=6)
    with pytest.raises(InputError, match="nobody is left for the teacher"):
        check_study(Study(config), [0, 1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("alone,taught", [("R31", "R32"), ("R33", "R34")])
def test_rows_of_equal_teachers_run(both, tmp_path, alone, taught):
    rows = [row_of("cmedl", name) for name in (alone, taught)]
    assert rows[0].study == rows[1].study
    arms = {row.name: arm_of(row, SIZES) for row in rows}
    config = study_of(both, arms, **rows[0].study)
    found = run_study(tmp_path / "run", config, [0, 1], workers=1)
    assert {(r["arm"], r["seed"]) for r in found} == {
        (a, s) for a in (alone, taught) for s in (0, 1)
    }
    for seed in (0, 1):
        tested = {r["group"] for r in found if r["seed"] == seed}
        assert len(tested) == 3
        assert not tested & set(Study(config).data(seed).teacher_train.groups)


def test_an_expert_never_sees_whom_its_students_are_tested_on(both):
    arms = {"distilled": {"method": "lotus"}}
    study = Study(study_of(both, arms, teachers=2))
    check_study(study, [0, 1])
    for seed in (0, 1):
        teacher = TeacherTask(seed=seed)
        assert teacher.split(study) == seed
        seen = set(study.data(teacher.split(study)).teacher_train.groups)
        assert seen and not seen & set(study.data(seed).student_test.groups)
    with pytest.raises(InputError, match="seed 2 needs a teacher of its own.*teachers=3"):
        check_study(study, [0, 2])


def test_teachers_of_other_people_all_see_one_split():
    study = Study(StudyConfig.from_flat(arms={"distilled": {"method": "lotus"}}))
    assert not study.shared_patients and TeacherTask(seed=3).split(study) == 0
