"""Gate: no private function or class of the library that the library never uses.

Imports, locals and names that are used but not there: ruff finds these, in the gate `lines`.
"""

import ast
import time
from collections import Counter

from common import ROOT, finish


SHOWN = ("_repr_html_", "_repr_markdown_")


def used(tree):
    "Every name that a module reads, as often as it does."
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.split(".")[-1]


def idle(root=ROOT, place="unpaired_kd"):
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
                asked = node.name.endswith("__") or node.name in SHOWN  # by Python, by Jupyter
                if not asked and not uses[node.name]:
                    yield f"{path.relative_to(root)}:{node.lineno}: {node.name} is never used"


def main():
    start = time.time()
    finish("names", [*idle()], "no private name without a use", start)


if __name__ == "__main__":
    main()
