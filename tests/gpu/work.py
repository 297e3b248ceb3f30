"""The steps, one after another in one process; where it dies, the main program starts another."""

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import checks
import speed
import torch
from cases import cases
from timed import OutOfTime, Plan, release, train

from unpaired_kd.core import supports_bf16

MARK = "\x1eGPU "  # begins each line that is for the main program
SPOILED = 3  # exit code: the device answers no more in this process
FIELDS = (
    "name",
    "kind",
    "method",
    "preset",
    "stage",
    "precision",
    "status",
    "seconds",
    "seconds_per_step",
    "images_per_second",
    "peak_mb",
    "first_losses",
    "fresh",
    "detail",
    "error",
)
LIMITS = dict(training=40, prediction=60, tests=150, speed=60, processes=60)  # s, of one step


@dataclass(frozen=True)
class Step:
    "Something to run, which may fail alone."

    name: str  # unique
    kind: str  # a key of `LIMITS`
    run: Callable  # (say, device, small, until)
    known: dict  # fields of its records that are settled


def training_steps(
    small: bool,  # sizes for a test
) -> list:  # of `Step`s
    "Every method in float32 and in bfloat16."
    found = []
    for case in cases(small):
        for precision in ("fp32", "bf16"):

            def run(say, device, small, until, case=case, precision=precision):
                length = (0, 1) if small else (3, 10)
                train(case, Plan(device, precision, *length, until), say)

            known = dict(method=case.method, preset=case.preset, precision=precision)
            found.append(Step(f"{case.name} {precision}", "training", run, known))
    return found


def all_steps(
    small: bool,  # sizes for a test
) -> list:  # of `Step`s
    "Everything, in its order: what is left out for want of time is at the end."
    return [
        Step("prediction", "prediction", checks.prediction, {}),
        *training_steps(small),
        Step("tests marked gpu", "tests", checks.pytest_gpu, {}),
        Step("variation map", "speed", speed.variation, {}),
        Step("steps", "speed", speed.steps, {}),
        Step("sliding inference", "speed", speed.sliding, {}),
        Step("two processes", "processes", checks.two_processes, {}),
    ]


def record(
    step: Step,  # what it is about
    **found,  # fields
) -> dict:  # all fields; None where there is nothing to say
    "One row of the result."
    return {
        **dict.fromkeys(FIELDS),
        "error": "",
        "name": step.name,
        "kind": step.kind,
        **step.known,
        **found,
    }


def spoils(
    e,  # an exception
) -> bool:  # whether later steps would fail too
    "After such an error a process cannot use its device any more."
    return "CUDA error" in str(e) or type(e).__name__ == "AcceleratorError"


def what_happened(
    e,  # an exception
) -> tuple:  # status and message, one line
    "How a step ended that did not come to its end."
    if isinstance(e, OutOfTime):
        return "left out", "stopped: its time was over"
    if isinstance(e, ModuleNotFoundError):
        return "left out", f"needs {e.name}, which is not here"
    first = (str(e).strip() or "no message").splitlines()[0]
    return "failed", f"{type(e).__name__}: {first[:400]}"


def guarded(
    step: Step,  # to run
    tell: Callable,  # called with each record
    device: str,  # cpu | cuda
    small: bool,  # sizes for a test
    until: float,  # end of the time, as `time.monotonic` counts
) -> bool:  # False: this process is spoiled
    "Run a step; whatever happens becomes a record."
    said = []
    begin = time.monotonic()
    fine = True  # this process can go on

    def say(**found):
        said.append(record(step, **{"seconds": round(time.monotonic() - begin, 3), **found}))
        tell(said[-1])

    if begin > until:
        say(status="left out", error="the time was over")
        return fine
    release()
    try:
        step.run(say, device, small, min(until, begin + LIMITS[step.kind]))
        if not said:
            say(status="failed", error="it said nothing")
    except Exception as e:
        status, why = what_happened(e)
        if status == "failed":
            traceback.print_exc()
        say(status=status, error=why)
        fine = not spoils(e)
    if fine:
        release()
    return fine


def send(
    what: str,  # begin | end | record
    value,  # plain data
):
    "Tell the main program."
    print(MARK + json.dumps([what, value]), flush=True)


def work(
    first: int,  # number of the first step
    small: bool,  # sizes for a test
    until: float,  # end of the time, as `time.monotonic` counts
) -> int:  # exit code
    "Run the steps from this one on."
    warnings.filterwarnings("ignore", "stage .* ended at its cap")
    warnings.filterwarnings("ignore", "no weights of VGG19")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not supports_bf16(device):
        print("bf16 is emulated on this device", file=sys.stderr)
    for i, step in enumerate(all_steps(small)):
        if i < first:
            continue
        send("begin", i)
        fine = guarded(step, lambda found: send("record", found), device, small, until)
        send("end", i)
        if not fine:
            return SPOILED
    return 0
