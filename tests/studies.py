"""Studies for tests: flat settings and, as in the experiment on LOTUS, changes to the arms of a
claim."""

from unpaired_kd.methods.controls import with_controls
from unpaired_kd.study.arms import merge_arms
from unpaired_kd.study.config import StudyConfig
from unpaired_kd.study.study import Study
from unpaired_kd.study.tasks import ArmTask, train
from unpaired_kd.study.trainings import PretrainTask, TeacherTask, pretrained_name

STANDARD = ("alone", "fine-tuned", "placebo", "distilled")


def make(flat=None, **more):
    """A study from flat settings; `arms` are changes to the standard ones, the rest of `OWN`
    describes LOTUS."""
    flat = {**(flat or {}), **more}
    own = {
        "start": "teacher",
        **{k: flat.pop(k) for k in ("start", "preset", "options", "weights") if k in flat},
    }
    base = dict(method="lotus", **own)
    arms = merge_arms(with_controls(base), flat.pop("arms", {}), base)
    return StudyConfig.from_flat(**flat, arms=arms)


def parts(config, seed, folder=None):
    "Who is in which part, written down in the folder as a run does."
    from unpaired_kd.study.parts import keep_splits

    if folder:
        keep_splits(folder, config.images, config.split, seed)
    return Study(config, folder).data(seed)


def train_arm(folder, config, name, seed, device="cpu"):
    return train(Study(config, folder), ArmTask(name, seed), device).student


def train_teacher(folder, config, number, device="cpu"):
    return train(Study(config, folder), TeacherTask(seed=number), device).learner.method.student


def train_first(folder, config, name, seed, device="cpu"):
    return train(Study(config, folder), PretrainTask(name, seed), device).learner


def learner_of(folder, config, name, seed, device="cpu"):
    return ArmTask(name, seed).learner(Study(config, folder), device, lambda row: None)


def first_name(config, name):
    return pretrained_name(Study(config), Study(config).arm(name))
