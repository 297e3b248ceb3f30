"""Gate: every experiment runs to its end through `ukd run` from an empty folder, with the small
parameters of nbs/experiments/dry.yaml; run again, it finds its work done, and has left nothing
else.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import ROOT, finish, front_matter, is_experiment, notebooks


def ukd(path, parameters, folder):
    "Run one experiment as a user would, beside its run folder; returns the finished process."
    command = [
        sys.executable,
        "-c",
        "import sys; from unpaired_kd.command.cli import main; sys.exit(main(sys.argv[1:]))",
        "run",
        str(path),
        "--out",
        str(folder),
    ]
    for k, v in parameters.items():
        command += [
            "-p",
            k,
            v
            if isinstance(v, str)
            else yaml.safe_dump(v, default_flow_style=True).removesuffix("...\n").strip(),
        ]
    return subprocess.run(command, cwd=Path(folder).parent, capture_output=True, text=True)


def main():
    start = time.time()
    found = []
    paths = [p for p in notebooks() if is_experiment(p)]
    plan = ROOT / "nbs/experiments/dry.yaml"
    small = (yaml.safe_load(plan.read_text()) or {}) if plan.exists() else {}
    found += [
        f"nbs/experiments/dry.yaml: no notebook {name!r}"
        for name in small.keys() - {p.stem for p in paths}
    ]
    for path in paths:
        if not front_matter(path).get("skip_exec"):
            remedy = "put `- skip_exec: true` under the title, or nbdev_test runs it in full"
            found.append(f"{path.name}: {remedy}")
        if path.stem not in small:
            found.append(f"nbs/experiments/dry.yaml has no entry {path.stem!r}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for attempt in ("first", "second"):
                done = ukd(path, small[path.stem] or {}, f"{folder}/run")
                if done.returncode:
                    said = f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
                    found.append(
                        f"{path.name}, {attempt} run, left with {done.returncode}:\n{said}"
                    )
                    break
            left = sorted(p.name for p in Path(folder).iterdir() if p.name != "run")
            found += [f"{path.name} left {name} outside its run folder" for name in left]
            wrong = ukd(path, {"no_such_parameter": 1}, f"{folder}/wrong")
            if wrong.returncode != 2:
                found.append(f"{path.name} accepted an unknown parameter")
    finish("experiments", found, f"{len(paths)} ran twice, with small parameters", start)


if __name__ == "__main__":
    main()
