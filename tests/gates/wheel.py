"""Gate: the package installs and works where the source tree is out of reach.

The sdist is built, the wheel from the sdist. The wheel goes into an environment of its own, which
borrows other people's packages from this one, and is used from an empty folder as a user would.
`python tests/gates/wheel.py FOLDER` leaves what was built in FOLDER.
"""
import os, re, subprocess, sys, sysconfig, tarfile, tempfile, time, zipfile
from pathlib import Path

import yaml
from packaging.metadata import Metadata

from house import ROOT, finish

NOT_PACKED = {"nbs/experiments/dry.yaml"}  # experiments hold it, only tests read it
ALONE = "import sys, unpaired_kd; print(unpaired_kd.__file__, *sys.path, sep='\\n')"
PREDICT = """
import sys, numpy as np
from PIL import Image
from unpaired_kd import Student
student, image, labels = sys.argv[1:]
found = Student.load(student).predict(image)
assert np.array_equal(found, np.asarray(Image.open(labels))), "unpaired_kd.Student and `ukd predict` differ"
"""


class Failed(Exception):
    "A step that ended with an error: its command and the end of what it printed."


def call(command, folder, env=None, status=0):
    "Run a command in `folder`; returns what it printed. Raises `Failed` if it leaves with another status."
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode == status: return done.stdout + done.stderr
    shown = " ".join(map(str, command[:6]))
    raise Failed(f"`{shown} ...` left with {done.returncode}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")


def build(out):
    "Build the sdist and, from it, the wheel, with the backend that is installed here. Returns both paths."
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], ROOT)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def packed(root=ROOT):
    "The files that the wheel must hold, from the tree: the library, and the experiments as its data."
    library = [p for p in (root / "unpaired_kd").rglob("*") if p.suffix == ".py" or p.name == "py.typed"]
    data = [p for p in (root / "nbs/experiments").iterdir() if p.suffix in (".ipynb", ".yaml")]
    names = {p.relative_to(root).as_posix() for p in [*library, *data]} - NOT_PACKED
    return {n.replace("nbs/experiments/", "unpaired_kd/experiments/") for n in names}


def compare_wheel(wheel, expected):
    "The wheel holds what is expected, and nothing else but its description. Returns complaints."
    with zipfile.ZipFile(wheel) as archive: names = set(archive.namelist())
    names = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    return [f"the wheel lacks {n}" for n in sorted(expected - names)] + [
        f"the wheel has {n}, which does not belong there" for n in sorted(names - expected)]


def compare_sdist(sdist):
    "The sdist holds every file that git knows. Returns complaints; none where there is no git."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    known = {n for n in done.stdout.split("\0") if n and os.path.lexists(ROOT / n)}
    with tarfile.open(sdist) as archive: names = {n.partition("/")[2] for n in archive.getnames()}
    return [f"the sdist lacks {n}" for n in sorted(known - names)]


def describe(wheel):
    "What the package index would refuse or show wrongly. Returns complaints."
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name)
    try: data = Metadata.from_email(text, validate=True)
    except ExceptionGroup as group: return [f"metadata: {e}" for e in group.exceptions]
    found = []
    if data.description_content_type != "text/markdown": found.append("metadata: the description is not Markdown")
    prose = re.sub(r"^```.*?^```", "", data.description, flags=re.M | re.S)
    relative = [t for t in re.findall(r"\]\(([^)\s]+)", prose) if not re.match(r"https?://|#|mailto:", t)]
    return found + [f"metadata: the link {t} leads nowhere on the package index" for t in relative]


def install(wheel, place):
    "A new environment with the wheel in it. Returns its folder of programs."
    call([sys.executable, "-m", "venv", "--without-pip", place], ROOT)
    bin = place / ("Scripts" if os.name == "nt" else "bin")
    # searched, but not a site folder: its own .pth files, such as that of an editable unpaired_kd, are not read
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", bin / "python", "install", "--quiet"]
    call([*pip, "--no-deps", "--no-index", wheel], ROOT)
    return bin


def alone(bin, place, env):
    "The environment's package is its own, and the tree is not in reach. Returns complaints."
    where, *path = call([bin / "python", "-c", ALONE], place, env).splitlines()
    found = [] if Path(where).is_relative_to(place) else [f"{where} is imported, not the installed package"]
    return found + [f"{p} is searched for modules" for p in path if p and (Path(p) / "unpaired_kd").exists()
                    and not Path(p).is_relative_to(place)]


def options(values):
    "Parameters as `-p name value` of the command line."
    for name, value in values.items():
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        yield from ("-p", name, text.removesuffix("...\n").strip())


def draw(path):
    "A grey picture with two blobs."
    import numpy as np
    from PIL import Image
    y, x = np.mgrid[:70, :90]
    blobs = np.exp(-((y - 30) ** 2 + (x - 25) ** 2) / 60) + np.exp(-((y - 45) ** 2 + (x - 65) ** 2) / 90)
    Image.fromarray((30 + 200 * blobs.clip(0, 1)).astype("uint8")).save(path)


def use(bin, folder, env):
    "The four commands and the library, from an empty folder. Returns complaints."
    small = yaml.safe_load((ROOT / "nbs/experiments/dry.yaml").read_text())
    small["lotus_ablation"].pop("seeds")  # the grid crosses them
    ukd = [bin / "ukd"]
    names = sorted(p.stem for p in (ROOT / "nbs/experiments").glob("*.ipynb"))
    said = call([*ukd, "run", "no_such_experiment"], folder, env, status=2)
    found = [f"`ukd run` does not know {n}" for n in names if not re.search(rf"\b{n}\b", said)]

    call([*ukd, "run", "lotus", "--out", "runs/lotus", *options(small["lotus"])], folder, env)
    call([*ukd, "sweep", "lotus_ablation", "--out", "runs/sweep", "--workers", "1", "--cells", "seeds=[[]0[]]",
          *options(small["lotus_ablation"])], folder, env)
    draw(folder / "image.png")
    call([*ukd, "predict", "runs/lotus/student", "image.png", "labels.png"], folder, env)
    call([bin / "python", "-c", PREDICT, "runs/lotus/student", "image.png", "labels.png"], folder, env)
    table = call([*ukd, "report", "runs/lotus"], folder, env)

    if "distilled" not in table: found.append(f"`ukd report` printed no table:\n{table[-1000:]}")
    for name in ("lotus/metrics.csv", "lotus/notebook.ipynb", "sweep/results.csv"):
        if not (folder / "runs" / name).exists(): found.append(f"runs/{name} was not written")
    here = {p.name for p in folder.iterdir()}
    return found + [f"{n} was left in the folder" for n in sorted(here - {"runs", "image.png", "labels.png"})]


def main(keep=None):
    start = time.time()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UKD_DEBUG")}
    with tempfile.TemporaryDirectory(prefix="gate_") as folder:
        place = Path(folder).resolve()
        try:
            sdist, wheel = build(Path(keep).resolve() if keep else place / "dist")
            found = compare_wheel(wheel, packed()) + compare_sdist(sdist) + describe(wheel)
            bin = install(wheel, place / "installed")
            found += alone(bin, place, env)
            (place / "empty").mkdir()
            found += use(bin, place / "empty", env)
        except Failed as e: finish("wheel", [str(e)], "not finished", start)
        size = f"{wheel.stat().st_size / 1e6:.1f} MB"
    finish("wheel", found, f"{size}, built from the sdist, used without the source tree", start)


if __name__ == "__main__": main(*sys.argv[1:])
