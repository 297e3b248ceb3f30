"""Codebooks by value: the quantiser, its moving means, k-means and restarts, FSQ, and the measures,
each against a computation written out here in float64.
"""

import math

import pytest
import torch

from unpaired_kd.core import torch_rng
from unpaired_kd.distillation.codebook import (
    FSQ,
    Codebook,
    average_codes,
    codebook_health,
    count_code_use,
    draw_joint_rows,
    nearest_code,
    rotate_onto,
    run_kmeans,
    shuffle_codes,
    vessel_information,
)
from unpaired_kd.distillation.patterns import (
    PatternProjector,
    average_to_grid,
    channel_kl,
    pattern_loss,
    token_code_ce,
    token_cosine,
)


def normal(*shape, name="x"):
    return torch.randn(shape, generator=torch_rng(0, name)).double()


def rows_of(z):
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def unit(v):
    return v / v.norm(dim=-1, keepdim=True)


def nearest(rows, table):
    "One by one, by the distance."
    return torch.tensor([min(range(len(table)), key=lambda j: (r - table[j]).norm()) for r in rows])


def codebook(cosine=True, **k):
    book = Codebook(5, 3, cosine, **{"decay": 0.8, "restart": 0.0, "seed": 2} | k).double()
    if book.update == "ema":
        table = normal(5, 3, name="table")
        book.table.copy_(unit(table) if cosine else table)
        book.counts.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
        book.sums.copy_(book.table * book.counts[:, None])
    return book


@pytest.mark.parametrize("gradient", ["straight", "rotate"])
@pytest.mark.parametrize("cosine", [True, False])
def test_values_gradients_and_commitment(cosine, gradient):
    book = codebook(cosine, gradient=gradient, beta=0.4)
    table = book.table.clone()
    z = normal(2, 3, 2, 2).requires_grad_()
    q = book(z)
    y = z.detach().clone().requires_grad_()
    rows = rows_of(y)
    rows = unit(rows) if cosine else rows
    index = nearest(rows.detach(), table)
    codes = table[index]
    assert torch.equal(q.index.flatten(), index)
    assert torch.allclose(rows_of(q.codes), codes) and not q.codes.requires_grad
    assert torch.allclose(rows_of(q.values), codes)
    loss = 0.4 * ((rows - codes) ** 2).mean()
    assert torch.allclose(q.loss, loss)
    w = normal(8, 3, name="w")
    a = torch.autograd.grad((rows_of(q.values) * w).sum(), z, retain_graph=True)[0]
    if gradient == "straight":
        through = rows
    else:  # turn and stretch, held constant
        through = torch.zeros_like(rows)
        for i in range(8):
            u = unit(rows[i].detach())
            v = unit(codes[i])
            r = unit(u + v)
            turn = torch.eye(3).double() - 2 * torch.outer(r, r) + 2 * torch.outer(v, u)
            stretch = codes[i].norm() / rows[i].detach().norm()
            through[i] = stretch * (turn @ rows[i])
        assert torch.allclose(through, codes)
    b = torch.autograd.grad((through * w).sum(), y, retain_graph=True)[0]
    assert torch.allclose(a, b)
    assert torch.allclose(torch.autograd.grad(q.loss, z)[0], torch.autograd.grad(loss, y)[0])


@pytest.mark.parametrize("cosine", [True, False])
def test_three_steps_of_the_moving_means(cosine):
    book = codebook(cosine)
    table = book.table.clone()
    N = book.counts.clone()
    m = book.sums.clone()
    for step in range(3):
        z = normal(1, 3, 4, name=step)
        rows = unit(rows_of(z)) if cosine else rows_of(z)
        index = nearest(rows, table)
        book.train()(z)
        for j in range(5):
            N[j] = 0.8 * N[j] + 0.2 * (index == j).sum()
            m[j] = 0.8 * m[j] + 0.2 * rows[index == j].sum(0)
        total = N.sum()
        idle = [j for j in range(5) if j not in index]
        assert idle and torch.equal(book.table[idle], table[idle])  # to the last bit
        for j in set(index.tolist()):
            smoothed = (N[j] + 1e-5) / (total + 5 * 1e-5) * total
            table[j] = m[j] / m[j].norm() if cosine else m[j] / smoothed
        assert torch.allclose(book.table, table) and torch.allclose(book.counts, N)
        assert torch.allclose(book.sums, m)
        table = book.table.clone()
    assert book.steps == 3 and book.restarted == 0
    book.eval()(normal(1, 3, 4))
    assert torch.allclose(book.table, table)


def test_a_restart_by_hand():
    "A dead code becomes a token, its count the threshold, its sum both together, once."
    book = codebook(restart=2.5, decay=0.999)
    z = normal(1, 3, 40)
    rows = unit(rows_of(z))
    before = book.table.clone()
    drawn = rows[torch.randperm(40, generator=torch_rng(2, "restart", 0))[:2]]
    book.train()(z)
    assert book.restarted == 2  # counts of about 1 and 2 are below 2.5
    assert torch.allclose(book.table[:2], drawn)
    assert torch.allclose(book.counts[:2], torch.tensor([2.5, 2.5]).double())
    assert torch.allclose(book.sums[:2], 2.5 * drawn)
    assert torch.allclose(book.table[2:], before[2:], atol=0.05)
    book.restart = 2.0
    kept = book.table[:2].clone()
    book(z)
    assert book.restarted == 2 and torch.allclose(book.table[:2], kept, atol=0.05)
    book.restart = 100.0
    book.restarting = False
    book(z)
    assert book.restarted == 2


def test_rows_are_drawn_once():
    rows = normal(6, 3)
    drawn = draw_joint_rows(rows, 4, torch_rng(0, "d"))
    order = torch.randperm(6, generator=torch_rng(0, "d"))[:4]
    assert torch.equal(drawn, rows[order])
    assert len(draw_joint_rows(rows, 9, torch_rng(0, "d"))) == 6


def kmeans_by_hand(tokens, first, steps, cosine):
    table = first.clone()
    for _ in range(steps):
        owner = nearest(tokens, table)
        for j in range(len(table)):
            own = tokens[owner == j]
            if len(own):
                table[j] = unit(own.mean(0)) if cosine else own.mean(0)
    return table, torch.bincount(nearest(tokens, table), minlength=len(table)).double()


@pytest.mark.parametrize("cosine", [True, False])
def test_kmeans_by_hand(cosine):
    tokens = normal(60, 3, name="tokens")
    prepared = unit(tokens) if cosine else tokens
    distinct = prepared.unique(dim=0)
    first = distinct[torch.randperm(60, generator=torch_rng(4, "kmeans"))[:4]]
    expected, sizes = kmeans_by_hand(prepared, first, 3, cosine)
    table, counts = run_kmeans(tokens, 4, cosine, 3, 4)
    assert torch.allclose(table, expected) and torch.equal(counts, sizes)
    start, _ = run_kmeans(tokens, 4, cosine, 0, 4)
    assert torch.allclose(start, first)


def test_the_start_takes_table_and_sizes_of_kmeans():
    "Three clusters of 30, 20 and 10 tokens: counts of 10 a code on average, by size."
    middles = torch.eye(3).double() * 5
    parts = [m + 0.05 * normal(n, 3, name=n) for m, n in zip(middles, (30, 20, 10))]
    book = Codebook(3, 3, False, seed=0).double().start(torch.cat(parts))
    for part, n in zip(parts, (30, 20, 10)):
        j = int((book.table - part.mean(0)).norm(dim=1).argmin())
        assert torch.allclose(book.table[j], part.mean(0))
        assert book.counts[j].item() == pytest.approx(n / 2)
        assert torch.allclose(book.sums[j], n / 2 * part.mean(0))


def test_a_code_without_tokens_takes_the_farthest_one():
    tokens = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1]]).double()
    for seed in range(6):
        table, counts = run_kmeans(tokens, 4, steps=8, seed=seed)
        assert len(table.unique(dim=0)) == 4 and counts.min() >= 1


def test_a_table_by_gradient():
    "The codebook term pulls codes to tokens, the commitment tokens to codes."
    book = codebook(False, update="gradient", beta=0.4)
    z = normal(1, 3, 6).requires_grad_()
    table = book.table.detach().clone().requires_grad_()
    rows = rows_of(z)
    codes = table[nearest(rows.detach(), table.detach())]
    loss = ((rows.detach() - codes) ** 2).mean() + 0.4 * ((rows - codes.detach()) ** 2).mean()
    q = book(z)
    assert torch.allclose(q.loss, loss)
    a = torch.autograd.grad(q.loss, [z, book.table])
    b = torch.autograd.grad(loss, [z, table])
    assert all(torch.allclose(x, y) for x, y in zip(a, b))
    long = Codebook(3, 2, True, update="gradient").double()
    with torch.no_grad():
        long.table.mul_(7)
    assert torch.allclose(long.rows().norm(dim=1), torch.ones(3).double())


def test_shuffled_and_averaged_codes():
    book = codebook().eval()
    z = normal(1, 3, 9)
    index = book(z).index
    order = torch.randperm(5, generator=torch_rng(1, "shuffled"))
    shuffled = shuffle_codes(book, 1)
    q = shuffled(z)
    assert torch.equal(q.index, index) and shuffled.frozen
    assert torch.allclose(rows_of(q.values), book.table[order][index.flatten()])
    assert torch.allclose(rows_of(shuffled.lookup(index)), book.table[order][index.flatten()])
    q = average_codes(book)(z)
    assert torch.allclose(rows_of(q.values), book.table.mean(0).expand(9, 3))


def test_fsq_by_hand():
    fsq = FSQ((3, 4, 2))
    z = normal(2, 3, 3).requires_grad_()
    q = fsq(z)
    for b in range(2):
        for i in range(3):
            number = 0
            place = 1
            for c, n in enumerate((3, 4, 2)):
                level = round((math.tanh(z[b, c, i].item()) + 1) * (n - 1) / 2)
                assert q.values[b, c, i].item() == pytest.approx(2 * level / (n - 1) - 1)
                number += level * place
                place *= n
            assert q.index[b, i] == number
    assert torch.allclose(fsq.lookup(q.index).double(), q.codes) and q.loss == 0
    grad = torch.autograd.grad(q.values.sum(), z)[0]
    assert torch.allclose(grad, 1 - z.detach().tanh() ** 2)


def test_use_and_information_by_hand():
    index = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    share = torch.tensor([0.0, 0.1, 0.9, 0.0, 0.3, 1.0, 0.95, 0.5])
    p = [3 / 8, 2 / 8, 3 / 8]
    use = count_code_use(index, 5)
    assert use["active"] == pytest.approx(3 / 5)
    assert use["perplexity"] == pytest.approx(math.exp(-sum(v * math.log(v) for v in p)))
    bins = [0, 0, 4, 0, 1, 4, 4, 2]
    pairs = list(zip(index.tolist(), bins))

    def entropy(values):
        return -sum(values.count(v) / 8 * math.log(values.count(v) / 8) for v in set(values))

    mutual = entropy(index.tolist()) + entropy(bins) - entropy(pairs)
    assert vessel_information(index, share, 5) == pytest.approx(mutual / entropy(bins))
    health = codebook_health(index, share, 5)
    assert health["active_vessel"] == pytest.approx(3 / 5)
    assert codebook_health(index[:1], share[:1], 5)["active_vessel"] == 0


# ---------------------------------------------------------------- pattern losses


@pytest.mark.parametrize("weighted", [False, True])
def test_pattern_losses_by_hand(weighted):
    u = normal(2, 3, 2, 2, name="u")
    table = normal(5, 3, name="t")
    index = torch.randint(5, (2, 2, 2), generator=torch_rng(0, "i"))
    codes = table[index].movedim(-1, 1)
    w = torch.rand(2, 2, 2, generator=torch_rng(0, "w")).double() + 0.5
    if not weighted:
        w = torch.ones_like(w)
    cosine = code_ce = channel = 0.0
    for b in range(2):
        for i in range(4):
            v = unit(u[b].flatten(1)[:, i])
            j = index[b].flatten()[i]
            weight = w[b].flatten()[i] / w.sum()
            cosine = cosine + weight * (1 - v @ unit(table[j]))
            scores = (unit(table) @ v / 0.1).exp()
            code_ce = code_ce - weight * (scores[j] / scores.sum()).log()
        for c in range(3):
            p = w[b].flatten() * (unit(rows_of(codes[b : b + 1]))[:, c] / 4).exp()
            q = w[b].flatten() * (unit(rows_of(u[b : b + 1]))[:, c] / 4).exp()
            p = p / p.sum()
            q = q / q.sum()
            channel = channel + 16 / 6 * (p * (p / q).log()).sum()
    given = w if weighted else None
    for kind, expected in (("cosine", cosine), ("code_ce", code_ce), ("channel", channel)):
        found = pattern_loss(u, codes, kind, index, table, weight=given)
        assert torch.allclose(found, expected), kind
    if not weighted:
        warm = pattern_loss(u, codes, "code_ce", index, table, tau=0.5)
        assert torch.allclose(warm, token_code_ce(u, index, table, 0.5).mean())
        assert abs(warm - code_ce) > 0.01
        assert torch.allclose(pattern_loss(u, codes), token_cosine(u, codes).mean())
        soft = pattern_loss(u, codes, "channel", tau=2.0)
        assert torch.allclose(soft, channel_kl(u, codes, 2.0)) and abs(soft - channel) > 1e-4


def test_projector_and_grid_by_hand():
    phi = PatternProjector(4, 3, 2, seed=1)
    f = normal(2, 4, 2, 2, name="f").float()
    v = torch.einsum("dc,bcij->bdij", phi.phi.weight[:, :, 0, 0], f)
    expected = v / v.norm(dim=1, keepdim=True)
    assert torch.allclose(phi(f), expected, atol=1e-6) and phi.phi.bias is None
    x = torch.arange(6.0)[None, None, None]
    got = average_to_grid(x, (1, 4))[0, 0, 0]
    shares = [(0 + 0.5 * 1) / 1.5, (0.5 * 1 + 2) / 1.5, (3 + 0.5 * 4) / 1.5, (0.5 * 4 + 5) / 1.5]
    assert torch.allclose(got, torch.tensor(shares), atol=1e-6)
    y = normal(1, 2, 4, 6)
    coarse = average_to_grid(y, (2, 3))
    assert torch.allclose(coarse, y.reshape(1, 2, 2, 2, 3, 2).mean((3, 5)))


def test_ties_and_blocks():
    "The first of two equal codes; blocks of any size give the same numbers."
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest_code(torch.tensor([[2.0, 0.1]]), table).tolist() == [0]
    z = normal(37, 3).float()
    table = normal(9, 3, name="t").float()
    assert torch.equal(nearest_code(z, table, 5), nearest(z, table))
    assert torch.allclose(
        rotate_onto(z, table[nearest(z, table)]), table[nearest(z, table)], atol=1e-5
    )
