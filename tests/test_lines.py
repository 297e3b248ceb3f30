"""The gate `lines` can fail: each count is shown a module whose figure is known by hand."""

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gates"))
import lines  # noqa: E402
import measures  # noqa: E402

DENSE = """
__all__ = ["f", "g"]
f = lambda x: x + 1
a, b = 1, 2
a, b = b, a
c, d = divmod(7, 2)


def g(x):
    return 1 if x > 1 else 2 if x > 0 else 3
"""


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    project = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(project)
    return folder


def figures(*texts):
    return lines.figures(dict(enumerate(texts)))


def test_what_stands_inside_what_is_counted():
    found = figures(DENSE)
    assert found["lambdas with a name"] == 1
    assert found["conditional expressions inside another"] == 1
    assert found["public names"] == 2
    # one of ten lines; the swap and the two values of one call are none
    assert found["parallel assignments per 1000 lines"] == 100


def test_tokens_are_those_of_logical_lines():
    text = "a = 1\nb = f(a,\n      2)  # comment\n\n\ndef f():\n    '''Text.'''\n"
    assert list(measures.tokens_of_lines(text)) == [3, 8, 5, 1]
    assert figures(text)["tokens of a logical line, median"] == 4


def test_long_lines_are_counted_with_and_without_a_mark():
    long = "x = 1  # " + "a" * 100 + "\n"
    marked = "y = 1  " + "a" * 0 + "# " + "b" * 100 + "  # noqa: E501\n"
    found = figures(long + marked + "z = 1\n")
    assert found["lines over 100 columns that are not marked"] == 1
    assert found["marked lines over 100 columns"] == 1


def test_the_list_of_names_that_nbdev_writes_is_not_counted():
    names = "__all__ = ['" + "a" * 100 + "',\n           '" + "b" * 100 + "']\n"
    found = figures(names + "x = 1\n")
    assert found["lines over 100 columns that are not marked"] == 0
    assert found["public names"] == 2


@pytest.mark.parametrize("most, expected", [(1, 1), (2, 1), (9, 1), (10, 1), (11, 2)])
def test_nine_in_ten(most, expected):
    assert lines.nine_in_ten([1] * 9 + [2] * (most > 10) + [3] * (most > 10)) == expected


def test_complexity_is_that_of_nine_functions_in_ten():
    simple = "\n\n".join(f"def f{i}():\n    return {i}" for i in range(10))
    tangled = "\n\ndef g(x):\n    return [a for a in x if a and x or a > 1]\n"
    assert figures(simple + tangled)["complexity of a function, nine in ten"] == 1
    assert figures(tangled)["complexity of a function, nine in ten"] == 5


def test_a_figure_above_its_limit_is_named():
    assert list(lines.too_much({"public names": 500})) == []
    (said,) = lines.too_much({"public names": 501})
    assert said == "public names: 501, at most 500"


# ---------------------------------------------------------------- ruff
def test_a_broken_rule_is_named_with_its_place(tmp_path):
    write(tmp_path, {"tests/test_a.py": "import os\n\n\ndef f():\n    x = 1\n    return y\n"})
    said = lines.check(tmp_path, ["tests"])
    assert len(said) == 3
    for place in ("1:8: F401", "5:5: F841", "6:12: F821"):
        assert any(f"tests/test_a.py:{place}" in line for line in said)


def test_a_chapter_may_define_a_thing_twice(tmp_path):
    twice = "def f(x):\n    return x\n\n\ndef f(x):\n    return x + 1\n"
    write(tmp_path, {"unpaired_kd/a.py": twice, "unpaired_kd/_modidx.py": "import os"})
    assert lines.check(tmp_path, ["unpaired_kd"]) == []


def test_what_is_not_formatted_is_named(tmp_path):
    write(tmp_path, {"tests/a.py": "x = 1\n", "tests/b.py": "x=1\n"})
    (said,) = lines.unformatted(tmp_path, ["tests"])
    assert "tests/b.py" in said and "ruff format" in said


def test_ruff_that_does_not_run_is_a_complaint(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\nno-such-setting = 1")
    assert "ruff did not run" in lines.check(tmp_path, ["."])[0]


# ---------------------------------------------------------------- cells
def chapter(*sources):
    cells = [dict(cell_type="code", source=s, metadata={}, outputs=[]) for s in sources]
    return json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))


def test_a_long_cell_of_two_functions_is_named(tmp_path):
    body = "".join(f"    x = {i}\n" for i in range(25))
    two = f"#| export\ndef f():\n{body}\n\ndef g():\n{body}"
    one = f"#| export\ndef f():\n{body}{body}"
    write(tmp_path, {"nbs/a.ipynb": chapter(one, two, two.replace("#| export", ""))})
    (said,) = lines.long_cells(tmp_path)
    assert "nbs/a.ipynb cell 1" in said
    assert len(ast.parse(one).body) == 1
