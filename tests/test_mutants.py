"""The lists of wrong changes fit the library; the runner tells who is noticed; a few are tried."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "mutants"
sys.path.insert(0, str(FOLDER))
import mutants  # noqa: E402

spec = importlib.util.spec_from_file_location("run_mutants", FOLDER / "__main__.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)

ALL = mutants.read_lists()
FOLDERS = (
    "distillation",
    "methods",
    "networks",
    "translation",
    "training",
    "metrics",
    "inference",
    "study",
)


def mutant(**changes):
    plain = dict(part="toy", tests=("tests/test_toy.py",), file="toy.py", why="wrong")
    return mutants.Mutant(**plain | dict(old="a + b", new="a - b") | changes)


# ---------------------------------------------------------------- the lists
def test_every_change_fits_its_module():
    assert list(runner.check_fit(ALL)) == []


def test_there_are_enough_of_them_in_every_folder():
    real = [m for m in ALL if not m.same]
    assert len(real) >= 150
    folders = {m.file.split("/")[0] for m in real}
    assert set(FOLDERS) <= folders


def test_no_change_stands_twice():
    keys = [(m.file, m.within, m.old, m.new) for m in ALL]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
def test_a_sample_is_noticed(tmp_path):
    "Another one with every change of the library: the draw is made from its text."
    text = "".join(p.read_text() for p in sorted((ROOT / "unpaired_kd").rglob("*.py")))
    drawn = random.Random(text).sample([m for m in ALL if not m.same], 3)
    found = runner.run(drawn, tmp_path / "answers.jsonl", jobs=1)
    missed = [m.name for m, answer in found.items() if answer["result"] not in runner.NOTICED]
    assert missed == []


# ---------------------------------------------------------------- one change
TOY = "def add(a, b):\n    return a + b\n\n\ndef more(a, b):\n    return a + b + 1\n"


def test_a_change_is_made_once():
    with pytest.raises(ValueError, match="occurs 2 times"):
        mutant().applied(TOY)
    changed = mutant(within="def more").applied(TOY)
    assert changed == TOY.replace("a + b + 1", "a - b + 1")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(old="a * b"), "occurs 0 times"),
        (dict(within="def less"), "not there any more"),
        (dict(within="def more", new="a + b"), "not changed"),
    ],
)
def test_a_change_that_does_not_fit_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        mutant(**changes).applied(TOY)


def test_a_change_that_is_no_python_is_named():
    with pytest.raises(SyntaxError):
        mutant(within="def more", new="a (").applied(TOY)


def test_a_list_with_an_unknown_key_is_named(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text('tests = ["tests/test_mutants.py"]\n[[mutant]]\nfile = "a"\nline = 1\n')
    with pytest.raises(ValueError, match="unknown keys"):
        mutants.read_list(path)
    path.write_text('tests = ["tests/test_gone.py"]\n[[mutant]]\nfile = "a"\n')
    with pytest.raises(ValueError, match="files of tests that are there"):
        mutants.read_list(path)


# ---------------------------------------------------------------- the runner
def toy_tree(root, test):
    for name, text in {
        "unpaired_kd/__init__.py": "",
        "unpaired_kd/toy.py": TOY,
        "tests/test_toy.py": f"from unpaired_kd.toy import add\n\n\ndef test():\n    {test}\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "test, expected",
    [
        ("assert add(2, 1) == 3", "failed"),
        ("assert add(2, 0) == 2", "passed"),
        ("while add(2, 1) == 1: pass", "hung"),
    ],
)
def test_the_tests_of_a_copy_answer(tmp_path, test, expected, monkeypatch):
    root = toy_tree(tmp_path, test)
    limit = 10 if expected == "hung" else 200
    ask = runner.ask_tests
    monkeypatch.setattr(runner, "ask_tests", lambda tests, folder: ask(tests, folder, limit))
    answer = runner.try_mutant(mutant(old="return a + b\n", new="return a - b\n"), root)
    assert answer["result"] == expected
    assert (root / "unpaired_kd/toy.py").read_text() == TOY


def test_a_test_that_is_not_there_answers_nothing(tmp_path):
    assert runner.ask_tests(("tests/test_gone.py",), toy_tree(tmp_path, "pass"))[0] == "broken"


def test_what_fails_unchanged_notices_nothing(tmp_path, monkeypatch):
    root = toy_tree(tmp_path, "assert add(2, 1) == 4")
    monkeypatch.setattr(runner, "COPIED", ("unpaired_kd", "tests"))
    (said,) = runner.control(("tests/test_toy.py",), root)
    assert said.startswith("unchanged, tests/test_toy.py: failed")


def test_answers_are_kept_until_something_changes(tmp_path):
    one = ALL[0]
    out = tmp_path / "answers.jsonl"
    out.write_text('{"of": "%s", "result": "failed", "said": ""}\n' % mutants.fingerprint(one))
    assert runner.waiting([one], out) == []
    other = mutants.dataclasses.replace(one, why="another")
    assert runner.waiting([other], out) == [other]


def test_the_share_counts_what_changes_something():
    answers = {
        mutant(why="a"): dict(result="failed", said=""),
        mutant(why="b"): dict(result="passed", said=""),
        mutant(why="c", same="it is the same"): dict(result="passed", said=""),
    }
    lines = []
    assert runner.report(answers, say=lines.append) == 0.5
    assert "not noticed: toy: b" in lines[0] and "it is the same" in lines[1]


def test_an_unknown_part_is_refused():
    done = subprocess.run(
        [sys.executable, str(FOLDER), "lotos"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "no list lotos" in done.stderr
