"""Apply small wrong changes to a copy of the library and see whether its tests notice.

    python tests/mutants                     # all lists, what was answered before is kept
    python tests/mutants lotus training      # some lists
    python tests/mutants --sample 5 --seed 1 # five drawn by chance
    python tests/mutants --jobs 2 --out runs/mutants.jsonl

First the tests must pass on the unchanged copy. An answer is one line of --out; it holds as long
as the change, its module and its tests are the same. The exit status is 1 if fewer than 95 % are
noticed, if the unchanged copy fails, or if a change does not fit its module any more.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import ROOT, fingerprint, read_lists

ENOUGH = 0.95  # share that must be noticed
LIMIT = 300  # seconds that the tests of a mutant may take; one that hangs is noticed
COPIED = ("unpaired_kd", "tests", "nbs", "pyproject.toml", "settings.ini", "README.md")
NOTICED = ("failed", "hung")


def make_copy(folder, root=ROOT):
    "Library and tests in a folder of their own."
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def ask_tests(tests, folder, limit=LIMIT):
    "`failed`, `passed`, `hung` or `broken` (no test ran), and the last line that pytest printed."
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "hung", f"longer than {limit} s"
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = said[-1] if said else "".join(done.stdout.splitlines()[-1:])
    words = {0: "passed", 1: "failed", 2: "failed"}  # 2: a module or a test cannot be imported
    return words.get(done.returncode, "broken"), last[:200]


def try_mutant(mutant, folder):
    "The answer to one mutant: a copy is changed, asked, and put back."
    path = folder / "unpaired_kd" / mutant.file
    text = path.read_text(encoding="utf-8")
    start = time.time()
    try:
        path.write_text(mutant.applied(text), encoding="utf-8")
        result, said = ask_tests(mutant.tests, folder)
    finally:
        path.write_text(text, encoding="utf-8")
    return dict(result=result, said=said, seconds=round(time.time() - start, 1))


def control(tests, root=ROOT):
    "Complaint if the tests fail on the library as it is: then they would notice anything."
    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        result, said = ask_tests(tests, make_copy(Path(scratch), root), limit=4 * LIMIT)
    return [] if result == "passed" else [f"unchanged, {', '.join(tests)}: {result}: {said}"]


def answers(path):
    "Answers that were given before: fingerprint -> answer."
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {entry["of"]: entry for entry in map(json.loads, lines)}


def waiting(mutants, out):
    "Mutants that have no answer yet."
    known = answers(out)
    return [m for m in mutants if fingerprint(m) not in known]


def run(mutants, out, jobs, say=print):
    "Answer what has no answer yet; returns {mutant: answer}."
    known = answers(out)
    marks = {m: fingerprint(m) for m in mutants}
    left = waiting(mutants, out)
    out.parent.mkdir(parents=True, exist_ok=True)

    def work(share):
        with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
            folder = make_copy(Path(scratch))
            for mutant in share:
                answer = dict(of=marks[mutant], name=mutant.name) | try_mutant(mutant, folder)
                known[marks[mutant]] = answer
                with open(out, "a", encoding="utf-8") as f:
                    f.write(json.dumps(answer) + "\n")
                say(f"{answer['result']:>6}  {answer['seconds']:>5} s  {mutant.name}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, [left[i::jobs] for i in range(jobs)]))
    return {m: known[mark] for m, mark in marks.items()}


def check_fit(mutants, root=ROOT):
    "One complaint for each change that does not fit its module any more."
    for mutant in mutants:
        try:
            mutant.applied((root / "unpaired_kd" / mutant.file).read_text(encoding="utf-8"))
        except (ValueError, OSError, SyntaxError) as error:
            yield f"{mutant.name}: {error}"


def report(found, say=print):
    "Print who was noticed; returns the share of those that change something."
    wrong = {m: a for m, a in found.items() if not m.same}
    noticed = [m for m, a in wrong.items() if a["result"] in NOTICED]
    for mutant, answer in wrong.items():
        if answer["result"] not in NOTICED:
            say(f"not noticed: {mutant.name} ({mutant.file}): {answer['said']}")
    for mutant in found.keys() - wrong.keys():
        say(f"changes nothing: {mutant.name}: {mutant.same}")
    share = len(noticed) / max(len(wrong), 1)
    say(f"{len(noticed)} of {len(wrong)} noticed ({share:.1%})")
    return share


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", help="lists; all without")
    parser.add_argument("--sample", type=int, help="how many, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    asked = parser.parse_args(arguments)
    try:
        mutants = read_lists(asked.parts)
    except ValueError as error:
        parser.error(str(error))
    if complaints := list(check_fit(mutants)):
        print("\n".join(complaints))
        return 1
    if asked.sample:
        mutants = random.Random(asked.seed).sample(mutants, min(asked.sample, len(mutants)))
    asked_tests = sorted({m.tests for m in waiting(mutants, asked.out)})
    if complaints := [c for tests in asked_tests for c in control(tests)]:
        print("\n".join(complaints))
        return 1
    share = report(run(mutants, asked.out, asked.jobs))
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
