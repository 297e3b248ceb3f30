"""The same answer on the device as on the CPU, the tests that need a device, and two processes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from machine import ROOT
from timed import OutOfTime

from unpaired_kd.core import rng, seeded
from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.networks.unet import UNet
from unpaired_kd.networks.volumes import LightUNet

LEAST_EQUAL = 0.999  # share of equal pixels that is demanded in float32


def settled(
    make: Callable,  # () -> network
    shape: tuple,  # of a batch (B,C,*s)
):
    "A network with random weights and the BatchNorm statistics of noise."
    with seeded(0, "student"):
        net = make().train()
        for m in net.modules():
            m.momentum = 1.0
        with torch.no_grad():
            net(torch.rand(shape))
    return net.eval()


def equal_share(
    net,  # a network
    recipe: Recipe,  # its recipe
    image,  # raw array
    device: str,  # cpu | cuda
    precision: str = "fp32",  # on the device
) -> float:  # share of equal pixels
    "How much of the device's label map is the CPU's."
    here = Student(net.cpu(), recipe).predict(image)
    there = Student(net.to(device), recipe, precision).predict(image)
    return float((here == there).mean())


def students(
    small: bool,  # for a test
):  # yields (name, network, recipe, image)
    "A student of images and one of volumes, and what they are to segment."
    side, cube = (64, 16) if small else (1024, 96)
    classes = ("background", "a", "b")
    net = settled(lambda: UNet(3, 3, 4 if small else 16), (2, 3, 64, 64))
    image = rng(0, "image").integers(0, 256, (side, side, 3), np.uint8)
    yield "image", net, Recipe(channels=3, classes=classes, patch=64 if small else 512), image
    net = settled(lambda: LightUNet(1, 3, 2 if small else 8), (2, 1, 16, 16, 16))
    volume = rng(0, "volume").integers(0, 256, (cube, cube, cube), np.uint8)
    yield "volume", net, Recipe(in_channels=1, dims=3, patch=cube, classes=classes), volume


def without_tf32(
    f,
    *args,  # a function and its arguments
):  # what it returns
    "Convolutions in full float32, as on the CPU, while the function runs."
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return f(*args)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def prediction(
    say: Callable,
    device: str,
    small: bool,
    until: float,  # see `speed.variation`
):
    "The label maps of device and CPU. `AssertionError` if they differ in float32."
    for name, net, recipe, image in students(small):
        begin = time.perf_counter()
        share = without_tf32(equal_share, net, recipe, image, device)
        found = {
            "equal_fp32": share,
            "equal_as_found": equal_share(net, recipe, image, device),
            "equal_bf16": equal_share(net, recipe, image, device, "bf16"),
        }
        fine = share >= LEAST_EQUAL
        say(
            stage=name,
            status="ok" if fine else "failed",
            detail=found,
            seconds=time.perf_counter() - begin,
            error="" if fine else f"only {share:.4%} of the pixels are the CPU's",
        )
        if time.monotonic() > until:
            raise OutOfTime


def finished(
    command: list,  # program and arguments
    until: float,  # end of the time
    **more,  # environment
) -> tuple:  # exit code, standard output, standard error
    "Run another program. At the end of the time it is killed with all it started: `OutOfTime`."
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
        start_new_session=True,
    )
    try:
        shown, errors = process.communicate(timeout=max(1, until - time.monotonic()))
    except subprocess.TimeoutExpired as e:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise OutOfTime from e
    return process.returncode, shown, errors


def marked(
    few: bool,  # one is enough
) -> list:  # paths
    "The test files that name the marker `gpu`."
    found = [
        str(p)
        for p in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in p.read_text(encoding="utf-8")
    ]
    return found[:1] if few else found


def outcomes(
    report,  # JUnit's XML, of pytest
) -> tuple:  # ({outcome: number}, messages of what failed)
    "Count what happened to the tests."
    counts = dict(passed=0, failed=0, skipped=0)
    said = []
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [c for c in case if c.tag in ("failure", "error")]
        if wrong:
            counts["failed"] += 1
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
        messages = [c.get("message") for c in wrong if c.get("message")]
        said += [f"{case.get('name')}: {m.splitlines()[0][:200]}" for m in messages]
    return counts, said


def pytest_gpu(
    say: Callable,
    device: str,
    small: bool,
    until: float,  # see `speed.variation`
):
    "The tests marked `gpu`. A file whose imports are not here counts as failed."
    import_module("pytest")  # so that its absence is said
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            f"--junitxml={report}",
            *marked(small),
        ]
        code, shown, _ = finished(command, until)
        assert report.exists(), f"pytest ended with {code}: {shown[-500:]}"
        counts, said = outcomes(report)
    if said:
        print(shown[-8000:], file=sys.stderr)
    say(status="failed" if counts["failed"] else "ok", detail=counts, error="; ".join(said))


def two_processes(
    say: Callable,
    device: str,
    small: bool,
    until: float,  # see `speed.variation`
):
    """LOTUS and VpbSD on two devices (small: two processes). `AssertionError` unless both
    end with the same weights."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        say(status="left out", error="this machine has one device")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            "2",
            str(Path(__file__).with_name("pair.py")),
            folder,
            *(["--small"] if small else []),
        ]
        more = {} if device == "cuda" else {"ACCELERATE_USE_CPU": "true"}
        code, _, errors = finished(command, until, **more)
        if code:
            print(errors[-8000:], file=sys.stderr)
        assert code == 0, f"ended with {code}: {errors[-300:]}"
        first, second = (json.loads((Path(folder) / f"{k}.json").read_text()) for k in (0, 1))
    check_pair(first, second, device)
    for name, took in first["seconds_per_step"].items():
        say(stage=name, status="ok", seconds_per_step=took)


def check_pair(
    first: dict,  # what one process has found
    second: dict,  # what the other one has
    device: str,  # cpu | cuda
):
    "`AssertionError` unless two processes trained together and ended with the same weights."
    assert first["processes"] == second["processes"] == 2, "the processes did not find each other"
    assert first["device"] != second["device"] or device == "cpu", "both took the same device"
    for name, digest in first["weights"].items():
        assert digest == second["weights"][name], f"{name}: the two ended with other weights"
