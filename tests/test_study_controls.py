"""Every control is what it says, in the very batch that a student learns from: shuffled labels are
shuffled, a placebo knows nothing, the true teacher is the trained one."""

import pytest
import torch
from small_sets import write_pair

from unpaired_kd.methods.registry import method_class
from unpaired_kd.networks.registry import weights_digest
from unpaired_kd.study.config import StudyConfig
from unpaired_kd.study.school import School
from unpaired_kd.study.study import Study
from unpaired_kd.study.tasks import ArmTask, train
from unpaired_kd.study.trainings import PretrainTask, TeacherTask, pretrained_name
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.learner import Learner

USUAL = dict(
    student="t1",
    teacher="t2",
    student_labels=2,
    test=2,
    patch=32,
    batch=2,
    steps=2,
    epochs=2,
    teacher_epochs=1,
    width=2,
    pairing="random",
    precision="fp32",
)
SMALL = {"lotus": {}, "cmedl": {"width": 2, "blocks": 1, "cx_on": "teacher"}}
SHUFFLED = [name for name in SMALL if "shuffled" in method_class(name).teachers]


@pytest.fixture
def folder(tmp_path):
    return write_pair(tmp_path / "set", list("abcdef"), list("uvwxyz"))


def study_of(data, place, **arm):
    arm["options"] = SMALL.get(arm["method"], {})
    return Study(StudyConfig.from_flat(data=data, arms={"arm": arm}, **USUAL), place)


def watched(study, monkeypatch):
    "Train the arm; (learner, [(batch, digest of its teacher) of every update])."
    seen = []
    backward = Learner._backward

    def watch(self, update, batch, noise, share):
        networks = self.method.networks | self.method.frozen
        teacher = networks.get("teacher")
        seen.append((batch, teacher and weights_digest(teacher)))
        return backward(self, update, batch, noise, share)

    task = ArmTask("arm", 0)
    for other in task.before(study):
        train(study, other, "cpu")
    monkeypatch.setattr(Learner, "_backward", watch)
    learner = task.learner(study, "cpu", lambda row: None)
    learner.fit()
    monkeypatch.undo()
    return learner, seen


def true_batch(study, batch):
    "The same teacher images with their own labels."
    patches = study.patches(study.data(0).teacher_train, 0, "teacher")
    return patches.read(batch["teacher"].plan)


def test_two_methods_can_have_shuffled_labels():
    assert SHUFFLED == ["lotus", "cmedl"]


@pytest.mark.parametrize("method", SHUFFLED)
@pytest.mark.parametrize("teacher", ["shuffled", "true"])
def test_labels_of_the_teachers_images(folder, tmp_path, monkeypatch, method, teacher):
    study = study_of(folder, tmp_path / "run", method=method, teacher=teacher)
    _, seen = watched(study, monkeypatch)
    batches = [batch for batch, _ in seen if "teacher" in batch]
    assert len(batches) >= USUAL["steps"]
    for batch in batches:
        true = true_batch(study, batch)
        given = batch["teacher"]
        assert torch.equal(given.image, true.image)
        assert given.label.sum() == true.label.sum() > 0
        assert torch.equal(given.label, true.label) == (teacher == "true")
        student = study.patches(study.data(0).student_train, 0, "student")
        own = student.read(batch["student"].plan)
        assert torch.equal(batch["student"].label, own.label)  # never shuffled
    if teacher == "shuffled":  # over the whole batch, not within the structures
        moved = [(b["teacher"].label != true_batch(study, b).label).float().mean() for b in batches]
        assert min(moved) > 0.1


def saved(study, task):
    "The digest of a training's network, as its checkpoint holds it."
    net = study.teacher_network(task.seed)
    path = task.place(study.folder) / "last.pt"
    net.load_state_dict(load_checkpoint(path)["networks"]["student"])
    return weights_digest(net)


def test_the_true_expert_is_the_trained_one_and_stays_it(folder, tmp_path, monkeypatch):
    study = study_of(folder, tmp_path / "run", method="lotus")
    _, seen = watched(study, monkeypatch)
    fresh = weights_digest(study.teacher_network(0))
    assert {teacher for _, teacher in seen} == {saved(study, TeacherTask(seed=0))} != {fresh}


@pytest.mark.parametrize("method", ["lotus", "cmedl"])
def test_a_placebo_knows_nothing_in_any_batch(folder, tmp_path, monkeypatch, method):
    study = study_of(folder, tmp_path / "run", method=method, teacher="placebo")
    assert ArmTask("arm", 0).before(study) == []  # nobody was trained for it
    learner, seen = watched(study, monkeypatch)
    digests = {teacher for _, teacher in seen}
    assert len(digests) == 1  # the same in every batch: it does not learn
    teacher = learner.method.frozen["teacher"]
    assert not any(p.requires_grad for p in teacher.parameters())
    blank = School(study, study.arm("arm"), 0).blank()
    assert digests == {weights_digest(blank)}
    train(study, TeacherTask(seed=0), "cpu")
    assert digests != {saved(study, TeacherTask(seed=0))}
    fresh = dict(study.teacher_network(0).named_parameters())
    for name, p in teacher.named_parameters():  # weights of its own, drawn at random
        if p.ndim > 1:
            assert not torch.equal(p, fresh[name]) and 0 < p.std() < 1


def test_a_placebo_has_seen_the_brightness_of_its_images(folder, tmp_path):
    study = study_of(folder, tmp_path / "run", method="lotus", teacher="placebo")
    school = School(study, study.arm("arm"), 0)
    means = [b for n, b in school.blank().named_buffers() if n.endswith("running_mean")]
    assert means and any(m.abs().max() > 0.01 for m in means)


def test_another_seed_has_another_placebo(folder, tmp_path):
    study = study_of(folder, tmp_path / "run", method="lotus", teacher="placebo")
    a, b = (weights_digest(School(study, study.arm("arm"), seed).blank()) for seed in (0, 1))
    assert a != b


def test_starts_are_what_they_say(folder, tmp_path):
    starts = ("scratch", "teacher", "placebo")
    arms = {f"from {start}": dict(method="single", start=start) for start in starts}
    study = Study(StudyConfig.from_flat(data=folder, arms=arms, **USUAL), tmp_path / "run")
    train(study, TeacherTask(seed=0), "cpu")
    found = [weights_digest(School(study, study.arm(name), 0).student()) for name in arms]
    fresh = study.network(study.config.student, 0, "student")
    blank = School(study, study.arm("from placebo"), 0).blank()
    assert found == [
        weights_digest(fresh),
        saved(study, TeacherTask(seed=0)),
        weights_digest(blank),
    ]
    assert len(set(found)) == 3


@pytest.mark.slow
def test_a_pretrained_placebo_is_not_the_pretrained_teacher(folder, tmp_path):
    small = dict(method="vpbsd", options={"codes": 8, "code_dim": 4, "inner": 8, "decoder": 4})
    arms = {"true": small, "placebo": small | {"teacher": "placebo"}}
    flat = USUAL | {"teacher_epochs": 2, "epochs": 1}
    study = Study(StudyConfig.from_flat(data=folder, arms=arms, **flat), tmp_path / "run")
    task = PretrainTask(pretrained_name(study, study.arm("true")), 0)
    assert pretrained_name(study, study.arm("placebo")) == ""
    trained = train(study, task, "cpu").learner.method.student.state_dict()
    given = {
        arm.name: method_class("vpbsd").teacher.give(School(study, arm, 0))
        for arm in study.config.arms
    }
    for name, p in given["true"].named_parameters():
        assert torch.equal(p, trained[name])
    moved = [
        not torch.equal(p, trained[name])
        for name, p in given["placebo"].named_parameters()
        if p.ndim > 1
    ]
    assert moved and all(moved)
    assert not any(p.requires_grad for net in given.values() for p in net.parameters())
