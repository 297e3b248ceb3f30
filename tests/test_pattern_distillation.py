"Pattern distillation: identities (A7), faults, number formats, both dimensions."

import pytest
import torch
import torch.nn.functional as F

from unpaired_kd.core import InputError, torch_rng
from unpaired_kd.distillation.codebook import unit_vectors
from unpaired_kd.distillation.patterns import (
    PatternProjector,
    average_to_grid,
    channel_kl,
    check_same_codebook,
    codebook_digest,
    pattern_loss,
    token_code_ce,
    token_cosine,
)

KINDS = ("cosine", "code_ce", "channel")

GRIDS = [(5, 4), (3, 4, 2)]


def case(grid=(3, 4, 2), D=6, K=11, B=2, dtype=torch.float64):
    g = torch_rng(0, "case", *grid)
    table = unit_vectors(torch.randn(K, D, generator=g, dtype=torch.float64)).to(dtype)
    index = torch.randint(K, (B, *grid), generator=g)
    return (
        torch.randn(B, D, *grid, generator=g, dtype=dtype),
        table[index].movedim(-1, 1),
        index,
        table,
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_half_of_the_squared_distance(grid):
    u, z, *_ = case(grid)
    assert abs(pattern_loss(u, z) - (F.normalize(u, dim=1) - z).square().sum(1).mean() / 2) < 1e-12


def test_zero_exactly_where_the_student_is_the_code():
    u, z, index, table = case()
    for kind in ("cosine", "channel"):
        assert abs(pattern_loss(3 * z, z, kind)) < 1e-12
    for i in range(z[0, 0].numel()):  # one token moved a little: never zero
        v = z.clone().flatten(2)
        v[0, :, i] += 0.05 * u.flatten(2)[0, :, i]
        assert (
            pattern_loss(v.view_as(z), z) > 1e-6 and pattern_loss(v.view_as(z), z, "channel") > 1e-6
        )
    assert pattern_loss(-z, z) == pytest.approx(2, abs=1e-12)


def test_code_ce_has_the_right_code_as_its_class_but_not_as_its_minimum():
    _, z, index, table = case()
    u = z.clone().requires_grad_()
    pattern_loss(u, z, "code_ce", index, table).backward()
    assert u.grad.abs().max() > 1e-6
    wrong = (index + 1) % len(table)
    assert pattern_loss(z, z, "code_ce", index, table) < pattern_loss(z, z, "code_ce", wrong, table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_scale_invariance_and_gradients(kind, grid):
    u, z, index, table = case(grid)
    z = z.requires_grad_()
    table = table.requires_grad_()
    w = torch.rand(index.shape, dtype=torch.float64).requires_grad_()
    scale = 10 ** torch.linspace(-3, 3, u[:, :1].numel(), dtype=torch.float64).view_as(
        u[:, :1]
    )  # another factor for every token
    assert pattern_loss(u, z, kind, index, table, weight=w).item() == pytest.approx(
        pattern_loss(scale * u, z, kind, index, table, weight=w).item(), abs=1e-12
    )
    u = u.requires_grad_()
    pattern_loss(u, z, kind, index, table, weight=w).backward()
    assert z.grad is None and table.grad is None and w.grad is None and u.grad.abs().sum() > 0
    assert (u.grad * u).sum(1).abs().max() < 1e-12  # nothing pushes along the vector


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(3, 2), (2, 2, 2)])
def test_gradcheck(kind, grid):
    u, z, index, table = case(grid, D=3, K=4, B=1)
    w = torch.rand(index.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: pattern_loss(v, z, kind, index, table, tau=0.5, weight=w), u.requires_grad_()
    )


def test_formulas_by_hand():
    u, z, index, table = case()
    v = F.normalize(u, dim=1)
    D = u.shape[1]
    p, q = ((f.flatten(2) / 4).softmax(-1) for f in (z, v))
    assert pattern_loss(u, z, "channel") == pytest.approx(
        16 / D * (p * (p / q).log()).sum((1, 2)).mean().item(), abs=1e-12
    )
    scores = torch.einsum("bdxyz,kd->bkxyz", v, table) / 0.1
    assert pattern_loss(u, None, "code_ce", index, table) == pytest.approx(
        F.cross_entropy(scores, index).item(), abs=1e-12
    )
    assert pattern_loss(u, z, "code_ce", index, table, tau=1.0) == pytest.approx(
        F.cross_entropy(scores / 10, index).item(), abs=1e-12
    )
    assert channel_kl(u, z, 1.0) == pytest.approx(pattern_loss(u, z, "channel", tau=1.0).item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_a_count(kind):
    u, z, index, table = case((6,), B=1)
    counts = torch.tensor([3, 1, 2, 1, 0, 4])

    def rep(f):
        return f.repeat_interleave(counts, dim=-1)

    a = pattern_loss(u, z, kind, index, table, weight=counts[None].double())
    assert a.item() == pytest.approx(
        pattern_loss(rep(u), rep(z), kind, rep(index), table).item(), abs=1e-9
    )
    assert pattern_loss(
        u, z, kind, index, table, weight=torch.full((1, 6), 5.0)
    ).item() == pytest.approx(pattern_loss(u, z, kind, index, table).item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_low_precision_inputs(kind):
    u, z, index, table = case(dtype=torch.float32)
    plain = pattern_loss(u, z, kind, index, table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = pattern_loss(u, z, kind, index, table)
    assert under.dtype == torch.float32 and torch.equal(plain, under)
    half = u.bfloat16().requires_grad_()
    loss = pattern_loss(half, z, kind, index, table)
    loss.backward()
    assert (
        loss.dtype == torch.float32
        and abs(loss - plain) < 0.02 * plain
        and half.grad.dtype == torch.bfloat16
    )
    assert pattern_loss(u.double(), z, kind, index, table).dtype == torch.float64
    assert pattern_loss(u, z, kind, index.int(), table) == plain


def test_a_token_without_direction():
    u, z, *_ = case()
    u[0, :, 0, 0, 0] = 0
    u.requires_grad_()
    assert token_cosine(u, z)[0, 0, 0, 0] == 1
    pattern_loss(u, z).backward()
    assert u.grad.isfinite().all() and (u.grad[0, :, 0, 0, 0] == 0).all()
    assert torch.equal(
        unit_vectors(torch.full((1, 2), 1e-18, dtype=torch.float32)), torch.zeros(1, 2)
    )
    assert torch.allclose(unit_vectors(torch.tensor([[3e15, 4e15]])), torch.tensor([[0.6, 0.8]]))


def test_codes_of_other_lengths_count_by_direction():
    u, z, index, table = case()
    for kind in KINDS:
        assert pattern_loss(u, 5 * z, kind, index, 0.2 * table).item() == pytest.approx(
            pattern_loss(u, z, kind, index, table).item(), abs=1e-12
        )


def nan(t):
    t = t.clone(memory_format=torch.contiguous_format)
    t.view(-1)[0] = float("nan")
    return t


@pytest.mark.parametrize(
    "words, change",
    [
        ("grid", dict(codes=lambda c: c["codes"][..., :1])),
        ("grid", dict(codes=lambda c: c["codes"][:1])),
        ("grid", dict(codes=lambda c: c["codes"][..., 0])),
        ("projected to 6 dimensions", dict(codes=lambda c: c["codes"][:, :4])),
        ("needs `codes`", dict(codes=lambda c: None)),
        ("Known: channel", dict(kind=lambda c: "cos")),
        ("temperature", dict(tau=lambda c: 0)),
        ("temperature", dict(tau=lambda c: float("nan"))),
        ("numbers in u", dict(u=lambda c: nan(c["u"]))),
        ("numbers in codes", dict(codes=lambda c: nan(c["codes"]))),
        ("numbers in u", dict(u=lambda c: c["u"] * float("inf"))),
        ("B,D", dict(u=lambda c: c["u"][:, :, 0, 0, 0])),
        ("one number for each token", dict(weight=lambda c: torch.ones(2, 1, 3, 4, 2))),
        ("at least 0", dict(weight=lambda c: torch.zeros(2, 3, 4, 2))),
        ("at least 0", dict(weight=lambda c: nan(torch.ones(2, 3, 4, 2)))),
        ("at least 0", dict(weight=lambda c: torch.full((2, 3, 4, 2), -1.0))),
    ],
)
@pytest.mark.parametrize("kind", ("cosine", "channel"))
def test_faults(words, change, kind):
    u, z, index, table = case()
    args = dict(u=u, codes=z, kind=kind, index=index, table=table)
    with pytest.raises(InputError, match=words):
        pattern_loss(**args | {k: f(args) for k, f in change.items()})


@pytest.mark.parametrize(
    "words, change",
    [
        ("needs `index`", dict(index=None)),
        ("needs `index`", dict(table=None)),
        ("0 to 10", dict(index="+11")),
        ("0 to 10", dict(index="-1")),
        ("0 to 10", dict(index="float")),
        ("index has shape", dict(index="short")),
        ("table has shape", dict(table="flat")),
        ("projected", dict(table="wide", codes=None)),
        ("table", dict(table="nan")),
    ],
)
def test_faults_of_code_ce(words, change):
    u, z, index, table = case()
    made = {
        "+11": index + 11,
        "-1": index - 1 - index.max(),
        "float": index.double(),
        "short": index[:1],
        "flat": table[0],
        "wide": torch.ones(11, 7),
        "nan": nan(table),
        None: None,
    }
    with pytest.raises(InputError, match=words):
        pattern_loss(
            **dict(u=u, codes=z, kind="code_ce", index=index, table=table)
            | {k: made[v] for k, v in change.items()}
        )


def test_projector():
    before = torch.random.get_rng_state()
    a = PatternProjector(8, 4, 3, seed=1)
    b = PatternProjector(8, 4, 3, seed=1)
    c = PatternProjector(8, 4, 3, seed=2)
    assert torch.equal(
        before, torch.random.get_rng_state()
    )  # the student's own random numbers do not move
    assert torch.equal(a.phi.weight, b.phi.weight) and not torch.equal(a.phi.weight, c.phi.weight)
    f = torch.randn(2, 8, 3, 3, 2)
    u = a(f)
    assert u.shape == (2, 4, 3, 3, 2) and torch.allclose(
        u.square().sum(1), torch.ones(2, 3, 3, 2), atol=1e-6
    )
    assert torch.allclose(a(9 * f), u, atol=1e-6)  # no bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(a(f), u) and a(f.bfloat16()).dtype == torch.float32
    assert PatternProjector(8, 4, dims=2)(f[..., 0]).shape == (2, 4, 3, 3) and list(
        a.state_dict()
    ) == ["phi.weight"]
    for bad in (
        lambda: a(f[:, :4]),
        lambda: a(f[..., 0]),
        lambda: PatternProjector(8, 4, dims=1),
        lambda: PatternProjector(0, 4),
    ):
        with pytest.raises(InputError):
            bad()


def test_to_grid():
    f = torch.randn(2, 3, 8, 6, 4, dtype=torch.float64)
    assert torch.allclose(average_to_grid(f, (4, 3, 1)), F.avg_pool3d(f, (2, 2, 4)), atol=1e-12)
    assert torch.equal(average_to_grid(f, (8, 6, 4)), f)
    odd = average_to_grid(f, [5, 4, 3])
    assert torch.allclose(odd.mean((2, 3, 4)), f.mean((2, 3, 4)), atol=1e-12)
    assert torch.allclose(
        average_to_grid(torch.ones(1, 1, 13, 7), (12, 5)), torch.ones(1, 1, 12, 5), atol=1e-6
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            average_to_grid(f.float(), (5, 4, 3)), average_to_grid(f.float(), (5, 4, 3)).float()
        ) and torch.allclose(average_to_grid(f.float(), (5, 4, 3)).double(), odd, atol=1e-6)
    for bad in ((9, 6, 4), (8, 6), (0, 6, 4), (8, 6, 4, 1)):
        with pytest.raises(InputError):
            average_to_grid(f, bad)
    assert torch.autograd.gradcheck(
        lambda v: average_to_grid(v, (2, 2)),
        torch.randn(1, 1, 3, 5, dtype=torch.float64, requires_grad=True),
    )


def test_codebooks_are_told_apart():
    table = case()[3].float()
    d = codebook_digest(table)
    assert (
        d
        == check_same_codebook(d, table.double(), "t.pt")
        == codebook_digest(table.T.contiguous().T)
        and len(d) == 16
    )
    for other in (table.flip(0), table * (1 + 1e-6), table[:-1], table.reshape(6, 11)):
        with pytest.raises(InputError, match="t.pt.*another teacher"):
            check_same_codebook(d, other, "t.pt")
    with pytest.raises(InputError):
        codebook_digest(table[0])


def test_a_permuted_table_changes_the_target_unless_renumbered():
    _, z, index, table = case()
    order = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2])
    assert pattern_loss(z, table[order][index].movedim(-1, 1)) > 0.3
    assert pattern_loss(
        z, z, "code_ce", order.argsort()[index], table[order]
    ).item() == pytest.approx(pattern_loss(z, z, "code_ce", index, table).item(), abs=1e-12)


def test_token_maps_have_the_grid():
    u, z, index, table = case()
    assert token_cosine(u, z).shape == token_code_ce(u, index, table).shape == index.shape
