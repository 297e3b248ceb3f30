"""The rows of the experiment `speed` that have a meaning on a device, timed there."""

import ast
import contextlib
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import ROOT
from timed import OutOfTime, peak_mb, release, synchronise

from unpaired_kd.core import seeded, torch_rng
from unpaired_kd.distillation.variation import variation_map
from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.methods.single import Single
from unpaired_kd.networks.volumes import LightUNet
from unpaired_kd.training.settings import Settings

NOTEBOOK = ROOT / "nbs" / "experiments" / "speed.ipynb"


def is_constant(
    node,  # of a syntax tree
) -> bool:  # True for `NAME = value`
    "An assignment to names in capital letters."
    return isinstance(node, ast.Assign) and all(
        isinstance(t, ast.Name) and t.id.isupper() for t in node.targets
    )


def notebook_names(
    path,  # a notebook
) -> dict:  # name -> object
    "Functions, classes and constants of a notebook. Imports that fail here leave a name out."
    space = {"__name__": Path(path).stem}
    for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.parse("".join(cell["source"])).body:
            code = compile(ast.Module([node], []), str(path), "exec")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                with contextlib.suppress(ImportError):
                    exec(code, space)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) or is_constant(node):
                exec(code, space)
    return space


def measured_here(
    device: str,  # cpu | cuda
) -> dict:  # name -> object
    "What the notebook `speed` measures with, its learner on this device."
    space = notebook_names(NOTEBOOK)

    def settings(**k):
        "Settings of the learner on this device."
        return Settings(**{**k, "device": device})

    space["Settings"] = settings
    return space


def seconds(
    step: Callable,  # without arguments
    rounds: int,  # timed calls
    until: float,  # end of the time, as `time.monotonic` counts
) -> float:  # of a call, median
    "Time a function; the first two calls warm up. Raises `OutOfTime`."
    times = []
    for _ in range(2 + rounds):
        if time.monotonic() > until:
            raise OutOfTime
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def alone(
    step: Callable,  # as `seconds`
    rounds: int,
    until: float,
) -> tuple:  # seconds of a call, peak memory in MB
    "Time a function and look at its memory."
    release()
    took = seconds(step, rounds, until)
    return took, peak_mb()


def compared(
    say: Callable,  # called with the record
    what: str,  # our way
    usual: Callable,  # the usual way
    ours: Callable,  # our way
    rounds: int,
    until: float,
    images: int,  # in a call
    peer: str,  # whose way `usual` is
):
    "Time two ways; say how many times faster ours is."
    slow, slow_mb = alone(usual, rounds, until)
    fast, fast_mb = alone(ours, rounds, until)
    say(
        stage=what,
        status="ok",
        seconds_per_step=fast,
        images_per_second=images / fast,
        peak_mb=fast_mb,
        detail={"peer": peer, "peer_seconds": slow, "peer_mb": slow_mb, "ratio": slow / fast},
    )


def close(a, b, share=1e-3):
    "`AssertionError` unless two results agree to a share of the largest value."
    a, b = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (a, b))
    assert (a - b).abs().max() <= share * b.abs().max(), "the two ways differ"


def variation(
    say: Callable,  # called with each record
    device: str,  # cpu | cuda
    small: bool,  # for a test
    until: float,  # end of the time
):
    "The variation map, forward and backward, against the notebook's map of centres."
    usual = notebook_names(NOTEBOOK)["centre_map"]
    side = 32 if small else 512
    f = torch.randn(1, 64, side, side, generator=torch_rng(0, "f")).to(device).requires_grad_()
    w = torch.randn(1, side, side, generator=torch_rng(0, "w")).to(device)
    for classes in (2, 8):
        y = torch.randint(classes, w.shape, generator=torch_rng(0, "y")).to(device)

        def gradient(way, y=y, classes=classes):
            return torch.autograd.grad((way(f, y, classes) * w).sum(), f)[0]

        close(gradient(variation_map), gradient(usual))
        compared(
            say,
            f"variation map, {classes} classes, {side}²",
            partial(gradient, usual),
            partial(gradient, variation_map),
            2 if small else 20,
            until,
            1,
            "map of centres",
        )


def placed(
    method,  # a `Method`
    device: str,  # cpu | cuda
):
    "The method, its networks on the device."
    for net in (*method.networks.values(), *method.frozen.values()):
        net.to(device)
    return method


def steps(
    say: Callable,
    device: str,
    small: bool,
    until: float,  # as `variation`
):
    "A step of LOTUS against the notebook's naive script, and against the student alone."
    here = measured_here(device)
    task = here["Task"](small)
    rounds = 2 if small else 20
    batch = {k: b.to(device) for k, b in task.batch.items()}
    ours = here["library_step"]
    same = here["SAME"]
    images = len(batch["student"])
    plain = here["naive_step"](placed(task.lotus(**same), device), batch)
    step = ours(task.lotus(**same), batch)
    close(step(), plain(), 0.05)
    compared(
        say, f"LOTUS step, {task.name}", plain, step, rounds, until, images, "naive script, fp32"
    )
    alone_step = ours(Single(copy.deepcopy(task.student)), batch)
    compared(
        say,
        f"distillation step, {task.name}",
        alone_step,
        ours(task.lotus(), batch),
        rounds,
        until,
        images,
        "student alone",
    )


def sliding(
    say: Callable,
    device: str,
    small: bool,
    until: float,  # as `variation`
):
    "A volume in blocks, from file to file."
    import tifffile

    from unpaired_kd.inference.volumes import predict_volume

    side = 32 if small else 256
    with seeded(0, "light"):
        net = LightUNet(width=2 if small else 8).to(device).eval()
    raw = (torch.rand(side, side, side, generator=torch_rng(0, "volume")) * 255).byte().numpy()
    recipe = Recipe(in_channels=1, dims=3, patch=96, classes=("background", "vessel"))
    for precision in ("fp32", "bf16"):
        student = Student(net, recipe, precision)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "volume.tif"
            tifffile.imwrite(source, raw)

            out = Path(folder) / "out.tif"
            how = dict(device=device, spacing=1, overwrite=True)
            job = partial(predict_volume, student, source, out, **how)
            took, most = alone(job, 1 if small else 3, until)
        say(
            stage=f"volume in blocks, {side}³",
            precision=precision,
            status="ok",
            peak_mb=most,
            seconds_per_step=took,
            images_per_second=1 / took,
            detail={"voxels_per_second": raw.size / took},
        )
