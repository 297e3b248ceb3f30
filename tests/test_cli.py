"""The command as users meet it: in a process of its own, with bad input, killed, on a fresh environment."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from unpaired_kd import cli
from unpaired_kd.core import InputError

START = "import sys; from unpaired_kd.cli import main; sys.exit(main(sys.argv[1:]))"


def notebook(path, *cells, tag=True):
    "A notebook of code cells; the first is the parameters cell."
    body = [dict(cell_type="code", id=f"c{i}", metadata={"tags": ["parameters"]} if tag and i == 0 else {}, source=c, outputs=[], execution_count=None) for i, c in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=body, metadata={"kernelspec": dict(name="python3", display_name="python3", language="python")}, nbformat=4, nbformat_minor=5)))
    return path


def ukd(*arguments, cwd, **kw):
    return subprocess.run([sys.executable, "-c", START, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, **kw)


PARAMETERS = 'steps: int = 2  # how many\nrate: float = 0.5\nname: str = "x"\nrun_folder: str = ""'


def test_run_in_a_process_of_its_own(tmp_path):
    "Values reach the notebook with their types; the kernel is this Python; output appears; the record is there."
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, 'import sys, os\nprint([steps, rate, name], sys.executable, os.environ["OMP_WAIT_POLICY"])\nprint("late", file=sys.stderr)')
    done = ukd("run", nb, "-p", "steps", "3", "-p", "rate", "1e-3", "-p", "name", "no", "--out", "runs/a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"[3, 0.001, 'no'] {sys.executable} passive" in done.stdout and "run folder: runs/a" in done.stdout
    assert done.stderr.strip() == "late"
    assert json.loads((tmp_path / "runs/a/parameters.json").read_text()) == {"notebook": "a", "steps": 3, "rate": .001, "name": "no"}
    assert json.loads((tmp_path / "runs/a/notebook.ipynb").read_text())["metadata"]["papermill"]["parameters"]["run_folder"] == "runs/a"


@pytest.mark.parametrize("arguments, said", [
    (["-p", "stepz", "3"], "Did you mean 'steps'"), (["-p", "steps", "three"], "takes int"), (["-p", "steps", "1.5"], "takes int"), (["-p", "rate", "fast"], "takes float"),
    (["-p", "run_folder", "x"], "--out"), (["-p", "steps", "1", "-p", "steps", "2"], "twice"), (["-p", "steps.x", "1"], "is no dict")])
def test_bad_parameters_are_refused_with_the_list_of_known_ones(tmp_path, arguments, said, capsys):
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, "1/0")
    assert cli.main(["run", str(nb), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert "out" in said or "twice" in said or "steps: int = 2" in error and "how many" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cells, tag, said", [
    ([PARAMETERS], False, "0 cells tagged"), (["steps: int = 2"], True, "run_folder"), (["steps = run()"], True, "plain value"), (["for i in []: pass"], True, "name: type = value"), (["a = b = 1"], True, "name: type = value")])
def test_notebooks_without_a_proper_parameters_cell_are_refused(tmp_path, cells, tag, said):
    with pytest.raises(InputError, match=said): cli.run_notebook(str(notebook(tmp_path / "a.ipynb", *cells, tag=tag)), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unknown_experiment_names_the_known(monkeypatch, tmp_path):
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    notebook(tmp_path / "nbs/experiments/lotus.ipynb", PARAMETERS)
    monkeypatch.chdir(tmp_path)
    assert cli.find_notebook("lotus") == Path("nbs/experiments/lotus.ipynb")
    with pytest.raises(InputError, match="Did you mean 'lotus'"): cli.find_notebook("lotos")


@pytest.mark.parametrize("kind, text, value", [
    ("int", "3", 3), ("float", "3", 3.), ("float", "1e-3", .001), ("float", "-.5", -.5), ("float", ".inf", float("inf")), ("bool", "true", True), ("str", "[1]", "[1]"), ("str", "", ""), ("list", "[a, 1]", ["a", 1]),
    ("list[float]", "[1, 2e-1]", [1., .2]), ("dict[str, float]", "{a: 1}", {"a": 1.}), ("int | None", "null", None), ("str | None", "null", None), ("str | None", "7", "7"), ("float | str", "auto", "auto"), ("float | str", "2", 2.)])
def test_values_take_the_annotated_type(kind, text, value):
    got = cli.parse_value(cli.Parameter("x", kind, None, ""), text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("kind, text", [("int", "true"), ("int", "2.0"), ("float", "true"), ("bool", "1"), ("bool", "on fire"), ("list", "1"), ("list", "{a: 1}"), ("list[int]", "[1.5]"), ("dict", "[]"), ("dict[str, int]", "{a: b}"), ("int | None", "x"), ("list", "[1"), ("set", "1")])
def test_values_of_another_type_are_refused(kind, text):
    with pytest.raises(InputError, match="does not fit"): cli.parse_value(cli.Parameter("x", kind, None, ""), text)


def test_a_failing_cell_keeps_the_notebook_and_bad_input_has_no_traceback(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, 'from unpaired_kd.core import InputError\nprint("before")', 'raise InputError("labels/7.png: no such label")', 'print("after")')
    done = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1 and "before" in done.stdout and "after" not in done.stdout
    assert "labels/7.png: no such label" in done.stderr and "Traceback" not in done.stderr
    assert "InputError" in (tmp_path / "out/notebook.ipynb").read_text()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_and_run_again(tmp_path):
    "SIGKILL leaves a folder that the same command takes over; another command is refused and told why."
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, 'from pathlib import Path\nimport time\nmark = Path(run_folder, "mark")\nagain = mark.exists()\nmark.write_text("")\nif not again: time.sleep(60)\nprint("resumed")')
    command = [sys.executable, "-c", START, "run", str(nb), "--out", "out"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while not (tmp_path / "out/mark").exists() and time.time() < until: time.sleep(.05)
    assert (tmp_path / "out/mark").exists()
    busy = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert busy.returncode == 2 and "at work" in busy.stderr
    first.send_signal(signal.SIGKILL); first.wait()
    (tmp_path / "out/notebook.ipynb").write_text('{"cells": [')  # killed while the notebook was being saved
    other = ukd("run", nb, "--out", "out", "-p", "steps", "9", cwd=tmp_path)
    assert other.returncode == 2 and "steps: 2 there, 9 now" in other.stderr
    again = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert again.returncode == 0 and "resumed" in again.stdout


def test_folders_that_are_refused(tmp_path):
    record = {"notebook": "a", "steps": 1}
    def claim(folder, record=record, **k):
        with cli.claim(folder, record, **k): pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"): claim(tmp_path / "file" / "run")
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(InputError, match="thesis.tex"): claim(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    claim(tmp_path / "run"); claim(tmp_path / "run")
    with pytest.raises(InputError, match="'a' there, 'b' now"): claim(tmp_path / "run", {"notebook": "b", "steps": 1})
    claim(tmp_path / "run", {"notebook": "a", "steps": 2}, extend=True)
    with pytest.raises(InputError, match="2 there, 1 now"): claim(tmp_path / "run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_unwritable_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot write"):
        with cli.claim(tmp_path / "locked" / "run", {}): pass


def test_help_is_light(tmp_path):
    "`ukd --help` imports neither torch nor Jupyter, and takes under a second."
    start = time.time()
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", START, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "predict" in done.stdout
    assert not [m for m in ("torch", "numpy", "papermill", "IPython", "matplotlib", "monai") if f" {m}\n" in done.stderr]
    assert time.time() - start < 1


def test_rows_of_several_runs_are_counted_once():
    row = lambda arm, case, dsc: dict(arm=arm, seed=0, case=case, dsc=dsc)
    a = [row("alone", c, .5) for c in "xy"] + [row("kl", c, .6) for c in "xy"]
    b = [row("alone", c, .5) for c in "xyz"] + [row("kl", c, .7) for c in "xy"]
    joined = cli.join_runs({"runs/a": a, "runs/b": b})
    assert [(r["arm"], r["case"]) for r in joined] == [("alone", "x"), ("alone", "y"), ("kl", "x"), ("kl", "y"), ("alone", "z"), ("kl (b)", "x"), ("kl (b)", "y")]
    assert len({(r["arm"], r["seed"], r["case"]) for r in joined}) == len(joined)


def test_predict(tmp_path, capsys):
    "`ukd predict` writes a label map of the image's size; a wrong student or image is named, and nothing is written."
    import numpy as np, tifffile
    from unpaired_kd.inference import Recipe, Student
    from unpaired_kd.networks.unet import UNet
    net = UNet(in_channels=3, classes=1, width=4)
    Student(net, Recipe(patch=32, network_config=net.config)).save(tmp_path / "student")
    tifffile.imwrite(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8))
    assert cli.main(["predict", str(tmp_path / "student"), str(tmp_path / "a.tif"), str(tmp_path / "out.tif")]) == 0
    label = tifffile.imread(tmp_path / "out.tif")
    assert label.shape == (40, 50) and set(np.unique(label)) <= {0, 1}
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:100])
    for student, image, said in [("absent", "a.tif", "absent"), ("student", "b.tif", "b.tif"), ("student", "c.tif", "c.tif")]:
        assert cli.main(["predict", str(tmp_path / student), str(tmp_path / image), str(tmp_path / "no.tif")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no.tif").exists()


def test_report(tmp_path, capsys):
    "`ukd report` prints one table for one run or several; a folder without scores is named."
    from unpaired_kd.report import save_rows
    rows = [dict(arm=a, seed=0, case=f"{g}{i}", group=g, label_group="", dsc=d + .01 * i, hd95=5. - d, aji=d / 2, pq=d / 2) for a, d in (("alone", .5), ("distilled", .6)) for g in "abc" for i in range(2)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_rows(tmp_path / name / "metrics.csv", rows)
    assert cli.main(["report", str(tmp_path / "one")]) == 0
    one = capsys.readouterr().out
    assert "alone" in one and "distilled" in one and "HD95" in one
    assert cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out == one
    assert cli.main(["report", str(tmp_path / "one"), "--metrics", "dsc", "--reference", "distilled"]) == 0
    assert "HD95" not in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path)]) == 2


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS + "".join(f"\nx{i}: int = {i}" for i in range(5000)))
    done = subprocess.run(f"{sys.executable} -c '{START}' run {nb} --help-notebook | head -n 1", shell=True, capture_output=True, text=True)
    assert done.stdout == f"Parameters of {nb}:\n" and done.stderr == ""
