"""`make gpu`, small, on the CPU; and on a device: the CPU's losses, label maps and resumed runs."""

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU))
import checks
import machine
import timed
import work
from cases import PLAIN, Blocks, case_of, cases, methods, network, train_case
from timed import OutOfTime, Plan, learner_of

from unpaired_kd.inference.student import Recipe, Student
from unpaired_kd.inference.volumes import predict_volume
from unpaired_kd.methods.single import Single
from unpaired_kd.training.learner import Learner
from unpaired_kd.training.settings import Settings

DEVICE = "cuda"


def main_program():
    "The module of `tests/gpu/__main__.py`."
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("gpu_main", GPU / "__main__.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def called(*arguments, **environment):
    "Run the program."
    return subprocess.run(
        [sys.executable, str(GPU), *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=900,
    )


# ---------------------------------------------------------------- the whole program, small


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "What a small run leaves."
    out = tmp_path_factory.mktemp("gpu") / "deep" / "gpu.json"
    done = called("--small", "--out", out, "--seconds", 600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done, json.loads(out.read_text())


@pytest.mark.slow
def test_the_record_says_where_and_what(small):
    _, found = small
    assert found["small"] and found["device"]["type"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"date", "commit", "changed", "seconds", "budget_seconds"} <= found.keys()
    assert {"name", "driver", "count", "capability", "memory_mb"} <= found["device"].keys()
    for step in found["steps"]:
        assert step.keys() == {*work.FIELDS, "difference"}


@pytest.mark.slow
def test_every_step_ended_well(small):
    _, found = small
    assert {s["name"] for s in found["steps"]} == {s.name for s in work.all_steps(True)}
    assert {s["name"]: s["error"] for s in found["steps"] if s["status"] != "ok"} == {}


@pytest.mark.slow
def test_every_method_is_there_in_both_precisions_and_with_all_its_stages(small):
    _, found = small
    rows = [s for s in found["steps"] if s["kind"] == "training"]
    both = {(m, p) for m in methods() for p in ("fp32", "bf16")}
    assert {(s["method"], s["precision"]) for s in rows} == both
    stages = {m: {s["stage"] for s in rows if s["method"] == m} for m in methods()}
    assert stages["vpbsd"] == {"pretrain", "finetune", "distil"}
    assert stages["lotus"] == {"denoise", "distil"}
    presets = {s["preset"] for s in rows if s["method"] == "lotus"}
    assert presets == {"recommended", "paper", "released"}
    for s in rows:
        assert s["seconds_per_step"] > 0 and s["images_per_second"] > 0 and s["first_losses"]


@pytest.mark.slow
def test_bf16_begins_where_fp32_does(small):
    _, found = small
    away = [s["difference"] for s in found["steps"] if s["precision"] == "bf16" and s["fresh"]]
    assert len(away) == len(cases(True)) and max(away) < 0.05
    assert sum(away) > 0  # it was another number format


@pytest.mark.slow
def test_speed_and_label_maps_and_processes_are_there(small):
    _, found = small
    rows = {s["name"]: s for s in found["steps"]}
    for name in ("variation map", "steps"):
        assert rows[name]["detail"]["ratio"] > 0
    assert rows["sliding inference"]["detail"]["voxels_per_second"] > 0
    assert rows["prediction"]["detail"]["equal_fp32"] == 1
    assert rows["two processes"]["seconds_per_step"] > 0
    assert set(rows["tests marked gpu"]["detail"]) == {"passed", "failed", "skipped"}


@pytest.mark.slow
def test_the_table_has_a_line_for_each_row(small):
    done, found = small
    for s in found["steps"]:
        assert any(line.startswith(s["name"]) for line in done.stdout.splitlines())
    assert f"{len(found['steps'])} rows, 0 failed" in done.stdout


def test_a_new_method_has_a_case_without_being_named():
    assert {c.method for c in cases(False)} == {c.method for c in cases(True)} == set(methods())
    assert case_of("not named anywhere", "recommended", False).size == PLAIN


def test_full_sizes_are_those_that_were_promised():
    full = {c.name: c for c in cases(False)}
    for preset in ("recommended", "paper", "released"):
        size = full[f"lotus {preset}"].size
        assert (size.side, size.batch, size.config["width"]) == (512, 16, 16)
    made = []
    for name in ("cmedl recommended", "cmedl recommended drit", "vpbsd recommended"):
        train_case(full[name], made.append)
    cycle, drit, teacher, student = made
    assert (cycle.options.blocks, cycle.options.width, cycle.options.side) == (9, 64, 256)
    assert (drit.options.i2i, drit.options.width) == ("drit", 64)
    assert 22.5e6 < sum(p.numel() for p in teacher.student.parameters()) < 23.5e6
    assert full["vpbsd recommended"].size.side == 96 and len(teacher.stages()) == 2


# ---------------------------------------------------------------- what goes wrong


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import importlib.util as u
        find = u.find_spec
        u.find_spec = lambda name, *a: None if name == "accelerate" else find(name, *a)
        """)
    )
    done = called("--small", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "missing here: accelerate." in done.stderr and "CONTRIBUTING.md" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_in_one_line():
    done = called()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "no accelerator" in done.stderr and "--small" in done.stderr


def test_carried_packages_are_found(tmp_path, monkeypatch):
    (tmp_path / "carried_example.py").write_text("x = 1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    assert machine.prepare(str(tmp_path)) and machine.missing(["carried_example"]) == []
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path), "before"]
    with pytest.raises(SystemExit, match="not a folder"):
        machine.unpacked(tmp_path / "none", tmp_path)


def test_carried_wheels_are_installed_without_a_network(tmp_path):
    import zipfile

    name = "carried_wheel-1.0"
    record = "carried_wheel-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as z:
        z.writestr("carried_wheel.py", "x = 1")
        z.writestr(
            f"{record}/METADATA", "Metadata-Version: 2.1\nName: carried-wheel\nVersion: 1.0\n"
        )
        z.writestr(
            f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr(f"{record}/RECORD", "")
    folder = machine.unpacked(tmp_path, tmp_path / "site")
    assert (folder / "carried_wheel.py").read_text() == "x = 1"
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("no zip")
    with pytest.raises(SystemExit, match="UKD_WHEELS"):
        machine.unpacked(tmp_path, tmp_path / "other")


def fails(say, *more):
    raise ValueError("first line\nsecond line")


def imports(say, *more):
    raise ModuleNotFoundError("No module", name="monai")


def late(say, *more):
    raise OutOfTime


def spoilt(say, *more):
    raise RuntimeError("CUDA error: an illegal memory access")


def silent(say, *more):
    pass


def half(say, *more):
    say(status="ok", stage="first")
    raise ValueError("then this")


@pytest.mark.parametrize(
    "run, status, error, fine",
    [
        (fails, ["failed"], "ValueError: first line", True),
        (imports, ["left out"], "needs monai", True),
        (late, ["left out"], "its time was over", True),
        (spoilt, ["failed"], "CUDA error", False),
        (silent, ["failed"], "said nothing", True),
        (half, ["ok", "failed"], "then this", True),
    ],
)
def test_whatever_a_step_does_becomes_a_record(run, status, error, fine):
    heard = []
    step = work.Step("one", "speed", run, dict(precision="bf16"))
    assert work.guarded(step, heard.append, "cpu", True, time.monotonic() + 60) is fine
    assert [h["status"] for h in heard] == status and error in heard[-1]["error"]
    assert "\n" not in heard[-1]["error"] and {h["precision"] for h in heard} == {"bf16"}


def test_after_its_time_a_step_is_left_out_and_noted():
    heard = []
    step = work.Step("one", "speed", fails, {})
    work.guarded(step, heard.append, "cpu", True, time.monotonic() - 1)
    assert [h["status"] for h in heard] == ["left out"]


DIES = textwrap.dedent("""
    import json, os, sys, time
    first = int(sys.argv[-1])
    for i in range(first, 4):
        def send(*m): print("odd text" * (i == 3) + "#" + json.dumps(m), flush=True)
        send("begin", i)
        if i == 1: os._exit(7)
        if i == 2: time.sleep(float(sys.argv[1]))
        send("record", {"name": str(i), "status": "ok"})
        send("end", i)
        if i == 0: sys.exit(3)
    """)


@pytest.mark.parametrize(
    "seconds, statuses",
    [(0, ["ok", "failed", "ok", "ok"]), (60, ["ok", "failed", "left out", "left out"])],
)
def test_a_process_that_dies_or_hangs_loses_only_its_own_step(
    tmp_path, monkeypatch, seconds, statuses
):
    main = main_program()
    script = tmp_path / "dies.py"
    monkeypatch.setattr(main, "GRACE", 1)
    script.write_text(DIES)
    steps = [(str(i), "speed") for i in range(4)]
    fields = ("name", "status", "error")
    heard = main.Collected(steps, fields, lambda records: None)
    until = time.monotonic() + (2 if seconds else 60)
    main.run_all([sys.executable, str(script), str(seconds)], heard, until, "#")
    assert [r["status"] for r in heard.records] == statuses
    assert "ended with 7" in heard.records[1]["error"]


def test_without_time_everything_is_noted_as_left_out(tmp_path):
    done = called("--small", "--seconds", 0, "--out", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert done.returncode == 0 and {s["status"] for s in found} == {"left out"}
    assert [s["name"] for s in found] == [s.name for s in work.all_steps(True)]


def test_losses_far_from_float32_are_a_failure():
    row = dict(stage="a", fresh=True, status="ok", error="")
    rows = [
        row | dict(name="m fp32", precision="fp32", first_losses={"seg": 1.0, "kl": 1e-6}),
        row | dict(name="m bf16", precision="bf16", first_losses={"seg": 1.1, "kl": 2e-6}),
        row | dict(name="m bf16", precision="bf16", first_losses={"seg": 1.5, "kl": 1e-6}),
    ]
    main_program().differences(rows)
    assert rows[0]["difference"] is None
    assert rows[1]["difference"] == pytest.approx(0.1) and rows[1]["status"] == "ok"
    assert rows[2]["status"] == "failed" and rows[2]["error"] == "far from float32: seg"


class Idle(Single):
    "Its labels teach nothing."

    def losses(self, batch, noise):
        return {"seg": lambda: 0 * self.student(batch["student"].image).sum()}


def test_weights_that_do_not_move_are_a_failure():
    case = case_of("single", "recommended", True)
    train = timed.Training(case, Plan("cpu", "fp32", 0, 1), lambda **found: None)
    train(Single(network(case.size, "student")))
    still = Idle(network(case.size, "student"))
    for p in still.student.parameters():
        torch.nn.init.zeros_(p)  # nothing decays either
    with pytest.raises(AssertionError, match="did not: student"):
        train(still)


def test_a_step_of_training_stops_at_the_end_of_its_time():
    case = case_of("single", "recommended", True)
    heard = []
    plan = Plan("cpu", "fp32", 0, 1, time.monotonic() - 1)
    with pytest.raises(OutOfTime):
        timed.train(case, plan, lambda **found: heard.append(found))
    assert not heard


# ---------------------------------------------------------------- on a device


@pytest.fixture
def exact():
    "Float32 as on the CPU, and the same sums in every run."
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32 = False
    cudnn.deterministic = True
    cudnn.benchmark = False
    yield
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


EVERY = cases(True, every=True)


def without_jumps(case):
    """The case without what differs from device to device: VpbSD draws the white noise of a strong
    change there, and a score on a threshold falls on either side of it."""
    strong = {"brightness": 0.08, "contrast": 0.4, "gamma": 0.4, "blur": 0.8}
    changes = {"vpbsd": dict(strong=strong, pseudo="soft"), "lotus": dict(dice="soft")}
    more = changes.get(case.method, {})
    return replace(case, size=replace(case.size, options=case.size.options | more))


def all_losses(case, device, folder, precision="fp32"):
    """Every term of every one of five steps a stage, in their order. The rate is small: Adam makes
    a full step of whatever sign rounding gives to a gradient that is zero."""
    seen = []
    plan = Plan(device, precision, 1, 3, rate=1e-5)

    def train(method):
        run = learner_of(method, Blocks(case.size, device), folder / type(method).__name__, plan)
        for stage in run.stages:
            stage.updates = [replace(u, losses=heard(u.losses, seen)) for u in stage.updates]
        run.fit()
        assert next(run.method.student.parameters()).device.type == device

    train_case(case, train)
    return seen


def heard(losses, seen):
    "Losses that leave all their values in `seen`."

    def keep(term, f):
        value = f()
        seen.append((term, value.item()))
        return value

    def listed(batch, noise):
        return {k: (lambda k=k, f=f: keep(k, f)) for k, f in losses(batch, noise).items()}

    return listed


@pytest.mark.gpu
@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_a_device_computes_the_losses_of_the_cpu(tmp_path, exact, case):
    case = without_jumps(case)
    here = all_losses(case, "cpu", tmp_path / "here")
    there = all_losses(case, DEVICE, tmp_path / "there")
    assert [k for k, _ in here] == [k for k, _ in there] and len(here) >= 5
    for (term, a), (_, b) in zip(here, there):
        assert abs(a - b) <= 1e-4 * max(1, abs(a)), f"{term}: {a} on the CPU, {b} here"


@pytest.mark.gpu
@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_bf16_stays_finite_on_a_device(tmp_path, case):
    seen = all_losses(case, DEVICE, tmp_path, "bf16")  # the learner looks at the gradients
    assert seen and all(np.isfinite(v) for _, v in seen)


class Stop(Exception):
    "The run was stopped."


@pytest.mark.gpu
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, exact):
    case = case_of("single", "recommended", True)
    size = replace(case.size, config=case.size.config | {"classes": 1})
    settings = Settings(epochs=4, steps=3, device=DEVICE, precision="fp32", bars=False)

    def learner(folder, **k):
        method = Single(network(size, "student"))
        return Learner(method, Blocks(size), tmp_path / folder, settings=settings, **k)

    def stop(row):
        if row["epoch"] == 2:
            raise Stop

    whole = learner("whole")
    whole.fit()
    with pytest.raises(Stop):
        learner("stopped", tell=stop).fit()
    again = learner("stopped")
    again.fit()
    assert len(again.history) == 4 and again.history[0] == pytest.approx(whole.history[0], abs=1e-5)
    for a, b in zip(whole.method.student.parameters(), again.method.student.parameters()):
        assert torch.allclose(a, b, atol=1e-5)
    fresh = network(size, "student").to(DEVICE)
    ends = again.method.student.parameters()
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(fresh.parameters(), ends))


@pytest.mark.gpu
@pytest.mark.parametrize("which", [0, 1], ids=["image", "volume"])
def test_a_label_map_of_a_device_is_that_of_the_cpu(exact, which):
    _, net, recipe, image = list(checks.students(True))[which]
    assert len(np.unique(Student(net, recipe).predict(image))) > 1
    assert checks.equal_share(net, recipe, image, DEVICE) >= checks.LEAST_EQUAL
    p = Student(net.to(DEVICE), recipe, "bf16").probabilities(image)
    assert np.isfinite(p).all() and np.allclose(p.sum(0), 1, atol=1e-2)


@pytest.mark.gpu
def test_blocks_of_a_volume_on_a_device_are_those_of_the_cpu(tmp_path, exact):
    tifffile = pytest.importorskip("tifffile")
    from unpaired_kd.networks.volumes import LightUNet

    net = checks.settled(lambda: LightUNet(width=2), (2, 1, 16, 16, 16))
    recipe = Recipe(in_channels=1, dims=3, patch=96, classes=("background", "vessel"))
    raw = np.random.default_rng(0).integers(0, 256, (40, 48, 56), np.uint8)
    tifffile.imwrite(tmp_path / "raw.tif", raw)
    Student(net, recipe).save(tmp_path / "student")
    maps = []
    for i, device in enumerate(("cpu", DEVICE)):
        out = tmp_path / f"{i}.tif"
        t = predict_volume(
            tmp_path / "student", tmp_path / "raw.tif", out, tile=16, device=device, spacing=1
        )
        assert t["blocks"] > 8
        maps.append(tifffile.imread(out).astype(int))
    assert len(np.unique(maps[0])) > 2
    assert np.abs(maps[0] - maps[1]).max() <= 1  # bytes: rounded probabilities
