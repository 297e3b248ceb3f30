"""Gate: every chapter runs, all in one process, so that what a notebook leaves behind meets the next one.

`forward` is nbdev's order, `reversed` the other; `make test` does both. Experiments run in their own gate.
"""
import os, sys, time

from common import ROOT, finish, front_matter, is_experiment, notebooks


def main(order):
    from nbdev.config import get_config
    from nbdev.test import test_nb
    os.chdir(ROOT / "nbs")
    start, found, ran, slow = time.time(), [], 0, []
    paths = [p for p in notebooks() if not is_experiment(p)]
    skipped = [p.name for p in paths if front_matter(p).get("skip_exec")]
    found += [f"{name} has `skip_exec`: only experiments may" for name in skipped]
    flags = get_config().tst_flags.split()
    for path in paths if order == "forward" else paths[::-1]:
        passed, seconds = test_nb(path, skip_flags=flags, basepath=ROOT)
        if not passed: found.append(f"{path.relative_to(ROOT)} failed ({order} order)")
        ran += seconds > 0
        if seconds > 30: slow.append(f"{path.name} {seconds:.0f} s")
    if ran != len(paths) - len(skipped): found.append(f"{ran} of {len(paths)} notebooks ran")
    if not paths: found.append("no notebooks found")
    finish(f"notebooks, {order}", found, f"{ran} ran" + (f"; slow: {', '.join(slow)}" if slow else ""), start)


if __name__ == "__main__": main(sys.argv[1] if len(sys.argv) > 1 else "forward")
