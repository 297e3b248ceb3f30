"""Does the project run on this machine's accelerator, and how fast? `make gpu`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import machine

HERE = Path(__file__).resolve().parent
LEAST = 0.1  # losses below this are compared as if they were as large
FAR = 0.25  # bfloat16's first losses may differ from float32's by this share
GRACE = 15  # s: so long before the end a step is stopped; at the end its process is
SPOILED = 3  # exit code of a process that said all it can: another goes on


def relative_differences(
    losses: dict,  # term -> value
    full: dict,  # term -> value in float32
) -> dict:  # term -> difference as a share of the value in float32
    "Of the terms that both have."
    both = {k: full[k] for k in losses if k in full}
    return {k: abs(losses[k] - v) / max(abs(v), LEAST) for k, v in both.items()}


def differences(
    records: list,  # all records, in their order
):
    "Fill in how far the first losses in bfloat16 are from those in float32; far ones fail."
    full = {}
    for r in records:
        r["difference"] = None
        if not r["fresh"]:
            continue
        key = r["name"].rsplit(" ", 1)[0], r["stage"]
        if r["precision"] == "fp32":
            full[key] = r["first_losses"]
        elif key in full:
            away = relative_differences(r["first_losses"], full[key])
            r["difference"] = max(away.values(), default=None)
            far = [k for k, v in away.items() if v > FAR]
            if far:
                r.update(status="failed", error=f"far from float32: {', '.join(far)}")


class Collected:
    "Records of the working processes so far."

    def __init__(
        self,
        names: list,  # of the steps: (name, kind)
        fields,  # names of a record's fields
        keep,  # called with the list of records after each
    ):
        self.names = names
        self.fields = fields
        self.keep = keep
        self.records = []
        self.now = None
        self.next = 0  # number of the step that runs; of the one after it

    def add(
        self,
        what: str,  # begin | end | record
        value,  # see `work.send`
    ):
        "A message of the working process."
        if what == "record":
            self.records.append(value)
            self.keep(self.records)
        elif what == "begin":
            self.now = value
            self.next = value + 1
        else:
            self.now = None

    def lost(
        self,
        status: str,  # failed | left out
        why: str,  # one line
    ):
        "The step that ran, or else the next one, came to no end."
        at = self.next if self.now is None else self.now
        if at >= len(self.names):
            return
        name, kind = self.names[at]
        self.now = None
        self.next = at + 1
        self.add(
            "record",
            {
                **dict.fromkeys(self.fields),
                "name": name,
                "kind": kind,
                "status": status,
                "error": why,
            },
        )


def run_once(
    command: list,  # the working process; the number of its first step is added
    collected: Collected,  # where its messages go
    until: float,  # end of the time, as `time.monotonic` counts
    mark: str,  # that begins its messages
) -> int:  # exit code
    "Start a process and listen until it ends; other lines go to standard error."
    process = subprocess.Popen(
        [*command, "--first", str(collected.next)], stdout=subprocess.PIPE, text=True
    )
    clock = threading.Timer(max(0, until - time.monotonic()) + GRACE - 1, process.kill)
    clock.start()
    try:
        for line in process.stdout:
            other, found, message = line.partition(mark)
            if found:
                collected.add(*json.loads(message))
            if other:
                print(other, end="", file=sys.stderr)
    finally:
        clock.cancel()
    return process.wait()


def run_all(
    command: list,  # as in `run_once`
    collected: Collected,  # as in `run_once`
    until: float,
    mark: str,  # as in `run_once`
):
    "Start processes until every step has a record. One that dies loses its own step, no other."
    while collected.next < len(collected.names):
        if time.monotonic() > until:
            collected.lost("left out", "the time was over")
            continue
        code = run_once(command, collected, until, mark)
        over = time.monotonic() > until
        within = collected.now is not None  # it was in the middle of a step
        if over and within:
            collected.lost("left out", "stopped: the time was over")
        elif not over and (within or code not in (0, SPOILED)):
            collected.lost("failed", f"the process ended with {code}")


def table(
    records: list,  # all records
) -> str:  # lines
    "Name, status, and what was measured."
    rows = []
    for r in records:
        name = f"{r['name']}, {r['stage']}" if r["stage"] else r["name"]
        step = r["seconds_per_step"]
        peak = r["peak_mb"]
        away = r["difference"]
        cells = [
            f"{name:52s}",
            f"{r['status']:8s}",
            f"{1e3 * step:10.1f} ms" if step else " " * 13,
            f"{peak:9.0f} MB" if peak else " " * 12,
            "" if away is None else f"{away:.1%} from fp32",
            r["error"],
        ]
        rows.append(" ".join(cells).rstrip())
    return "\n".join(rows)


def arguments(argv=None):
    "The command line."
    p = argparse.ArgumentParser(prog="tests/gpu", description=__doc__)
    p.add_argument("--small", action="store_true", help="tiny sizes, on the CPU: does it all run?")
    p.add_argument("--out", default="runs/gpu.json", help="where the record goes")
    p.add_argument("--seconds", type=float, default=360, help="time for everything, s")
    # a working process: its first step, and the end of its time
    p.add_argument("--first", type=int, help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def absent(
    names,  # modules
) -> str:  # one line
    "What to do about modules that are not here."
    return (
        f"missing here: {', '.join(names)}. Install them, or carry them: "
        '"On a GPU" in CONTRIBUTING.md says how.'
    )


def refused(
    small: bool,  # no device is needed
) -> str:  # why nothing can be run; "": it can
    "Look before the first step."
    names = machine.missing(machine.NEEDED)
    if names:
        return absent(names)
    import torch

    if not small and not torch.cuda.is_available():
        return "there is no accelerator that torch can use. --small runs the same on the CPU, tiny."
    return ""


def whole(
    args,  # the command line
    begin: float,  # as `time.monotonic` counts
    end: float,  # of the time
) -> int:  # exit code
    "Run everything and write the record; 1 if a step failed."
    try:
        import work
    except ModuleNotFoundError as e:
        raise SystemExit(absent([e.name])) from e
    head = dict(
        format=1,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        small=args.small,
        budget_seconds=args.seconds,
        device=machine.device(),
        versions=machine.versions(),
        **machine.source(),
    )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep(records):
        took = round(time.monotonic() - begin, 1)
        text = json.dumps({**head, "seconds": took, "steps": records}, indent=1, ensure_ascii=False)
        part = out.with_name(out.name + ".part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, out)
        print(f"{took:6.1f} s  {records[-1]['name']}  {records[-1]['status']}", file=sys.stderr)

    collected = Collected([(s.name, s.kind) for s in work.all_steps(args.small)], work.FIELDS, keep)
    command = [sys.executable, str(HERE), "--until", str(end), *["--small"] * args.small]
    run_all(command, collected, end, work.MARK)
    differences(collected.records)
    keep(collected.records)
    failed = sum(r["status"] == "failed" for r in collected.records)
    print(
        f"{head['device']['name']}, torch {head['versions']['torch']}\n{table(collected.records)}"
    )
    print(f"{len(collected.records)} rows, {failed} failed; {out}")
    return int(failed > 0)


def main():
    "One call: the program itself, or one of its working processes."
    begin = time.monotonic()
    args = arguments()
    if args.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.first is not None:
        sys.path.insert(1, str(machine.ROOT))
        import work

        return work.work(args.first, args.small, args.until)
    scratch = machine.prepare(os.environ.get("UKD_WHEELS", ""))
    try:
        why = refused(args.small)
        if why:
            raise SystemExit(why)
        return whole(args, begin, begin + args.seconds - GRACE)
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
