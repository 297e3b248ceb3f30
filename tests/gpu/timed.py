"""Train a method for a few steps through the project's learner, and time them."""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import Blocks, Case, train_case

from unpaired_kd.training.learner import Learner
from unpaired_kd.training.settings import Settings

FIXED = 10**9  # the learner asks for its fixed batches from this number on


class OutOfTime(Exception):
    "The time of this step is over."


def synchronise():
    "Wait until the device has done all it was asked for."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release():
    "Give memory back, so that the next step starts with all of it."
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mb() -> float | None:  # MB; None on the CPU
    "The most memory that tensors took since the last `release` or `peak_mb`."
    if not torch.cuda.is_available():
        return None
    most = torch.cuda.max_memory_allocated() / 1e6
    torch.cuda.reset_peak_memory_stats()
    return round(most, 1)


@dataclass(frozen=True)
class Plan:
    "How long to train, and on what."

    device: str  # cpu | cuda
    precision: str  # fp32 | bf16
    warm: int = 3  # untimed steps
    steps: int = 10  # timed steps
    until: float = math.inf  # end of the time, as `time.monotonic` counts
    rate: float = 1e-4  # learning rate


class Stopwatch:
    "A source of batches that notes when each is asked for: when the step before it is done."

    def __init__(
        self,
        data,  # has `.batch(step, names, rank)`
        until: float,  # when to stop, as `time.monotonic` counts
    ):
        self.data = data
        self.until = until
        self.marks = []

    def batch(self, step, names=None, rank=0):
        "The batch of `data`. Raises `OutOfTime`."
        if step < FIXED:
            if time.monotonic() > self.until:
                raise OutOfTime
            synchronise()
            self.marks.append(time.perf_counter())
        return self.data.batch(step, names, rank)

    def seconds(
        self,
        warm: int,  # steps that do not count
    ) -> float | None:  # of a step, median; None if none was timed
        "The time from batch to batch. Forgets the marks."
        marks = self.marks[warm:]
        self.marks = []
        gaps = [b - a for a, b in zip(marks, marks[1:])]
        return statistics.median(gaps) if gaps else None


def noted(
    losses: Callable,  # of an update: (batch, noise) -> {term: function}
    first: dict,  # term -> value when it was first computed; filled in
) -> Callable:  # the same
    "Losses that leave their first values in `first`."

    def keep(term, compute):
        value = compute()
        first.setdefault(term, value.detach())
        return value

    def listed(batch, noise):
        return {k: (lambda k=k, f=f: keep(k, f)) for k, f in losses(batch, noise).items()}

    return listed


def copies(
    method,  # a `Method`
) -> dict:  # network -> its parameters, on the CPU
    "What the networks weigh now."
    return {
        name: [p.detach().cpu().clone() for p in net.parameters()]
        for name, net in method.networks.items()
    }


def has_moved(
    before: list,  # of tensors
    now: list,  # the same after training
) -> bool:  # whether some changed, and all are finite
    "Whether training did what it should to the parameters of a network."
    changed = any(not torch.equal(a, b) for a, b in zip(before, now))
    return changed and all(p.isfinite().all() for p in now)


def find_unmoved(
    before: dict,  # from `copies`
    learner,  # after training
) -> list:  # names of networks
    "Networks that some update may change and whose parameters are all as before, or not finite."
    updates = [update for stage in learner.stages for update in stage.updates]
    may = {name for update in updates for name in update.changes}
    now = {name: p for name, p in copies(learner.method).items() if name in may and p}
    return [name for name, p in now.items() if not has_moved(before[name], p)]


def learner_of(
    method,  # a `Method`
    data,  # batches
    folder,  # for its checkpoint
    plan: Plan,  # how long, and on what
    tell: Callable = lambda row: None,  # called at the end of each stage
) -> Learner:
    "A learner that gives each stage one epoch."
    settings = Settings(
        epochs=len(method.stages()),
        steps=plan.warm + plan.steps + 1,
        lr=plan.rate,
        precision=plan.precision,
        device=plan.device,
        save_every=100,
        bars=False,
    )
    return Learner(method, data, folder, settings=settings, tell=tell)


class Training:
    "One method in training: a record for each of its stages."

    def __init__(
        self,
        case: Case,  # the method
        plan: Plan,  # how long, and on what
        say: Callable,  # called with each record
    ):
        self.case = case
        self.plan = plan
        self.say = say
        self.fresh = True
        self.watch = Stopwatch(Blocks(case.size, plan.device), plan.until)

    def __call__(
        self,
        method,  # a `Method`
    ):
        "Train it. Raises what the learner raises, `AssertionError` for weights that did not move."
        before = copies(method)
        self.first = {}
        with tempfile.TemporaryDirectory() as folder:
            learner = learner_of(method, self.watch, folder, self.plan, self.tell)
            for stage in learner.stages:
                stage.updates = [
                    replace(u, losses=noted(u.losses, self.first)) for u in stage.updates
                ]
            learner.fit()
            method.finish(lambda i: self.watch.batch(FIXED + i))
        still = find_unmoved(before, learner)
        assert not still, f"weights that should have moved did not: {', '.join(still)}"

    def tell(
        self,
        row: dict,  # of the history
    ):
        "A stage is over: say what it took."
        losses = {k: float(v) for k, v in self.first.items()}
        numbers = {k: v for k, v in {**losses, **row}.items() if isinstance(v, float)}
        odd = [k for k, v in numbers.items() if not math.isfinite(v)]
        assert not odd, f"not finite: {', '.join(odd)}"
        took = self.watch.seconds(self.plan.warm)
        self.say(
            stage=row["stage"],
            status="ok",
            seconds_per_step=took,
            peak_mb=peak_mb(),
            images_per_second=took and self.case.size.batch / took,
            first_losses=losses,
            fresh=self.fresh,
        )
        self.fresh = False
        self.first.clear()


def train(
    case: Case,  # the method
    plan: Plan,  # how long, and on what
    say: Callable,  # called with each record
):
    "Train a method and the teacher it needs for a few steps. Raises `OutOfTime`."
    train_case(case, Training(case, plan, say))
