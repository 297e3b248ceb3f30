"""Codebooks: identities of the quantiser, faults, determinism, and what codes learn on plain
tubes. The names A1..A11 are the checks of the chapter `codebook`."""

import copy
import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.data.phantoms.vessels import VesselKnobs, vessel_volume
from unpaired_kd.distillation.codebook import (
    FSQ,
    Codebook,
    average_codes,
    code_statistics,
    codebook_health,
    count_code_use,
    nearest_code,
    rotate_onto,
    run_kmeans,
    shuffle_codes,
    straight_through,
    unit_vectors,
    vessel_information,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch_rng(seed, "test"), dtype=dtype)


def normal_of(name, seed, *shape):
    return torch.randn(*shape, generator=torch_rng(seed, name))


# ---- identities


def test_straight_through_is_exact_and_the_rotation_trick_is_not():  # A1
    gaps = {}
    for kind in ("straight", "rotate"):
        book = Codebook(32, 8, cosine=False, restart=0, gradient=kind).double().eval()
        book.table.copy_(normal(32, 8, dtype=torch.float64))
        z = normal(2, 8, 3, 4, 5, seed=1, dtype=torch.float64).requires_grad_()
        w = normal(2, 8, 3, 4, 5, seed=2, dtype=torch.float64)
        (book(z).values * w).sum().backward()
        gaps[kind] = (z.grad - w).abs().max().item()
    assert gaps["straight"] == 0 and gaps["rotate"] > 0.1


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("cosine", [False, True])
def test_values_are_rows(dtype, limit, cosine):  # A2
    book = Codebook(16, 4, cosine=cosine).to(dtype).eval()
    q = book(normal(2, 4, 5, 6, dtype=dtype))
    assert (q.values - q.codes).abs().max() <= limit and torch.equal(book.lookup(q.index), q.codes)
    assert (q.values.movedim(1, -1).reshape(-1, 1, 4) - book.table).abs().amax(2).amin(
        1
    ).max() <= limit
    turned = rotate_onto(normal(9, 4, dtype=dtype), normal(9, 4, seed=3, dtype=dtype))
    assert (turned - normal(9, 4, seed=3, dtype=dtype)).abs().max() < limit * 10


def test_gradients_of_the_loss():  # A3
    book = Codebook(16, 4, cosine=False, update="gradient", beta=0.25).double()
    with torch.no_grad():
        book.table.copy_(normal(16, 4, dtype=torch.float64))
    z = normal(1, 4, 200, seed=1, dtype=torch.float64).requires_grad_()
    q = book(z)
    q.loss.backward()
    gap = (z - q.codes).detach()
    n = z.numel()
    assert (z.grad - 2 * 0.25 * gap / n).abs().max() < 1e-12
    wanted = torch.zeros(16, 4, dtype=torch.float64).index_add_(0, q.index[0], -2 * gap[0].T / n)
    assert (book.table.grad - wanted).abs().max() < 1e-12
    book.table.grad = None
    z.grad = None
    book(z).values.sum().backward()  # the decoder's gradient does not reach the table
    assert book.table.grad is None and (z.grad == 1).all()
    moving = Codebook(16, 4, cosine=False)
    assert not list(moving.parameters()) and set(moving.state_dict()) == {
        "table",
        "counts",
        "sums",
        "steps",
        "restarted",
    }


@pytest.mark.parametrize(
    "m,k,d,chunk", [(1, 1, 1, 1024), (1025, 7, 3, 1024), (5000, 300, 16, 512), (100, 513, 64, 1)]
)
def test_nearest_is_brute_force(m, k, d, chunk):  # A4
    z = normal(m, d)
    table = normal(k, d, seed=1)
    index = nearest_code(z, table, chunk)
    assert (
        torch.equal(index, torch.cdist(z.double(), table.double()).argmin(1))
        and index.dtype == torch.int64
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, table, chunk), index)
    assert torch.equal(
        nearest_code(z.bfloat16(), table, chunk), nearest_code(z.bfloat16().float(), table, chunk)
    )
    assert nearest_code(z.requires_grad_(), table).requires_grad is False
    assert nearest_code(z[:0].detach(), table).shape == (0,)


def test_autocast_changes_nothing():
    a, b = (Codebook(64, 16, restart=0) for _ in range(2))
    z = normal(2, 16, 6, 6, 6)
    q = a(z)
    with torch.autocast("cpu", torch.bfloat16):
        p = b(z)
    assert (
        torch.equal(q.index, p.index)
        and torch.equal(q.values, p.values)
        and p.values.dtype == torch.float32
        and torch.equal(a.table, b.table)
    )
    assert b(z.bfloat16()).values.dtype == torch.float32


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_cosine_rows_have_length_one(update):  # A4
    book = Codebook(64, 16, update=update, restart=2, decay=0.5)
    optimiser = torch.optim.SGD(book.parameters(), 0.1) if update == "gradient" else None
    for i in range(10):
        q = book(3 * normal(2, 16, 5, 5, 5, seed=i))
        if optimiser:
            optimiser.zero_grad()
            q.loss.backward()
            optimiser.step()
        rows = book.rows().detach()
        assert (rows.double().norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.equal(book.eval()(q.codes * 7).index, q.index)
    if update == "ema":
        assert book.restarted > 0


def test_no_memory_gives_means_and_no_hits_keep_the_row():  # A5
    book = Codebook(32, 4, cosine=False, decay=0.0, restart=0).double()
    book.table.copy_(normal(32, 4, dtype=torch.float64))
    book.table[7] = 50.0
    z = normal(1, 4, 4000, seed=1, dtype=torch.float64)
    index = book(z).index[0]
    rows = z[0].T
    used = index.unique().tolist()
    means = torch.stack([rows[index == j].mean(0) for j in used])
    assert 7 not in used and (book.table[used] - means).abs().max() < 1e-6
    assert (book.table[7] == 50).all()
    lone = Codebook(8, 4, restart=0)
    before = lone.table.clone()
    index = lone(normal(1, 4, 1)).index
    still = [j for j in range(8) if j != index.item()]
    assert torch.equal(lone.table[still], before[still]) and not torch.equal(lone.table, before)


def test_statistics_equal_one_hot():
    z = normal(500, 6)
    index = torch.randint(9, (500,), generator=torch_rng(0, "index"))
    one = F.one_hot(index, 10).float()
    counts, sums = code_statistics(z, index, 10)
    assert (
        torch.equal(counts, one.sum(0))
        and torch.allclose(sums, one.T @ z, atol=1e-4)
        and counts[9] == 0
    )


def test_perplexity():  # A6
    assert abs(count_code_use(torch.arange(64).repeat(100), 64)["perplexity"] - 64) < 1e-9
    assert count_code_use(torch.full((10,), 3), 64) == dict(active=1 / 64, perplexity=1.0)
    share = torch.rand(50000, generator=torch_rng(0, "share"))
    assert vessel_information((share * 5).long(), share, 8) == pytest.approx(1)
    assert vessel_information(torch.randint(8, (50000,)), share, 8) < 0.01
    assert math.isnan(vessel_information(torch.zeros(9).long(), torch.zeros(9), 8))
    assert codebook_health(torch.zeros(9).long(), torch.zeros(9), 8)["active_vessel"] == 0


# ---- start, restarts, freezing, resuming


def test_kmeans_rows_are_distinct_and_means():
    tokens = normal(60, 3).repeat(5, 1)
    for cosine in (False, True):
        table, size = run_kmeans(tokens, 60, cosine)
        assert len(table.unique(dim=0)) == 60 and size.sum() == 300
    two = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(50, 1) + 0.01 * normal(100, 2)
    table, size = run_kmeans(two, 2)
    assert size.tolist() == [50, 50] and torch.allclose(
        table.sort(0).values[:, 0], torch.tensor([-1.0, 1.0]), atol=0.01
    )
    assert torch.equal(run_kmeans(tokens, 10, seed=4)[0], run_kmeans(tokens, 10, seed=4)[0])
    assert not torch.equal(run_kmeans(tokens, 10, seed=4)[0], run_kmeans(tokens, 10, seed=5)[0])


def test_kmeans_leaves_no_code_empty():  # in one of these 30 draws, averaging alone loses a code
    for seed in range(30):
        table, size = run_kmeans(normal_of("x", seed, 60, 2), 40, seed=seed)
        assert size.min() >= 1 and len(table.unique(dim=0)) == 40


def test_start_needs_tokens():
    book = Codebook(64, 16)
    with pytest.raises(InputError, match="640 tokens.*there are 639"):
        book.start(normal(639, 16))
    book.start(normal(639, 16), per_code=1).start(normal(1, 16, 8, 10, 8))
    assert (book.table.norm(dim=1) - 1).abs().max() < 1e-6 and len(book.table.unique(dim=0)) == 64
    with pytest.raises(InputError, match="64 different tokens; there are 63"):
        book.start(normal(63, 16).repeat(99, 1))


def test_restarts_take_tokens_of_the_batch_and_can_be_switched_off():
    book = Codebook(16, 4, cosine=False, restart=1.0, decay=0.5)
    book.table.copy_(torch.full((16, 4), 100.0) + torch.arange(16.0)[:, None])
    book.table[0] = 0
    z = normal(1, 4, 64)
    book.restarting = False
    for _ in range(8):
        book(z)
    assert book.restarted == 0 and (book.table[1:] >= 100).all()
    book.restarting = True
    book(z)
    fresh = book.table[1:]
    assert book.restarted == 15 and len(fresh.unique(dim=0)) == 15
    assert torch.cdist(fresh, z[0].T).amin(1).max() < 1e-3
    drawn = []
    for _ in range(2):  # the same batch, the next step: other tokens
        book.table.fill_(100.0)
        book.counts.zero_()
        book(z)
        drawn.append(book.table[1:].clone())
    assert not torch.equal(*drawn)
    few = Codebook(16, 4, restart=50.0)
    few(normal(1, 4, 3))  # fewer tokens than dead codes: no token twice
    assert few.restarted == 3


def steps_of(book, first, last):
    for i in range(first, last):
        book(normal(2, 8, 4, 4, 4, seed=i) * torch.linspace(0.1, 2, 8)[:, None, None, None])
    return book


def test_a_resumed_run_is_identical():
    settings = dict(codes=64, dim=8, restart=1.0, decay=0.5, seed=3)
    whole = steps_of(Codebook(**settings), 0, 12)
    state = copy.deepcopy(steps_of(Codebook(**settings), 0, 5).state_dict())
    resumed = Codebook(**settings)
    resumed.load_state_dict(state)
    torch.manual_seed(99)  # the global generator has no part in it
    steps_of(resumed, 5, 12)
    assert whole.restarted > state["restarted"] > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.table, steps_of(Codebook(**{**settings, "seed": 4}), 0, 12).table)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_frozen_is_immovable(update):
    book = Codebook(32, 8, update=update, restart=4.0)
    steps_of(book, 0, 2)
    optimiser = (
        torch.optim.AdamW(nn.ModuleList([book]).parameters(), 1.0, weight_decay=0.5)
        if update == "gradient"
        else None
    )
    assert book.freeze() is book and not any(
        p.requires_grad or p.grad is not None for p in book.parameters()
    )
    before = {k: v.clone() for k, v in book.state_dict().items()}
    holder = nn.ModuleDict(dict(book=book, other=nn.Linear(2, 2)))
    holder.train().requires_grad_(True)  # a careless trainer
    assert holder["other"].training and not book.training
    book.training = True  # even so
    with torch.no_grad():
        steps_of(book, 2, 4)
    q = book(normal(1, 8, 4, 4, 4).requires_grad_())
    (q.loss + q.values.sum()).backward()
    if optimiser:
        optimiser.step()
    for name, value in before.items():
        assert torch.equal(value, book.state_dict()[name]), name
    assert copy.deepcopy(book).frozen
    with pytest.raises(InputError, match="frozen"):
        book.start(normal(999, 8))


def test_evaluation_does_not_learn_but_training_does():
    book = Codebook(32, 8)
    before = book.table.clone()
    steps_of(book.eval(), 0, 2)
    assert torch.equal(before, book.table) and book.steps == 0
    steps_of(book.train(), 0, 2)
    assert not torch.equal(before, book.table) and book.steps == 2


# ---- FSQ


def test_fsq():
    fsq = FSQ((8, 6, 5))
    z = 2 * normal(2, 3, 8, 8, 8)
    z.requires_grad_()
    q = fsq(z)
    assert fsq.codes == 240 and 0 <= q.index.min() and q.index.max() < 240 and q.loss == 0
    assert (
        torch.equal(fsq.lookup(q.index), q.codes)
        and q.codes.abs().max() <= 1
        and torch.equal(q.values, q.codes)
    )
    assert torch.equal(
        fsq(torch.atanh(fsq.lookup(torch.arange(240)[None]) * 0.999)).index[0], torch.arange(240)
    )
    q.values.sum().backward()
    assert torch.allclose(z.grad, 1 - z.detach().tanh().square(), atol=1e-5)
    assert fsq.start().freeze() is fsq


# ---- faults


@pytest.mark.parametrize(
    "bad",
    [
        dict(codes=0),
        dict(dim=0),
        dict(decay=1.0),
        dict(decay=-0.1),
        dict(eps=0.0),
        dict(restart=-1.0),
        dict(beta=-1.0),
        dict(update="sgd"),
        dict(gradient="gumbel"),
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(InputError):
        Codebook(**bad)


def test_faults():
    book = Codebook(8, 4)
    with pytest.raises(InputError, match="needs \\(B,4"):
        book(normal(2, 5, 3, 3))
    for value in (math.nan, math.inf):
        z = normal(2, 4, 3, 3)
        z[1, 2, 0, 0] = value
        before = book.table.clone()
        with pytest.raises(InputError, match="not finite"):
            book(z)
        with pytest.raises(InputError, match="not finite"):
            run_kmeans(z.movedim(1, -1).reshape(-1, 4), 2)
        assert torch.equal(before, book.table)
    with pytest.raises(InputError, match="codes=16, dim=4"):
        book.load_state_dict(Codebook(16, 4).state_dict())
    with pytest.raises(InputError, match="parts.0.table"):
        nn.ModuleDict({"parts": nn.ModuleList([book])}).load_state_dict(
            nn.ModuleDict({"parts": nn.ModuleList([Codebook(8, 5)])}).state_dict()
        )
    with pytest.raises(InputError):
        nearest_code(normal(5, 3), normal(5, 4))
    with pytest.raises(InputError):
        count_code_use(torch.tensor([0, 8]), 8)
    with pytest.raises(InputError):
        count_code_use(torch.tensor([]).long(), 8)
    with pytest.raises(InputError):
        vessel_information(torch.zeros(4).long(), torch.zeros(5), 8)
    with pytest.raises(InputError):
        vessel_information(torch.zeros(4).long(), torch.full((4,), 255.0), 8)
    for levels in ((), (1, 3), (2.5,)):
        with pytest.raises(InputError):
            FSQ(levels)
    with pytest.raises(InputError):
        FSQ((3, 3))(normal(1, 3, 4))


def test_zero_tokens_stay_finite():
    z = torch.zeros(1, 4, 8, requires_grad=True)
    for kind in ("straight", "rotate"):
        q = Codebook(8, 4, gradient=kind)(z)
        (q.values.sum() + q.loss).backward()
        assert q.values.isfinite().all() and z.grad.isfinite().all()
    assert (
        torch.equal(straight_through(z, z + 1).detach(), z.detach() + 1)
        and (unit_vectors(torch.zeros(2, 3)) == 0).all()
    )


# ---- what codes learn: plain tubes, K=64 (thresholds are shares of K)

K = 64


class AutoEncoder(nn.Module):
    def __init__(self, book, skip):
        super().__init__()
        self.book = book
        self.cut = nn.Conv3d(1, 32, 4, 4)
        self.look = nn.Conv3d(32, 32, 3, padding=1)
        self.down = nn.Conv3d(32, book.dim, 1)
        self.up = nn.Conv3d(book.dim, 32, 3, padding=1)
        self.paint = nn.ConvTranspose3d(32, 1, 4, 4)
        self.skip = nn.Conv3d(32, 32, 1) if skip else None

    def encode(self, x):
        first = F.gelu(self.cut(x))
        return self.down(first + F.gelu(self.look(first))), first

    def forward(self, x):
        z, first = self.encode(x)
        q = self.book(z)
        h = F.gelu(self.up(q.values))
        return self.paint(h if self.skip is None else h + self.skip(first)), q


def cubes(numbers):
    knobs = VesselKnobs(cells=0, sheets=0, haze=0, hollow=0, animal=0, texture=0.2, background=0.15)
    out = []
    for n in numbers:
        image, label = vessel_volume("lightsheet", 0, knobs, n)
        low, high = np.percentile(image, (0.5, 99.8))
        v = torch.from_numpy(
            np.stack([np.clip((image - low) / (high - low), 0, 1), label > 0]).astype(np.float32)
        )
        out.append(
            v.reshape(2, 2, 32, 2, 32, 2, 32)
            .permute(0, 1, 3, 5, 2, 4, 6)
            .reshape(2, 8, 1, 32, 32, 32)
        )
    return torch.cat(out, 1)


def fit(book, images, variance, skip=False, start=True, steps=200):
    torch.manual_seed(0)
    net = AutoEncoder(book, skip).train()
    log = []
    if start:
        with torch.no_grad():
            book.start(net.encode(images[:40])[0])
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3, fused=True)
    for i in range(steps):
        for g in optimiser.param_groups:
            g["lr"] = 3e-3 * min(1, (i + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
        book.restarting = i < 0.9 * steps
        x = images[torch.randint(len(images), (4,), generator=torch_rng(0, "batch", i))]
        out, q = net(x)
        loss = F.mse_loss(out, x) / variance + q.loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        log.append(int(book.restarted))
    return net.eval(), np.diff(log, prepend=0)


@torch.no_grad()
def judged(net, held, book=None):
    own = net.book
    net.book = book or net.book
    out, q = net(held)
    net.book = own
    return (F.mse_loss(out, held) / held.var()).item(), q.index


@pytest.fixture(scope="module")
def learned():
    """Trained once: healthy, with a skip, textbook (images as they come), one code; with their
    held-out error, codes, and log of restarts."""
    images = cubes(range(12))[0]
    held, mask = cubes(range(100, 106))
    centre = images.mean()
    scale = images.std()
    share = F.avg_pool3d(mask, 4)[:, 0]

    def standard(x):
        return (x - centre) / scale

    found = {}

    def add(name, book, raw=False, **k):
        view = (lambda x: x) if raw else standard
        net, log = fit(book, view(images), view(images).var(), **k)
        error, index = judged(net, view(held))
        found[name] = dict(
            net=net,
            log=log,
            error=error,
            held=view(held),
            health=codebook_health(index, share, book.codes),
            factor=judged(net, view(held), shuffle_codes(book))[0] / error,
        )
        print(
            name,
            f"error {error:.3f} shuffle {found[name]['factor']:.2f}",
            found[name]["health"],
            log.reshape(10, -1).sum(1),
        )

    add("healthy", Codebook(K, 16, decay=0.95))
    add("skip", Codebook(K, 16, decay=0.95), skip=True)
    add("textbook", Codebook(K, 16, cosine=False, update="gradient"), start=False, raw=True)
    add("one code", Codebook(1, 16, decay=0.95, restart=0), steps=60)
    return found


def healthy(h):
    return (
        h["active"] >= 0.8
        and h["perplexity"] >= 0.3 * K
        and h["active_vessel"] >= 0.4
        and h["nmi"] >= 0.45
    )


@pytest.mark.slow
def test_codes_are_in_use_and_speak_of_vessels(learned):  # A8
    assert healthy(learned["healthy"]["health"]), learned["healthy"]["health"]


@pytest.mark.slow
def test_textbook_settings_collapse(learned):  # A8, negative control
    h = learned["textbook"]["health"]
    assert not healthy(h) and h["active"] <= 0.1 and h["perplexity"] < 3 and h["nmi"] < 0.2, h


@pytest.mark.slow
def test_the_decoder_reads_the_codes(learned):  # A9
    run = learned["healthy"]
    assert run["factor"] >= 3
    assert judged(run["net"], run["held"], average_codes(run["net"].book))[0] == pytest.approx(
        1, abs=0.25
    )
    moved = copy.deepcopy(
        run["net"].book
    )  # the table itself permuted: the search follows, nothing changes
    moved.table.copy_(moved.table[torch.randperm(K, generator=torch_rng(0, "moved"))])
    assert judged(run["net"], run["held"], moved)[0] == pytest.approx(run["error"], abs=1e-5)


@pytest.mark.slow
def test_with_a_skip_it_does_not(learned):  # A9, negative control
    run = learned["skip"]
    assert (
        run["factor"] < 1.1
        and run["error"] < learned["healthy"]["error"]
        and run["health"]["active"] > 0.8
    )


@pytest.mark.slow
def test_reconstruction(learned):  # A10
    assert (
        learned["healthy"]["error"] < 0.5
        and learned["healthy"]["error"] < 0.9 * learned["one code"]["error"]
    )


@pytest.mark.slow
def test_restarts_fall_and_end(learned):  # A11
    log = learned["healthy"]["log"]
    assert log.sum() > 0 and log[180:].sum() == 0 and log[100:].sum() < log[:100].sum()


# ---- several processes

STATE = ("table", "counts", "sums", "steps", "restarted")
SETTINGS = [
    dict(cosine=True, restart=2.0),
    dict(cosine=False, restart=2.0),
    dict(cosine=True, restart=0.0),
]


def joint_batch(step):
    "Features (4,8,3,3,3) of two processes together; process 1 has three of the four."
    return normal_of("joint", step, 4, 8, 3, 3, 3) + 2 * (
        step > 6
    )  # they move on, so that codes die


def run_book(config, part, look=lambda book: None):
    "Eight steps on a part of each joint batch; the state after every step."
    book = Codebook(24, 8, decay=0.6, seed=3, **config)
    states = []
    book.start(normal_of("start", 0, 400, 8))
    for step in range(12):
        book(joint_batch(step)[part])
        look(book)
        states.append({k: getattr(book, k).clone() for k in STATE})
    return states


def _process(rank, port, folder):
    from accelerate import Accelerator

    from unpaired_kd.training.processes import average_buffers

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    part = slice(0, 1) if rank == 0 else slice(1, 4)
    found = [
        run_book(
            c, part, lambda book: average_buffers({"teacher": nn.ModuleList([book])}, accelerator)
        )
        for c in SETTINGS
    ]
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_that_sees_the_joint_batch(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    for config, a, b in zip(SETTINGS, first, second):
        alone = run_book(config, slice(None))
        assert (alone[-1]["restarted"] > 0) == (config["restart"] > 0)
        for step, (x, y, z) in enumerate(zip(a, b, alone)):
            for k in STATE:
                assert torch.equal(x[k], y[k]), (config, step, k)
                assert (x[k] - z[k]).abs().max() <= 2e-6 * max(1, z[k].abs().max()), (
                    config,
                    step,
                    k,
                )
            if config["cosine"]:
                assert (x["table"].norm(dim=1) - 1).abs().max() < 1e-6


def test_restarts_of_one_process_are_drawn_as_ever():
    """By hand: the dead codes take the rows of the permutation of this seed and step, and begin
    at the threshold."""
    rows = unit_vectors(normal(30, 4))
    book = Codebook(6, 4, restart=2.0, decay=0.5, seed=5)
    book.counts.copy_(torch.tensor([9.0, 1, 9, 0, 1, 9]))
    book.steps.fill_(7)
    old = book.table.clone()
    book._restart(rows)
    chosen = torch.randperm(30, generator=torch_rng(5, "restart", 7))[:3]
    assert torch.equal(book.table[[1, 3, 4]], rows[chosen]) and torch.equal(
        book.table[[0, 2, 5]], old[[0, 2, 5]]
    )
    assert (
        book.counts.tolist() == [9, 2, 9, 2, 2, 9]
        and book.restarted == 3
        and torch.equal(book.sums[3], 2 * book.table[3])
    )


def test_a_restarted_code_is_not_restarted_again():
    "One dead code, and tokens that keep it alive afterwards: one restart, not one a step."
    book = Codebook(2, 2, cosine=False, restart=1.0, decay=0.9, seed=0)
    book.table.copy_(torch.tensor([[0.0, 0], [50, 50]]))
    book.counts.copy_(torch.tensor([10.0, 0.5]))
    book.sums.copy_(book.counts[:, None] * book.table)
    left = torch.zeros(8, 2)
    right = torch.full((8, 2), 4.0)
    for _ in range(4):
        book(torch.cat([left, right]).T[None])
    assert book.restarted == 1 and sorted(book.table.round().tolist()) == [[0, 0], [4, 4]]


def test_the_start_counts_tokens_by_the_size_of_each_code():
    """Three clusters of 10, 30 and 60 tokens: counts are 10 a code on average, shared out by
    size; sums are counts times rows."""
    centres = torch.tensor([[0.0, 0], [100, 0], [0, 100]])
    tokens = torch.cat([c + 0.01 * normal(n, 2, seed=n) for c, n in zip(centres, (10, 30, 60))])
    book = Codebook(3, 2, cosine=False).start(tokens)
    order = torch.cdist(centres, book.table).argmin(1)
    assert torch.allclose(book.counts[order], torch.tensor([3.0, 9, 18]), atol=1e-5)
    assert torch.allclose(book.sums, book.counts[:, None] * book.table)
