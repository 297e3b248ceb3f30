"""What a run folder says must be so: damaged, killed at any write, called twice, given other
data."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from studies import STANDARD, learner_of, make, parts, train_arm, train_teacher

from unpaired_kd.core import InputError, read_csv, write_json
from unpaired_kd.study.checks import check_study
from unpaired_kd.study.folder import environment
from unpaired_kd.study.rows import load_rows
from unpaired_kd.study.run import export_student, run_study
from unpaired_kd.study.study import Study
from unpaired_kd.study.tasks import ArmTask, train
from unpaired_kd.study.trainings import TeacherTask, finished
from unpaired_kd.training.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
FULL = bool(os.environ.get("UKD_FULL"))  # every file and every write, instead of some of each kind
CONFIG = dict(
    teacher="mr",
    student="ct",
    width=2,
    epochs=2,
    teacher_epochs=1,
    steps=1,
    batch=2,
    patch=32,
    student_labels=1,
    validation=1,
    precision="fp32",
    arms={a: None for a in STANDARD if a != "fine-tuned"},
)


def make_data(folder):
    "Eight images of either modality with a bright square, and their labels."
    from PIL import Image

    r = np.random.default_rng(0)
    for modality in ("mr", "ct"):
        for part in ("images", "labels"):
            (folder / modality / part).mkdir(parents=True)
        for i in range(8):
            label = np.zeros((32, 32), np.uint8)
            y, x = r.integers(2, 16, 2)
            label[y : y + 12, x : x + 12] = 1
            image = (60 + 120 * label + r.normal(0, 8, label.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / modality / "images" / f"{modality}{i}.png")
            Image.fromarray(label * 255).save(folder / modality / "labels" / f"{modality}{i}.png")
        rows = [f"{modality}{i},{modality} patient {i}" for i in range(8)]
        (folder / modality / "groups.csv").write_text("\n".join(["id,group", *rows]) + "\n")
    return folder


def go(data, folder):
    "A whole run, as the notebook of an experiment has it; returns what it found, as text."
    from unpaired_kd.command.notebook import claim_folder
    from unpaired_kd.inference.student import Student
    from unpaired_kd.study.figures import box_plot, save_figure

    config = make(CONFIG, data=str(data))
    with claim_folder(folder, dict(notebook="tiny", parameters={})):
        test = parts(config, 0, folder).student_test
        rows = run_study(folder, config, [0], workers=1)
        history = read_csv(folder / "history.csv")
        out = export_student(Study(config, folder), rows, arm="fine-tuned")
        save_figure(folder / "figures" / "cases.png", box_plot(rows, "dsc", reference="fine-tuned"))
        write_json(folder / "notebook.ipynb", {"cells": []})
    label = Student.load(out, "cpu").predict(test.native(0).image)
    weights = hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()
    return json.dumps([rows, history, label.tolist(), weights])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    "Data, a finished run, and what it found."
    top = tmp_path_factory.mktemp("runs")
    data = make_data(top / "data")
    return data, top / "run", go(data, top / "run")


def flip_digit(path):
    "Another number: the digit that is nearest to the middle of a text file."
    text = bytearray(path.read_bytes())
    digits = [i for i, b in enumerate(text) if 48 <= b <= 57]
    i = min(digits, key=lambda i: abs(i - len(text) // 2))
    text[i] = 48 + (text[i] - 48 + 1) % 10
    path.write_bytes(bytes(text))


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "cut in half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "one byte": flip_byte,
    "another number": flip_digit,
    "deleted": lambda p: p.unlink(),
    "emptied": lambda p: p.write_bytes(b""),
}
# for people; made anew by every run
PAST = ("notebook.ipynb", "figures/cases.png", "student/README.md")
FILES = [
    "config.json",
    "parameters.json",
    "data.json",
    "tables.json",
    "metrics.csv",
    "history.csv",
    "splits/student-0.json",
    "splits/student-0-parts.json",
    "splits/teacher-0.json",
    *[
        f"checkpoints/{t}-0/{f}"
        for t, names in {
            "teacher": ("last.pt", "metrics.csv", "done.json"),
            "fine-tuned": ("last.pt", "best.pt", "history.csv", "metrics.csv", "done.json"),
        }.items()
        for f in names
    ],
    "student/weights.safetensors",
    "student/config.json",
    *PAST,
]


def read(folder, test):
    "What `ukd report` and `ukd predict` read in a finished folder."
    from unpaired_kd.inference.student import Student

    return json.dumps(
        [load_rows(folder), Student.load(folder / "student", "cpu").predict(test).tolist()]
    )


def verdict(action, expected, path):
    "How an action on a damaged folder ends."
    try:
        found = action()
    except InputError as e:
        return (
            "refused"
            if str(path) in str(e) or path.name == "parameters.json"
            else f"WRONG FILE NAMED: {e}"
        )
    return "same result" if found == expected else "SILENTLY WRONG"


@pytest.mark.slow
def test_no_damage_to_a_finished_run_is_silent(run, tmp_path, capsys):
    data, whole, found = run
    test = parts(make(CONFIG, data=str(data)), 0).student_test.native(0).image
    seen = read(whole, test)
    left = files(whole)
    table = []
    bad = []
    for name in files(whole) if FULL else FILES:
        if ".lock" in name:
            continue
        for damage, do in DAMAGES.items():
            if damage == "another number" and not name.endswith((".json", ".csv", ".md", ".ipynb")):
                continue
            folder = tmp_path / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            try:
                do(folder / name)
            except ValueError:
                continue  # a text without a digit
            again = functools.partial(go, data, folder)
            told = verdict(functools.partial(read, folder, test), seen, folder / name)
            ends = verdict(again, found, folder / name)
            mended = ""
            if ends == "refused":  # what the message advises must help
                (folder / name).unlink(missing_ok=True)
                mended = verdict(again, found, folder / name)
            if (mended or ends) == "same result" and files(folder) != left:
                ends = f"LEFT OVER OR LOST: {set(files(folder)) ^ set(left)}"
            table.append(
                f"{name:40} {damage:15} read: {told:12} run again: {ends:12} "
                f"{mended and 'deleted and run again: ' + mended}"
            )
            if (
                not {told, ends, mended or "same result"} <= {"refused", "same result"}
                or mended == "refused"
            ):
                bad.append(table[-1])
    with capsys.disabled():
        print(
            "\n"
            + "\n".join(table)
            + f"\n{len(table)} damages, {len(bad)} silently wrong or without a way out"
        )
    assert not bad, "\n".join(bad)


# --- kills

SWEEP = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot, monai.inferers, unpaired_kd.command.cli, unpaired_kd.inference.student
    from test_runs import files, go

    data, top, wanted = Path(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3:]]
    counted = [0]

    def counting(real, n):
        def call(*args, **kw):
            counted[0] += 1
            if counted[0] == n: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        return call

    def child(folder, n):
        "Run in a process that is killed at the n-th call of os.replace or os.fsync; its status."
        pid = os.fork()
        if pid: return os.waitpid(pid, 0)[1]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = 1
        try:
            os.replace, os.fsync = counting(os.replace, n), counting(os.fsync, n)
            found = go(data, folder)
            (top/"found.txt").write_text(found + f" {counted[0]}")
            status = 0
        finally: os._exit(status)

    assert child(top/"whole", 0) == 0
    found, _, calls = (top/"found.txt").read_text().rpartition(" ")
    left = files(top/"whole")
    print("calls", calls, flush=True)
    for n in wanted or range(1, int(calls) + 1):
        folder = top/f"killed{n}"
        died = child(folder, n)
        parts = [f for f in files(folder) if ".part" in f]
        ended = child(folder, 0)
        same = (top/"found.txt").read_text().rpartition(" ")[0] == found
        odd = set(files(folder)) ^ set(left)
        how = "killed" if died == signal.SIGKILL else died
        what = "same" if same else "OTHER"
        words = [how, "again", ended, what, "left", sorted(odd), "parts before", len(parts)]
        print("kill", n, *words, flush=True)
""")


def sweep(data, top, *numbers):
    script = top / "sweep.py"
    script.write_text(SWEEP)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": os.devnull,  # sums kept there would move the count of writes
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(data), str(top), *map(str, numbers)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_run_killed_at_any_write_ends_as_the_uninterrupted_one(run, tmp_path, capsys):
    calls = int(sweep(run[0], tmp_path, -1)[0].split()[1])
    some = (
        []
        if FULL
        else sorted(
            {
                1,
                2,
                3,
                4,
                5,
                calls - 2,
                calls - 1,
                calls,
                *np.linspace(6, calls - 3, 4).astype(int).tolist(),
            }
        )
    )
    (tmp_path / "again").mkdir()
    said = sweep(run[0], tmp_path / "again", *some)
    lines = [line for line in said if line.startswith("kill ")]
    bad = [line for line in lines if " killed again 0 same left [] " not in line]
    with capsys.disabled():
        print(
            f"\n{calls} writes and syncs in a run; killed at {len(lines)} of them, {len(bad)} "
            "ended otherwise"
        )
    assert len(lines) == (calls if FULL else len(some)) and not bad, "\n".join(bad)


# --- data


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def study(data, **changes):
    return make(CONFIG, data=str(data), **changes)


def turn_round(path):
    from PIL import Image

    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def test_changed_data_are_listed_before_anything_is_trained_or_shown(data, tmp_path):
    run_study(tmp_path / "run", study(data), [0], workers=1)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    turn_round(data / "ct/labels/ct3.png")
    (data / "mr/images/mr5.png").rename(data / "mr/images/mr9.png")
    (data / "mr/labels/mr5.png").rename(data / "mr/labels/mr9.png")
    (data / "mr/groups.csv").write_text(
        (data / "mr/groups.csv")
        .read_text()
        .replace("mr5,", "mr9,")
        .replace("mr patient 2", "mr patient 1")
    )
    for act in (
        lambda f, c: run_study(f, c, [0]),
        lambda f, c: parts(c, 0, f),
        lambda f, c: train_arm(f, c, "fine-tuned", 0, "cpu"),
        lambda f, c: train_teacher(f, c, 0, "cpu"),
    ):
        with pytest.raises(InputError) as e:
            act(tmp_path / "run", study(data))
        said = str(e.value)
        assert (
            "2 changed: ct/labels/ct3.png, patient of mr mr2" in said
            and "mr/images/mr9.png" in said
            and "3 added" in said
            and "3 removed" in said
            and "another run folder" in said
        )
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (tmp_path / "run/data.json").unlink()  # without the list the records still know other data
    with pytest.raises(InputError, match="data.json"):
        run_study(tmp_path / "run", study(data), [0], workers=1)


def test_touched_files_and_a_copy_of_the_data_are_the_same_data(data, tmp_path):
    rows = run_study(tmp_path / "run", study(data), [0], workers=1)
    for p in data.rglob("*.png"):
        p.write_bytes(p.read_bytes())
    (data / "mr").rename(tmp_path / "mr")
    shutil.copytree(tmp_path / "mr", data / "mr")
    assert run_study(tmp_path / "run", study(data), [0], workers=1) == rows


@pytest.mark.parametrize(
    "found", ["finished", "not scored", "in the middle", "a run folder that was copied"]
)
def test_data_that_were_moved_are_the_same_data(data, run, tmp_path, found):
    folder = tmp_path / "run"
    place = tmp_path / "run/checkpoints/fine-tuned-0"
    shutil.copytree(run[1], folder)
    if found == "not scored":
        (place / "metrics.csv").unlink()
    if found == "in the middle":

        class Stop(Exception):
            pass

        def stop(row):
            if row["epoch"] == 1:
                raise Stop

        shutil.rmtree(place)
        with pytest.raises(Stop):
            train(Study(study(data), folder), ArmTask("fine-tuned", 0), "cpu", stop)
        assert load_checkpoint(place / "last.pt")["position"]["total"] == 1
    if found == "a run folder that was copied":
        folder = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    data.rename(tmp_path / "moved")
    rows = run_study(folder, study(tmp_path / "moved"), [0], workers=1)
    assert (
        rows == json.loads(run[2])[0] and read_csv(folder / "history.csv") == json.loads(run[2])[1]
    )
    assert json.loads((folder / "config.json").read_text())["study"]["data"] == str(
        tmp_path / "moved"
    )
    turn_round(tmp_path / "moved/ct/labels/ct3.png")
    with pytest.raises(InputError, match="1 changed: ct/labels/ct3.png"):
        run_study(folder, study(tmp_path / "moved"), [0], workers=1)


def test_weights_that_the_teacher_starts_from_count_by_their_content(run, data, tmp_path):
    a = tmp_path / "a.pt"
    b = tmp_path / "b.pt"
    shutil.copyfile(run[1] / "checkpoints/teacher-0/last.pt", a)
    rows = run_study(tmp_path / "run", study(data, teacher_weights=str(a)), [0], workers=1)
    a.rename(b)
    assert run_study(tmp_path / "run", study(data, teacher_weights=str(b)), [0], workers=1) == rows
    shutil.copyfile(run[1] / "checkpoints/fine-tuned-0/last.pt", b)
    with pytest.raises(InputError, match="different: teacher_weights"):
        run_study(tmp_path / "run", study(data, teacher_weights=str(b)), [0], workers=1)


def test_one_and_one_point_nothing_are_the_same_setting(data, tmp_path):
    assert make(zoom=1) == make(zoom=1.0) and type(make(zoom=1).images.zoom) is float
    rows = run_study(tmp_path / "run", study(data, zoom=1, foreground=1), [0], workers=1)
    assert (
        run_study(tmp_path / "run", study(data, zoom=1.0, foreground=1.0), [0], workers=1) == rows
    )


def test_corrected_labels_are_read_in_a_process_that_read_the_old_ones(data, tmp_path):
    config = study(data)
    old = parts(config, 0).student_test
    old.native(0)
    for p in (data / "ct/labels").iterdir():
        turn_round(p)
    new = parts(config, 0).student_test
    assert (new.native(0).label == 1 - old.native(0).label).all()


def test_all_bad_files_are_named_before_any_training(data, tmp_path):
    for name in ("ct/images/ct3.png", "mr/images/mr2.png", "mr/images/mr6.png"):
        (data / name).write_bytes((data / name).read_bytes()[:200])
    with pytest.raises(InputError) as e:
        run_study(tmp_path / "run", study(data), [0], workers=1)
    assert (
        all(n in str(e.value) for n in ("ct3.png", "mr2.png", "mr6.png"))
        and not (tmp_path / "run").exists()
    )


# --- what is finished


def test_a_finished_run_is_not_read_or_trained_again(run, tmp_path, monkeypatch):
    from unpaired_kd.data.collections import Collection

    data, whole, found = run
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(Collection, "check", lambda *a, **k: pytest.fail("read again"))
    monkeypatch.setattr(
        "unpaired_kd.study.tasks.score", lambda *a, **k: pytest.fail("scored again")
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.pt")}
    run_study(tmp_path / "run", study(data), [0], workers=1)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.pt")}


def test_a_lost_config_is_put_together_again_with_all_seeds(data, tmp_path):
    rows = run_study(tmp_path / "run", study(data), [0, 1], workers=1)
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").unlink()
    assert run_study(tmp_path / "run", study(data), [1], workers=1) == rows
    assert json.loads((tmp_path / "run/config.json").read_text()) == config
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(InputError, match="other settings"):
        run_study(tmp_path / "run", study(data, lr=0.1), [1], workers=1)
    with pytest.raises(InputError, match="arm 'fine-tuned'"):
        run_study(
            tmp_path / "run",
            study(
                data, arms={**CONFIG["arms"], "fine-tuned": dict(method="single", start="scratch")}
            ),
            [1],
            workers=1,
        )


def test_a_training_in_another_ones_place_is_refused(run, tmp_path):
    data, whole, _ = run
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(
        tmp_path / "run/checkpoints/fine-tuned-0", tmp_path / "run/checkpoints/fine-tuned-1"
    )
    with pytest.raises(
        InputError, match="fine-tuned-1/done.json is that of another training, fine-tuned 0"
    ):
        run_study(tmp_path / "run", study(data), [0, 1], workers=1)


def test_a_record_of_another_kind_is_named(run, tmp_path):
    data, whole, _ = run
    for path, other in [
        ("data.json", "tables.json"),
        ("data.json", "checkpoints/teacher-0/done.json"),
        ("checkpoints/fine-tuned-0/done.json", "tables.json"),
        ("checkpoints/fine-tuned-0/done.json", "data.json"),
        ("checkpoints/fine-tuned-0/done.json", "checkpoints/teacher-0/done.json"),
        ("config.json", "data.json"),
    ]:
        folder = Path(shutil.copytree(whole, tmp_path / f"run {len(list(tmp_path.iterdir()))}"))
        shutil.copyfile(folder / other, folder / path)
        with pytest.raises(InputError) as e:
            run_study(folder, study(data), [0], workers=1)
        assert str(folder / path) in str(e.value), (path, other)


def test_a_teacher_that_was_trained_again_with_another_result_fits_no_old_student(run, tmp_path):
    import torch

    from unpaired_kd.core import digest
    from unpaired_kd.networks.registry import weights_digest
    from unpaired_kd.study.records import keep_record, record_of

    data, whole, found = run
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    teacher = folder / "checkpoints/teacher-0"
    student = folder / "checkpoints/fine-tuned-0"
    assert record_of(student)["lessons"] == {"teacher-0": record_of(teacher)["weights"]}
    net = train_teacher(folder, study(data), 0, "cpu")
    assert record_of(teacher)["weights"] == digest({"student": weights_digest(net)}, 64)
    shutil.rmtree(teacher)
    rows = run_study(folder, study(data), [0], workers=1)
    assert json.dumps(rows) == json.dumps(json.loads(found)[0])  # it becomes the same again
    state = load_checkpoint(teacher / "last.pt")
    record = record_of(teacher)  # another machine: other last digits
    weights = next(iter(state["networks"]["student"].values()))
    weights += 1e-6
    torch.save(state, teacher / "last.pt")
    net.load_state_dict(state["networks"]["student"])
    facts = {k: v for k, v in record.items() if k not in ("files", "weights")}
    keep_record(
        teacher, record["files"], weights=digest({"student": weights_digest(net)}, 64), **facts
    )
    for act in (
        lambda: run_study(folder, study(data), [0], workers=1),
        lambda: train_arm(folder, study(data), "fine-tuned", 0, "cpu"),
        lambda: run_study(folder, study(data), [0, 1], workers=1),
    ):
        with pytest.raises(
            InputError, match="fine-tuned-0 learned from other weights than those of .*teacher-0"
        ):
            act()
    (
        student / "done.json"
    ).unlink()  # and one that stopped half-way does not go on with another teacher
    with pytest.raises(InputError, match="last.pt was made with"):
        run_study(folder, study(data), [0], workers=1)
    shutil.rmtree(student)  # what the message advises
    rows = run_study(folder, study(data), [0], workers=1)
    assert {r["arm"] for r in rows} == {"teacher", "fine-tuned"} and record_of(student)[
        "lessons"
    ] == {"teacher-0": record_of(teacher)["weights"]}


def test_a_run_among_the_images_is_refused(data):
    for place in (data, data / "ct", data / "mr/images/run"):
        with pytest.raises(InputError, match="among the images"):
            run_study(place, study(data), [0], workers=1)
    assert not list(data.rglob("*.json")) and not (data / "mr/images/run").exists()
    run_study(data / "run", study(data), [0], workers=1)


def test_lost_splits_of_finished_seeds_are_made_again(data, tmp_path):
    run_study(tmp_path / "run", study(data), [0, 1], workers=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/splits").iterdir()}
    shutil.rmtree(tmp_path / "run/splits")
    run_study(tmp_path / "run", study(data), [0, 1], workers=1)
    assert (
        before == {p.name: p.read_bytes() for p in (tmp_path / "run/splits").iterdir()}
        and len(before) == 5
    )


def test_a_half_trained_teacher_teaches_nobody(data, tmp_path):
    class Stop(Exception):
        pass

    def stop(row):
        raise Stop

    config = study(
        data,
        teacher_epochs=3,
        arms={**CONFIG["arms"], "alone": dict(method="single", start="scratch")},
    )
    with pytest.raises(Stop):
        train(Study(config, tmp_path), TeacherTask(seed=0), "cpu", stop)
    write = tmp_path / "checkpoints/teacher-0/last.pt"
    assert not write.exists() or not finished(tmp_path, TeacherTask(seed=0))
    with pytest.raises(InputError, match="train the teacher first"):
        learner_of(tmp_path, config, "fine-tuned", 0)
    train_arm(tmp_path, config, "fine-tuned", 0)  # which finishes the teacher first
    assert load_checkpoint(write)["position"]["finished"] and finished(
        tmp_path, TeacherTask(seed=0)
    )


def test_one_wrong_byte_in_a_checkpoint_is_found_wherever_a_number_lies(run, tmp_path):
    path = run[1] / "checkpoints/fine-tuned-0/last.pt"
    whole = path.read_bytes()
    state = load_checkpoint(path)
    weights = next(iter(state["networks"]["student"].values())).numpy().tobytes()
    for at in [whole.find(weights), *np.linspace(0, len(whole) - 1, 60).astype(int)]:
        data = bytearray(whole)
        data[at] ^= 0x10
        (tmp_path / "last.pt").write_bytes(bytes(data))
        try:
            found = load_checkpoint(tmp_path / "last.pt")
        except InputError:
            continue
        assert str(found) == str(state), at  # padding


def test_no_arm_leaves_the_table_without_a_word(data, tmp_path):
    rows = run_study(tmp_path / "run", study(data), [0, 1], workers=1)
    (tmp_path / "run/checkpoints/fine-tuned-1/metrics.csv").unlink()
    with pytest.warns(UserWarning, match="not finished: fine-tuned 1"):
        few = run_study(tmp_path / "run", study(data), [0], workers=1)
    assert few == [r for r in rows if r["seed"] == 0]
    assert run_study(tmp_path / "run", study(data), [0, 1], workers=1) == rows


@pytest.mark.parametrize("workers", [-1, True, "2", 1.5, None])
def test_workers_are_a_number(data, tmp_path, workers):
    with pytest.raises(InputError, match="workers"):
        run_study(tmp_path / "run", study(data), [0], workers=workers)


# --- one at a time


def test_two_studies_do_not_write_to_one_folder(run, tmp_path):
    from unpaired_kd.study.folder import holding

    shutil.copytree(run[1], tmp_path / "run")
    with holding(tmp_path / "run"):
        with pytest.raises(InputError, match="at work") as e:
            run_study(tmp_path / "run", study(run[0]), [0], workers=1)
    assert str(e.value).count("\n") == 0
    run_study(tmp_path / "run", study(run[0]), [0], workers=1)


def test_left_over_parts_are_cleared(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    for place in (".", "splits", "checkpoints/teacher-0"):
        (tmp_path / "run" / place / ".ukd.part.abcd1234.json").write_text("half")
    run_study(tmp_path / "run", study(run[0]), [0], workers=1)
    assert not [f for f in files(tmp_path / "run") if ".part" in f]


def test_a_foreign_folder_is_not_touched(data, tmp_path):
    for content in (
        {"model_type": "bert"},
        {"format": 1, "recipe": {}},
        [],
        {"study": {}, "arms": {}, "seeds": [], "made by": {}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="config.json"):
            run_study(tmp_path, study(data), [0], workers=1)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "data"]


# --- scripts, checkouts, weights


def script(tmp_path, text, *environment, **more):
    (tmp_path / "mine.py").write_text(text)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        **more,
    }
    return subprocess.run(
        [*environment, sys.executable, "mine.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("workers,ends", [(1, "1"), (2, "InputError")])
def test_a_script_without_a_guard(run, tmp_path, workers, ends):
    done = script(
        tmp_path,
        "from test_runs import CONFIG, study\n"
        "from unpaired_kd.study.run import run_study\n"
        "print('mine', flush=True)\n"
        "arms = dict(CONFIG['arms'], alone=dict(method='single', start='scratch'))\n"
        f"rows = run_study('run', study({str(run[0])!r}, arms=arms), [0], workers={workers})\n"
        "print(len({r['arm'] for r in rows}))\n",
    )
    assert done.stdout.count("mine") == 1
    if workers == 1:
        assert done.returncode == 0 and done.stdout.split()[-1] == "3"
    else:
        assert (
            'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
            and "mine.py" in done.stderr.splitlines()[-1]
        )


def test_a_machine_without_git_home_or_name(run, tmp_path):
    done = script(
        tmp_path,
        "import os\n"
        "from test_runs import study\n"
        "from unpaired_kd.study.folder import environment\n"
        "from unpaired_kd.study.run import run_study\n"
        "os.environ['PATH'] = '/nonexistent'\n"
        "os.environ.pop('HOME', None)\n"
        "assert environment()['commit'] == ''\n"
        f"print(len(run_study('run', study({str(run[0])!r}), [0], workers=1)))\n",
        TMPDIR="/proc/nothing",
    )
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_commit_is_that_of_this_checkout_only(tmp_path):
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "unpaired_kd", site / "unpaired_kd")

    def git(*words):
        return subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
            capture_output=True,
            text=True,
            check=True,
        )

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a thesis, library and all")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from unpaired_kd.study.folder import environment; "
            "print(repr(environment()['commit']))",
        ],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "''", done
    if (ROOT / ".git").exists():
        assert environment()["commit"]


def test_foreign_teacher_weights_are_refused_before_anything(run, tmp_path):
    import pickle

    import torch

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    net = torch.nn.Conv2d(1, 1, 1)
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "lightning.ckpt")
    torch.save(net, tmp_path / "whole.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"networks": {}}, tmp_path / "empty.pt")
    torch.save({"networks": {"student": {"a": 3}}}, tmp_path / "odd.pt")
    torch.save({"networks": {"student": net.state_dict()}}, tmp_path / "other.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "evil2.pt")
    torch.save(
        {"networks": {"student": net.state_dict()}},
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    for path in [
        *sorted(p for p in tmp_path.iterdir() if p.suffix in (".pt", ".ckpt")),
        tmp_path / "absent.pt",
    ]:
        with pytest.raises(InputError, match=path.name):
            check_study(Study(study(run[0], teacher_weights=str(path))), [0])
        if path.name != "absent.pt" and path.is_file() and path.name != "other.pt":
            place = tmp_path / path.stem / "checkpoints/teacher-0"
            place.mkdir(parents=True)
            (place / "last.pt").write_bytes(path.read_bytes())
            with pytest.raises(InputError, match="last.pt"):
                train_teacher(tmp_path / path.stem, study(run[0]), 0, "cpu")
    assert not (tmp_path / "executed").exists()


def test_a_label_edited_while_a_training_runs_is_never_scored(data, run, tmp_path, monkeypatch):
    """The label of a test image changes after the last batch. Restored, the run ends as if nothing
    had been."""
    from unpaired_kd.training import learner as module

    config = study(data)
    folder = tmp_path / "run"
    label = Path(parts(config, 0).student_test.cases[0].label)
    kept = label.read_bytes()
    fit = module.Learner.fit

    def fit_and_edit(self):
        out = fit(self)
        if (folder / "checkpoints/teacher-0/done.json").exists():
            turn_round(label)
        return out

    monkeypatch.setattr(module.Learner, "fit", fit_and_edit)
    with pytest.raises(InputError) as e:
        run_study(folder, config, [0], workers=1)
    place = folder / "checkpoints/fine-tuned-0"
    assert f"1 changed: ct/labels/{label.name}" in str(e.value) and f"delete {place}" in str(
        e.value
    )
    assert not (place / "done.json").exists() and not (place / "metrics.csv").exists()
    monkeypatch.setattr(module.Learner, "fit", fit)
    with pytest.raises(InputError, match="1 changed"):
        run_study(folder, config, [0], workers=1)
    label.write_bytes(kept)
    shutil.rmtree(place)
    assert run_study(folder, config, [0], workers=1) == load_rows(run[1])


def test_a_training_on_other_data_is_named(data, run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    turn_round(data / "ct/labels/ct3.png")
    run_study(tmp_path / "other", study(data), [0], workers=1)
    place = tmp_path / "run/checkpoints/fine-tuned-0"
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "other/checkpoints/fine-tuned-0", place)
    with pytest.raises(InputError, match=f"{place} was trained with other data than .*Delete it"):
        run_study(tmp_path / "run", study(run[0]), [0], workers=1)
    shutil.rmtree(place)
    assert run_study(tmp_path / "run", study(run[0]), [0], workers=1) == load_rows(run[1])


def test_a_table_that_was_cut_is_reported_as_cut(run, tmp_path, capsys):
    from unpaired_kd.command.cli import main

    shutil.copytree(run[1], tmp_path / "run")
    table = tmp_path / "run/metrics.csv"
    rows = load_rows(run[1])
    (tmp_path / "run/tables.json").unlink()
    text = table.read_text().splitlines(keepends=True)
    table.write_text("".join(text[:-1]))
    assert main(["report", str(tmp_path / "run"), "--reference", "fine-tuned"]) == 0
    said = capsys.readouterr().out
    cases = [r["case"] for r in rows if r["arm"] == "fine-tuned"]
    assert f"metrics.csv lacks 1 of {len(cases)} cases of fine-tuned 0, e.g. {cases[-1]}" in said


def test_a_table_that_is_gone_is_written_again(run, tmp_path, capsys):
    from unpaired_kd.command.cli import main

    shutil.copytree(run[1], tmp_path / "run")
    table = tmp_path / "run/metrics.csv"
    table.unlink()
    assert main(["report", str(tmp_path / "run"), "--reference", "fine-tuned"]) == 2
    assert "metrics.csv is gone. The same command writes it again" in capsys.readouterr().err
    run_study(tmp_path / "run", study(run[0]), [0], workers=1)
    assert table.read_bytes() == (run[1] / "metrics.csv").read_bytes()


@pytest.mark.parametrize("name", ["ct/groups.csv", "manifest.csv"])
def test_a_table_of_patients_that_was_not_fetched_is_not_a_missing_one(data, name, capsys):
    from unpaired_kd.command.cli import main

    (data / name).unlink(missing_ok=True)
    (data / name).symlink_to("../.git/annex/objects/4f.csv")
    with pytest.raises(InputError, match=f"{name} is a link to .*which is not there. Fetch"):
        check_study(Study(study(data)), [0])
    assert main(["check", str(data)]) in (1, 2)
    assert f"{name} is a link to" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["config.json", "data.json", "parameters.json", "tables.json"])
def test_a_record_that_was_not_fetched_is_not_a_missing_one(run, tmp_path, name, capsys):
    from unpaired_kd.command.cli import main

    shutil.copytree(run[1], tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to("nowhere")
    if name == "parameters.json":
        (tmp_path / "run/config.json").unlink()
    assert main(["report", str(tmp_path / "run"), "--reference", "fine-tuned"]) == 2
    assert f"{name} is a link to nowhere, which is not there" in capsys.readouterr().err
