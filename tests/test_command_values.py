"""What the command makes of words, files and folders, by value; no kernel, no process."""

import json
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest

from unpaired_kd.command import cli, grid, notebook, row_process, sweep
from unpaired_kd.command.parameters import (
    FileLayer,
    Parameter,
    find_clash,
    parse_parameter,
    parse_parameters,
    resolve_parameters,
)
from unpaired_kd.command.process import Stopped, UnstoppableStream, stop_on_signals
from unpaired_kd.command.run_folder import check_run_folder, claim_folder, name_run_folder
from unpaired_kd.command.yaml_nodes import Misfit, parse_yaml, read_scalar
from unpaired_kd.core import InputError, digest

PARAMETERS = """lr: float = 0.5
seed: int = 0
names: list[str] = []
weights: dict = {"kl": 1.0, "ce": 2.0}
workers: int = 0
run_folder: str = ""
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a notebook of parameters, and we are in it."
    cell = dict(cell_type="code", metadata={"tags": ["parameters"]}, source=PARAMETERS)
    (tmp_path / "toy.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(text, given=(), scale=None):
    "The rows of a grid with this text."
    Path("g.yaml").write_text(f"notebook: toy.ipynb\n{text}")
    return grid.expand_grid("g.yaml", list(given), scale)[1]


# ---------------------------------------------------------------- text to values
@pytest.mark.parametrize(
    "text, value",
    [("7", 7), ("1e-3", 0.001), ("0o17", 15), ("0x1F", 31), ("~", None), ("TRUE", True)],
)
def test_scalars_of_the_core_schema(text, value):
    assert repr(read_scalar(text)) == repr(value)


@pytest.mark.parametrize("text", ["010", "1:30", "1_000", "off", "Yes", "2024-01-01", "-08"])
def test_scalars_on_which_the_versions_of_yaml_differ(text):
    with pytest.raises(Misfit, match="versions differ"):
        read_scalar(text)


def test_anchors_may_repeat_ten_thousand_parts_and_no_more():
    "A list of 100 parts, itself one part; each repetition adds 101, so 99 of them are allowed."
    part = "&a [" + ", ".join("x" * 100) + "]"
    parse_yaml(f"[{part}{', *a' * 99}]", anchors=True)
    with pytest.raises(Misfit, match="repeat more than 10000"):
        parse_yaml(f"[{part}{', *a' * 100}]", anchors=True)


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("str | int", "12", 12),
        ("int | str", "twelve", "twelve"),
        ("str | None", "null", None),
        ("float", "2", 2.0),
        ("list[int | None]", "[1, null]", [1, None]),
        ("list[str | int]", "[12, twelve]", [12, "twelve"]),
        ("dict[str, float]", "{no: 1}", {"no": 1.0}),
    ],
)
def test_a_value_is_that_of_its_annotation(kind, text, value):
    assert repr(parse_parameter(Parameter("x", kind, None, ""), text)) == repr(value)


def test_a_file_is_read_more_strictly_than_a_line():
    name = Parameter("x", "str", "", "")
    assert parse_parameter(name, "7") == "7"
    with pytest.raises(InputError, match="Write it in quotes"):
        parse_parameter(name, parse_yaml("7"))
    assert parse_parameter(name, parse_yaml("'7'")) == "7"


# ---------------------------------------------------------------- parameters
@pytest.mark.parametrize(
    "key, others, clash",
    [
        ("weights", ["lr", "weights.kl"], "weights.kl"),
        ("weights.kl", ["weights"], "weights"),
        ("weights.kl", ["weights.ce"], None),
        ("weights", ["weights2", "weight"], None),
        ("lr", ["lr"], "lr"),
    ],
)
def test_two_names_clash_where_one_holds_the_other(key, others, clash):
    assert find_clash(key, others) == clash


def test_a_value_on_several_lines_keeps_its_comment():
    cell = (
        "lr: float = (\n  0.5  # learning rate\n)\nkinds: list = [\n  1,  # one\n  2,\n]  # two\n"
    )
    found = parse_parameters("toy.ipynb", cell)
    assert {name: p.help for name, p in found.items()} == {
        "lr": "learning rate",
        "kinds": "one two",
    }


def test_layers_lie_over_each_other_and_entries_beside_each_other():
    known = {
        "lr": Parameter("lr", "float", 0.5, ""),
        "weights": Parameter("weights", "dict", {"kl": 1.0, "ce": 2.0}, ""),
    }
    first = FileLayer([("lr", parse_yaml("1")), ("weights.kl", parse_yaml("3.0"))], "a.yaml")
    values = resolve_parameters("n", known, first, [("weights.ce", "4.0"), ("lr", "2")])
    assert values == {"lr": 2.0, "weights": {"kl": 3.0, "ce": 4.0}}
    assert known["weights"].default == {"kl": 1.0, "ce": 2.0}
    for between in ([], [[("lr", "2")]]):
        with pytest.raises(InputError, match="^'weights' would undo 'weights.kl'"):
            resolve_parameters("n", known, first, *between, [("weights", "{kl: 1, ce: 1}")])
    with pytest.raises(InputError, match="^a.yaml: unknown parameter 'rl'"):
        resolve_parameters("n", known, FileLayer([("rl", parse_yaml("1"))], "a.yaml"))


# ---------------------------------------------------------------- run folders
def test_the_name_of_a_run_folder_is_that_of_all_values():
    values = {"lr": 0.5, "weights": {"kl": 1.0}}
    name = name_run_folder("a/toy.ipynb", values)
    assert name == name_run_folder("toy.ipynb", {"weights": {"kl": 1.0}, "lr": 0.5})
    assert name.startswith("runs/toy-")
    for other in ({"lr": 0.25}, {"weights": {"kl": 0.0}}, {"more": 1}):
        assert name_run_folder("toy.ipynb", values | other) != name
    assert name_run_folder("other.ipynb", values) != name


def test_a_folder_belongs_to_its_record(tmp_path):
    record = {"notebook": "toy", "lr": 0.5}
    with claim_folder(tmp_path / "run", record) as folder:
        assert json.loads((folder / "parameters.json").read_text()) == record
        with pytest.raises(InputError, match="at work"):
            with claim_folder(folder, record):
                pass
    check_run_folder(tmp_path / "run", record, extend=False)
    check_run_folder(tmp_path / "run", record | {"lr": 1.0}, extend=True)
    with pytest.raises(InputError, match="lr: 0.5 there, 1.0 now"):
        check_run_folder(tmp_path / "run", record | {"lr": 1.0}, extend=False)
    with pytest.raises(InputError, match="not the record of such a run"):
        check_run_folder(tmp_path / "run", {"sweep": "toy"}, extend=True)


@pytest.mark.parametrize(
    "error, more, free",
    [("InputError", [], True), ("ValueError", [], False), ("InputError", ["metrics.csv"], False)],
)
def test_only_a_folder_in_which_nothing_was_made_is_free_again(tmp_path, error, more, free):
    "The notebook found its parameters bad, and left the record and its error."
    (tmp_path / "parameters.json").write_text('{"notebook": "toy", "lr": 0.5}')
    cells = [{"outputs": []}, {"outputs": [{"ename": error}]}]
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    for name in more:
        (tmp_path / name).write_text("")
    corrected = {"notebook": "toy", "lr": 1.0}
    if free:
        check_run_folder(tmp_path, corrected, extend=False)
        return
    with pytest.raises(InputError, match="other parameters"):
        check_run_folder(tmp_path, corrected, extend=False)


def test_experiments_of_the_current_folder_count_most(tmp_path, monkeypatch):
    package = tmp_path / "site/unpaired_kd"
    for folder in (package / "experiments", tmp_path / "here/nbs/experiments"):
        folder.mkdir(parents=True)
        (folder / "lotus.ipynb").write_text("")
    (package / "experiments/other.ipynb").write_text("")
    monkeypatch.setattr(notebook, "files", lambda name: package)
    monkeypatch.chdir(tmp_path / "here")
    assert notebook.list_experiment_files(".ipynb") == {
        "lotus": Path("nbs/experiments/lotus.ipynb"),
        "other": package / "experiments/other.ipynb",
    }


# ---------------------------------------------------------------- grids
def test_layers_of_a_row(place):
    "The notebook's, base, the scale, the command line, the row; one process a row."
    text = """base: {lr: 1.0, seed: 1}
scales: {full: {lr: 2.0, seed: 2}}
rows: {a: {}, b: {seed: 5}}
"""
    (row, _) = rows_of("rows: {a: {}, b: {seed: 5}}")
    assert row.values == dict(lr=0.5, seed=0, names=[], weights={"kl": 1.0, "ce": 2.0}, workers=1)
    found = [rows_of(text), rows_of(text, scale="full"), rows_of(text, [("lr", "3")], "full")]
    assert [[(r.values["lr"], r.values["seed"]) for r in rows] for rows in found] == [
        [(1.0, 1), (1.0, 5)],
        [(2.0, 2), (2.0, 5)],
        [(3.0, 2), (3.0, 5)],
    ]
    assert rows_of(text, [("workers", "3")])[0].values["workers"] == 3


def test_rows_and_points(place):
    "Every entry with every point, the last list fastest; names, and what was set, as text."
    rows = rows_of("rows: {a: {lr: 1e-3}, b: {}}\ngrid: {seed: [0, 1], names: [[x], ['1']]}")
    points = ["seed=0 names=[x]", "seed=0 names=['1']", "seed=1 names=[x]", "seed=1 names=['1']"]
    assert [row.name for row in rows] == [f"{entry} {p}" for entry in "ab" for p in points]
    assert [row.entry for row in rows] == ["a"] * 4 + ["b"] * 4
    assert rows[1].given == {"seed": "0", "names": "['1']", "lr": "0.001"}
    assert rows[1].key == digest({"notebook": "toy", **rows[1].values})


def test_what_is_given_does_not_reach_a_row_that_sets_it(place):
    text = "rows: {a: {}, b: {weights: {kl: 5.0}}, c: {weights.ce: 6.0}}"
    rows = rows_of(text, [("weights.kl", "7.0"), ("lr", "8")])
    assert [row.values["weights"] for row in rows] == [
        {"kl": 7.0, "ce": 2.0},
        {"kl": 5.0},
        {"kl": 7.0, "ce": 6.0},
    ]
    assert {row.values["lr"] for row in rows} == {8.0}
    grid.check_given("g.yaml", [("weights.kl", "7.0")], [rows[0], rows[2]])
    with pytest.raises(InputError, match="'weights' in its grid or in row 'b'"):
        grid.check_given("g.yaml", [("weights.kl", "7.0")], rows)


def test_first_words_name_a_row_and_first_letters_do_not(place):
    rows = rows_of("rows: {R1 one: {}, R10 ten: {seed: 1}, R1: {seed: 2}, R2 two: {seed: 3}}")

    def chosen(*patterns):
        return [row.name for row in grid.choose_rows("g.yaml", rows, patterns)]

    assert chosen("R2") == ["R2 two"]
    assert chosen("R1") == ["R1"]
    assert chosen("R1*") == ["R1 one", "R10 ten", "R1"]
    assert chosen("R2", "R10") == ["R10 ten", "R2 two"]
    with pytest.raises(InputError, match="--rows: 'R' fits no row"):
        chosen("R")


# ---------------------------------------------------------------- sweeps
def test_a_row_keeps_its_folder_when_it_gets_another_name(tmp_path):
    first = grid.Row("no kl seed=1", {}, {}, "0123456789ab")
    (folder,) = sweep._find_row_folders(tmp_path, [first]).values()
    assert folder == tmp_path / "rows/no_kl_seed=1-0123456789ab"
    folder.mkdir(parents=True)
    renamed = grid.Row("without", {}, {}, "0123456789ab")
    assert sweep._find_row_folders(tmp_path, [renamed]) == {"0123456789ab": folder}


def test_how_far_a_row_is(tmp_path):
    assert row_process.row_state(tmp_path) == "to do"
    (tmp_path / "parameters.json").write_text("{}")
    assert row_process.row_state(tmp_path) == "begun"
    (tmp_path / "done.json").write_text("{}")
    assert row_process.row_state(tmp_path) == "done"


def test_the_table_of_a_sweep(tmp_path):
    "Finished rows only, in the order of the grid; what varies stands in front."
    rows = [grid.Row(n, {}, {"lr": lr, "seed": 0}, n) for n, lr in (("b", 2), ("a", 1), ("c", 3))]
    for name in "ab":
        folder = tmp_path / f"rows/{name}-{name}"
        folder.mkdir(parents=True)
        table = f"arm,seed,case,group,dsc\nx,0,{name}1,g,0.5\n"
        (folder / "metrics.csv").write_text(table)
        (folder / "done.json").write_text("{}")
    unfinished = tmp_path / "rows/c-c"
    unfinished.mkdir()
    (unfinished / "parameters.json").write_text("{}")
    (unfinished / "metrics.csv").write_text("arm,seed,case,group,dsc\nx,0,c1,g,0.5\n")
    sweep._write_results(tmp_path, rows)
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "row,lr,arm,seed,case,group,dsc",
        "b,2,x,0,b1,g,0.5",
        "a,1,x,0,a1,g,0.5",
    ]


def test_a_parameter_that_the_scores_contradict_is_called_given(tmp_path):
    rows = [grid.Row(n, {}, dict(seed=s, arm="x"), n) for n, s in (("a", 1), ("b", 2))]
    scores = {"a": [dict(arm="x", seed=1)], "b": [dict(arm="x", seed=0)]}
    assert sweep._join_scores(rows, scores, ["seed", "arm"]) == [
        dict(row="a", given_seed=1, arm="x", seed=1),
        dict(row="b", given_seed=2, arm="x", seed=0),
    ]


def test_a_row_that_left_nothing_here_has_failed(tmp_path):
    answer = Future()
    answer.set_result(dict(state="done", seconds=1.0, reason=""))
    job = dict(folder=str(tmp_path))
    found = row_process._read_answer(answer, job)
    assert found["state"] == "failed" and "another file system" in found["reason"]
    (tmp_path / "done.json").write_text("{}")
    assert row_process._read_answer(answer, job) == dict(state="done", seconds=1.0, reason="")
    lost = Future()
    lost.set_exception(RuntimeError("worker lost"))
    found = row_process._read_answer(lost, job)
    assert (found["state"], found["reason"]) == ("failed", "RuntimeError: worker lost")


# ---------------------------------------------------------------- the command itself
def test_a_stream_that_cannot_be_written_stops_nothing():
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise OSError

        def flush(self):
            raise ValueError("closed")

    stream = UnstoppableStream(Full())
    assert stream.write("text") == 4
    stream.flush()
    assert stream.fault.errno == 28  # the first one


def test_a_signal_is_an_error_within_and_what_it_was_without():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as e:
            with stop_on_signals():
                signal.raise_signal(signal.SIGTERM)
        assert e.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "fault, status, words",
    [
        (InputError("labels: none"), 2, "ukd run: labels: none"),
        (Stopped(15), 143, "stopped. The same command continues"),
        (KeyboardInterrupt(), 130, "stopped. The same command continues"),
        (PermissionError(13, "Permission denied", "a.csv"), 2, "a.csv: Permission denied."),
    ],
)
def test_the_exit_status_says_how_a_command_ended(monkeypatch, capsys, fault, status, words):
    def run(args):
        raise fault

    monkeypatch.delenv("UKD_DEBUG", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "run", run)
    assert cli.main(["run", "lotus"]) == status
    assert words in capsys.readouterr().err


def test_a_mistake_of_ours_is_shown_with_its_traceback(monkeypatch):
    def run(args):
        raise KeyError("ours")

    monkeypatch.setitem(cli.COMMANDS, "run", run)
    with pytest.raises(KeyError):
        cli.main(["run", "lotus"])
