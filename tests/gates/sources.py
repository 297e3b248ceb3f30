"""Gate: the library is the export of the notebooks, the notebooks are clean, README.md is the
export of nbs/index.ipynb, and the chapters made from others are up to date.
"""

import difflib
import subprocess
import sys
import time

from common import ROOT, finish, notebooks, read, scratch
from readme import render, stale_pictures

from book.generated import stale
from book.text import options, without_options


def run_nbdev(command, tree):
    "Run one nbdev command in `tree`; returns what it printed if it failed."
    modules = ("cli", "export", "doclinks", "clean")
    code = "\n".join([*(f"from nbdev.{name} import *" for name in modules), f"{command}()"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    if done.returncode == 0:
        return []
    return [f"{command} failed: {done.stderr.strip().splitlines()[-1]}"]


def contents(tree, pattern, under):
    "Relative path -> bytes."
    return {
        str(p.relative_to(tree)): p.read_bytes()
        for p in sorted((tree / under).rglob(pattern))
        if "__pycache__" not in p.parts
    }


def differences(before, after, mend):
    "One complaint for each file that changed, with the first changed lines."
    found = []
    for name in sorted(before.keys() | after.keys()):
        a = before.get(name)
        b = after.get(name)
        if a == b:
            continue
        if a is None:
            found.append(f"{name} is missing in the tree: {mend}")
        elif b is None:
            found.append(f"{name} has no notebook: delete it")
        else:
            lines = [
                line
                for line in difflib.unified_diff(
                    a.decode().splitlines(), b.decode().splitlines(), lineterm="", n=0
                )
            ][2:8]
            found.append(
                f"{name} differs: {mend}\n      " + "\n      ".join(line[:160] for line in lines)
            )
    return found


def stored_outputs(root=ROOT):
    "Errors, machine paths and heavy pictures in stored outputs."
    import json

    for path in notebooks(root):
        name = path.relative_to(root)
        for i, cell in enumerate(read(path)["cells"]):
            for out in cell.get("outputs", []):
                text = json.dumps(out)
                if out["output_type"] == "error":
                    yield f"{name} cell {i} stores an error: {out['ename']}"
                if str(root) in text:
                    yield f"{name} cell {i} stores a path of this machine"
                for mime, data in out.get("data", {}).items():
                    if mime.startswith("image/") and len("".join(data)) > 270_000:
                        yield f"{name} cell {i} stores a picture over 200 kB"


def manners(root=ROOT):
    "Small things that would show on the site."
    for path in notebooks(root):
        name = path.relative_to(root)
        cells = read(path)["cells"]
        if not cells[0]["source"].startswith("# "):
            yield f"{name}: the first cell must be `# Title` and `> claim`"
        for cell in cells:
            given = options(cell["source"]) if cell["cell_type"] == "code" else {}
            if "default_exp" in given and "hide" not in given:
                yield f"{name}: put `#| hide` under `#| default_exp`, or the site shows that cell"
            if cell["cell_type"] == "code" and "\n#|" in f"\n{without_options(cell['source'])}":
                yield f"{name}: cell {cell['id']} has a `#|` line below its code, where none counts"


def main():
    start = time.time()
    found = []
    with scratch() as tree:
        modules = contents(tree, "*.py", "unpaired_kd")
        found += run_nbdev("nbdev_export", tree)
        found += differences(modules, contents(tree, "*.py", "unpaired_kd"), "run nbdev_export")
        pages = contents(tree, "*.ipynb", "nbs")
        found += run_nbdev("nbdev_clean", tree)
        found += differences(pages, contents(tree, "*.ipynb", "nbs"), "run nbdev_clean")
    readme = ROOT / "README.md"
    if not readme.exists() or readme.read_text() != render():
        found.append("README.md is not the export of nbs/index.ipynb: run `make prepare`")
    found += [*stale(), *stale_pictures(), *stored_outputs(), *manners()]
    finish(
        "sources",
        found,
        f"{len(modules)} modules exported, {len(pages)} notebooks cleaned, README.md compared",
        start,
    )


if __name__ == "__main__":
    main()
