"""Gate: no name without a use, in the exported modules, the tests and the gates.

ruff (pyproject.toml, `[tool.ruff]`) finds imports, local variables and names that are used but not there; what it
does not look for, a private function or class that nobody calls, is looked for here.
"""

import ast
import subprocess
import sys
import time
from collections import Counter

from common import ROOT, finish

PLACES = ("unpaired_kd", "tests")


def ruff(root=ROOT, places=PLACES):
    "What ruff complains about, one line each."
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--quiet",
        "--output-format",
        "concise",
    ]
    done = subprocess.run([*command, *places], cwd=root, capture_output=True, text=True)
    if done.stderr:
        return [
            f'ruff did not run (pip install -e ".[dev]" -c constraints.txt): {done.stderr.strip()}'
        ]
    return done.stdout.splitlines()


def used(tree):
    "Every name that a module reads, as often as it does."
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.split(".")[-1]


def idle(root=ROOT, place=PLACES[0]):
    "Private functions, methods and classes of the library that the library never uses."
    trees = {
        p: ast.parse(p.read_text())
        for p in sorted((root / place).rglob("*.py"))
        if p.name != "_modidx.py"
    }
    uses = Counter(name for tree in trees.values() for name in used(tree))
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.startswith("_"):
                if not node.name.endswith("__") and not uses[node.name]:
                    yield f"{path.relative_to(root)}:{node.lineno}: {node.name} is never used"


def main():
    start = time.time()
    finish("names", [*ruff(), *idle()], "no import, local or private name without a use", start)


if __name__ == "__main__":
    main()
