"""The study under faults: killed at any moment, called twice, given bad input. And what importing the library may cost."""
import json, os, signal, subprocess, sys, textwrap, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unpaired_kd.core import InputError, read_csv
from unpaired_kd.study.run import ARMS, StudyConfig, all_arms, check_seeds, check_study, finished, run_study, share, split_data, train_teacher

ROOT = Path(__file__).parents[1]
TINY = StudyConfig(width=2, epochs=2, teacher_epochs=1, steps=4, batch=2, patch=48, precision="fp32", arms={"fine-tuned": None, "placebo": None})
SCRIPT = textwrap.dedent("""
    import sys
    from test_study import TINY
    from unpaired_kd.study.run import run_study
    if __name__ == "__main__": run_study(sys.argv[1], TINY, [0], workers=2)
""")


def start(folder, script):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen([sys.executable, str(script), str(folder)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def alive(session):
    "The processes of a session that have not ended, where the system lists them."
    fields = [p.read_text().rpartition(")")[2].split() for p in readable(Path("/proc").glob("[0-9]*/stat"))]
    return [f for f in fields if f[3] == str(session) and f[0] != "Z"]


def readable(paths):
    "Those that are still there when it is their turn."
    for p in paths:
        try: p.read_text()
        except OSError: continue
        yield p



def test_a_killed_study_resumes_to_the_same_scores(tmp_path):
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, script).wait() == 0
    victim = start(killed, script)
    while not (killed / "checkpoints/alone-0/last.pt").exists() and victim.poll() is None: time.sleep(.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not finished(killed, ("arm", "distilled", 0))
    until = time.monotonic() + 300
    while alive(victim.pid) and time.monotonic() < until: time.sleep(.05)  # the worker notices and leaves
    assert not alive(victim.pid), "a worker outlived its study"
    before = sorted(p.stat().st_mtime_ns for p in killed.rglob("*") if p.is_file())
    time.sleep(1.5)
    assert before == sorted(p.stat().st_mtime_ns for p in killed.rglob("*") if p.is_file()), "somebody still writes"
    assert start(killed, script).wait() == 0
    assert (whole / "metrics.csv").read_text() == (killed / "metrics.csv").read_text()
    assert (whole / "history.csv").read_text() == (killed / "history.csv").read_text()


def test_a_training_goes_on_when_nobody_passes_its_reports_on(monkeypatch):
    from unpaired_kd.study import run as study
    class Gone:
        def put(self, report): raise FileNotFoundError("listener")
        def empty(self): raise ConnectionRefusedError
    told = []
    def task(kind, folder, config, name, seed, device, tell):
        tell({"epoch": 0})
        told.append(name)
    monkeypatch.setattr(study, "_task", task)
    study._in_worker("arm", "", TINY, "alone", 0, Gone())
    assert told == ["alone"] and list(study._heard(Gone())) == []


def test_more_seeds_and_arms_may_be_added_but_nothing_changed(tmp_path):
    few = replace(TINY, arms={k: None for k in ARMS if k != "alone"})
    rows = run_study(tmp_path, few, [0], workers=1)
    assert {r["arm"] for r in rows} == {"alone"} # nobody needs the teacher yet
    more = run_study(tmp_path, replace(TINY, arms={**few.arms, "no kl": dict(weights={"kl": 0})}), [0], workers=1)
    assert {r["arm"] for r in more} == {"teacher", "alone", "no kl"} and [r for r in more if r["arm"] == "alone"] == rows
    with pytest.raises(InputError, match="no kl"): run_study(tmp_path, replace(TINY, arms={**few.arms, "no kl": {}}), [0])
    with pytest.raises(InputError, match="steps"): run_study(tmp_path, replace(few, steps=5), [0])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["made by"]["versions"]["torch"] and config["seeds"] == [0]


@pytest.mark.parametrize("arm", [dict(metod="lotus"), dict(method="cmedll"), dict(init="imagenet"), dict(teacher="none")])
def test_arms_are_checked(arm):
    with pytest.raises(InputError, match="x"): all_arms(StudyConfig(arms={"x": arm}))


def test_shares():
    assert share(.5, 10, "test") == 5 and share(3, 10, "test") == 3
    for bad in (0, 10, .01, 1.5e3):
        with pytest.raises(InputError, match="test"): share(bad, 10, "test")


def test_no_patient_on_both_sides_and_seeds_differ(tmp_path):
    a, b = (split_data(TINY, s, tmp_path) for s in (0, 1))
    for d in (a, b): assert not set(d.student_train.groups) & set(d.student_test.groups) and not set(d.teacher_train.groups) & set(d.teacher_test.groups)
    assert a.student_test.ids != b.student_test.ids and a.teacher_test.ids == b.teacher_test.ids
    saved = tmp_path / "splits/student-0.json"
    saved.write_text(saved.read_text().replace(a.student_test.groups[0], b"x".decode(), 1))
    with pytest.raises(InputError, match="student-0.json"): split_data(TINY, 0, tmp_path)


def test_importing_the_library_is_light():
    code = """
        import sys, time, torch
        start = time.perf_counter()
        import unpaired_kd
        spent = time.perf_counter() - start
        import unpaired_kd.inference.student, unpaired_kd.training.learner, unpaired_kd.study.run, unpaired_kd.command.cli
        heavy = [m for m in ("monai", "matplotlib", "IPython", "ipywidgets", "papermill", "nbformat", "sklearn", "skimage") if m in sys.modules]
        print(spent, *heavy)
    """
    spent, *heavy = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout.split()
    assert float(spent) < .5 and not heavy


CELLS = dict(teacher="ihc", student="if", classes=["background", "positive", "negative"])


def six_panels(path, seed):
    "A DeepLIIF-like tile: brown and blue discs, their fluorescence, their coloured segmentation."
    from PIL import Image
    g, side = np.random.default_rng(seed), 64
    y, x = np.mgrid[:side, :side]
    panels = np.full((6, side, side, 3), 20, np.uint8)
    panels[0] = 235
    for i, (cy, cx) in enumerate([(16, 16), (16, 46), (46, 16), (46, 46)]):
        r = np.hypot(y - cy - g.integers(-3, 4), x - cx - g.integers(-3, 4))
        panels[0][r < 9], panels[2][r < 9] = (120, 70, 40) if i % 2 else (90, 110, 170), 180
        if i % 2: panels[4][r < 9] = 220
        panels[5][r < 9], panels[5][(r >= 8) & (r < 10)] = (255, 0, 0) if i % 2 else (0, 0, 255), (0, 255, 0)
    Image.fromarray(np.concatenate(list(panels), 1)).save(path)


def test_cells_of_two_kinds_from_tiles_to_a_table(tmp_path):
    from unpaired_kd.data.sets.deepliif import convert_deepliif
    (tmp_path / "tiles").mkdir()
    for i in range(12): six_panels(tmp_path / "tiles" / f"{'Bladder' if i % 2 else 'Lung'}_{i:03}.png", i)
    convert_deepliif(tmp_path / "tiles", tmp_path / "set", student_share=.5)
    parts = split_data(StudyConfig(data=str(tmp_path / "set"), **CELLS, student_labels=2), 0)
    assert len(parts.teacher_train) + len(parts.teacher_test) == 6 and not set(parts.teacher_train.groups) & {g for c in (parts.student_train, parts.student_test) for g in c.groups}
    config = StudyConfig(data=str(tmp_path / "set"), **CELLS, patch=48, batch=2, width=4, epochs=2, teacher_epochs=1, steps=2, student_labels=2, instances="watershed", cells=True,
                         arms={"placebo": None, "fine-tuned": None, "ummkd": dict(method="ummkd", init="scratch"), "as released": dict(preset="released")})
    rows = run_study(tmp_path / "run", config, [0], workers=1)
    assert {r["arm"] for r in rows} == {"teacher", "alone", "distilled", "ummkd", "as released"}
    assert all({"dsc_positive", "dsc_negative", "aji", "pq"} <= r.keys() for r in rows)


def test_the_teacher_may_start_from_weights(tmp_path):
    config = StudyConfig(epochs=2, teacher_epochs=1, steps=1, batch=2, patch=48, width=4)
    first = train_teacher(tmp_path / "a", config, 0, "cpu")
    again = train_teacher(tmp_path / "b", replace(config, teacher_weights=str(tmp_path / "a/checkpoints/teacher-0/last.pt"), lr=1e-9), 0, "cpu")
    assert max((a - b).abs().max() for a, b in zip(first.parameters(), again.parameters())) < 1e-6
    with pytest.raises(InputError, match="nowhere"): train_teacher(tmp_path / "c", replace(config, teacher_weights="nowhere.pt"), 0, "cpu")


def test_validation_patients_are_neither_labelled_nor_tested(tmp_path):
    test, valid = (split_data(StudyConfig(score_on=s), 3) for s in ("test", "validation"))
    assert test.student_train.ids == valid.student_train.ids
    seen = set(valid.student_test.groups)
    assert seen and not seen & set(valid.student_train.groups) and not seen & set(test.student_test.groups)
    with pytest.raises(InputError, match="score_on"): split_data(StudyConfig(score_on="tset"), 0)


@pytest.mark.parametrize("bad,words", [
    (dict(lr=float("nan")), "lr"), (dict(lr=-1.), "lr"), (dict(lr=0.), "lr"), (dict(lr=float("inf")), "lr"), (dict(lr=True), "lr"), (dict(lr="1e-3"), "lr"), (dict(lr=None), "lr"),
    (dict(epochs=2.), "epochs"), (dict(epochs=True), "epochs"), (dict(epochs=-3), "epochs"), (dict(steps="4"), "steps"), (dict(batch=0), "batch"), (dict(batch=[2]), "batch"),
    (dict(foreground=7.), "foreground"), (dict(foreground=-.1), "foreground"), (dict(rich=float("nan")), "rich"), (dict(test=float("nan")), "test"), (dict(test=-1), "test"),
    (dict(teacher_test=-.5), "teacher_test"), (dict(teacher_share=0.), "teacher_share"), (dict(teacher_share=2.), "teacher_share"), (dict(zoom=0.), "zoom"), (dict(depth=-1), "depth"),
    (dict(student_labels=0), "student_labels"), (dict(student_labels=True), "student_labels"), (dict(validation=-1), "validation"), (dict(min_size=-5), "min_size"), (dict(dims=4), "dims"),
    (dict(weights={"kl": True}), "kl"), (dict(weights={"kl": float("nan")}), "kl"), (dict(weights={"kl": "1"}), "kl"), (dict(weights=3), "weights"), (dict(topology="yes"), "topology"),
    (dict(augment={"rotate": "a"}), "rotate"), (dict(augment={"rotate": float("nan")}), "rotate"), (dict(intensity="x"), "intensity"), (dict(network="unnet"), "unet"),
    (dict(precision="fp8"), "precision"), (dict(schedule="x"), "schedule"), (dict(data_options={"patience": 3}), "patience"), (dict(batch=1, patch=16), "batch=1"),
    (dict(network_options={"deep": 3}), "deep"), (dict(classes="background, bone"), "classes"), (dict(cells=1), "cells"),
    (dict(epochs=0), "epochs"), (dict(teachers=0), "teachers"), (dict(pairing="index"), "registered"), (dict(pairing="x"), "pairing"), (dict(augment={"x": 1}), "augment"),
    (dict(teacher_weights="nowhere.pt"), "nowhere"), (dict(options={"taps": ["conv11"]}), "conv10"), (dict(options={"head": "conv11"}), "conv10"), (dict(options={"tau": "2"}), "tau"),
    (dict(options={"stride": 0}), "stride"), (dict(options={"stride": "2"}), "stride"), (dict(options={"denoise_share": "a"}), "denoise_share"), (dict(options={"ifv_classes": [5]}), "ifv_classes"),
    (dict(options={"checkpoint": True, "statistics": "all"}), "twice"), (dict(arms={"u": 3}), "no arm"), (dict(arms={"u": dict(method="ummkd", options={"ce": "x"})}), "rarity"),
    (dict(preset="x"), "preset"), (dict(init="x"), "init"), (dict(arms={1: 2}), "arm 1"), (dict(test=3.7), "test"), (dict(teacher_test=1.5), "teacher_test"), (dict(width=2**63), "width"), (dict(width=10**9), "width"),
    (dict(patch=2**63), "patch"), (dict(batch=2**63), "batch"),
    (dict(arms={"u": dict(weights={"seg_teacher": 1.})}), "joint"), (dict(instances="x"), "instance"), (dict(epochs=1), "two stages"),
    (dict(lr=10**400), "lr"), (dict(data_options={"zoom": .5}), "Set zoom"), (dict(data_options={"invert": True}), "Set invert_student"), (dict(data_options={"cache_gb": float("nan")}), "cache_gb"),
    (dict(network_options={"width": 3.5}), "cannot be built"), (dict(options={"ifv_classes": ["a"]}), "ifv_classes|cannot be built"),
    (dict(arms={"y" * 254: {}}), "too long"), (dict(arms={"é" * 101: {}}), "too long"), (dict(arms={"Alone": {}}), "'alone' is taken"), (dict(arms={"TEACHER": {}}), "'teacher' is taken"),
    (dict(arms={"a": {}, "a ": {}}), "'a' is taken"), (dict(arms=dict.fromkeys(ARMS)), "every arm")])
def test_what_would_fail_later_is_refused_before_anything_is_written(tmp_path, bad, words):
    with pytest.raises(InputError, match=words): run_study(tmp_path / "run", replace(StudyConfig(patch=48, width=4), **bad), [0], workers=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", [[], [-1], [True], [0, 0], [1.5], ["0"], [2**40], 3, "01", None])
def test_odd_seeds_are_refused(seeds):
    with pytest.raises(InputError, match="seed"): check_study(StudyConfig(), seeds)


def test_numpy_counts_as_python_does(tmp_path):
    mine = StudyConfig(epochs=np.int64(2), lr=np.float64(.5), rich=np.float32(.5), options={"tau": np.int32(4)}, intensity=np.array([0., 2.]), topology=np.bool_(True))
    theirs = StudyConfig(epochs=2, lr=.5, rich=.5, options={"tau": 4}, intensity=[0., 2.], topology=True)
    assert mine == theirs and json.dumps(mine.options) == '{"tau": 4}' and type(mine.epochs) is int and type(mine.rich) is float
    for seeds in ([np.int64(0), 1], np.arange(2), range(2), (0, 1)): assert check_seeds(seeds) == [0, 1] and all(type(s) is int for s in check_seeds(seeds))
    for bad in (np.array([.5]), np.array([True]), np.array([1, 1]), np.array([])):
        with pytest.raises(InputError, match="seed"): check_seeds(bad)
    alone = replace(TINY, epochs=np.int64(1), steps=1, arms=dict.fromkeys(set(ARMS) - {"alone"}))
    assert {r["seed"] for r in run_study(tmp_path, alone, np.arange(1), workers=np.int64(1))} == {0}
    assert json.loads((tmp_path / "config.json").read_text())["seeds"] == [0]


def test_an_arm_that_a_notebook_needs():
    with pytest.raises(InputError, match="placebo"): check_study(TINY, [0], needs=("alone", "placebo"))
    check_study(TINY, [0], needs=("alone", "distilled"))


def test_names_of_arms_that_a_disk_can_tell_apart():
    assert set(all_arms(StudyConfig(arms={"y" * 200: {}, "alone 2": {}, "distilled": None}))) == {"alone", "fine-tuned", "placebo", "y" * 200, "alone 2"}
    assert set(all_arms(StudyConfig(arms={"alone": None, "Alone": {}}))) == {"Alone", "fine-tuned", "placebo", "distilled"}


def test_shuffled_labels_are_a_function_of_the_step():
    from unpaired_kd.methods.controls import ShuffledLabels
    from unpaired_kd.study.run import source
    config = StudyConfig(patch=48, batch=2)
    patches = source(config, split_data(config, 0).teacher_train, 0, "teacher", 3)
    a, b, true = ShuffledLabels(patches, 0), ShuffledLabels(patches, 0), patches.batch(3)
    assert (a.batch(3).label == b.batch(3).label).all() and (a.batch(3, rank=0).image == true.image).all()
    assert (a.batch(3).label != true.label).any() and a.batch(3).label.sum() == true.label.sum()
    assert a.collection is patches.collection
