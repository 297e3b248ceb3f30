"""A sweep as users meet it: mistakes in the file, rows that fail or are killed, sweeps that are
stopped, and a cluster."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unpaired_kd.command import cli, sweep
from unpaired_kd.command import grid as grids
from unpaired_kd.core import InputError, read_csv

# a shell's `&` would have Ctrl-C ignored
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
START = "import sys; from unpaired_kd.command.cli import main; sys.exit(main(sys.argv[1:]))"
PARAMETERS = """do: str = "score"
seed: int = 0
lr: float = .5
weights: dict = {"kl": 1.}
workers: int = 0
run_folder: str = ""
"""
BODY = """import os, time
from pathlib import Path
here = Path(run_folder)
(here / "kernel").write_text(str(os.getpid()))
with open(here / "times", "a") as f: f.write("x")
if do == "fail": raise ValueError("diverged")
if do == "wait": time.sleep(900)
if do == "die": os.kill(os.getppid(), 9)
rows = "arm,seed,case,group,dsc\\n" + "".join(f"a,{seed},{c},{c},{lr}\\n" for c in "xy")
(here / "metrics.csv").write_text("nonsense" if do == "nonsense" else rows)
print(workers, os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"])"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the toy notebook, and we are in it."
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={"tags": ["parameters"]} if i == 0 else {},
            source=c,
            outputs=[],
            execution_count=None,
        )
        for i, c in enumerate([PARAMETERS, BODY])
    ]
    (tmp_path / "toy.ipynb").write_text(
        json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grid(place, text, name="g.yaml"):
    (place / name).write_text("notebook: toy.ipynb\n" + text)
    return str(place / name)


def of(place, pattern):
    "The run folder of a row, by its name."
    (found,) = (place / "runs/g/rows").glob(pattern)
    return found


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # a zombie has ended
    except FileNotFoundError:
        return True


def wait_for(condition, process=None, seconds=600):
    """Wait until it holds; the process that brings it about must be alive. The limit only ends a
    test that hangs."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("grid: {}\nrows: {}", "is empty"),
        ("grid: {seed: []}", "at least one"),
        ("grid: {seed: 1}", "must be a list"),
        ("grid: [1]", "`grid` must be a mapping"),
        ("gird: {seed: [1]}", "Did you mean 'grid'"),
        ("grid: {sed: [1]}", "Did you mean 'seed'"),
        ("grid: {seed: [0, one]}", "seed=one.*takes int"),
        ("grid: {seed: [1, '2']}", "without quotes"),
        ("base: {lr: [.1, .2]}\ngrid: {seed: [1]}", "goes under `grid`"),
        ("base: {lr: fast}\ngrid: {seed: [1]}", "takes float"),
        ("base: {do: no}\ngrid: {seed: [1]}", "Write it in quotes"),
        ("grid: {do: [7]}", "Write it in quotes"),
        ("base: {run_folder: x}\ngrid: {seed: [1]}", "--out"),
        ("grid: {seed: [1, 1]}", "same parameters"),
        ("rows: {a: {}, b: {seed: 0}}", "'a' and 'b' have the same"),
        ("rows:\n  a: {}\n  a: {seed: 1}", r"'a' \(line 4\) stands twice"),
        ("rows: {a/b: {}}", "cannot name a folder"),
        ("rows: {'': {}}", "cannot name a folder"),
        ("rows: {..: {}}", "cannot name a folder"),
        ("rows: {no: {}}", "in quotes"),
        ("rows: {a: 3}", "`rows: a` must be a mapping"),
        ("rows: [a]", "must be a mapping"),
        ("rows: {a: {seed: 1}}\ngrid: {seed: [2]}", "sets 'seed' too"),
        ("rows: {a: {weights: {}}}\ngrid: {weights.kl: [2]}", "weights.kl"),
        ("rows: {a: {weights.ce: 1}}", "Did you mean|unknown entry"),
        ("grid: {seed: [1]", "not valid YAML"),
        ("- a", "YAML"),
        ("scales: {demo: {sed: 1}}\ngrid: {seed: [1]}", "Did you mean 'seed'"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_written(place, text, said, capsys):
    path = grid(place, text)
    with pytest.raises(InputError, match=f"(?s)g.yaml.*({said})"):
        sweep.run_sweep(path, scale="demo" if "demo" in text else None)
    assert cli.main(["sweep", path] + (["--scale", "demo"] if "demo" in text else [])) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_bad_arguments(place):
    path = grid(place, "grid: {seed: [1, 2]}\nscales: {demo: {}}")
    for said, arguments in {
        "Did you mean 'demo'": dict(scale="demos"),
        "1 or more": dict(workers=0),
        "cluster decides": dict(workers=1, scheduler="tcp://x:1"),
        "'seed' in its grid": dict(given=[("seed", "1")]),
        "takes float": dict(given=[("lr", "x")]),
        "twice": dict(given=[("lr", "1")] * 2),
    }.items():
        with pytest.raises(InputError, match=said):
            sweep.run_sweep(path, **arguments)
    with pytest.raises(InputError, match="absent.yaml does not exist"):
        sweep.run_sweep("absent.yaml")
    (place / "g.yaml").write_text("notebook: absent.ipynb\ngrid: {seed: [1]}")
    with pytest.raises(InputError, match="absent.ipynb"):
        sweep.run_sweep(path)
    (place / "g.yaml").write_text("notebook: [a]\ngrid: {seed: [1]}")
    with pytest.raises(InputError, match="notebook"):
        sweep.run_sweep(path)
    assert not (place / "runs").exists()


def test_folders_of_others_are_refused(place):
    path = grid(place, "grid: {seed: [1, 2]}")
    for name, file in {"run": "config.json", "thesis": "thesis.tex"}.items():
        (place / name).mkdir()
        (place / name / file).write_text("{}")
        with pytest.raises(InputError, match="--out"):
            sweep.run_sweep(path, out=name)
        assert [p.name for p in (place / name).iterdir()] == [file]


def test_rows_are_what_the_file_says(place):
    """Scale over base, -p over both, row and grid over all; one worker inside a row; equal
    parameters, equal key."""
    path = grid(
        place,
        """base: {lr: 1e-3, weights: {kl: 2.0}}
grid: {seed: [0, 1]}
rows: {kl: , no kl: {weights.kl: 0}}
scales: {full: {lr: 2e-3}}
""",
    )

    def of(**k):
        return {row.name: row for row in grids.expand_grid(path, **k)[1]}

    base = of()
    full = of(scale="full")
    mine = of(scale="full", given=[("lr", "1"), ("workers", "3")])
    assert list(base) == ["kl seed=0", "kl seed=1", "no kl seed=0", "no kl seed=1"]
    assert base["kl seed=1"].values == dict(
        do="score", seed=1, lr=0.001, weights={"kl": 2.0}, workers=1
    )
    assert base["no kl seed=0"].values["weights"] == {"kl": 0}
    assert full["kl seed=0"].values["lr"] == 0.002
    assert mine["kl seed=0"].values["lr"] == 1.0
    assert mine["kl seed=0"].values["workers"] == 3
    assert len({row.key for rows in (base, full, mine) for row in rows.values()}) == 12
    typed = of(given=[("lr", "2e-3")])
    assert [row.key for row in typed.values()] == [row.key for row in full.values()]
    flat = grid(place, "base: {weights: {kl: 2.0}}\ngrid: {seed: [0]}", "h.yaml")
    (row,) = grids.expand_grid(flat, [("weights.kl", "5")])[1]
    assert row.values["weights"] == {"kl": 5.0}


OWN = "rows: {ours: {}, theirs: {lr: .25}, all of it: {weights: {kl: 3}}}\ngrid: {seed: [0, 1]}"


def test_what_is_given_reaches_the_rows_that_do_not_set_it(place):
    "The others keep what they set, wholly or in part; `grid` is never overruled."
    path = grid(place, OWN)
    given = [("lr", ".125"), ("weights.kl", "2"), ("do", "wait")]
    rows = {row.name: row.values for row in grids.expand_grid(path, given)[1]}
    assert [rows[f"{name} seed=0"]["lr"] for name in ("ours", "theirs", "all of it")] == [
        *(0.125, 0.25, 0.125)
    ]
    weights = [rows[f"{name} seed=1"]["weights"] for name in ("ours", "theirs", "all of it")]
    assert weights == [{"kl": 2.0}, {"kl": 2.0}, {"kl": 3.0}]
    assert {values["do"] for values in rows.values()} == {"wait"}


def test_what_is_given_must_reach_the_rows_that_run(place, capsys):
    "Only the chosen rows are asked: another one may set the parameter itself."
    path = grid(place, OWN)
    command = ["sweep", path, "--dry-run", "-p", "lr", ".125"]
    for chosen, row in [([], "theirs seed=0"), (["--rows", "theirs"], "theirs seed=0")]:
        assert cli.main([*command, *chosen]) == 2
        assert f"-p lr: {path} sets 'lr' in its grid or in row '{row}'" in capsys.readouterr().err
    assert cli.main([*command, "--rows", "ours", "all*"]) == 0
    assert "6 rows of" in capsys.readouterr().out
    for key in ("weights", "weights.kl"):
        value = "{kl: 1}" if key == "weights" else "1"
        with pytest.raises(InputError, match=f"-p {key}: .*sets 'weights' in .*'all of it seed=0'"):
            sweep.run_sweep(path, [(key, value)], dry_run=True)
        assert sweep.run_sweep(path, [(key, value)], dry_run=True, only=["ours"]) == 0
    with pytest.raises(InputError, match="-p seed: .*sets 'seed' in its grid"):
        sweep.run_sweep(path, [("seed", "3")], dry_run=True, only=["ours"])
    with pytest.raises(InputError, match="Did you mean 'seed'"):
        sweep.run_sweep(path, [("sed", "3")], dry_run=True, only=["ours"])


@pytest.mark.slow
def test_a_sweep_from_failure_to_table(place, capsys):
    """A failed row, a killed one and one with a broken table stop no other; they are named, tried
    again, and the finished are not."""
    path = grid(
        place, "rows: {good: {}, raises: {do: fail}, killed: {do: die}, broken: {do: nonsense}}"
    )
    assert cli.main(["sweep", path, "--dry-run"]) == 0
    assert not (place / "runs").exists()
    assert capsys.readouterr().out.count("to do  ") == 4
    assert cli.main(["sweep", path, "--workers", "2"]) == 1
    out, error = capsys.readouterr()
    assert "good: done" in out
    raised = of(place, "raises-*").relative_to(place)
    assert f"failed: raises: {raised}/notebook.ipynb" in error
    assert "killed by signal 9" in error
    assert "not a file of rows" in error
    assert "rows that failed: 3" in error
    assert "diverged" in (of(place, "raises-*") / "notebook.ipynb").read_text()
    assert "1 1 passive" in (of(place, "good-*") / "log.txt").read_text()
    assert [r["row"] for r in read_csv("runs/g/results.csv")] == ["good", "good"]
    path = grid(place, "rows: {better name: {}}\ngrid: {seed: [0]}\nbase: {lr: .5}")
    assert cli.main(["sweep", path]) == 0
    assert "1 done, 0 to do" in capsys.readouterr().out
    assert (of(place, "good-*") / "times").read_text() == "x"
    found = [(r["row"], r["seed"], r["case"]) for r in read_csv("runs/g/results.csv")]
    assert found == [("better name seed=0", 0, case) for case in "xy"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_and_continued(place, how, status, monkeypatch):
    "After Ctrl-C and after a kill no process is left, and the same command continues."
    path = grid(place, "grid: {do: [wait, score]}")
    first = subprocess.Popen(
        [sys.executable, "-c", LISTEN + START, "sweep", path, "--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(p.read_text() for p in place.glob("runs/g/rows/*/kernel")), first)
    (folder,) = place.glob("runs/g/rows/*")
    with pytest.raises(InputError, match="at work"):
        sweep.run_sweep(path)
    first.send_signal(how)
    assert first.wait(timeout=600) == status
    kernel = int((folder / "kernel").read_text())
    wait_for(lambda: gone(kernel))
    assert len(list(place.glob("runs/g/rows/*"))) == 1 and not (folder / "done.json").exists()
    assert "The same command continues" in first.stderr.read() or how == signal.SIGKILL
    if how == signal.SIGINT:  # the waiting row, now with a notebook that does not wait
        text = (place / "toy.ipynb").read_text()
        (place / "toy.ipynb").write_text(text.replace("time.sleep(900)", "pass"))
        assert sweep.run_sweep(grid(place, "grid: {do: [wait]}")) == 0
        assert (folder / "done.json").exists()


def test_a_parameter_that_the_scores_contradict_gets_another_name():
    def row(name, **values):
        return grids.Row(name, {}, values, name)

    rows = [row("a", seed=1, row=3, tau=[1], arm="x"), row("b", seed=2, row=4, tau=[2], arm="x")]
    scores = {"a": [dict(arm="x", seed=0)], "b": [dict(arm="x", seed=0)]}
    assert sweep._list_varied(rows) == ["seed", "row", "tau"]
    assert sweep._join_scores(rows, scores, ["seed", "row", "tau", "arm"])[1] == dict(
        row="b", given_seed=2, given_row=4, tau="[2]", arm="x", seed=0
    )


def test_rows_of_the_same_data_must_have_seen_the_same_images(tmp_path):
    "Two rows that differ in a setting of training only name the same data; other data may differ."

    def study(name, fingerprint):
        (tmp_path / name / "splits").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"study": {}, "arms": {}, "seeds": [0]}')
        split = {"parts": {}, "data": fingerprint}
        (tmp_path / name / "splits/student-0.json").write_text(json.dumps(split))
        return tmp_path / name

    folders = {"a": study("a", "1"), "b": study("b", "1"), "c": study("c", "2")}
    values = {"a": {"data": "x", "lr": 1}, "b": {"data": "x", "lr": 2}, "c": {"data": "x", "lr": 3}}
    rows = {key: grids.Row(key, {}, v, key) for key, v in values.items()}
    sweep._check_same_data([rows["a"], rows["b"]], folders)
    with pytest.raises(InputError, match="a and .*c: the data have changed"):
        sweep._check_same_data(list(rows.values()), folders)
    for name in ("data", "zoom", "has_objects"):
        other = grids.Row("c", {}, values["c"] | {name: "y"}, "c")
        sweep._check_same_data([rows["a"], rows["b"], other], folders)


@pytest.mark.slow
def test_a_cluster(place, capsys):
    "The same through a Dask scheduler; one that is not there is named, and nothing is written."
    import distributed

    path = grid(place, "grid: {seed: [1]}")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        assert cli.main(["sweep", path, "--scheduler", cluster.scheduler_address]) == 0
    assert "seed=1: done" in capsys.readouterr().out
    assert len(read_csv("runs/g/results.csv")) == 2
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        sweep.run_sweep(path, out="other", scheduler="tcp://127.0.0.1:9")
    assert not (place / "other").exists()


def test_a_cluster_without_dask(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "dask", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install \"unpaired_kd\[scale\]\""):
        sweep.run_sweep(grid(place, "grid: {seed: [1]}"), scheduler="tcp://127.0.0.1:9")
    assert not (place / "runs").exists()


ROWS = """rows: {R01 alone: {}, R02 kl: {lr: .1}, R12 kl too: {lr: .2}, R02: {lr: .3}}
grid: {seed: [0, 1]}
"""


@pytest.mark.parametrize(
    "patterns, names",
    [
        (["R01*"], ["R01 alone seed=0", "R01 alone seed=1"]),
        (["R01 alone"], ["R01 alone seed=0", "R01 alone seed=1"]),
        (
            ["* seed=1", "R01 alone seed=1"],
            ["R01 alone seed=1", "R02 kl seed=1", "R12 kl too seed=1", "R02 seed=1"],
        ),
        (
            ["R12", "R01"],
            ["R01 alone seed=0", "R01 alone seed=1", "R12 kl too seed=0", "R12 kl too seed=1"],
        ),
        (["R02"], ["R02 seed=0", "R02 seed=1"]),
        (["R[01][12] kl"], ["R02 kl seed=0", "R02 kl seed=1"]),
        (["R?2 kl too seed=[!1]"], ["R12 kl too seed=0"]),
    ],
)
def test_patterns_choose_rows_in_the_order_of_the_grid(place, patterns, names):
    """Whole names of rows and entries first, then their first words; an entry R02 is not hidden by
    the entry R02 kl."""
    path = grid(place, ROWS)
    rows = grids.expand_grid(path)[1]
    assert [row.name for row in grids.choose_rows(path, rows, patterns)] == names


def test_a_name_with_brackets_names_itself(place):
    (place / "toy.ipynb").write_text(
        (place / "toy.ipynb").read_text().replace("lr: float = .5", "seeds: list = [0]")
    )
    path = grid(place, "grid: {seeds: [[0], [1]], seed: [3, 4]}")

    def chosen(*patterns):
        rows = grids.expand_grid(path)[1]
        return [row.name for row in grids.choose_rows(path, rows, patterns)]

    assert chosen("seeds=[0] seed=3") == ["seeds=[0] seed=3"]
    assert chosen("seeds=[1]") == ["seeds=[1] seed=3", "seeds=[1] seed=4"]


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("R11", "Near names: .*'R01 alone'"),
        ("R03*", "Near names: .*'R02"),
        ("r01 alone", "Near names: 'R01 alone'"),
        ("R01 alone seed=2", "'R01 alone seed=0'"),
        ("R1", "Near names"),
        ("alone", "names: "),
        ("#", "The first names: 'R01 alone', 'R02 kl'"),
        ("", "The first names"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_with_near_names(place, pattern, said, capsys):
    "Also beside one that fits, and in a dry run; nothing is written."
    path = grid(place, ROWS)
    with pytest.raises(InputError, match=f"--rows: .*fits no row of .*g.yaml. .*{said}"):
        sweep.run_sweep(path, only=["R02*", pattern])
    assert cli.main(["sweep", path, "--dry-run", "--rows", pattern]) == 2
    assert "Traceback" not in capsys.readouterr().err and not (place / "runs").exists()


def test_the_whole_grid_is_checked_though_a_part_is_chosen(place):
    path = grid(place, "rows: {good: {}, bad: {sed: 1}}")
    with pytest.raises(InputError, match="row 'bad'.*Did you mean 'seed'"):
        sweep.run_sweep(path, only=["good"])
    assert not (place / "runs").exists()


@pytest.mark.slow
def test_several_calls_fill_one_folder(place, capsys):
    """Only the chosen rows run; the table has every finished row of the grid, with all parameters
    that vary in it."""
    path = grid(place, "rows: {first: {}, second: {lr: .25}, fails: {do: fail}}")

    def begun():
        return sorted(p.name.rpartition("-")[0] for p in place.glob("runs/g/rows/*"))

    def listed():
        return [(r["row"], r["lr"], r["do"]) for r in read_csv("runs/g/results.csv")]

    assert cli.main(["sweep", path, "--dry-run", "--rows", "se*", "--rows", "first"]) == 0
    assert not (place / "runs").exists()
    out = capsys.readouterr().out
    assert out.count("to do  ") == 2
    assert "fails" not in out
    assert "3 rows of" in out
    assert "2 chosen, of these 0 done, 2 to do" in out
    assert cli.main(["sweep", path, "--rows", "second"]) == 0
    assert begun() == ["second"]
    second = [("second", 0.25, "score")] * 2
    assert listed() == second
    assert cli.main(["sweep", path, "--rows", "f[!a]*"]) == 0
    assert begun() == ["first", "second"]
    assert (of(place, "second-*") / "times").read_text() == "x"
    assert listed() == [("first", 0.5, "score")] * 2 + second
    capsys.readouterr()
    assert cli.main(["sweep", path, "--rows", "second"]) == 0
    assert "1 chosen, of these 1 done, 0 to do" in capsys.readouterr().out
    assert listed() == [("first", 0.5, "score")] * 2 + second


def names_and(values, rows):
    return [(row.name, *(row.values[v] for v in values)) for row in rows]


def test_anchors_of_a_grid_are_read_while_they_repeat_little(place):
    path = grid(
        place,
        "base: {lr: &lr 1e-3}\nrows:\n  a: &a {weights.kl: *lr}\n  b: {seed: 1}\nscales: {s: *a}",
    )
    assert names_and(["lr", "seed"], grids.expand_grid(path)[1]) == [
        ("a", 0.001, 0),
        ("b", 0.001, 1),
    ]
    assert [c.values["weights"] for c in grids.expand_grid(path)[1]] == [{"kl": 0.001}, {"kl": 1.0}]
    with pytest.raises(InputError, match="'weights.kl'|same parameters"):
        grids.expand_grid(grid(place, "base: {seed: &s 2}\ngrid: {seed: [*s, 2]}"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("base: &a {weights: *a}\ngrid: {seed: [1]}", "contains itself"),
        ("grid: {seed: [*nobody]}", "undefined alias"),
        (
            "base: {do: &a ["
            + "x, " * 101
            + "]}\nscales:\n"
            + "".join(f"  s{i}: {{do: *a}}\n" for i in range(100))
            + "grid: {seed: [1]}",
            "repeat more than 10000",
        ),
        (
            "base:\n  a0: &a0 [1]\n"
            + "".join(f"  a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
            + "grid: {seed: [1]}",
            "nested more than 50",
        ),
        ("rows:\n  a: &a {seed: 1}\n  b: {<<: *a, lr: 2}", "not merged"),
        ("grid: {weights: [{kl:1}]}", "value is missing"),
    ],
)
def test_anchors_that_are_refused(place, text, said):
    "A loop, a name of nothing, a part of a hundred repeated too often, a ladder; at once."
    with pytest.raises(InputError, match=f"g.yaml.*({said})"):
        grids.expand_grid(grid(place, text))


def test_a_list_in_the_wrong_place_is_told_the_right_one(place):
    (place / "toy.ipynb").write_text(
        (place / "toy.ipynb")
        .read_text()
        .replace("lr: float = .5", "lr: float = .5\\nnames: list[str] = []")
    )
    for text, said in {
        "grid: {names: [a, b]}": "list of lists",
        "base: {seed: [1, 2]}\ngrid: {lr: [1]}": "goes under `grid`",
        "grid: {names: [[a, off]]}": "in quotes",
    }.items():
        with pytest.raises(InputError) as e:
            grids.expand_grid(grid(place, text))
        assert said in str(e.value) and ("`grid`" in str(e.value)) == (said == "goes under `grid`")


@pytest.mark.parametrize(
    "text",
    [
        "base: {weights.kl: 3}\ngrid: {seed: [1]}\nscales: {x: {weights: {kl: 1}}}",
        "base: {weights.kl: 3}\ngrid: {weights: [{kl: 1}]}",
        "scales: {x: {weights.kl: 3}}\nrows: {a: {weights: {}}}",
    ],
)
def test_a_dict_does_not_silently_undo_its_entries(place, text):
    with pytest.raises(InputError, match="g.yaml.*'weights' would undo 'weights.kl'"):
        grids.expand_grid(grid(place, text), scale="x" if "scales" in text else None)
    whole = grid(
        place, "base: {weights: {kl: 3}}\ngrid: {weights.kl: [2]}\nscales: {x: {weights: {kl: 1}}}"
    )
    part = grid(place, "base: {weights.kl: 3}\ngrid: {weights.kl: [2]}", "h.yaml")
    for path, scale in ((whole, "x"), (part, None)):
        (row,) = grids.expand_grid(path, scale=scale)[1]
        assert row.values["weights"] == {"kl": 2.0}


def test_entries_are_not_merged_anywhere_in_a_grid(place):
    for text in (
        "base: {<<: {lr: 1}}\ngrid: {seed: [1]}",
        "base: {weights: {<<: {kl: 1}}}\ngrid: {seed: [1]}",
        "grid: {weights: [{<<: {kl: 1}}]}",
    ):
        with pytest.raises(InputError, match="not merged with <<"):
            grids.expand_grid(grid(place, text))
