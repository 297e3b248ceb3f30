"""All checks: `python tests/gates`, or some of them: `python tests/gates pages config`.

The gates and pytest run as separate processes, as many at a time as there are cores, one thread
each. What a job prints appears when it ends; pytest's part comes last. The exit status is 0 only if
everything passed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JOBS = {  # longest first
    "pytest": ["-m", "pytest", "--durations=5"],
    "forward": ["tests/gates/notebooks.py", "forward"],
    "reversed": ["tests/gates/notebooks.py", "reversed"],
    "experiments": ["tests/gates/experiments.py"],
    "wheel": ["tests/gates/wheel.py"],
    "pages": ["tests/gates/pages.py"],
    "sources": ["tests/gates/sources.py"],
    "house": ["tests/gates/house.py"],
    "lines": ["tests/gates/lines.py"],
    "names": ["tests/gates/names.py"],
    "config": ["tests/gates/config.py"],
}
LIMIT = 30 * 60  # seconds a job may take


def run(names, cores):
    "Run the jobs; returns {name: (exit status, text)}; prints each text but pytest's as it comes."
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "MPLBACKEND": "agg",
        "PYTHONUTF8": "1",
    }
    waiting = list(names)
    running = {}
    done = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < cores:
                name = waiting.pop(0)
                out = open(Path(folder) / name, "w")
                running[name] = (
                    subprocess.Popen(
                        [sys.executable, *JOBS[name]],
                        cwd=ROOT,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    ),
                    time.time(),
                )
                out.close()
                print(f"...  {name} started", flush=True)
            time.sleep(0.2)
            for name, (process, since) in list(running.items()):
                if process.poll() is None and time.time() - since > LIMIT:
                    process.kill()
                if process.poll() is None:
                    continue
                text = (Path(folder) / name).read_text(errors="replace").rstrip()
                done[name] = (process.wait(), text)
                del running[name]
                print(
                    f"...  pytest ended ({time.time() - since:.0f} s), shown last"
                    if name == "pytest"
                    else text,
                    flush=True,
                )
    return done


def usable_cores():
    "Cores that this process may use."
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def main():
    names = sys.argv[1:] or list(JOBS)
    if wrong := [n for n in names if n not in JOBS]:
        sys.exit(f"no gate {', '.join(wrong)}; there are {', '.join(JOBS)}")
    start = time.time()
    done = run(names, cores=min(usable_cores(), 6))
    failed = [n for n, (status, _) in done.items() if status]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "All passed"
    print(f"\n{verdict}: {len(done)} jobs in {time.time() - start:.0f} s")
    if "pytest" in done:
        print(done["pytest"][1])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
