"""Gate: every chapter runs, all in one process, so that what a notebook leaves behind meets the
next one.

`forward` is nbdev's order, `reversed` the other; `make test` does both. Names after it choose
chapters. On the way the stored text of every cell is compared with what it gives now (stored.py).
Experiments run in their own gate.
"""

import atexit
import os
import re
import sys
import time

from common import ROOT, finish, front_matter, is_experiment, notebooks
from execnb.shell import CaptureShell
from stored import difference

MEND = "run the chapter in Jupyter and save it"
UNRUN = ("index", "boxes", "references")  # pages without code that runs


class Shell(CaptureShell):
    """nbdev's shell; as in Jupyter, a `;` at the end of a cell keeps back its value, not what it
    prints.
    """

    def run(self, code, **options):
        outputs = super().run(f"{code}\n#", **options)
        quiet = re.search(r";\s*(?:#[^\n]*)?\s*\Z", code)
        return [o for o in outputs if not (quiet and o["output_type"] == "execute_result")]


def left_out(cell, flags):
    """Whether a cell is not run, by nbdev's rules: prose, a flag, `eval: false`, or the export
    itself.
    """
    given = getattr(cell, "directives_", None) or {}
    never = given.get("eval:", [""])[0].lower() == "false"
    return (
        cell.cell_type != "code"
        or "nbdev_export(" in cell.source
        or never
        or bool(flags & given.keys())
    )


def run_chapter(path, flags=frozenset()):
    "Run a notebook as nbdev_test does. Returns (what failed or differs, one line each; cells run)."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    nb = NBProcessor(path, procs=FrontmatterProc, process=True, rm_directives=False).nb
    found = []
    stored = {}
    shell = Shell(path, mpl_format="png")

    def leave(cell):
        if left_out(cell, flags):
            return True
        stored[cell.idx_] = cell.outputs
        cell.outputs = []

    def compare(cell):
        said = (
            None
            if shell.exc
            else difference(stored[cell.idx_], cell.outputs, "measured" in cell.directives_)
        )
        if said:
            found.append(f"cell {cell.idx_} ({cell.id}) {said}")

    try:
        shell.run_all(nb, exc_stop=True, preproc=leave, postproc=compare)
    except Exception:
        found.append(f"failed: {shell.prettytb(fname=path)}")
    finally:  # else each shell lives on, and at the end looks through all objects of the process
        atexit.unregister(shell.atexit_operations)
    return found, len(stored)


def chosen(names=()):
    "The chapters, in nbdev's order: all, or those of these names (`losses/segmentation`)."
    paths = {
        str(p.relative_to(ROOT / "nbs").with_suffix("")): p
        for p in notebooks()
        if not is_experiment(p)
    }
    if wrong := [n for n in names if n not in paths]:
        sys.exit(f"no chapter {', '.join(wrong)}; there are {', '.join(paths)}")
    return [p for name, p in paths.items() if not names or name in names]


def main(order="forward", *names):
    from nbdev.config import get_config

    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    start = time.time()
    found = []
    ran = 0
    slow = []
    paths = chosen(names)
    skipped = [p for p in paths if front_matter(p).get("skip_exec")]
    found += [f"{p.name} has `skip_exec`: only experiments may" for p in skipped]
    flags = set(get_config(path=ROOT).tst_flags.split())
    for path in paths if order == "forward" else paths[::-1]:
        since = time.time()
        os.chdir(path.parent)
        said, cells = run_chapter(path, flags)
        found += [f"{path.relative_to(ROOT)}, {order}: {s}" for s in said]
        ran += cells
        if not cells and path.stem not in UNRUN:
            found.append(f"{path.relative_to(ROOT)} ran no cell")
        if time.time() - since > 30:
            slow.append(f"{path.name} {time.time() - since:.0f} s")
    if not paths:
        found.append("no notebooks found")
    if any("stores" in f for f in found):
        found.append(f"stored text is not what the chapter says now: {MEND}")
    notes = f"{len(paths)} ran, {ran} cells" + (f"; slow: {', '.join(slow)}" if slow else "")
    finish(f"notebooks, {order}", found, notes, start)


if __name__ == "__main__":
    main(*sys.argv[1:])
