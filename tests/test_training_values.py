"""The rules of training by value: what a weight is after some steps, when a stage ends, who moves,
which epoch is kept, which statistics are measured again, what every field of `Settings` does."""

import math
import warnings
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from unpaired_kd import core
from unpaired_kd.core import InputError, resolve_precision, seeded, torch_rng
from unpaired_kd.training import learner as learner_module
from unpaired_kd.training.calibrate import recalibrate_batchnorm
from unpaired_kd.training.checkpoints import get_random_state, load_checkpoint, set_random_state
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.method import (
    Method,
    Stage,
    Update,
    merge_weights,
    set_modes,
    weighted_sum,
)
from unpaired_kd.training.processes import average_buffers, average_gradients
from unpaired_kd.training.rules import Improvements, NoBetter, NotSettled, Plateau
from unpaired_kd.training.settings import Settings, learning_rate, select_deciding
from unpaired_kd.training.validation import validate

START = {"a": (1.0, -2.0), "b": (0.5, 3.0)}
BETAS = {"a": (0.9, 0.999), "b": (0.5, 0.9)}
OWN_RATE = {"a": 1.0, "b": 0.25}


def quiet(**more):
    "Settings of a small run on the CPU."
    plain = dict(epochs=3, steps=4, lr=0.1, weight_decay=0.0, schedule="constant")
    return Settings(**{**plain, **more}, bars=False, device="cpu")


def numbers(step):
    "The batch of a step."
    return [math.sin(step + 1), math.cos(2 * step)]


class Data:
    "Batches of two numbers; the name of the batch and the process do not matter."

    def batch(self, step, names=None, rank=0):
        return {"student": torch.tensor(numbers(step), dtype=torch.float64)}


class Number(nn.Module):
    "A network whose only layer is two numbers."

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Products(Method):
    "Two networks whose product shall be the batch: in one update, or each in one of its own."

    adam = {"b": {"rate": OWN_RATE["b"], "betas": BETAS["b"]}}

    def __init__(self, joint=True, stages=None):
        self.networks = {"student": Number(START["a"]), "b": Number(START["b"])}
        self.weights = {"near": 1.0, "far": 0.5}
        self.joint = joint
        self.own_stages = stages
        self.log = []

    def near(self, batch, noise):
        self.log.append([p.requires_grad for n in self.networks.values() for p in n.parameters()])
        return {"near": lambda: self.square(batch, 1.0)}

    def far(self, batch, noise):
        return {"far": lambda: self.square(batch, 2.0)}

    def square(self, batch, factor):
        product = self.networks["student"].w * self.networks["b"].w
        return ((product - factor * batch["student"]) ** 2).sum()

    def updates(self):
        if self.joint:
            return [Update("both", ("student", "b"), self.near)]
        first = Update("first", ("student",), self.near, {"student": 2.0})
        return [first, Update("second", ("b",), self.far)]

    def stages(self):
        return self.own_stages(self) if self.own_stages else [Stage("train", self.updates())]


class HandAdam:
    "AdamW for a list of numbers, as its paper writes it: decay apart from the gradient."

    def __init__(self, betas):
        self.betas = betas
        self.n = 0
        self.m = [0.0, 0.0]
        self.v = [0.0, 0.0]

    def step(self, w, g, rate, decay):
        b1, b2 = self.betas
        self.n += 1
        out = []
        for i in range(2):
            self.m[i] = b1 * self.m[i] + (1 - b1) * g[i]
            self.v[i] = b2 * self.v[i] + (1 - b2) * g[i] ** 2
            m = self.m[i] / (1 - b1**self.n)
            v = self.v[i] / (1 - b2**self.n)
            out.append(w[i] - rate * decay * w[i] - rate * m / (math.sqrt(v) + 1e-8))
        return out


def slopes(w, batches, factor, weight):
    "Gradients of the mean of `weight * sum (a b - factor x)^2` over batches, for a and b."
    a, b = w["a"], w["b"]
    rest = [[a[i] * b[i] - factor * x[i] for i in range(2)] for x in batches]
    mean = [2 * weight * sum(r[i] for r in rest) / len(batches) for i in range(2)]
    return {"a": [mean[i] * b[i] for i in range(2)], "b": [mean[i] * a[i] for i in range(2)]}


def clipped(g, most):
    "Gradients of one update shortened together to the length `most`."
    length = math.sqrt(sum(x**2 for part in g.values() for x in part))
    factor = min(1.0, most / (length + 1e-6)) if most else 1.0
    return {n: [factor * x for x in part] for n, part in g.items()}


def rate_by_hand(s, step):
    if s.schedule == "constant":
        return s.lr
    return s.lr * (1 + math.cos(math.pi * step / (s.epochs * s.steps))) / 2


def train_by_hand(s, joint):
    "Both networks after all steps."
    w = {n: list(v) for n, v in START.items()}
    adam = {n: HandAdam(BETAS[n]) for n in w}
    for step in range(s.epochs * s.steps):
        first = s.accumulate * step
        batches = [numbers(first + j) for j in range(s.accumulate)]
        plan = [(("a", "b"), 1.0, 1.0)] if joint else [(("a",), 1.0, 1.0), (("b",), 2.0, 0.5)]
        for names, factor, weight in plan:
            g = slopes(w, batches, factor, weight)
            g = clipped({n: g[n] for n in names}, s.clip)
            for n in names:
                own = OWN_RATE[n] if joint or n == "b" else 2.0
                w[n] = adam[n].step(w[n], g[n], own * rate_by_hand(s, step), s.weight_decay)
    return w


def trained(folder, s, joint=True, **more):
    run = Learner(Products(joint), Data(), folder, settings=s, **more)
    run.fit()
    return run


def both_numbers(run):
    nets = run.method.networks
    return {"a": nets["student"].w.tolist(), "b": nets["b"].w.tolist()}


def check_steps(folder, s, joint=True):
    "The weights are those by hand; returns them."
    found = both_numbers(trained(folder, s, joint))
    for name, wanted in train_by_hand(s, joint).items():
        assert found[name] == pytest.approx(wanted, rel=1e-9), name
    return found


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(weight_decay=0.3),
        dict(schedule="cosine"),
        dict(clip=0.5),
        dict(schedule="cosine", weight_decay=0.1, clip=0.7, epochs=2, steps=5, lr=0.02),
    ],
)
def test_weights_after_some_steps_are_those_by_hand(tmp_path, changes, joint):
    check_steps(tmp_path, quiet(**changes), joint)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulated_gradients_are_a_mean_over_consecutive_batches(tmp_path, clip):
    check_steps(tmp_path, quiet(accumulate=3, clip=clip))


# --- every field of `Settings` ---


def check_changed(field, value):
    "A number that changes the weights to those by hand."

    def check(folder, monkeypatch):
        s = quiet(schedule="cosine")
        changed = replace(s, **{field: value})
        assert check_steps(folder / "as before", s) != check_steps(folder / "changed", changed)

    return check


def check_precision(folder, monkeypatch):
    seen = {}

    class Layer(Products):
        def near(self, batch, noise):
            layer = nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2))
            seen["kind"] = layer.dtype
            return super().near(batch, noise)

    table = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for word, kind in table.items():
        run = Learner(Layer(), Data(), folder / word, settings=quiet(precision=word, epochs=1))
        run.fit()
        assert run.precision == word and seen["kind"] == kind
        assert run.scaler.is_enabled() == (word == "fp16")
    for has, word in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(core, "supports_bf16", lambda device, has=has: has)
        run = Learner(Layer(), Data(), folder / f"auto {has}", settings=quiet(precision="auto"))
        assert run.precision == word


def check_device(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = Learner(Products(), Data(), folder, settings=quiet())
    assert run.device.type == "cpu"
    with pytest.raises(InputError, match="device='cuda'"):
        Learner(Products(), Data(), folder, settings=replace(quiet(), device="cuda"))


DICE = [0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1, 0.1]
LOSS = [9.0, 8.0, 7.0, 6.0, 5.0, 6.0, 6.0, 6.0]


def validated(folder, monkeypatch, **more):
    "A run whose validation gives the scores above."
    scores = iter(zip(DICE, LOSS))
    monkeypatch.setattr(learner_module, "validate", lambda net, batches: next(scores))
    return trained(folder, quiet(epochs=8, steps=1, **more), valid=[torch.zeros(1)])


def check_early_stop(folder, monkeypatch):
    for patience, epochs in {0: 8, 1: 3, 2: 4, 3: 5, 6: 8}.items():
        run = validated(folder / str(patience), monkeypatch, early_stop=patience)
        assert len(run.history) == epochs, patience


def check_stop_on(folder, monkeypatch):
    for word, epochs in {"dice": 4, "loss": 7}.items():
        run = validated(folder / word, monkeypatch, early_stop=2, stop_on=word)
        assert len(run.history) == epochs, word
        assert load_checkpoint(folder / word / "best.pt")["epoch"] == 1  # by Dice, the first of two


def check_save_every(folder, monkeypatch):
    for every, totals in {1: [1, 2, 3, 4, 5], 2: [2, 4, 5], 3: [3, 5], 7: [5]}.items():
        saved = []
        run = Learner(
            Products(), Data(), folder / str(every), settings=quiet(epochs=5, save_every=every)
        )
        save = run._save
        run._save = lambda saved=saved, run=run, save=save: (
            saved.append(run.position["total"]),
            save(),
        )
        run.fit()
        assert saved == totals
        assert load_checkpoint(folder / str(every) / "last.pt")["position"]["total"] == 5


def check_tensorboard(folder, monkeypatch):
    written = []
    monkeypatch.setattr(
        learner_module, "write_tensorboard", lambda where, rows: written.append((where, len(rows)))
    )
    trained(folder / "without", quiet(epochs=4))
    assert not written
    trained(folder / "with", quiet(epochs=4, save_every=2, tensorboard=True))
    assert written == [(folder / "with" / "tensorboard", 2)] * 2


def check_bars(folder, monkeypatch):
    asked = []
    bar = SimpleNamespace(update=lambda: None, set_postfix_str=asked.append, close=lambda: None)
    monkeypatch.setattr(learner_module, "make_progress_bar", lambda *a: asked.append(a) or bar)
    for shown in (False, True):
        asked.clear()
        s = replace(quiet(epochs=2), bars=shown)
        trained(folder / str(shown), s)
        assert asked[0] == (8, str(shown), 0, shown) and asked[-1].startswith("train near ")


EFFECTS = {
    "epochs": check_changed("epochs", 5),
    "steps": check_changed("steps", 7),
    "accumulate": check_changed("accumulate", 2),
    "lr": check_changed("lr", 0.03),
    "weight_decay": check_changed("weight_decay", 0.4),
    "schedule": check_changed("schedule", "constant"),
    "clip": check_changed("clip", 0.3),
    "precision": check_precision,
    "device": check_device,
    "early_stop": check_early_stop,
    "stop_on": check_stop_on,
    "save_every": check_save_every,
    "tensorboard": check_tensorboard,
    "bars": check_bars,
}


@pytest.mark.parametrize("field", [f.name for f in fields(Settings)])
def test_every_setting_changes_what_it_should(tmp_path, monkeypatch, field):
    EFFECTS[field](tmp_path, monkeypatch)


def test_the_settings_as_a_table():
    assert Settings() == Settings(
        epochs=10,
        steps=30,
        accumulate=1,
        lr=1e-3,
        weight_decay=1e-7,
        schedule="cosine",
        clip=0.0,
        precision="auto",
        device="auto",
        early_stop=0,
        stop_on="dice",
        save_every=1,
        tensorboard=False,
        bars=True,
    )
    result = "epochs steps accumulate lr weight_decay schedule clip early_stop stop_on"
    assert set(select_deciding(Settings())) == set(result.split())


# --- the learning rate ---


@pytest.mark.parametrize(
    "step, cosine", [(0, 0.1), (5, 0.0853553391), (10, 0.05), (15, 0.0146446609), (20, 0), (25, 0)]
)
def test_the_rate_at_given_steps(step, cosine):
    s = Settings(epochs=4, steps=5, lr=0.1)
    assert learning_rate(s, step) == pytest.approx(cosine, abs=1e-9)
    assert learning_rate(replace(s, schedule="constant"), step) == 0.1


def rates_used(folder, stages, s):
    "The rate of every step, read from the optimiser after it."
    method = Products(stages=stages)
    run = Learner(method, Data(), folder, settings=s)
    used = []
    move = run._move

    def moved(update, parameters):
        move(update, parameters)
        used.append(run.optimisers["student"].param_groups[0]["lr"])

    run._move = moved
    run.fit()
    return run, used


def test_a_stage_may_have_a_schedule_of_its_own(tmp_path):
    def two(method):
        return [
            Stage("one", method.updates(), epochs=1),
            Stage("two", method.updates(), anew=True),
        ]

    run, used = rates_used(tmp_path, two, quiet(epochs=3, steps=2, schedule="cosine"))
    whole = [0.05 * (1 + math.cos(math.pi * k / 6)) for k in (0, 1)]
    own = [0.05 * (1 + math.cos(math.pi * k / 4)) for k in (0, 1, 2, 3)]
    assert used == pytest.approx(whole + own)
    assert [r["lr"] for r in run.history] == pytest.approx([used[1], used[3], used[5]])
    assert run.optimisers["b"].state[run.method.networks["b"].w]["step"] == 4  # moments anew


def test_without_anew_stages_share_one_schedule_and_moments(tmp_path):
    def two(method):
        return [Stage("one", method.updates(), epochs=1), Stage("two", method.updates())]

    run, used = rates_used(tmp_path, two, quiet(epochs=3, steps=2, schedule="cosine"))
    assert used == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])
    assert run.optimisers["b"].state[run.method.networks["b"].w]["step"] == 6


# --- when a stage ends ---


@pytest.mark.parametrize(
    "rule, values, end",
    [
        (Plateau("x", 3, 0.25), [0, 0.5, 0.625, 0.5, 0.5], 3),
        (Plateau("x", 3, 0.25), [1, 0.75, 1, 0.75, 1], None),  # a range of delta is no plateau
        (Plateau("x", 3, 0.25, min_epochs=5), [1, 1, 1, 1, 1, 1], 4),
        (Plateau("x", 2, 0.25, min_epochs=4), [0, 0, 0, 9, 9], 4),
        (NoBetter("x", 2), [0.1, 0.3, 0.2, 0.3, 0.1], 3),  # as high is not higher
        (NoBetter("x", 2), [0.1, 0.2, 0.1, 0.3, 0.2], None),
        (NoBetter("x", 1), [3, 4, 5, 4, 6], 3),
        (Improvements("x", 2, 0.5), [0.4, 0.6, 0.6, 0.7, 0.8], 3),
        (Improvements("x", 3), [0, 0.1, 0.3, 0.2, 0.4], 4),
        (Improvements("x", 2), [0.2, 0.1, 0.2, 0.1], None),
    ],
)
def test_a_rule_ends_at_this_epoch(rule, values, end):
    ends = [i for i, v in enumerate(values) if rule.settled(v)]
    assert (ends[0] if ends else None) == end
    assert rule.values == values


def test_the_rules_as_a_table():
    assert vars(Plateau("x")) == dict(measure="x", patience=30, delta=0.01, min_epochs=0, values=[])
    assert vars(NoBetter("x")) == dict(measure="x", patience=30, values=[])
    assert vars(Improvements("x")) == dict(measure="x", count=24, start=0.0, values=[])


class Watched(Products):
    "Two stages; the first one watches a number that changes from epoch to epoch."

    def __init__(self, rule, cap, values):
        super().__init__()
        self.rule = rule
        self.cap = cap
        self.values = values
        self.done_at = []
        self.begun = []

    def stages(self):
        first = Stage("one", self.updates(), epochs=self.cap, until=self.rule)
        return [first, Stage("two", self.updates())]

    def near(self, batch, noise):
        self.done_at.append(self.done)
        return super().near(batch, noise)

    def begin(self, stage, batches):
        self.begun.append((stage.name, batches(3)["student"].tolist()))

    def monitor(self, batch, noise):
        return {"x": self.values.pop(0) if self.values else 0.0}


def ended(run):
    return [(r["stage"], r.get("ended")) for r in run.history]


def test_a_stage_ends_by_its_rule_or_its_cap(tmp_path):
    s = quiet(epochs=5, steps=2)
    values = [0, 0, 0, 0, 1, 1, 1, 1]  # two a epoch, the row has their mean
    run = Learner(
        Watched(Plateau("x", 2, 0.5), 4, list(values)), Data(), tmp_path / "a", settings=s
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.fit()
    one, two = ("one", None), ("two", None)
    assert ended(run) == [one, ("one", "settled"), two, two, two]
    first = [0, 0.125, 0.25, 0.375]  # of four epochs, the longest duration
    assert run.method.done_at == pytest.approx(first + [k / 6 for k in range(6)])
    fixed = numbers(10**9 + 3)
    assert run.method.begun == [("one", fixed), ("two", fixed)]
    capped = Watched(Plateau("x", 3, 0.5), 2, list(values))
    run = Learner(capped, Data(), tmp_path / "b", settings=s)
    with pytest.warns(NotSettled, match="stage 'one' ended at its cap of 2 epochs"):
        run.fit()
    assert ended(run) == [one, ("one", "cap"), two, two, two]
    assert [r["x"] for r in run.history] == [0, 0, 1, 1, 0]


def test_early_stopping_waits_for_the_last_stage_and_counts_from_its_start(tmp_path, monkeypatch):
    def two(method):
        return [Stage("one", method.updates(), epochs=4), Stage("two", method.updates())]

    scores = iter([0.9, 0.1, 0.1, 0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 0.2])
    monkeypatch.setattr(learner_module, "validate", lambda net, batches: (next(scores), 1.0))
    s = quiet(epochs=10, steps=1, early_stop=2)
    run = Learner(Products(stages=two), Data(), tmp_path, settings=s, valid=[torch.zeros(1)])
    run.fit()
    assert len(run.history) == 8


def test_the_best_epoch_by_validation_is_kept(tmp_path, monkeypatch):
    run = validated(tmp_path, monkeypatch)
    s = quiet(epochs=8, steps=1)
    after_two = train_by_hand(replace(s, epochs=2), joint=True)
    assert run.best == 0.5 and both_numbers(run) != after_two
    assert run.best_student() is run.method.student
    assert both_numbers(run)["a"] == pytest.approx(after_two["a"])
    assert both_numbers(run)["b"] == pytest.approx(after_two["b"])


# --- who moves ---


def test_only_those_of_an_update_move_and_the_next_sees_them_moved(tmp_path):
    run = Learner(Products(joint=False), Data(), tmp_path, settings=quiet(steps=1, epochs=1))
    run.fit()
    x = numbers(0)
    # the first step of Adam has the length of its rate
    slope = slopes(START, [x], 1.0, 1.0)["a"]
    a = [w - 0.2 * math.copysign(1, g) for w, g in zip(START["a"], slope)]
    slope = slopes({"a": a, "b": START["b"]}, [x], 2.0, 0.5)["b"]
    b = [w - 0.025 * math.copysign(1, g) for w, g in zip(START["b"], slope)]
    assert both_numbers(run)["a"] == pytest.approx(a, abs=1e-7)
    assert both_numbers(run)["b"] == pytest.approx(b, abs=1e-7)
    assert run.method.log == [[True, False]]


@pytest.mark.parametrize("weights", [{"near": 0}, {"near": 0.0, "far": 0}])
def test_what_has_no_gradient_does_not_even_decay(tmp_path, weights):
    run = trained(tmp_path, quiet(weight_decay=0.5), joint=True, weights=weights)
    assert both_numbers(run) == {n: list(v) for n, v in START.items()}
    assert "near" not in run.history[0]


def test_a_network_that_a_loss_leaves_out_does_not_decay(tmp_path):
    class Half(Products):
        def square(self, batch, factor):
            return ((self.networks["student"].w - batch["student"]) ** 2).sum()

    run = Learner(Half(), Data(), tmp_path, settings=quiet(weight_decay=0.5))
    run.fit()
    assert both_numbers(run)["b"] == list(START["b"]) and both_numbers(run)["a"] != [1.0, -2.0]


class Normed(Method):
    "A student, a network that another stage trains, and a frozen one, all with BatchNorm."

    def __init__(self):
        with seeded(0, "normed"):
            self.networks = {"student": self.net(), "other": self.net()}
            self.frozen = {"teacher": self.net()}
        self.weights = {"fit": 1.0}

    def net(self):
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).double()

    def stages(self):
        return [Stage("train", [Update("student", ("student",), self.losses)])]

    def losses(self, batch, noise):
        x = batch["student"].reshape(1, 1, 1, 2)
        nets = [*self.networks.values(), *self.frozen.values()]
        return {"fit": lambda: sum(net(x).square().mean() for net in nets)}


def test_frozen_and_resting_networks_keep_weights_and_statistics(tmp_path):
    method = Normed()
    nets = {**method.networks, **method.frozen}
    before = {n: {k: v.clone() for k, v in net.state_dict().items()} for n, net in nets.items()}
    run = Learner(method, Data(), tmp_path, settings=quiet(weight_decay=0.1))
    run.fit()
    moved = {
        n: {k for k, v in net.state_dict().items() if not torch.equal(v, before[n][k])}
        for n, net in nets.items()
    }
    assert moved["other"] == moved["teacher"] == set()
    assert {"0.weight", "1.weight", "1.running_mean", "1.num_batches_tracked"} <= moved["student"]
    set_modes(method, run.stages[0])
    assert [net.training for net in nets.values()] == [True, False, False]
    assert not any(p.requires_grad for p in method.frozen["teacher"].parameters())


# --- what is recorded ---


def test_a_row_of_the_history_by_hand(tmp_path):
    class Counted(Products):
        def near(self, batch, noise):
            self.counts["absent"] = self.counts.get("absent", 0) + 3
            return super().near(batch, noise)

        def monitor(self, batch, noise):
            return {"first": batch["student"][0].item()}

    told = []
    s = quiet(epochs=2, steps=2, lr=1e-30)
    run = Learner(Counted(), Data(), tmp_path, settings=s, tell=told.append)
    history = run.fit()
    values = [sum((p - x) ** 2 for p, x in zip((0.5, -6.0), numbers(k))) for k in range(4)]
    fixed = [math.sin(10**9 + 1), math.sin(10**9 + 2)]
    assert told == history and len(history) == 2
    for epoch, row in enumerate(history):
        assert row["near"] == pytest.approx(sum(values[2 * epoch : 2 * epoch + 2]) / 2)
        assert row["absent"] == 3 and row["first"] == pytest.approx(sum(fixed) / 2)
        assert [row[k] for k in ("stage", "epoch", "step")] == ["train", epoch, 2 * epoch + 2]


def test_weights_of_terms():
    assert merge_weights({"a": 1.0, "b": 2.0}, {"b": 0}) == {"a": 1.0, "b": 0}
    assert merge_weights({"a": 1.0}, None) == {"a": 1.0}
    terms = {"a": lambda: torch.tensor(3.0), "b": lambda: torch.tensor(5.0), "c": pytest.fail}
    total, values = weighted_sum(terms, {"a": 2.0, "b": -1.0, "c": 0})
    assert total.item() == 1.0 and values == {"a": 3.0, "b": 5.0}
    assert weighted_sum({"c": pytest.fail}, {"c": 0}) == (None, {})


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    s = quiet(epochs=6, schedule="cosine", weight_decay=0.1)
    assert both_numbers(trained(tmp_path / "whole", s)) == check_steps(tmp_path / "again", s)

    def stop(row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", s, tell=stop)
    assert load_checkpoint(tmp_path / "cut/last.pt")["position"]["total"] == 3
    check_steps(tmp_path / "cut", s)
    other = Learner(Products(), Data(), tmp_path / "cut", settings=replace(s, lr=0.2))
    with pytest.raises(InputError, match="another method, other options"):
        other.fit()


def test_global_generators_go_on_where_they_were():
    import random

    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), random.gauss()

    with seeded(0, "draw"):
        random.gauss()
        np.random.randn()  # both keep a second number in hand
        state = get_random_state()
        wanted = draw(), np.random.randn()
        set_random_state(state)
        assert (draw(), np.random.randn()) == wanted


def test_noise_is_a_function_of_seed_purpose_step_and_process(tmp_path):
    run = Learner(Products(), Data(), tmp_path, seed=7, settings=quiet())
    _, noise = run._batch(run.stages[0], 5)
    wanted = torch.rand(2, generator=torch_rng(7, "masks", 5, 0)).tolist()
    assert torch.rand(2, generator=noise("masks")).tolist() == wanted


# --- several processes ---


class Pair:
    "An accelerator of two processes; the other one always says `other`."

    num_processes = 2

    def __init__(self, other):
        self.other = other
        self.messages = 0

    def reduce(self, x, how):
        assert how == "mean"
        self.messages += 1
        return (x + self.other) / 2


def test_gradients_are_means_over_processes():
    a, b, still = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad = torch.tensor([1.0, 3.0])
    still.requires_grad_(False)
    pair = Pair(torch.tensor([3.0, 5.0, 8.0, 2.0]))
    average_gradients([a, still, b], pair)
    assert a.grad.tolist() == [2.0, 4.0] and b.grad.tolist() == [4.0, 1.0]  # none counts as zero
    assert still.grad is None and pair.messages == 1
    pair.num_processes = 1
    average_gradients([a], pair)
    assert a.grad.tolist() == [2.0, 4.0]


def test_buffers_are_means_over_processes_but_for_those_that_modules_keep_alike():
    class Codebook(nn.Module):
        own_buffers = True

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(2))

    net = nn.Sequential(nn.BatchNorm1d(2), Codebook())
    net[0].running_mean.fill_(4.0)
    average_buffers({"student": net}, Pair(2.0))
    assert net[0].running_mean.tolist() == [3.0, 3.0] and net[0].running_var.tolist() == [1.5, 1.5]
    assert net[0].num_batches_tracked == 0 and net[1].table.tolist() == [1.0, 1.0]


# --- recalibration ---


def moments(x):
    "Mean and unbiased variance of every channel of (B,C,H,W)."
    flat = x.movedim(1, 0).flatten(1)
    mean = flat.mean(1)
    return mean, ((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1)


@pytest.mark.parametrize("n", [1, 3])
def test_recalibration_by_hand(n):
    "Both layers get the mean over the batches; the second one reads what the first one normalised."
    net = Normed().net()
    net = nn.Sequential(net[0], net[1], net[2], nn.BatchNorm2d(1, momentum=0.3).double())
    weights = {k: v.clone() for k, v in net.named_parameters()}
    gen = torch_rng(0, "calibrate")
    old = [torch.rand(2, 1, 4, 4, generator=gen, dtype=torch.float64) for _ in range(2)]
    images = [5 + torch.randn(3, 1, 4, 4, generator=gen, dtype=torch.float64) for _ in range(n)]
    for x in old:
        net(x)
    assert recalibrate_batchnorm(net, images) is net
    first, second = [], []
    for x in images:
        y = net[0](x)
        first.append(moments(y))
        mean = y.mean((0, 2, 3), keepdim=True)
        var = ((y - mean) ** 2).mean((0, 2, 3), keepdim=True)
        second.append(moments(net[2]((y - mean) / (var + 1e-5).sqrt())))
    for layer, found in ((net[1], first), (net[3], second)):
        for name, k in (("running_mean", 0), ("running_var", 1)):
            wanted = sum(f[k] for f in found) / n
            torch.testing.assert_close(getattr(layer, name), wanted, rtol=1e-9, atol=1e-9)
        assert layer.num_batches_tracked == n
    assert (net[1].momentum, net[3].momentum) == (0.1, 0.3)
    assert not any(m.training for m in net.modules())
    assert all(torch.equal(v, weights[k]) for k, v in net.named_parameters())


# --- validation ---


class Given(nn.Module):
    "A network whose image is its logits."

    def forward(self, x):
        assert not self.training
        return x


def test_validation_of_one_class_by_hand():
    "Images of 4 pixels: Dice 2/3, 0 (a false alarm), none on either side (left out)."
    logits = torch.tensor([[[[2.0, 0.25, -1.0, 0.0]]], [[[1.0, -1.0, -1.0, -1.0]]]])
    label = torch.tensor([[[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    empty = SimpleNamespace(image=-logits[:1].abs() - 1, label=label[1:])
    net = Given().train()
    score, loss = validate(net, [SimpleNamespace(image=logits, label=label), empty])
    assert score == pytest.approx((2 / 3 + 0) / 2) and net.training

    def by_hand(x, y):
        p = 1 / (1 + (-x).exp())
        dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        return dice - 0.5 * (y * p.log() + (1 - y) * (1 - p).log()).mean()

    wanted = [by_hand(logits[:, 0], label), by_hand(empty.image[:, 0], empty.label)]
    assert loss == pytest.approx(float(sum(wanted) / 2))
    assert validate(net, [empty])[0] == 1.0


def test_validation_of_three_classes_by_hand():
    "Class 1: Dice 2*1/(1+2); class 2: 2*1/(2+1); the background does not count."
    said = torch.tensor([[[0, 1, 2, 2]]])
    label = torch.tensor([[[0, 1, 1, 2]]])
    logits = 3.0 * nn.functional.one_hot(said, 3).movedim(-1, 1)
    score, _ = validate(Given(), [SimpleNamespace(image=logits, label=label)])
    assert score == pytest.approx(2 / 3)
    absent = torch.tensor([[[0, 1, 1, 0]]])
    score, _ = validate(Given(), [SimpleNamespace(image=logits, label=absent)])
    assert score == pytest.approx((2 / 3 + 0) / 2)


def test_number_formats(monkeypatch):
    for has, word in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(core, "supports_bf16", lambda device, has=has: has)
        assert resolve_precision("auto", "cpu") == word
        assert [resolve_precision(p) for p in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
