"""What a run folder says must be so: damaged, killed at any write, called twice, given other data."""
import hashlib, json, os, shutil, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unpaired_kd.core import InputError, read_csv, write_json
from unpaired_kd.report import load_rows
from unpaired_kd.study import ARMS, StudyConfig, export_student, run_study, split_data

ROOT = Path(__file__).parents[1]
FULL = bool(os.environ.get("UKD_FULL")) # every file and every write, instead of some of each kind
CONFIG = StudyConfig(teacher="mr", student="ct", width=2, epochs=2, teacher_epochs=1, steps=1, batch=2, patch=32, student_labels=1,
                     validation=1, precision="fp32", arms={a: None for a in ARMS if a != "fine-tuned"})


def make_data(folder):
    "Eight images of either modality with a bright square, and their labels."
    from PIL import Image
    r = np.random.default_rng(0)
    for modality in ("mr", "ct"):
        for part in ("images", "labels"): (folder / modality / part).mkdir(parents=True)
        for i in range(8):
            label = np.zeros((32, 32), np.uint8)
            y, x = r.integers(2, 16, 2)
            label[y:y + 12, x:x + 12] = 1
            image = (60 + 120 * label + r.normal(0, 8, label.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / modality / "images" / f"{modality}{i}.png")
            Image.fromarray(label * 255).save(folder / modality / "labels" / f"{modality}{i}.png")
        rows = [f"{modality}{i},{modality} patient {i}" for i in range(8)]
        (folder / modality / "groups.csv").write_text("\n".join(["id,group", *rows]) + "\n")
    return folder


def go(data, folder):
    "A whole run, as the notebook of an experiment has it; returns what it found, as text."
    from unpaired_kd.cli import claim
    from unpaired_kd.inference import Student
    from unpaired_kd.report import box_plot, save_figure
    config = replace(CONFIG, data=str(data))
    with claim(folder, dict(notebook="tiny", parameters={})):
        test = split_data(config, 0, folder).student_test
        rows = run_study(folder, config, [0], workers=1)
        history = read_csv(folder / "history.csv")
        out = export_student(folder, config, rows, arm="fine-tuned")
        save_figure(folder / "figures" / "cases.png", box_plot(rows, "dsc", reference="fine-tuned"))
        write_json(folder / "notebook.ipynb", {"cells": []})
    label = Student.load(out, "cpu").predict(test.native(0).image)
    weights = hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()
    return json.dumps([rows, history, label.tolist(), weights])


def files(folder): return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


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
    "cut in half": lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]),
    "one byte": flip_byte,
    "another number": flip_digit,
    "deleted": lambda p: p.unlink(),
    "emptied": lambda p: p.write_bytes(b""),
}
PAST = ("notebook.ipynb", "figures/cases.png", "student/README.md") # for people; made anew by every run
FILES = ["config.json", "parameters.json", "data.json", "tables.json", "metrics.csv", "history.csv", "splits/student-0.json", "splits/student-0-parts.json", "splits/teacher-0.json",
         *[f"checkpoints/{t}-0/{f}" for t, names in {"teacher": ("last.pt", "metrics.csv", "done.json"), "fine-tuned": ("last.pt", "best.pt", "history.csv", "metrics.csv", "done.json")}.items() for f in names],
         "student/weights.safetensors", "student/config.json", *PAST]


def read(folder, test):
    "What `ukd report` and `ukd predict` read in a finished folder."
    from unpaired_kd.inference import Student
    return json.dumps([load_rows(folder), Student.load(folder / "student", "cpu").predict(test).tolist()])


def verdict(action, expected, path):
    "How an action on a damaged folder ends."
    try: found = action()
    except InputError as e: return "refused" if str(path) in str(e) or path.name == "parameters.json" else f"WRONG FILE NAMED: {e}"
    return "same result" if found == expected else "SILENTLY WRONG"


def test_no_damage_to_a_finished_run_is_silent(run, tmp_path, capsys):
    data, whole, found = run
    test = split_data(replace(CONFIG, data=str(data)), 0).student_test.native(0).image
    seen, left, table, bad = read(whole, test), files(whole), [], []
    for name in files(whole) if FULL else FILES:
        if ".lock" in name: continue
        for damage, do in DAMAGES.items():
            if damage == "another number" and not name.endswith((".json", ".csv", ".md", ".ipynb")): continue
            folder = tmp_path / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            try: do(folder / name)
            except ValueError: continue # a text without a digit
            told = verdict(lambda: read(folder, test), seen, folder / name)
            ends = verdict(lambda: go(data, folder), found, folder / name)
            mended = ""
            if ends == "refused": # what the message advises must help
                (folder / name).unlink(missing_ok=True)
                mended = verdict(lambda: go(data, folder), found, folder / name)
            if (mended or ends) == "same result" and files(folder) != left: ends = f"LEFT OVER OR LOST: {set(files(folder)) ^ set(left)}"
            table.append(f"{name:40} {damage:15} read: {told:12} run again: {ends:12} {mended and 'deleted and run again: ' + mended}")
            if not {told, ends, mended or "same result"} <= {"refused", "same result"} or mended == "refused": bad.append(table[-1])
    with capsys.disabled(): print("\n" + "\n".join(table) + f"\n{len(table)} damages, {len(bad)} silently wrong or without a way out")
    assert not bad, "\n".join(bad)


# --- kills

SWEEP = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot, monai.inferers, unpaired_kd.cli, unpaired_kd.inference
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
        "Run in a process of its own that is killed at the n-th call of os.replace or os.fsync; its exit status, and what it found."
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
        print("kill", n, "killed" if died == signal.SIGKILL else died, "again", ended, "same" if same else "OTHER", "left", sorted(odd), "parts before", len(parts), flush=True)
""")


def sweep(data, top, *numbers):
    script = top / "sweep.py"
    script.write_text(SWEEP)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, str(script), str(data), str(top), *map(str, numbers)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_run_killed_at_any_write_ends_as_the_uninterrupted_one(run, tmp_path, capsys):
    calls = int(sweep(run[0], tmp_path, -1)[0].split()[1])
    some = [] if FULL else sorted({1, 2, 3, 4, 5, calls - 2, calls - 1, calls, *np.linspace(6, calls - 3, 4).astype(int).tolist()})
    (tmp_path / "again").mkdir()
    lines = [l for l in sweep(run[0], tmp_path / "again", *some) if l.startswith("kill ")]
    bad = [l for l in lines if " killed again 0 same left [] " not in l]
    with capsys.disabled(): print(f"\n{calls} writes and syncs in a run; killed at {len(lines)} of them, {len(bad)} ended otherwise")
    assert len(lines) == (calls if FULL else len(some)) and not bad, "\n".join(bad)
