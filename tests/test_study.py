"""The study under faults: killed at any moment, called twice, given bad input. And what importing
the library may cost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from studies import STANDARD, make, parts, train_teacher

from unpaired_kd.core import InputError
from unpaired_kd.study.checks import check_seeds, check_study
from unpaired_kd.study.config import read_study
from unpaired_kd.study.parts import count_groups
from unpaired_kd.study.run import run_study
from unpaired_kd.study.study import Study
from unpaired_kd.study.tasks import ArmTask, train
from unpaired_kd.study.trainings import finished
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.settings import Settings

ROOT = Path(__file__).parents[1]
TINY = dict(
    width=2,
    epochs=2,
    teacher_epochs=1,
    steps=4,
    batch=2,
    patch=48,
    precision="fp32",
    arms={"fine-tuned": None, "placebo": None},
)
SCRIPT = textwrap.dedent("""
    import sys
    from test_study import TINY, make
    from unpaired_kd.study.run import run_study
    if __name__ == "__main__": run_study(sys.argv[1], make(TINY), [0], workers=2)
""")


def start(folder, script):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def alive(session):
    "The processes of a session that have not ended, where the system lists them."
    fields = [
        p.read_text().rpartition(")")[2].split()
        for p in readable(Path("/proc").glob("[0-9]*/stat"))
    ]
    return [f for f in fields if f[3] == str(session) and f[0] != "Z"]


def readable(paths):
    "Those that are still there when it is their turn."
    for p in paths:
        try:
            p.read_text()
        except OSError:
            continue
        yield p


@pytest.mark.slow
def test_a_killed_study_resumes_to_the_same_scores(tmp_path):
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert start(whole, script).wait() == 0
    victim = start(killed, script)
    while not (killed / "checkpoints/alone-0/last.pt").exists() and victim.poll() is None:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not finished(killed, ArmTask("distilled", 0))
    until = time.monotonic() + 300
    while alive(victim.pid) and time.monotonic() < until:
        time.sleep(0.05)  # the worker notices and leaves
    assert not alive(victim.pid), "a worker outlived its study"
    before = sorted(p.stat().st_mtime_ns for p in killed.rglob("*") if p.is_file())
    time.sleep(1.5)
    assert before == sorted(p.stat().st_mtime_ns for p in killed.rglob("*") if p.is_file()), (
        "somebody still writes"
    )
    assert start(killed, script).wait() == 0
    assert (whole / "metrics.csv").read_text() == (killed / "metrics.csv").read_text()
    assert (whole / "history.csv").read_text() == (killed / "history.csv").read_text()


def test_a_training_goes_on_when_nobody_passes_its_reports_on(monkeypatch):
    from unpaired_kd.study import run as study

    class Gone:
        def put(self, report):
            raise FileNotFoundError("listener")

        def empty(self):
            raise ConnectionRefusedError

    told = []

    def run(task, config, folder, device, tell):
        tell({"epoch": 0})
        told.append(task.name)

    monkeypatch.setattr(study, "_run_task", run)
    study._run_in_worker(ArmTask("alone", 0), make(TINY), "", Gone())
    assert told == ["alone"] and list(study._read_reports(Gone())) == []


@pytest.mark.slow
def test_more_seeds_and_arms_may_be_added_but_nothing_changed(tmp_path):
    few = {**TINY, "arms": {k: None for k in STANDARD if k != "alone"}}
    rows = run_study(tmp_path, make(few), [0], workers=1)
    assert {r["arm"] for r in rows} == {"alone"}  # nobody needs the teacher yet
    more = run_study(
        tmp_path, make(TINY, arms={**few["arms"], "no kl": dict(weights={"kl": 0})}), [0], workers=1
    )
    assert {r["arm"] for r in more} == {"teacher", "alone", "no kl"} and [
        r for r in more if r["arm"] == "alone"
    ] == rows
    with pytest.raises(InputError, match="no kl"):
        run_study(tmp_path, make(TINY, arms={**few["arms"], "no kl": {}}), [0])
    with pytest.raises(InputError, match="steps"):
        run_study(tmp_path, make(few, steps=5), [0])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["made by"]["versions"]["torch"] and config["seeds"] == [0]


@pytest.mark.parametrize(
    "arm",
    [dict(metod="lotus"), dict(method="cmedll"), dict(start="imagenet"), dict(teacher="none")],
)
def test_arms_are_checked(arm):
    with pytest.raises(InputError, match="x"):
        make(arms={"x": arm})


def test_shares():
    assert count_groups(0.5, 10, "test") == 5 and count_groups(3, 10, "test") == 3
    for bad in (0, 10, 0.01, 1.5e3):
        with pytest.raises(InputError, match="test"):
            count_groups(bad, 10, "test")


def test_no_patient_on_both_sides_and_seeds_differ(tmp_path):
    a, b = (parts(make(TINY), s, tmp_path) for s in (0, 1))
    for d in (a, b):
        assert not set(d.student_train.groups) & set(d.student_test.groups) and not set(
            d.teacher_train.groups
        ) & set(d.teacher_test.groups)
    assert a.student_test.ids != b.student_test.ids and a.teacher_test.ids == b.teacher_test.ids
    saved = tmp_path / "splits/student-0.json"
    saved.write_text(saved.read_text().replace(a.student_test.groups[0], b"x".decode(), 1))
    with pytest.raises(InputError, match="student-0.json"):
        parts(make(TINY), 0, tmp_path)


def test_importing_the_library_is_light():
    code = """
        import sys, time, torch
        start = time.perf_counter()
        import unpaired_kd
        spent = time.perf_counter() - start
        import unpaired_kd.inference.student, unpaired_kd.training.learner
        import unpaired_kd.study.run, unpaired_kd.command.cli
        heavy = "monai matplotlib IPython ipywidgets papermill nbformat sklearn skimage"
        print(spent, *(m for m in heavy.split() if m in sys.modules))
    """
    spent, *heavy = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout.split()
    assert float(spent) < 0.5 and not heavy


CELLS = dict(teacher="ihc", student="if", classes=["background", "positive", "negative"])


def six_panels(path, seed):
    "A DeepLIIF-like tile: brown and blue discs, their fluorescence, their coloured segmentation."
    from PIL import Image

    g = np.random.default_rng(seed)
    side = 64
    y, x = np.mgrid[:side, :side]
    panels = np.full((6, side, side, 3), 20, np.uint8)
    panels[0] = 235
    for i, (cy, cx) in enumerate([(16, 16), (16, 46), (46, 16), (46, 46)]):
        r = np.hypot(y - cy - g.integers(-3, 4), x - cx - g.integers(-3, 4))
        panels[0][r < 9] = (120, 70, 40) if i % 2 else (90, 110, 170)
        panels[2][r < 9] = 180
        if i % 2:
            panels[4][r < 9] = 220
        panels[5][r < 9] = (255, 0, 0) if i % 2 else (0, 0, 255)
        panels[5][(r >= 8) & (r < 10)] = (0, 255, 0)
    Image.fromarray(np.concatenate(list(panels), 1)).save(path)


def test_cells_of_two_kinds_from_tiles_to_a_table(tmp_path):
    from unpaired_kd.data.sets.deepliif import convert_deepliif

    (tmp_path / "tiles").mkdir()
    for i in range(12):
        six_panels(tmp_path / "tiles" / f"{'Bladder' if i % 2 else 'Lung'}_{i:03}.png", i)
    convert_deepliif(tmp_path / "tiles", tmp_path / "set", student_share=0.5)
    d = parts(make(data=str(tmp_path / "set"), **CELLS, student_labels=2), 0)
    assert len(d.teacher_train) + len(d.teacher_test) == 6 and not set(d.teacher_train.groups) & {
        g for c in (d.student_train, d.student_test) for g in c.groups
    }
    config = make(
        data=str(tmp_path / "set"),
        **CELLS,
        patch=48,
        batch=2,
        width=4,
        epochs=2,
        teacher_epochs=1,
        steps=2,
        student_labels=2,
        instances="watershed",
        has_objects=True,
        arms={
            "placebo": None,
            "fine-tuned": None,
            "ummkd": dict(method="ummkd", start="scratch"),
            "as released": dict(preset="released"),
        },
    )
    rows = run_study(tmp_path / "run", config, [0], workers=1)
    assert {r["arm"] for r in rows} == {"teacher", "alone", "distilled", "ummkd", "as released"}
    assert all({"dsc_positive", "dsc_negative", "aji", "pq"} <= r.keys() for r in rows)


def test_the_teacher_may_start_from_weights(tmp_path):
    flat = dict(epochs=2, teacher_epochs=1, steps=1, batch=2, patch=48, width=4)
    first = train_teacher(tmp_path / "a", make(flat), 0)
    weights = str(tmp_path / "a/checkpoints/teacher-0/last.pt")
    again = train_teacher(tmp_path / "b", make(flat, teacher_weights=weights, lr=1e-9), 0)
    assert max((a - b).abs().max() for a, b in zip(first.parameters(), again.parameters())) < 1e-6
    with pytest.raises(InputError, match="nowhere"):
        train_teacher(tmp_path / "c", make(flat, teacher_weights="nowhere.pt"), 0)


def test_validation_patients_are_neither_labelled_nor_tested(tmp_path):
    test, valid = (parts(make(score_on=s), 3) for s in ("test", "validation"))
    assert test.student_train.ids == valid.student_train.ids
    seen = set(valid.student_test.groups)
    assert (
        seen
        and not seen & set(valid.student_train.groups)
        and not seen & set(test.student_test.groups)
    )
    with pytest.raises(InputError, match="score_on"):
        make(score_on="tset")


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(lr=float("nan")), "lr"),
        (dict(lr=-1.0), "lr"),
        (dict(lr=0.0), "lr"),
        (dict(lr=float("inf")), "lr"),
        (dict(lr=True), "lr"),
        (dict(lr="1e-3"), "lr"),
        (dict(lr=None), "lr"),
        (dict(epochs=2.0), "epochs"),
        (dict(epochs=True), "epochs"),
        (dict(epochs=-3), "epochs"),
        (dict(steps="4"), "steps"),
        (dict(batch=0), "batch"),
        (dict(batch=[2]), "batch"),
        (dict(foreground=7.0), "foreground"),
        (dict(foreground=-0.1), "foreground"),
        (dict(bright_share=float("nan")), "bright_share"),
        (dict(test=float("nan")), "test"),
        (dict(test=-1), "test"),
        (dict(teacher_test=-0.5), "teacher_test"),
        (dict(teacher_share=0.0), "teacher_share"),
        (dict(teacher_share=2.0), "teacher_share"),
        (dict(zoom=0.0), "zoom"),
        (dict(depth=-1), "depth"),
        (dict(student_labels=0), "student_labels"),
        (dict(student_labels=True), "student_labels"),
        (dict(validation=-1), "validation"),
        (dict(min_size=-5), "min_size"),
        (dict(dims=4), "dims"),
        (dict(weights={"kl": True}), "kl"),
        (dict(weights={"kl": float("nan")}), "kl"),
        (dict(weights={"kl": "1"}), "kl"),
        (dict(weights=3), "weights"),
        (dict(topology="yes"), "topology"),
        (dict(augment={"rotate": "a"}), "rotate"),
        (dict(augment={"rotate": float("nan")}), "rotate"),
        (dict(intensity="x"), "intensity"),
        (dict(network="unnet"), "unet"),
        (dict(precision="fp8"), "precision"),
        (dict(schedule="x"), "schedule"),
        (dict(data_options={"patience": 3}), "patience"),
        (dict(batch=1, patch=16), "batch=1"),
        (dict(network_options={"deep": 3}), "deep"),
        (dict(classes="background, bone"), "classes"),
        (dict(has_objects=1), "has_objects"),
        (dict(epochs=0), "epochs"),
        (dict(teachers=0), "teachers"),
        (dict(pairing="index"), "registered"),
        (dict(pairing="x"), "pairing"),
        (dict(augment={"x": 1}), "augment"),
        (dict(teacher_weights="nowhere.pt"), "nowhere"),
        (dict(options={"taps": ["conv11"]}), "conv10"),
        (dict(options={"head": "conv11"}), "conv10"),
        (dict(options={"tau": "2"}), "tau"),
        (dict(options={"stride": 0}), "stride"),
        (dict(options={"stride": "2"}), "stride"),
        (dict(options={"denoise_share": "a"}), "denoise_share"),
        (dict(options={"ifv_classes": [5]}), "ifv_classes"),
        (dict(options={"checkpoint": True, "statistics": "all"}), "twice"),
        (dict(arms={"u": 3}), "no arm"),
        (dict(arms={"u": dict(method="ummkd", options={"ce": "x"})}), "rarity"),
        (dict(preset="x"), "preset"),
        (dict(start="x"), "start"),
        (dict(arms={1: 2}), "arm 1"),
        (dict(test=3.7), "test"),
        (dict(teacher_test=1.5), "teacher_test"),
        (dict(width=2**63), "width"),
        (dict(width=10**9), "width"),
        (dict(patch=2**63), "patch"),
        (dict(batch=2**63), "batch"),
        (dict(arms={"u": dict(weights={"seg_teacher": 1.0})}), "joint"),
        (dict(instances="x"), "instance"),
        (dict(epochs=1), "two stages"),
        (dict(lr=10**400), "lr"),
        (dict(data_options={"zoom": 0.5}), "Set zoom"),
        (dict(data_options={"invert": True}), "Set invert_student"),
        (dict(data_options={"cache_gb": float("nan")}), "cache_gb"),
        (dict(network_options={"width": 3.5}), "cannot be built"),
        (dict(options={"ifv_classes": ["a"]}), "ifv_classes|cannot be built"),
        (dict(arms={"y" * 254: {}}), "too long"),
        (dict(arms={"é" * 101: {}}), "too long"),
        (dict(arms={"Alone": {}}), "'alone' is taken"),
        (dict(arms={"TEACHER": {}}), "'teacher' is taken"),
        (dict(arms={"a": {}, "a ": {}}), "'a' is taken"),
        (dict(arms=dict.fromkeys(STANDARD)), "every arm"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_written(tmp_path, bad, words):
    with pytest.raises(InputError, match=words):
        run_study(tmp_path / "run", make(dict(patch=48, width=4), **bad), [0], workers=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", [[], [-1], [True], [0, 0], [1.5], ["0"], [2**40], 3, "01", None])
def test_odd_seeds_are_refused(seeds):
    with pytest.raises(InputError, match="seed"):
        check_study(Study(make()), seeds)


def test_numpy_counts_as_python_does(tmp_path):
    mine = make(
        epochs=np.int64(2),
        lr=np.float64(0.5),
        bright_share=np.float32(0.5),
        options={"tau": np.int32(4)},
        intensity=np.array([0.0, 2.0]),
        topology=np.bool_(True),
    )
    theirs = make(
        epochs=2, lr=0.5, bright_share=0.5, options={"tau": 4}, intensity=[0.0, 2.0], topology=True
    )
    assert (
        mine == theirs
        and json.dumps(mine.arms[3].options) == '{"tau": 4}'
        and type(mine.training.epochs) is int
        and type(mine.patches.bright_share) is float
    )
    for seeds in ([np.int64(0), 1], np.arange(2), range(2), (0, 1)):
        assert check_seeds(seeds) == [0, 1] and all(type(s) is int for s in check_seeds(seeds))
    for bad in (np.array([0.5]), np.array([True]), np.array([1, 1]), np.array([])):
        with pytest.raises(InputError, match="seed"):
            check_seeds(bad)
    alone = make(TINY, epochs=np.int64(1), steps=1, arms=dict.fromkeys(set(STANDARD) - {"alone"}))
    assert {r["seed"] for r in run_study(tmp_path, alone, np.arange(1), workers=np.int64(1))} == {0}
    assert json.loads((tmp_path / "config.json").read_text())["seeds"] == [0]


def test_an_arm_that_a_notebook_needs():
    with pytest.raises(InputError, match="placebo"):
        check_study(Study(make(TINY)), [0], needs=("alone", "placebo"))
    check_study(Study(make(TINY)), [0], needs=("alone", "distilled"))


def test_names_of_arms_that_a_disk_can_tell_apart():
    assert {a.name for a in make(arms={"y" * 200: {}, "alone 2": {}, "distilled": None}).arms} == {
        "alone",
        "fine-tuned",
        "placebo",
        "y" * 200,
        "alone 2",
    }
    assert {a.name for a in make(arms={"alone": None, "Alone": {}}).arms} == {
        "Alone",
        "fine-tuned",
        "placebo",
        "distilled",
    }


def test_shuffled_labels_are_a_function_of_the_step():
    from unpaired_kd.methods.controls import ShuffledLabels

    study = Study(make(patch=48, batch=2))
    patches = study.patches(study.data(0).teacher_train, 0, "teacher")
    a = ShuffledLabels(patches, 0)
    b = ShuffledLabels(patches, 0)
    true = patches.batch(3)
    assert (a.batch(3).label == b.batch(3).label).all() and (
        a.batch(3, rank=0).image == true.image
    ).all()
    assert (a.batch(3).label != true.label).any() and a.batch(3).label.sum() == true.label.sum()
    assert a.collection is patches.collection


def test_a_large_teacher_and_a_small_student(tmp_path):
    flat = dict(
        width=8,
        teacher_width=32,
        epochs=2,
        teacher_epochs=1,
        steps=1,
        batch=2,
        patch=48,
        start="scratch",
        arms={"fine-tuned": None},
    )
    rows = run_study(tmp_path, make(flat), [0], workers=1)
    assert {r["arm"] for r in rows} == {"teacher", "alone", "placebo", "distilled"}
    sizes = {
        t: load_checkpoint(tmp_path / f"checkpoints/{t}-0/last.pt")["networks"]["student"][
            "conv1.0.weight"
        ].shape[0]
        for t in ("teacher", "alone", "distilled")
    }
    assert sizes == {"teacher": 32, "alone": 8, "distilled": 8}
    with pytest.raises(InputError, match="'fine-tuned': start='teacher'.*width 32.*width 8"):
        run_study(tmp_path / "b", make(flat, arms={}), [0], workers=1)


def test_settings_of_the_learner_are_settings_of_a_study():
    study = Study(make(clip=1, weight_decay=1e-3, accumulate=2, tensorboard=True, save_every=3))
    assert study.settings(7, "cpu") == Settings(
        epochs=7,
        clip=1.0,
        weight_decay=1e-3,
        accumulate=2,
        tensorboard=True,
        save_every=3,
        device="cpu",
        bars=False,
    )
    assert "save_every" not in study.common() and study.common()["accumulate"] == 2


def test_a_training_trains_what_it_needs_first(tmp_path):
    study = Study(make(TINY), tmp_path)
    train(study, ArmTask("distilled", 0), "cpu")
    assert {p.parent.name for p in tmp_path.glob("checkpoints/*/done.json")} == {
        "teacher-0",
        "distilled-0",
    }
    with pytest.raises(InputError, match="arm 'destilled'.*'distilled'"):
        train(study, ArmTask("destilled", 0), "cpu")


def test_on_a_cluster_of_one_machine(tmp_path):
    distributed = pytest.importorskip("distributed")
    alone = make(TINY, arms={k: None for k in STANDARD if k not in ("alone", "fine-tuned")})
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        there = run_study(tmp_path / "there", alone, [0], scheduler=cluster.scheduler_address)
    assert there == run_study(tmp_path / "here", alone, [0], workers=1)
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        run_study(tmp_path / "b", alone, [0], scheduler="tcp://127.0.0.1:1")


def test_a_folder_of_an_earlier_version_is_the_same_study(tmp_path):
    "Its settings are fewer, and its arms are in other words."
    from unpaired_kd.study.folder import known_study
    from unpaired_kd.study.records import write_sealed

    record = json.loads((ROOT / "nbs/results/lotus/phantoms/config.json").read_text())
    write_sealed(tmp_path / "config.json", record)
    config = read_study(record["study"], record["arms"])
    assert known_study(Study(config, tmp_path))["seeds"] == record["seeds"]
    with pytest.raises(InputError, match="different: patch"):
        known_study(Study(config.change(patch=64), tmp_path))
    with pytest.raises(InputError, match="different: arm 'alone'"):
        known_study(
            Study(config.change(arms={"alone": dict(method="single", start="teacher")}), tmp_path)
        )


def test_no_method_is_named_where_studies_are_run():
    import ast

    from unpaired_kd.methods.registry import all_methods

    for path in sorted((ROOT / "unpaired_kd/study").glob("*.py")):
        words = {
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not words & set(all_methods()), path
