"""Gate: the package installs and works where the source tree is out of reach.

The sdist is built, the wheel from the sdist. The wheel goes into an environment of its own, which
borrows other people's packages from this one, and is used from an empty folder as a user would.
`python tests/gates/wheel.py FOLDER` leaves what was built in FOLDER.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import yaml
from common import ROOT, finish
from packaging.metadata import Metadata

HOME = "nbs/experiments"  # where experiments and grids stand in the tree
PACKED = "unpaired_kd/experiments"  # where they stand in the wheel
NOT_PACKED = {f"{PACKED}/dry.yaml"}  # only tests read it
UNSEEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UKD_DEBUG")  # not set by a user
ALONE = "import sys, unpaired_kd; print(unpaired_kd.__file__, *sys.path, sep='\\n')"
SAME = """
import sys, numpy as np
from PIL import Image
from unpaired_kd import Student
student, image, labels = sys.argv[1:]
found = Student.load(student).predict(image)
assert np.array_equal(found, np.asarray(Image.open(labels))), "Student and `ukd predict` differ"
"""


class Failed(Exception):
    "A step that ended with an error: its command and the end of what it printed."


def call(command, folder, env=None, status=0):
    "Run a command in `folder`; returns what it printed. Raises `Failed` at another exit status."
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode == status:
        return done.stdout + done.stderr
    shown = " ".join(command[:6])
    said = f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    raise Failed(f"`{shown} ...` left with {done.returncode}:\n{said}")


def build(out):
    "Build the sdist and from it the wheel, with the backend that is installed. Returns both."
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], ROOT)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def packed(root=ROOT):
    "The files that the wheel must hold: the library, and the experiments as its data."
    library = [p for p in (root / "unpaired_kd").rglob("*") if p.suffix == ".py"]
    data = [p for p in (root / HOME).iterdir() if p.suffix in (".ipynb", ".yaml")]
    names = {p.relative_to(root).as_posix().replace(HOME, PACKED) for p in [*library, *data]}
    return names - NOT_PACKED | {"unpaired_kd/py.typed"}


def compare_wheel(wheel, expected):
    "Complaints if the wheel holds less or more than is expected, its description apart."
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    lacking = [f"the wheel lacks {n}" for n in sorted(expected - names)]
    return lacking + [f"the wheel has a stray {n}" for n in sorted(names - expected)]


def compare_sdist(sdist):
    "Complaints if the sdist lacks a file that git knows; none where there is no git."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    known = {n for n in done.stdout.split("\0") if n and os.path.lexists(ROOT / n)}
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    return [f"the sdist lacks {n}" for n in sorted(known - names)]


def describe(wheel):
    "Complaints about what the package index would refuse, or show wrongly."
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name)
    try:
        data = Metadata.from_email(text, validate=True)
    except ExceptionGroup as group:
        return [f"metadata: {e}" for e in group.exceptions]
    if data.description_content_type != "text/markdown":
        return ["metadata: the description is not Markdown"]
    prose = re.sub(r"^```.*?^```", "", data.description, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)", prose)
    relative = [t for t in targets if not re.match(r"https?://|#|mailto:", t)]
    return [f"metadata: the link {t} leads nowhere on the package index" for t in relative]


def install(wheel, place):
    "Make an environment with the wheel in it. Returns the folder of its programs."
    call([sys.executable, "-m", "venv", "--without-pip", place], ROOT)
    base = {"base": str(place), "platbase": str(place)}
    programs = Path(sysconfig.get_path("scripts", vars=base))
    # searched, but no site folder: .pth files there, as of an editable unpaired_kd, are not read
    borrowed = Path(sysconfig.get_path("purelib", vars=base)) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet"]
    call([*pip, "--no-deps", "--no-index", wheel], ROOT)
    return programs


def check_alone(programs, place, env):
    "Complaints if another package than the installed one is imported, or could be."
    where, *path = call([programs / "python", "-c", ALONE], place, env).splitlines()
    outside = [Path(p) for p in path if p and not Path(p).is_relative_to(place)]
    found = [f"{p} is searched for modules" for p in outside if (p / "unpaired_kd").exists()]
    if not Path(where).is_relative_to(place):
        found.append(f"{where} is imported, not the installed package")
    return found


def options(values):
    "Parameters as `-p name value` of the command line."
    for name, value in values.items():
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        yield from ("-p", name, value if isinstance(value, str) else text)


def draw(path):
    "A grey picture with two blobs."
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:70, :90]
    first = np.exp(-((y - 30) ** 2 + (x - 25) ** 2) / 60)
    second = np.exp(-((y - 45) ** 2 + (x - 65) ** 2) / 90)
    Image.fromarray((30 + 200 * (first + second).clip(0, 1)).astype("uint8")).save(path)


def use(programs, folder, env):
    "The four commands and the library, in an empty folder. Returns complaints."
    small = yaml.safe_load((ROOT / HOME / "dry.yaml").read_text())
    ukd = programs / "ukd"
    said = call([ukd, "run", "no_such_experiment"], folder, env, status=2)
    names = sorted(p.stem for p in (ROOT / HOME).glob("*.ipynb"))
    found = [f"`ukd run` does not know {n}" for n in names if not re.search(rf"\b{n}\b", said)]

    call([ukd, "run", "lotus", "--out", "runs/lotus", *options(small["lotus"])], folder, env)
    row = {k: v for k, v in small["lotus_ablation"].items() if k != "seeds"}  # which the grid sets
    grid = ["lotus_ablation", "--rows", "seeds=[0]", "--workers", "1", "--out", "runs/sweep"]
    call([ukd, "sweep", *grid, *options(row)], folder, env)
    draw(folder / "image.png")
    files = ["runs/lotus/student", "image.png", "labels.png"]
    call([ukd, "predict", *files], folder, env)
    call([programs / "python", "-c", SAME, *files], folder, env)
    table = call([ukd, "report", "runs/lotus"], folder, env)

    if "distilled" not in table:
        found.append(f"`ukd report` printed no table:\n{table[-1000:]}")
    for name in ("lotus/metrics.csv", "lotus/notebook.ipynb", "sweep/results.csv"):
        if not (folder / "runs" / name).exists():
            found.append(f"runs/{name} was not written")
    left = {p.name for p in folder.iterdir()} - {"runs", "image.png", "labels.png"}
    return found + [f"{n} was left in the folder" for n in sorted(left)]


def main(keep=None):
    start = time.time()
    env = {k: v for k, v in os.environ.items() if k not in UNSEEN}
    with tempfile.TemporaryDirectory(prefix="gate_") as folder:
        place = Path(folder).resolve()
        try:
            sdist, wheel = build(Path(keep).resolve() if keep else place / "dist")
            found = compare_wheel(wheel, packed()) + compare_sdist(sdist) + describe(wheel)
            programs = install(wheel, place / "installed")
            found += check_alone(programs, place / "installed", env)
            (place / "empty").mkdir()
            found += use(programs, place / "empty", env)
        except Failed as e:
            finish("wheel", [str(e)], "not finished", start)
        size = f"{wheel.stat().st_size / 1e6:.1f} MB"
    finish("wheel", found, f"{size}, built from the sdist, used without the source tree", start)


if __name__ == "__main__":
    main(*sys.argv[1:])
