"""Gate: one line, one idea.

ruff (pyproject.toml, `[tool.ruff]`) formats the notebooks and the tests and checks both and the
exported library. What it does not count is counted here, over the library; `python
tests/gates/lines.py` prints the figures.
"""

import ast
import re
import statistics
import subprocess
import sys
import time

from common import ROOT, finish, notebooks, read
from measures import (
    complexity,
    functions,
    named_lambdas,
    nested_conditions,
    parallel_assignments,
    tokens_of_lines,
)

COLUMNS = 100
FORMATTED = ("nbs", "tests", "book")
CHECKED = ("nbs", "tests", "book", "unpaired_kd")
MARK = "# noqa: E501"  # a line that is a formula may be longer
LIMITS = {
    "lines over 100 columns that are not marked": 0,
    "marked lines over 100 columns": 30,
    "tokens of a logical line, median": 10,
    "parallel assignments per 1000 lines": 10,
    "lambdas with a name": 0,
    "conditional expressions inside another": 0,
    "complexity of a function, nine in ten": 8,
    "public names": 500,
}


# ---------------------------------------------------------------- ruff
def ruff(*arguments, root=ROOT):
    "What ruff prints, one complaint a line; a ruff that cannot run is a complaint."
    command = [sys.executable, "-m", "ruff", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.stderr:
        remedy = 'pip install -e ".[dev]" -c constraints.txt'
        return [f"ruff did not run ({remedy}): {done.stderr.strip()}"]
    return done.stdout.splitlines()


def check(root=ROOT, places=CHECKED):
    "Lines that break a rule of `[tool.ruff.lint]`."
    return ruff("check", "--no-cache", "--quiet", "--output-format", "concise", *places, root=root)


def unformatted(root=ROOT, places=FORMATTED):
    "Files that `ruff format` would change."
    said = ruff("format", "--no-cache", "--quiet", "--diff", *places, root=root)
    files = [line.removeprefix("+++ ") for line in said if line.startswith("+++ ")]
    broken = [line for line in said if line.startswith("ruff did not run")]
    return broken + [f"{file}: run `ruff format nbs tests book`" for file in files]


# ---------------------------------------------------------------- figures
def library(root=ROOT):
    "Path -> text of every module."
    modules = sorted((root / "unpaired_kd").rglob("*.py"))
    return {path: path.read_text() for path in modules if path.name != "_modidx.py"}


def public_names(tree):
    "What a module offers to its readers: `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def written_lines(text):
    "The lines of a module that stand in its chapter: all but nbdev's own list of public names."
    return re.sub(r"^__all__ = \[[^]]*\]$", "", text, flags=re.M).splitlines()


def nine_in_ten(values):
    "The value that nine in ten do not exceed."
    return sorted(values)[int(0.9 * (len(values) - 1))] if values else 0


def figures(texts):
    """{what is counted: figure} of modules given as {path: text}; the keys of LIMITS, in their
    order.
    """
    trees = [ast.parse(text) for text in texts.values()]
    lines = [line for text in texts.values() for line in written_lines(text)]
    long = [line for line in lines if len(line) > COLUMNS]
    marked = [line for line in long if MARK in line]
    tokens = [n for text in texts.values() for n in tokens_of_lines(text)]
    complexities = [complexity(node) for tree in trees for _, node in functions(tree)]
    parallel = sum(len(parallel_assignments(tree)) for tree in trees)
    found = (
        len(long) - len(marked),
        len(marked),
        statistics.median(tokens or [0]),
        round(1000 * parallel / max(len(lines), 1), 1),
        sum(len(named_lambdas(tree)) for tree in trees),
        sum(len(nested_conditions(tree)) for tree in trees),
        nine_in_ten(complexities),
        sum(len(public_names(tree)) for tree in trees),
    )
    return dict(zip(LIMITS, found, strict=True))


def too_much(found, limits=LIMITS):
    "One complaint for each figure above its limit."
    for what, figure in found.items():
        if figure > limits[what]:
            yield f"{what}: {figure}, at most {limits[what]}"


# ---------------------------------------------------------------- cells
CELL = 40  # lines of an exported cell, a class or a function alone in its cell excepted


def definitions(source):
    "How many functions and classes a cell holds; a table is none."
    kinds = (ast.FunctionDef, ast.ClassDef)
    return sum(isinstance(node, kinds) for node in ast.parse(source).body)


def long_cells(root=ROOT):
    "Exported cells that hold several definitions in more than CELL lines: each could be one cell."
    for path in notebooks(root):
        for number, cell in enumerate(read(path)["cells"]):
            source = cell["source"]
            exported = cell["cell_type"] == "code" and source.startswith("#| export")
            if exported and len(source.splitlines()) > CELL and definitions(source) > 1:
                size = len(source.splitlines())
                yield f"{path.relative_to(root)} cell {number}: {size} lines, at most {CELL}"


def main():
    start = time.time()
    found = figures(library())
    complaints = [*unformatted(), *check(), *too_much(found), *long_cells()]
    for what, figure in found.items():
        print(f"  {figure:>6}  {what} (at most {LIMITS[what]})")
    finish("lines", complaints, "notebooks, tests and library, by ruff and by counting", start)


if __name__ == "__main__":
    main()
