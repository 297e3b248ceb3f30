"""Faults and properties of the learner: kills, several processes, number formats, several networks
and stages."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from unpaired_kd.core import InputError, read_csv, seeded, torch_rng
from unpaired_kd.data.patches import Batch
from unpaired_kd.networks.unet import UNet
from unpaired_kd.training.checkpoints import load_checkpoint
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.method import Method, Stage, Update
from unpaired_kd.training.rules import Improvements, NoBetter, Plateau
from unpaired_kd.training.settings import Settings

SCRIPT = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_learner import learner
    run = learner(sys.argv[1])
    wait = float(sys.argv[2])
    draw = run.data.batch
    run.data.batch = lambda *a: (time.sleep(wait), draw(*a))[1]
    run.fit()
""")


class Blobs:
    "Noisy squares; the batch is a function of (name, step, rank)."

    def __init__(self, names=("student",), dims=2):
        self.names = names
        self.dims = dims

    def batch(self, step, names=None, rank=0):
        return {n: self.one(n, step, rank) for n in names or self.names}

    def one(self, name, step, rank):
        g = torch_rng(0, name, step, rank)
        label = torch.zeros(2, *[16] * self.dims, dtype=torch.long)
        at = torch.randint(2, 8, (2,), generator=g)
        for i, a in enumerate(at):
            label[(i, *[slice(a, a + 6)] * self.dims)] = 1
        return Batch(
            image=(0.4 * label[:, None] + 0.2 * torch.rand(2, 1, *label.shape[1:], generator=g)),
            label=label,
            ids=["", ""],
            label_groups=["", ""],
        )


class Plain(Method):
    def __init__(self, net):
        self.networks = {"student": net}
        self.weights = {"seg": 1.0}

    def stages(self):
        return [Stage("train", [Update("student", ("student",), self.losses)])]

    def losses(self, batch, noise):
        b = batch["student"]
        return {
            "seg": lambda: nn.functional.binary_cross_entropy_with_logits(
                self.student(b.image).float()[:, 0], b.label.float()
            )
        }


def learner(folder, seed=0, settings=None, method=None, **k):
    with seeded(seed, "net"):
        net = UNet(in_channels=1, width=2)
    return Learner(
        method or Plain(net),
        k.pop("data", Blobs()),
        folder,
        seed=seed,
        settings=settings or Settings(epochs=5, steps=6, bars=False, device="cpu"),
        **k,
    )


def weights(run):
    return {
        k: v.clone()
        for n, net in run.method.networks.items()
        for k, v in {f"{n}.{k}": v for k, v in net.state_dict().items()}.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_sigkill_in_the_middle_of_an_epoch_changes_nothing(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def call(folder, wait):
        return [sys.executable, str(script), str(tmp_path / folder), str(wait)]

    subprocess.run(call("whole", 0), env=env, check=True)
    victim = subprocess.Popen(call("killed", 0.3), env=env)
    history = tmp_path / "killed/history.csv"
    for _ in range(600):
        if history.exists():
            break
        time.sleep(0.1)
    time.sleep(0.7)  # an epoch takes 1.8 s: this is inside the next one
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert 1 <= len(read_csv(history)) < 5
    assert not list((tmp_path / "killed").glob("*.part*"))
    subprocess.run(call("killed", 0), env=env, check=True)
    a, b = (load_checkpoint(tmp_path / f / "last.pt") for f in ("whole", "killed"))
    assert same(a["networks"]["student"], b["networks"]["student"])
    assert read_csv(tmp_path / "whole/history.csv") == read_csv(history)


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(tmp_path):
    runs = [learner(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1))]
    for r in runs:
        r.fit()
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_full(tmp_path, precision):
    half, full = (
        learner(
            tmp_path / p,
            settings=Settings(epochs=4, steps=8, lr=5e-3, precision=p, bars=False, device="cpu"),
        )
        for p in (precision, "fp32")
    )
    a = half.fit()
    b = full.fit()
    assert a[-1]["seg"] < 0.9 * a[0]["seg"]
    assert abs(a[-1]["seg"] - b[-1]["seg"]) < 0.1


def test_early_stopping_and_best_weights(tmp_path):
    run = learner(
        tmp_path,
        settings=Settings(epochs=50, steps=2, lr=1e-30, early_stop=3, bars=False, device="cpu"),
        valid=[Blobs().batch(99)["student"]],
    )
    history = run.fit()
    assert len(history) == history[-1]["epoch"] + 1 < 50
    assert load_checkpoint(tmp_path / "best.pt")["val_dice"] == max(r["val_dice"] for r in history)
    assert (
        len(history) - 1 - max(range(len(history)), key=lambda i: (history[i]["val_dice"], -i)) >= 3
    )
    kept = load_checkpoint(tmp_path / "best.pt")["networks"]["student"]
    assert same(kept, run.best_student().state_dict())


class Gan(Method):
    "Three networks, three updates in turn, as a translation method has them."

    def __init__(self):
        with seeded(0, "gan"):
            self.networks = {
                n: nn.Conv2d(1, 1, 3, padding=1) for n in ("generator", "discriminator", "student")
            }
        self.weights = {"fool": 1.0, "spot": 1.0, "seg": 1.0}
        self.log = []

    def stages(self):
        return [
            Stage(
                "all",
                [
                    Update("g", ("generator",), self.g),
                    Update("d", ("discriminator",), self.d),
                    Update("s", ("student",), self.s),
                ],
            )
        ]

    def fake(self, b):
        return self.networks["generator"](b["teacher"].image)

    def g(self, b, noise):
        return {"fool": lambda: (self.networks["discriminator"](self.fake(b)) - 1).square().mean()}

    def d(self, b, noise):
        return {
            "spot": lambda: (
                self.networks["discriminator"](self.fake(b).detach()).square().mean()
                + (self.networks["discriminator"](b["student"].image) - 1).square().mean()
            )
        }

    def s(self, b, noise):
        return {
            "seg": lambda: (
                (self.networks["student"](self.fake(b)) - b["teacher"].label[:, None].float())
                .square()
                .mean()
            )
        }


def test_alternating_updates_change_only_their_own_networks(tmp_path):
    method = Gan()
    data = Blobs(("student", "teacher"))
    run = Learner(
        method,
        data,
        tmp_path,
        settings=Settings(epochs=1, steps=1, bars=False, device="cpu", precision="fp32"),
    )
    for update in run.stages[0].updates:
        before = weights(run)
        run._update(update, [(data.batch(0), run._noise(0))])
        changed = {
            k.split(".")[0] for k, v in weights(run).items() if not torch.equal(v, before[k])
        }
        assert changed == set(update.changes)
    assert len(run.fit()) == 1


class Three(Plain):
    "Three stages with their own patches, lengths and frozen parts; one of them has no labels."

    def __init__(self, net):
        super().__init__(net)
        self.networks["codebook"] = nn.Conv3d(1, 1, 1)
        self.weights = {"rebuild": 1.0, "seg": 1.0, "agree": 1.0}
        self.seen = []

    def stages(self):
        def look(name):
            return lambda b, n: (self.seen.append((name, tuple(b))), getattr(self, name)(b, n))[1]

        return [
            Stage(
                "pretrain",
                [Update("c", ("codebook",), look("rebuild"))],
                epochs=2,
                draws=("unlabelled",),
            ),
            Stage(
                "finetune",
                [Update("s", ("student",), look("losses"))],
                epochs=1,
                draws=("student",),
            ),
            Stage("distil", [Update("s", ("student",), look("both"))]),
        ]

    def rebuild(self, b, n):
        return {
            "rebuild": lambda: (
                (self.networks["codebook"](b["unlabelled"].image) - b["unlabelled"].image)
                .square()
                .mean()
            )
        }

    def both(self, b, n):
        return {
            **self.losses(b, n),
            "agree": lambda: (
                (
                    self.student(b["unlabelled"].image).sigmoid()
                    - self.networks["codebook"](b["unlabelled"].image)
                )
                .square()
                .mean()
            ),
        }


def test_three_stages_in_3d_with_their_own_patches(tmp_path):
    with seeded(0, "net"):
        method = Three(UNet(in_channels=1, width=2, dims=3))
    run = Learner(
        method,
        Blobs(("student", "unlabelled"), dims=3),
        tmp_path,
        settings=Settings(epochs=5, steps=2, bars=False, device="cpu", precision="fp32"),
    )
    history = run.fit()
    assert [r["stage"] for r in history] == ["pretrain"] * 2 + ["finetune"] + ["distil"] * 2
    assert dict(method.seen) == {
        "rebuild": ("unlabelled",),
        "losses": ("student",),
        "both": ("student", "unlabelled"),
    }


def test_plateau_state_survives_a_resume(tmp_path):
    class Watched(Plain):
        def stages(self):
            return [
                Stage("a", super().stages()[0].updates, until=Plateau("still", patience=4)),
                Stage("b", super().stages()[0].updates),
            ]

        def monitor(self, batch, noise):
            return {"still": 0.5}

    def build(epochs):
        return learner(
            tmp_path / "run",
            method=Watched(UNet(in_channels=1, width=2)),
            settings=Settings(epochs=8, steps=1, bars=False, device="cpu"),
        )

    run = build(8)
    run.tell = lambda row: (_ for _ in ()).throw(KeyboardInterrupt) if row["epoch"] == 3 else None
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    history = build(8).fit()
    assert [r["stage"] for r in history] == ["a"] * 4 + ["b"] * 4


def _rank(rank, port, folder):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    run = learner(
        folder, settings=Settings(epochs=2, steps=3, bars=False, device="cpu", precision="fp32")
    )
    assert run.accelerator.num_processes == 2
    run.fit()
    torch.save(run.method.student.state_dict(), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_same_weights(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert same(a, b)
    alone = learner(
        tmp_path / "alone",
        settings=Settings(epochs=2, steps=3, bars=False, device="cpu", precision="fp32"),
    )
    alone.fit()
    assert not same(a, alone.method.student.state_dict())  # it did see the other process's batches


class Spoiled(Plain):
    "From `when` on, the gradient of one layer is `value`, though the loss is an ordinary number."

    def __init__(self, net, when=8, value=float("nan"), layer="conv5.3.weight"):
        super().__init__(net)
        self.step = 0
        self.when = when
        self.value = value
        dict(net.named_parameters())[layer].register_hook(self.spoil)

    def spoil(self, g):
        self.step += 1
        return torch.full_like(g, self.value) if self.step > self.when else g


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, value):
    with seeded(0, "net"):
        method = Spoiled(UNet(in_channels=1, width=2), value=value)
    run = learner(
        tmp_path,
        method=method,
        settings=Settings(epochs=5, steps=6, bars=False, device="cpu", precision="fp32"),
    )
    words = (
        "gradient of student.conv5.3.weight is not finite: update 'student' of stage 'train', "
        "epoch 1, step 8. Lower lr"
    )
    with pytest.raises(InputError, match=words):
        run.fit()
    # as after epoch 0
    assert load_checkpoint(tmp_path / "last.pt")["position"]["total"] == 1
    assert len(read_csv(tmp_path / "history.csv")) == 1
    assert run.position["step"] == 9  # batch 9 was not learned from


def test_it_is_noticed_in_the_last_batch_of_an_epoch(tmp_path):
    with seeded(0, "net"):
        method = Spoiled(UNet(in_channels=1, width=2), when=5)
    run = learner(
        tmp_path,
        method=method,
        settings=Settings(epochs=1, steps=6, bars=False, device="cpu", precision="fp32"),
    )
    with pytest.raises(InputError, match="epoch 0, step 5"):
        run.fit()
    assert not (tmp_path / "last.pt").exists()


def test_other_layers_are_counted(tmp_path):
    with seeded(0, "net"):
        method = Spoiled(UNet(in_channels=1, width=2), when=0, layer="conv10.weight")
    dict(method.student.named_parameters())["conv10.bias"].register_hook(method.spoil)
    with pytest.raises(
        InputError, match="gradient of student.conv10.weight and 1 more is not finite"
    ):
        learner(tmp_path, method=method).fit()


class Loud(Plain):
    """A loss that is `factor` times a mean: its fp16 gradients overflow at the scaler's first
    scales, or at every scale."""

    def __init__(self, net, factor):
        super().__init__(net)
        self.factor = factor

    def losses(self, batch, noise):
        return {
            "seg": lambda: (
                self.student(batch["student"].image).float().sigmoid().mean() * self.factor
            )
        }


def loud(folder, factor):
    with seeded(0, "net"):
        method = Loud(nn.Conv2d(1, 1, 3, padding=1), factor)
    return learner(
        folder,
        method=method,
        settings=Settings(epochs=2, steps=20, bars=False, device="cpu", precision="fp16"),
    )


def test_fp16_may_find_its_scale_first(tmp_path):
    run = loud(tmp_path / "fine", 1e4)
    assert len(run.fit()) == 2
    assert 1 <= run.scaler.get_scale() < 65536  # it had to halve, and no error was made of it
    with pytest.raises(InputError, match="gradient of student.weight and 1 more is not finite"):
        loud(tmp_path / "hopeless", float("inf")).fit()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    run = learner(tmp_path)
    run.fit()
    other = learner(tmp_path, method=Plain(UNet(in_channels=1, width=4)))
    with pytest.raises(InputError, match="another architecture"):
        other._resume()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="file"):
        learner(tmp_path / "file" / "run").fit()


def test_tensorboard_is_optional(tmp_path):
    pytest.importorskip("tensorboard")
    learner(
        tmp_path, settings=Settings(epochs=1, steps=1, tensorboard=True, bars=False, device="cpu")
    ).fit()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("rule", [lambda: Improvements("still", 3), lambda: NoBetter("still", 1)])
def test_the_other_rules_survive_a_resume(tmp_path, rule):
    values = [0.1, 0.2, 0.15, 0.3, 0.4, 0.5]

    class Watched(Plain):
        def stages(self):
            return [
                Stage("a", super().stages()[0].updates, until=rule()),
                Stage("b", super().stages()[0].updates),
            ]

        def monitor(self, batch, noise):
            return {"still": values[self.epoch()]}

    def build(folder):
        method = Watched(UNet(in_channels=1, width=2))
        run = learner(
            tmp_path / folder,
            method=method,
            settings=Settings(epochs=6, steps=1, bars=False, device="cpu"),
        )
        method.epoch = lambda: run.position["total"]
        return run

    def ended(history):
        return [(r["stage"], r.get("ended")) for r in history]

    whole = build("whole")
    broken = build("broken")
    broken.tell = lambda row: (
        (_ for _ in ()).throw(KeyboardInterrupt) if row["epoch"] == 2 else None
    )
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    assert ended(build("broken").fit()) == ended(whole.fit())
    assert ("a", "settled") in ended(whole.history) and whole.history[-1]["stage"] == "b"


def test_gradients_of_several_batches_are_averaged(tmp_path):
    """One update on two batches is one on both together, where nothing in the network looks at a
    whole batch."""

    class Both(Blobs):
        def one(self, name, step, rank):
            a, b = (super(Both, self).one(name, 2 * step + j, rank) for j in range(2))
            return Batch(
                image=torch.cat([a.image, b.image]),
                label=torch.cat([a.label, b.label]),
                ids=a.ids + b.ids,
                label_groups=a.label_groups + b.label_groups,
            )

    def run(data, accumulate, folder):
        with seeded(0, "net"):
            net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 1, 1))
        own = Settings(
            epochs=2, steps=3, accumulate=accumulate, bars=False, device="cpu", precision="fp32"
        )
        found = Learner(Plain(net), data, tmp_path / folder, settings=own)
        found.fit()
        return found

    one = run(Both(), 1, "one")
    two = run(Blobs(), 2, "two")
    other = run(Blobs(), 1, "other")
    gap = max((weights(one)[k] - v).abs().max() for k, v in weights(two).items())
    assert gap < 1e-6 < max((weights(one)[k] - v).abs().max() for k, v in weights(other).items())
    assert [r["seg"] for r in one.history] == pytest.approx(
        [r["seg"] for r in two.history], abs=1e-6
    )


def test_updates_that_build_on_each_other_are_not_accumulated(tmp_path):
    class Twice(Plain):
        def stages(self):
            return [Stage("train", [Update(n, ("student",), self.losses) for n in "ab"])]

    with pytest.raises(InputError, match="accumulate=2.*several updates"):
        learner(
            tmp_path,
            settings=Settings(accumulate=2, device="cpu"),
            method=Twice(UNet(in_channels=1, width=2)),
        )
