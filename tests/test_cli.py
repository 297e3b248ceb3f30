"""The command as users meet it: a process of its own, bad input, kills, a fresh environment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unpaired_kd.command import cli, parameters
from unpaired_kd.command import notebook as program
from unpaired_kd.command.arguments import read_arguments
from unpaired_kd.core import InputError
from unpaired_kd.study.joined import join_runs

START = "import sys; from unpaired_kd.command.cli import main; sys.exit(main(sys.argv[1:]))"


def notebook(path, *cells, tag=True):
    "A notebook of code cells; the first is the parameters cell."
    body = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={"tags": ["parameters"]} if tag and i == 0 else {},
            source=c,
            outputs=[],
            execution_count=None,
        )
        for i, c in enumerate(cells)
    ]
    path.write_text(
        json.dumps(
            dict(
                cells=body,
                metadata={
                    "kernelspec": dict(name="python3", display_name="python3", language="python")
                },
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )
    return path


def ukd(*arguments, cwd, **kw):
    return subprocess.run(
        [sys.executable, "-c", START, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        **kw,
    )


PARAMETERS = 'steps: int = 2  # how many\nrate: float = 0.5\nname: str = "x"\nrun_folder: str = ""'


def test_run_in_a_process_of_its_own(tmp_path):
    "Values arrive with their types; the kernel is this Python; output and record are there."
    body = """import sys, os
print([steps, rate, name], sys.executable, os.environ["OMP_WAIT_POLICY"])
print("late", file=sys.stderr)"""
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, body)
    given = "-p steps 3 -p rate 1e-3 -p name no --out runs/a".split()
    done = ukd("run", nb, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"[3, 0.001, 'no'] {sys.executable} passive" in done.stdout
    assert "run folder: runs/a" in done.stdout
    assert done.stderr.strip() == "late"
    record = json.loads((tmp_path / "runs/a/parameters.json").read_text())
    assert record == {"notebook": "a", "steps": 3, "rate": 0.001, "name": "no"}
    kept = json.loads((tmp_path / "runs/a/notebook.ipynb").read_text())
    assert kept["metadata"]["papermill"]["parameters"]["run_folder"] == "runs/a"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-p", "stepz", "3"], "Did you mean 'steps'"),
        (["-p", "steps", "three"], "takes int"),
        (["-p", "steps", "1.5"], "takes int"),
        (["-p", "rate", "fast"], "takes float"),
        (["-p", "run_folder", "x"], "--out"),
        (["-p", "steps", "1", "-p", "steps", "2"], "twice"),
        (["-p", "steps.x", "1"], "is no dict"),
    ],
)
def test_bad_parameters_are_refused_with_the_list_of_known_ones(tmp_path, arguments, said, capsys):
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, "1/0")
    assert cli.main(["run", str(nb), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert "out" in said or "twice" in said or "steps: int = 2" in error and "how many" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "cells, tag, said",
    [
        ([PARAMETERS], False, "0 cells tagged"),
        (["steps: int = 2"], True, "run_folder"),
        (["steps = run()"], True, "plain value"),
        (["for i in []: pass"], True, "name: type = value"),
        (["a = b = 1"], True, "name: type = value"),
    ],
)
def test_notebooks_without_a_proper_parameters_cell_are_refused(tmp_path, cells, tag, said):
    with pytest.raises(InputError, match=said):
        program.run_notebook(
            str(notebook(tmp_path / "a.ipynb", *cells, tag=tag)), out=str(tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


def test_unknown_experiment_names_the_known(monkeypatch, tmp_path):
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    notebook(tmp_path / "nbs/experiments/lotus.ipynb", PARAMETERS)
    monkeypatch.chdir(tmp_path)
    assert program.find_notebook("lotus") == Path("nbs/experiments/lotus.ipynb")
    with pytest.raises(InputError, match="Did you mean 'lotus'"):
        program.find_notebook("lotos")


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("int", "3", 3),
        ("float", "3", 3.0),
        ("float", "1e-3", 0.001),
        ("float", "-.5", -0.5),
        ("float", ".inf", float("inf")),
        ("bool", "true", True),
        ("str", "[1]", "[1]"),
        ("str", "", ""),
        ("list", "[a, 1]", ["a", 1]),
        ("list[float]", "[1, 2e-1]", [1.0, 0.2]),
        ("dict[str, float]", "{a: 1}", {"a": 1.0}),
        ("int | None", "null", None),
        ("str | None", "null", None),
        ("str | None", "7", "7"),
        ("float | str", "auto", "auto"),
        ("float | str", "2", 2.0),
    ],
)
def test_values_take_the_annotated_type(kind, text, value):
    got = parameters.parse_parameter(parameters.Parameter("x", kind, None, ""), text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("int", "true"),
        ("int", "2.0"),
        ("float", "true"),
        ("bool", "1"),
        ("bool", "on fire"),
        ("list", "1"),
        ("list", "{a: 1}"),
        ("list[int]", "[1.5]"),
        ("dict", "[]"),
        ("dict[str, int]", "{a: b}"),
        ("int | None", "x"),
        ("list", "[1"),
        ("set", "1"),
    ],
)
def test_values_of_another_type_are_refused(kind, text):
    with pytest.raises(InputError, match="does not fit"):
        parameters.parse_parameter(parameters.Parameter("x", kind, None, ""), text)


@pytest.mark.parametrize(
    "text",
    [
        "C: data",
        "[a",
        "*x",
        "010",
        "off",
        "null",
        "2024-01-01",
        "#1",
        "  spaces  ",
        "",
        "'quoted'",
        "!tag",
        "1e3",
        "a\nb",
        "x" * 300_000,
        "{a: 1}",
    ],
)
def test_text_is_text(text):
    "As it was typed; in an alternative, whatever the other type does not take; never read as YAML."
    assert parameters.parse_parameter(parameters.Parameter("x", "str", "a", ""), text) == text
    assert parameters.parse_parameter(parameters.Parameter("x", "str | None", None, ""), text) == (
        None if text == "null" else text
    )
    assert parameters.parse_parameter(parameters.Parameter("x", "int | str", 0, ""), text) == text


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (
            "list[str]",
            "[no, yes, off, 010, 1e3, 2024-01-01, null, '5', 1:30]",
            ["no", "yes", "off", "010", "1e3", "2024-01-01", "null", "5", "1:30"],
        ),
        ("dict[str, float]", "{off: 1, 010: .5}", {"off": 1.0, "010": 0.5}),
        ("list[str | None]", "[null, a, ~]", [None, "a", None]),
        ("int", "0x10", 16),
        ("int", "0o10", 8),
        ("int", "+7", 7),
        ("int", "-0", 0),
        ("float", "1.", 1.0),
        ("float", ".5", 0.5),
        ("float", "-.inf", float("-inf")),
        ("float", "5E-1", 0.5),
        ("float", "0x10", 16.0),
        *(("bool", t, True) for t in ("yes", "On", "TRUE")),
        *(("bool", t, False) for t in ("no", "OFF", "False")),
        (
            "list",
            "[a b, 1, .5, true, null, ~, 'no', 0x1F, {k: [v]}]",
            ["a b", 1, 0.5, True, None, None, "no", 31, {"k": ["v"]}],
        ),
        ("dict", "{1: a, 2: b}", {1: "a", 2: "b"}),
        ("object", "{a: null, b: 16-9}", {"a": None, "b": "16-9"}),
    ],
)
def test_values_are_what_was_meant(kind, text, value):
    "By hand, from the core schema of YAML 1.2; `repr` tells 1 from 1.0 and from True."
    assert repr(
        parameters.parse_parameter(parameters.Parameter("x", kind, None, ""), text)
    ) == repr(value)


@pytest.mark.parametrize(
    "text",
    [
        "010",
        "-07",
        "1:30",
        "1_000",
        "0b11",
        "yes",
        "No",
        "on",
        "OFF",
        "2024-01-01",
        "=",
        "<<",
        "08",
    ],
)
def test_what_nobody_can_know_is_refused(text):
    "Without a type, wherever YAML 1.1 and 1.2 disagree; in quotes it is text."
    for place in ("{}", "[{}]", "{{a: {}}}", "{{{}: a}}"):
        with pytest.raises(InputError):
            parameters.parse_parameter(
                parameters.Parameter("x", "object", None, ""), place.format(text)
            )
    assert parameters.parse_parameter(
        parameters.Parameter("x", "list", None, ""), f"['{text}']"
    ) == [text]


def test_entries_deep_in_a_dict(tmp_path):
    nb = notebook(
        tmp_path / "a.ipynb",
        """net: dict = {"width": 8, "inner": {"codes": 4, "tap": None}}
free: dict = {}
lr: dict[str, dict[str, float]] = {"a": {"b": 1.0}}
""",
    )
    known = parameters.read_parameters(nb)
    got = parameters.resolve_parameters(
        nb,
        known,
        [
            ("net.inner.codes", "16"),
            ("net.inner.tap", "conv9"),
            ("free.a.b", "1"),
            ("free.a.c", "x"),
            ("lr.a.b", "2"),
        ],
    )
    assert got == {
        "net": {"width": 8, "inner": {"codes": 16, "tap": "conv9"}},
        "free": {"a": {"b": 1, "c": "x"}},
        "lr": {"a": {"b": 2.0}},
    }
    assert (
        known["net"].default == {"width": 8, "inner": {"codes": 4, "tap": None}}
        and known["free"].default == {}
    )


def test_everything_arrives_in_the_notebook_as_it_was_given(tmp_path):
    """Also keys that are numbers, text that looks like code, and a notebook and a folder with
    braces; papermill says nothing."""
    cell = """text: str = ""
keys: dict = {}
odd: list = []
maybe: int | None = None
run_folder: str = ""
"""
    body = """from pathlib import Path
Path(run_folder, "seen").write_text(repr([text, keys, odd, maybe]))"""
    nb = notebook(tmp_path / "n {x} %s 'é'.ipynb", cell, body)
    text = "\"; import os\n\\\\ {x} %s # \U0001f600'"
    given = ["-p", "text", text, "-p", "keys", "{1: {2: a}, 3: [.5]}"]
    given += ["-p", "odd", "[.inf, null, true]", "-p", "maybe", "3"]
    done = ukd("run", nb, *given, "--out", "o {y} %d", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "o {y} %d/seen").read_text(encoding="utf-8") == repr(
        [text, {1: {2: "a"}, 3: [0.5]}, [float("inf"), None, True], 3]
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_kernel_that_dies_is_one_sentence(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, "import os\nos.kill(os.getpid(), 9)")
    done = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and "the kernel that runs" in done.stderr
        and "out/notebook.ipynb" in done.stderr
    )


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_in_order(number):
    "One line and status 128 + number; a hang-up that was to be ignored (`nohup`) is."
    script = f"""import os, signal, sys
from unpaired_kd.command import cli
def wait(args):
    os.kill(os.getpid(), {int(number)})
    print('went on')
    return 0
cli.COMMANDS['sweep'] = wait
signal.signal({int(number)}, HANDLER)
sys.exit(cli.main(['sweep', 'x']))
"""

    def start(handler):
        command = [sys.executable, "-c", script.replace("HANDLER", handler)]
        return subprocess.run(command, capture_output=True, text=True)

    usual = "signal.default_int_handler" if number == signal.SIGINT else "signal.SIG_DFL"
    stopped = start(usual)  # whatever the tests were started with
    assert stopped.returncode == 128 + number
    assert stopped.stdout == ""
    assert stopped.stderr == "\nukd sweep: stopped. The same command continues.\n"
    ignored = start("signal.SIG_IGN")
    assert ignored.returncode == 0
    assert ignored.stdout == "went on\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "gbk"])
def test_a_table_on_a_terminal_that_has_no_such_signs(tmp_path, encoding):
    "The dash, the plus-minus and the micron may become question marks; the numbers stay."
    (tmp_path / "metrics.csv").write_text(
        "arm,seed,case,group,hd95_unit,dsc,hd95\n"
        + "".join(
            f"{a},0,{c},{c},mm,0.{d}{c},0.{c}\n"
            for a, d in (("alone", 5), ("kl", 6))
            for c in range(3)
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", START, "report", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    text = done.stdout.decode(encoding)
    assert done.returncode == 0 and done.stderr == b"" and "51.0" in text and "61.0" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full device")
def test_an_output_that_is_full_or_closed(tmp_path):
    (tmp_path / "metrics.csv").write_text("arm,seed,case,group,dsc\nalone,0,a,a,0.5\n")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", START, "report", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    closed = subprocess.run(
        f"{sys.executable} -c '{START}' report {tmp_path} >&-",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert closed.returncode == 0 and closed.stderr == ""


@pytest.mark.slow
def test_a_failing_cell_keeps_the_notebook_and_bad_input_has_no_traceback(tmp_path):
    nb = notebook(
        tmp_path / "a.ipynb",
        PARAMETERS,
        'from unpaired_kd.core import InputError\nprint("before")',
        'raise InputError("labels/7.png: no such label")',
        'print("after")',
    )
    done = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1 and "before" in done.stdout and "after" not in done.stdout
    assert "labels/7.png: no such label" in done.stderr and "Traceback" not in done.stderr
    assert "InputError" in (tmp_path / "out/notebook.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_and_run_again(tmp_path):
    "After SIGKILL the same command takes the folder over; another one is refused with the reason."
    body = """from pathlib import Path
import time
mark = Path(run_folder, "mark")
again = mark.exists()
mark.write_text("")
if not again: time.sleep(900)
print("resumed")"""
    nb = notebook(tmp_path / "a.ipynb", PARAMETERS, body)
    command = [sys.executable, "-c", START, "run", str(nb), "--out", "out"]
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "out/mark").exists() and first.poll() is None:
        time.sleep(0.05)
    assert (tmp_path / "out/mark").exists()
    busy = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert busy.returncode == 2 and "at work" in busy.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path / "out/notebook.ipynb").write_text(
        '{"cells": ['
    )  # killed while the notebook was being saved
    other = ukd("run", nb, "--out", "out", "-p", "steps", "9", cwd=tmp_path)
    assert other.returncode == 2 and "steps: 2 there, 9 now" in other.stderr
    again = ukd("run", nb, "--out", "out", cwd=tmp_path)
    assert again.returncode == 0 and "resumed" in again.stdout


def test_folders_that_are_refused(tmp_path):
    record = {"notebook": "a", "steps": 1}

    def claim(folder, record=record, **k):
        with program.claim_folder(folder, record, **k):
            pass

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        claim(tmp_path / "file" / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(InputError, match="thesis.tex"):
        claim(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    claim(tmp_path / "run")
    claim(tmp_path / "run")
    with pytest.raises(InputError, match="'a' there, 'b' now"):
        claim(tmp_path / "run", {"notebook": "b", "steps": 1})
    claim(tmp_path / "run", {"notebook": "a", "steps": 2}, extend=True)
    with pytest.raises(InputError, match="2 there, 1 now"):
        claim(tmp_path / "run")


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere"
)
def test_unwritable_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot write"):
        with program.claim_folder(tmp_path / "locked" / "run", {}):
            pass


def test_help_is_light(tmp_path):
    "`ukd --help` imports neither torch nor Jupyter, and takes under a second of the processor."
    start = os.times()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", START, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "predict" in done.stdout
    assert not [
        m
        for m in ("torch", "numpy", "papermill", "IPython", "matplotlib", "monai")
        if f" {m}\n" in done.stderr
    ]
    end = os.times()
    assert end.children_user + end.children_system - start.children_user - start.children_system < 1


def test_rows_of_several_runs_are_counted_once():
    def row(arm, case, dsc):
        return dict(arm=arm, seed=0, case=case, dsc=dsc)

    a = [row("alone", c, 0.5) for c in "xy"] + [row("kl", c, 0.6) for c in "xy"]
    b = [row("alone", c, 0.5) for c in "xyz"] + [row("kl", c, 0.7) for c in "xy"]
    joined = join_runs({"runs/a": a, "runs/b": b})
    assert [(r["arm"], r["case"]) for r in joined] == [
        ("alone", "x"),
        ("alone", "y"),
        ("kl", "x"),
        ("kl", "y"),
        ("alone", "z"),
        ("kl (b)", "x"),
        ("kl (b)", "y"),
    ]
    assert len({(r["arm"], r["seed"], r["case"]) for r in joined}) == len(joined)


def study(folder, seed, arms=("alone", "kl"), data="same", base=0.5, **settings):
    "A run folder as a study leaves it: a record, a split with the data's fingerprint, scores."
    from unpaired_kd.study.rows import save_rows

    (folder / "splits").mkdir(parents=True)
    record = dict(
        study=dict(data=str(folder), epochs=10, options={}) | settings,
        arms={a: {"method": a} for a in arms},
        seeds=[seed],
    )
    (folder / "config.json").write_text(json.dumps(record))
    (folder / f"splits/student-{seed}.json").write_text(json.dumps(dict(parts={}, data=data)))
    rows = [
        dict(arm=a, seed=seed, collection="ct", case=c, group=c, dsc=base + 0.1 * i)
        for i, a in enumerate(arms)
        for c in "xy"
    ]
    save_rows(folder / "metrics.csv", rows)
    return str(folder)


def arms_of(*folders):
    from unpaired_kd.study.rows import load_rows

    rows = join_runs({f: load_rows(f) for f in folders})
    return {(r["arm"], r["seed"]) for r in rows}


def test_only_runs_of_the_same_data_and_settings_are_merged(tmp_path, capsys):
    "Seeds of one study stand side by side, also with other arms; other epochs or images never do."
    first = study(tmp_path / "a", 0)
    same = {("alone", 0), ("kl", 0)}
    assert arms_of(first, study(tmp_path / "b", 1, arms=("alone", "ifv"))) == same | {
        ("alone", 1),
        ("ifv", 1),
    }
    assert arms_of(first, study(tmp_path / "c", 1, epochs=100)) == same | {
        ("alone (c)", 1),
        ("kl (c)", 1),
    }
    assert arms_of(first, study(tmp_path / "d", 1, data="other")) == same | {
        ("alone (d)", 1),
        ("kl (d)", 1),
    }
    assert arms_of(first, study(tmp_path / "e", 1, options={"tau": 2})) == same | {
        ("alone", 1),
        ("kl", 1),
    }  # each arm's record has its own
    assert arms_of(first, study(tmp_path / "f", 0, base=0.4)) == same | {
        ("alone (f)", 0),
        ("kl (f)", 0),
    }  # the same seed, other scores
    again = study(tmp_path / "other/a", 1, epochs=5)
    assert arms_of(first, again) == same | {(f"alone ({again})", 1), (f"kl ({again})", 1)}
    longer = study(tmp_path / "g", 0, base=0.6, epochs=100)
    assert cli.main(["report", first, longer]) == 0
    out = capsys.readouterr().out
    assert (
        "'alone (g)' is not 'alone': other epochs." in out
        and "'kl (g)' is not 'kl': other epochs." in out
    )
    assert cli.main(["report", first, str(tmp_path / "d")]) == 2  # other seeds cannot be paired
    assert "'alone (d)' is not 'alone': other images." in capsys.readouterr().err


def test_a_sealed_study_is_joined_and_a_changed_one_is_named(tmp_path, capsys):
    "Seals differ where only seeds do; a changed table, record or list of data is named."
    from unpaired_kd.study.records import keep_tables, write_sealed

    a = tmp_path / "a"
    b = tmp_path / "b"
    for seed, folder in enumerate((a, b)):
        study(folder, seed)
        write_sealed(folder / "config.json", json.loads((folder / "config.json").read_text()))
        write_sealed(folder / "data.json", dict(contents={"ct/x.png": "1"}))
        keep_tables(folder, ["metrics.csv"])
    assert arms_of(str(a), str(b)) == {(arm, seed) for arm in ("alone", "kl") for seed in (0, 1)}
    write_sealed(b / "data.json", dict(contents={"ct/x.png": "2"}))
    assert ("alone (b)", 1) in arms_of(str(a), str(b))
    for name, old, new in [
        ("data.json", '"2"', '"1"'),
        ("config.json", '"epochs": 10', '"epochs": 11'),
        ("metrics.csv", "0.5", "0.7"),
    ]:
        text = (b / name).read_bytes()
        (b / name).write_bytes(text.replace(old.encode(), new.encode(), 1))
        assert cli.main(["report", str(b)]) == 2 and str(b / name) in capsys.readouterr().err
        (b / name).write_bytes(text)
    assert cli.main(["report", str(b)]) == 0


def test_what_a_table_lacks_and_what_stands_in_it_twice_is_said(tmp_path, capsys):
    folder = study(tmp_path / "a", 0)
    record = json.loads((tmp_path / "a/config.json").read_text())
    record.update(seeds=[0, 1], arms=record["arms"] | {"ifv": {}})
    (tmp_path / "a/config.json").write_text(json.dumps(record))
    table = tmp_path / "a/metrics.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    assert cli.main(["report", folder]) == 0
    out, error = capsys.readouterr()
    assert (
        "arm 'ifv' has no scores of seed 0, 1 yet" in out
        and "arm 'alone' has no scores of seed 1 yet" in out
        and "1 rows stand in the tables twice" in error
    )


def test_predict(tmp_path, capsys):
    "`ukd predict` writes a label map of the image's size; a wrong student or image is named."
    import numpy as np
    import tifffile

    from unpaired_kd.inference.student import Recipe, Student
    from unpaired_kd.networks.unet import UNet

    net = UNet(in_channels=3, classes=1, width=4)
    Student(net, Recipe(patch=32, network_config=net.config)).save(tmp_path / "student")
    tifffile.imwrite(
        tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (40, 50), dtype=np.uint8)
    )
    assert (
        cli.main(
            [
                "predict",
                str(tmp_path / "student"),
                str(tmp_path / "a.tif"),
                str(tmp_path / "out.tif"),
            ]
        )
        == 0
    )
    label = tifffile.imread(tmp_path / "out.tif")
    assert label.shape == (40, 50) and set(np.unique(label)) <= {0, 1}
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:100])
    for student, image, said in [
        ("absent", "a.tif", "absent"),
        ("student", "b.tif", "b.tif"),
        ("student", "c.tif", "c.tif"),
    ]:
        assert (
            cli.main(
                [
                    "predict",
                    str(tmp_path / student),
                    str(tmp_path / image),
                    str(tmp_path / "no.tif"),
                ]
            )
            == 2
        )
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no.tif").exists()


def test_report(tmp_path, capsys):
    "`ukd report` prints one table for one run or several; a folder without scores is named."
    from unpaired_kd.study.rows import save_rows

    rows = [
        dict(
            arm=a,
            seed=0,
            case=f"{g}{i}",
            group=g,
            label_group="",
            dsc=d + 0.01 * i,
            hd95=5.0 - d,
            aji=d / 2,
            pq=d / 2,
        )
        for a, d in (("alone", 0.5), ("distilled", 0.6))
        for g in "abc"
        for i in range(2)
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_rows(tmp_path / name / "metrics.csv", rows)
    assert cli.main(["report", str(tmp_path / "one")]) == 0
    one = capsys.readouterr().out
    assert "alone" in one and "distilled" in one and "HD95" in one
    assert cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out == one
    assert (
        cli.main(["report", str(tmp_path / "one"), "--metrics", "dsc", "--reference", "distilled"])
        == 0
    )
    assert "HD95" not in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path)]) == 2


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    nb = notebook(
        tmp_path / "a.ipynb", PARAMETERS + "".join(f"\nx{i}: int = {i}" for i in range(5000))
    )
    done = subprocess.run(
        f"{sys.executable} -c '{START}' run {nb} --help-notebook | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"Parameters of {nb}:\n" and done.stderr == ""


OWN = 'run_folder: str = ""\nn: int = 1\nlr: float = .1\nname: str = "a"\n'


@pytest.mark.parametrize(
    "given, want",
    [
        (["-p", "lr", "-1e-3"], {"lr": -0.001}),
        (["-p", "name", "--out"], {"name": "--out"}),
        (["-p", "name", "-p"], {"name": "-p"}),
        (["-p", "n", "-5", "-p", "name", "a=b"], {"n": -5, "name": "a=b"}),
        (["-p", "name", ""], {"name": ""}),
        (["-p", "name", "a\tb c"], {"name": "a\tb c"}),
    ],
)
def test_values_that_look_like_options(given, want):
    args = read_arguments(["run", "x.ipynb", *given, "--out", "o"])
    assert (args.notebook, args.out) == ("x.ipynb", "o")
    known = {
        n: parameters.Parameter(n, t, d, "")
        for n, t, d in [("n", "int", 1), ("lr", "float", 0.1), ("name", "str", "a")]
    }
    values = parameters.resolve_parameters("x", known, args.given)
    assert {k: values[k] for k in want} == want and [
        k for k in values if values[k] != known[k].default
    ] == list(want)


@pytest.mark.parametrize(
    "given", [["-p", "n=5"], ["-pn=5"], ["-p", "n=5", "-p", "lr", "1"], ["-p", "n"], ["-p"]]
)
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_parameter_without_its_value_is_told_how(command, given, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([command, "x.ipynb", *given])
    said = capsys.readouterr().err
    assert e.value.code == 2 and "-p NAME VALUE" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "kind, text, want",
    [
        ("int | None", "None", None),
        ("str | None", "None", None),
        ("str", "None", "None"),
        ("dict[str, float | None]", "{a: None, b: 1}", {"a": None, "b": 1.0}),
        ("list[int | None]", "[1, None, null]", [1, None, None]),
        ("list", "[None]", ["None"]),
        ("dict", "{a: null, b: ''}", {"a": None, "b": ""}),
        ("list[str]", "[a, '']", ["a", ""]),
    ],
)
def test_nothing_as_people_write_it(kind, text, want):
    assert parameters.parse_parameter(parameters.Parameter("x", kind, None, ""), text) == want


@pytest.mark.parametrize(
    "kind, text, said",
    [
        ("dict", "{a:1}", "missing"),
        ("dict", "{a}", "missing"),
        ("dict", "{a: {b: }}", "missing"),
        ("tuple[int, int]", "7", "change it in the notebook"),
        ("Path", "a", "change it in the notebook"),
        ("dict", "&a {x: 1}", "anchors"),
        ("list[str]", "[&a, b]", "anchors"),
        ("int", "1_000", "write a number like 1000"),
        ("float", "010", "write a number like 0.001"),
        ("list[int]", "[1:30]", "write a number like 1000"),
        ("int | None", "1_000", "write a number like 1000"),
        ("bool | None", "010", "write true or false"),
        ("dict", "{a: 1_000}", "in quotes if it is text"),
        ("dict", "{<<: {a: 1}, b: 2}", "not merged with <<"),
        ("dict", "{a: {<<: {a: 1}}}", "not merged with <<"),
    ],
)
def test_values_that_are_refused(kind, text, said):
    with pytest.raises(InputError, match=f"'x' takes .*does not fit.*{said}"):
        parameters.parse_parameter(parameters.Parameter("x", kind, None, ""), text)


@pytest.mark.parametrize(
    "written, shown",
    [
        ("Optional[int]", "int | None"),
        ("typing.Optional[List[int]]", "list[int] | None"),
        ("Union[int, str]", "int | str"),
        ("'t.Dict[str, Optional[float]]'", "dict[str, float | None]"),
        ("list[Optional[int]]", "list[int | None]"),
        ("np.ndarray", "np.ndarray"),
        ("dict", "dict"),
    ],
)
def test_annotations_of_typing(written, shown):
    import ast

    assert parameters.show_annotation(ast.parse(written, mode="eval").body) == shown


def test_a_parameters_cell_is_code_and_sets_each_name_once(tmp_path):
    nb = notebook(tmp_path / "twice.ipynb", OWN + "n: int = 2", "pass")
    with pytest.raises(
        InputError, match="twice.ipynb, parameters cell, line 5: 'n' stands there twice"
    ):
        parameters.read_parameters(nb)
    text = json.loads(Path(nb).read_text())
    text["cells"][0] = dict(
        cell_type="markdown", id="a", metadata={"tags": ["parameters"]}, source=OWN
    )
    Path(nb).write_text(json.dumps(text))
    with pytest.raises(InputError, match="0 cells tagged"):
        parameters.read_parameters(nb)


@pytest.mark.parametrize("out", ["", " ", "\t"])
def test_a_run_folder_has_a_name(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    nb = notebook(tmp_path / "a.ipynb", OWN, "pass")
    with pytest.raises(InputError, match="name of the run folder is empty"):
        program.run_notebook(str(nb), out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


@pytest.mark.slow
def test_after_bad_input_found_by_the_notebook_the_corrected_command_takes_the_folder(tmp_path):
    check = """from pathlib import Path
from unpaired_kd.core import InputError
if n > 2: raise InputError("n: give 2 at most.")
if n == 2: Path(run_folder, "made").write_text("x")
if n == 2 and name == "b": raise InputError("b")"""
    nb = notebook(tmp_path / "a.ipynb", OWN, check)

    def go(*given):
        return ukd("run", nb, "--out", "out", *given, cwd=tmp_path)

    assert go("-p", "n", "3").returncode == 1
    assert go("-p", "n", "1").returncode == 0  # nothing was made: the folder is free
    said = go("-p", "n", "2")
    assert said.returncode == 2 and "n: 1 there, 2 now" in said.stderr  # a finished run is not
    assert (
        ukd("run", nb, "--out", "other", "-p", "n", "2", "-p", "name", "b", cwd=tmp_path).returncode
        == 1
    )
    said = ukd("run", nb, "--out", "other", "-p", "n", "1", cwd=tmp_path)
    assert (
        said.returncode == 2
        and "n: 2 there, 1 now" in said.stderr
        and (tmp_path / "other/made").exists()
    )  # something was made


@pytest.mark.slow
def test_a_kernel_that_cannot_start_says_so_in_a_sentence(tmp_path):
    nb = notebook(tmp_path / "a.ipynb", OWN, "pass")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/ipykernel_launcher.py").write_text("raise RuntimeError('no such socket')")
    env = os.environ | {
        "PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    done = ukd("run", nb, "--out", "out", cwd=tmp_path, env=env)
    assert (
        done.returncode == 1
        and "did not start" in done.stderr
        and "Traceback" not in done.stderr
        and "kernel.log" in done.stderr
    )
    assert "no such socket" in (tmp_path / "out/kernel.log").read_text()
    loud = ukd("run", nb, "--out", "out", cwd=tmp_path, env=env | {"UKD_DEBUG": "1"})
    assert "no such socket" in loud.stderr
    assert (
        ukd("run", nb, "--out", "out", cwd=tmp_path).returncode == 0
        and not (tmp_path / "out/kernel.log").exists()
    )


@pytest.mark.slow
def test_papermill_sees_every_parameter(tmp_path):
    "It names no unknown ones, also where it may speak; its own translator is back afterwards."
    from papermill import inspect_notebook

    from unpaired_kd.command.parameters import find_parameters_cell

    cell = (
        find_parameters_cell(program.find_notebook("lotus"))
        + "\ncells2: bool | None = None\nedge: float = .5  # of x = 1"
    )
    nb = notebook(tmp_path / "dry.ipynb", cell, "print(patch)")

    def seen():
        return set(inspect_notebook(str(nb)))

    known = set(parameters.read_parameters(nb))
    unread = known - seen()  # what papermill cannot read
    assert unread >= {"cells2", "edge"}
    with program.exact_translator():
        assert seen() == known
    assert known - seen() == unread
    for debug in ({}, {"UKD_DEBUG": "1"}):
        done = ukd(
            "run",
            nb,
            "-p",
            "patch",
            "48",
            "--out",
            f"out{len(debug)}",
            cwd=tmp_path,
            env=os.environ | debug,
        )
        assert (
            done.returncode == 0
            and "48" in done.stdout
            and "nknown parameter" not in done.stderr
            and "parse" not in done.stderr
        ), done.stderr


@pytest.mark.slow
def test_parameters_from_files(tmp_path):
    "Later files over earlier, -p over all; the run folder is that of the same values typed."
    nb = notebook(
        tmp_path / "a.ipynb",
        """steps: int = 2
name: str = "x"
weights: dict = {"kl": 1.0, "ifv": 1.0}
run_folder: str = ""
""",
        "print([steps, name, weights])",
    )
    (tmp_path / "a.yaml").write_text("steps: 3\nname: 'no'\nweights.kl: 0.5\n")
    (tmp_path / "b.yaml").write_text("steps: 4  # more\n")
    done = ukd("run", nb, "-f", "a.yaml", "-p", "weights.ifv", "0", "-f", "b.yaml", cwd=tmp_path)
    assert done.returncode == 0 and "[4, 'no', {'kl': 0.5, 'ifv': 0.0}]" in done.stdout, done.stderr
    typed = ukd(
        "run", nb, *"-p steps 4 -p name no -p weights.kl .5 -p weights.ifv 0".split(), cwd=tmp_path
    )
    assert typed.returncode == 0 and typed.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_version_is_that_of_the_package(capsys):
    import unpaired_kd

    with pytest.raises(SystemExit) as e:
        cli.main(["--version"])
    assert e.value.code == 0 and capsys.readouterr().out == f"ukd {unpaired_kd.__version__}\n"


def test_experiments_and_grids_of_the_installed_package(tmp_path, monkeypatch):
    "Outside a checkout they are found in the package; those of the current folder count more."
    package = tmp_path / "site/unpaired_kd"
    (package / "experiments").mkdir(parents=True)
    notebook(package / "experiments/lotus.ipynb", PARAMETERS, "print(steps)")
    (package / "experiments/many.yaml").write_text("notebook: lotus\ngrid: {steps: [1, 2]}\n")
    (package / "experiments/dry.yaml").write_text("lotus:\n  steps: 1\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(program, "files", lambda name: package)
    from unpaired_kd.command import grid

    assert program.find_notebook("lotus") == package / "experiments/lotus.ipynb"
    assert grid.find_grid("many") == package / "experiments/many.yaml"
    assert cli.main(["sweep", "many", "--dry-run"]) == 0 and not list((tmp_path / "here").iterdir())
    with pytest.raises(
        InputError, match="unknown grid 'mani'. Did you mean 'many'. Known: many. Or give"
    ):
        grid.find_grid("mani")
    (tmp_path / "here/nbs/experiments").mkdir(parents=True)
    notebook(tmp_path / "here/nbs/experiments/lotus.ipynb", PARAMETERS)
    assert program.find_notebook("lotus") == Path("nbs/experiments/lotus.ipynb")


def test_what_a_run_needs_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None if name == "papermill" else name)
    with pytest.raises(InputError, match=r'needs papermill: pip install "unpaired_kd\[run\]"'):
        program.require_modules("papermill", "ipykernel")
