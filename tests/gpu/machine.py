"""What this machine has: packages, device, versions."""

import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "numpy", "scipy", "fastcore", "tqdm", "accelerate", "safetensors")
NAMED = (*NEEDED, "monai", "pytest", "tifffile")  # versions that the record names


def missing(
    names,  # modules
) -> list:  # those that cannot be imported
    "Looked for, not imported."
    return [n for n in names if find_spec(n) is None]


def unpacked(
    folder,  # of wheels, or of packages as they are
    into,  # where wheels are installed
) -> Path:  # folder for the path
    "Make carried packages importable, without a network. `SystemExit` names what pip says."
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"UKD_WHEELS={folder} is not a folder.")
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return folder.resolve()
    options = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(into), *wheels],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"UKD_WHEELS={folder}: {done.stderr.strip()}")
    return Path(into)


def prepare(
    wheels: str,  # value of UKD_WHEELS; "": nothing is carried
) -> str:  # folder to remove at the end, or ""
    "Put the checkout and carried packages on the path, for this process and those it starts."
    scratch = ""
    paths = [str(ROOT)]
    if wheels:
        scratch = tempfile.mkdtemp()
        paths.append(str(unpacked(wheels, scratch)))
    sys.path[1:1] = paths
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])
    return scratch


def output(
    *command,  # program and arguments
) -> str | None:  # what it prints; None if it cannot be asked
    "Ask another program."
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def installed(
    name: str,  # of a distribution
) -> str | None:  # its version
    "The version of a package, if it is here."
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device() -> dict:  # plain data
    "The accelerator, as torch sees it; the processor if there is none."
    import torch

    if not torch.cuda.is_available():
        return dict(
            type="cpu",
            name=platform.processor() or platform.machine(),
            count=0,
            memory_mb=None,
            capability=None,
            driver=None,
        )
    one = torch.cuda.get_device_properties(0)
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return dict(
        type="cuda",
        name=one.name,
        count=torch.cuda.device_count(),
        memory_mb=round(one.total_memory / 1e6),
        capability=f"{one.major}.{one.minor}",
        driver=driver and driver.splitlines()[0],
    )


def versions() -> dict:  # name -> version, None: not here
    "Python, what torch was built with, and packages."
    import torch

    return dict(
        python=platform.python_version(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        **{n: installed(n) for n in NAMED},
    )


def source() -> dict:  # commit, and whether files differ from it
    "Which code this is. Without git or its folder: unknown."
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    commit = output("git", "rev-parse", "HEAD")
    return dict(commit=commit, changed=None if commit is None else bool(changed))
