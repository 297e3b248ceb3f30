"""Pictures and figures of networks and volumes against plain loops, in float64."""

import importlib.machinery
import itertools
import sys
import types

import numpy as np
import pytest
import torch

from unpaired_kd.analysis import tsne
from unpaired_kd.analysis.feature_maps import (
    compare_features,
    correlate_channels,
    linear_cka,
    match_channels,
    tile_maps,
)
from unpaired_kd.analysis.tsne import (
    Separation,
    compare_separations,
    crop_window,
    embed_features,
    measure_separation,
    sample_pixels,
)
from unpaired_kd.analysis.volume_views import classify_errors, project_errors, project_volume

RNG = np.random.default_rng(0)


# ---------------------------------------------------------------- channels
def correlation(a, b):
    "Pearson's, written out."
    a = [float(v) for v in np.ravel(a)]
    b = [float(v) for v in np.ravel(b)]
    x = [v - sum(a) / len(a) for v in a]
    y = [v - sum(b) / len(b) for v in b]
    both = sum(v * w for v, w in zip(x, y))
    return both / (sum(v * v for v in x) * sum(w * w for w in y)) ** 0.5


A = RNG.standard_normal((3, 4, 5)) + 2
B = RNG.standard_normal((4, 4, 5)) - 1


def test_correlations_of_channels():
    want = [[correlation(a, b) for b in B] for a in A]
    np.testing.assert_allclose(correlate_channels(A, B), want, atol=1e-12)


def test_the_partners_are_the_best_of_all():
    orders = list(itertools.permutations(range(4), 3))
    sums = [sum(correlation(A[i], B[j]) for i, j in enumerate(order)) for order in orders]
    best = orders[int(np.argmax(sums))]
    order, r = match_channels(A, B)
    assert order.tolist() == list(best)
    assert r.sum() == pytest.approx(max(sums), abs=1e-12)
    figures = compare_features(A, B)
    assert figures["matched"] == pytest.approx(max(sums) / 3, abs=1e-12)
    assert figures["tied"] == pytest.approx(sums[orders.index((0, 1, 2))] / 3, abs=1e-12)


def test_linear_cka_is_its_formula():
    "|X'Y|² / (|X'X| |Y'Y|) of centred channels, positions as rows; one loop for each sum."

    def gram(x, y):
        "Sum of the squares of all products of two channels."
        return sum(float(a @ b) ** 2 for a in x for b in y)

    x = [a.ravel() - a.mean() for a in A]
    y = [b.ravel() - b.mean() for b in B]
    want = gram(x, y) / (gram(x, x) * gram(y, y)) ** 0.5
    assert linear_cka(A, B) == pytest.approx(want, abs=1e-12)


def test_tiles_stand_row_by_row_each_in_its_own_range():
    maps = np.array([[[0, 2]], [[5, 1]], [[3, 3]]], float)
    line = [1.0] * 6
    assert tile_maps(maps, 2).tolist() == [
        [0, 1, 1, 1, 0, 1],
        line,
        [0, 0, 1, 1, 1, 1],
        line,
    ]


# ---------------------------------------------------------------- pixels
def test_the_window_is_around_the_middle_of_the_box():
    mask = np.zeros((20, 30), bool)
    mask[8:12, 21:25] = True
    rows, columns = crop_window(mask, 8)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (6, 14, 19, 27)
    mask[8:12, 28:30] = True
    assert crop_window(mask, 10)[1] == slice(20, 30)


def test_half_of_the_pixels_of_each_case_are_foreground():
    label = np.zeros((12, 12), int)
    label[4:6, 4:8] = 3
    pixels = sample_pixels([label, label.T], most=20, crop=6, seed=1)
    for case, y in enumerate((label, label.T)):
        mine = pixels.case == case
        values = y[pixels.row[mine], pixels.column[mine]]
        assert (values > 0).tolist() == pixels.label[mine].tolist()
        assert pixels.label[mine].sum() == 5 and mine.sum() == 10


def test_a_small_structure_gives_all_of_its_pixels():
    label = np.zeros((12, 12), int)
    label[4:6, 4:8] = 1
    pixels = sample_pixels([label], most=1000, crop=6)
    foreground = zip(pixels.row[pixels.label].tolist(), pixels.column[pixels.label].tolist())
    assert sorted(foreground) == [(row, column) for row in (4, 5) for column in (4, 5, 6, 7)]
    assert len(pixels.label) == 16


def test_a_value_between_pixels_of_a_coarse_map():
    "A map of 1 x 2 enlarged to 1 x 4: bilinear, pixel centres at (k + 1/2) / 4."
    coarse = torch.tensor([[[[0.0, 8.0]]]], dtype=torch.float64)
    columns = torch.arange(4)
    found = tsne._read_at(coarse, torch.zeros(4, dtype=torch.long), columns, (1, 4))
    assert found[:, 0].tolist() == pytest.approx([0, 2, 6, 8])


# ---------------------------------------------------------------- t-SNE
FEATURES = RNG.standard_normal((60, 5)) * [1, 10, 100, 1, 1] + [0, 5, 7, 0, 0]


def principal_components(x):
    "Components of standardised channels by their covariance, largest first; signs are free."
    z = (x - x.mean(0)) / x.std(0)
    values, vectors = np.linalg.eigh(z.T @ z)
    return z @ vectors[:, np.argsort(values)[::-1]]


@pytest.fixture(params=["sklearn", "opentsne"])
def asked(request, monkeypatch):
    "What an engine is asked for, with a stand-in for it: (name, settings, points)."
    found = {}

    class TSNE:
        def __init__(self, **settings):
            found.update(settings)

        def fit_transform(self, x):
            found["x"] = x
            return x[:, :2] + 1

        fit = fit_transform

    if request.param == "sklearn":
        monkeypatch.setattr("sklearn.manifold.TSNE", TSNE)
    else:
        module = types.ModuleType("openTSNE")
        module.TSNE = TSNE
        module.__spec__ = importlib.machinery.ModuleSpec("openTSNE", None)
        monkeypatch.setitem(sys.modules, "openTSNE", module)
    done = embed_features(FEATURES, request.param, perplexity=7, iterations=400, seed=3, threads=2)
    return request.param, found, done


def test_the_points_are_the_principal_components_of_standardised_channels(asked):
    _, found, _ = asked
    want = principal_components(FEATURES)
    np.testing.assert_allclose(np.abs(found["x"]), np.abs(want), atol=1e-9)


def test_the_start_is_at_the_first_two_components_a_ten_thousandth_wide(asked):
    engine, found, _ = asked
    start = found["init" if engine == "sklearn" else "initialization"]
    first_two = found["x"][:, :2]
    want = first_two / first_two[:, 0].std() * 1e-4
    np.testing.assert_allclose(start, want, rtol=1e-5)
    assert np.std(start[:, 0]) == pytest.approx(1e-4, rel=1e-5)


def test_the_engine_gets_its_settings(asked):
    engine, found, done = asked
    assert (found["perplexity"], found["random_state"], found["n_jobs"]) == (7, 3, 2)
    if engine == "sklearn":
        assert (found["max_iter"], found["learning_rate"]) == (400, "auto")
    else:
        assert found["n_iter"] == 150  # and 250 with exaggeration
    assert (done.engine, done.perplexity, done.iterations) == (engine, 7.0, 400)
    np.testing.assert_allclose(done.xy, found["x"][:, :2] + 1, rtol=1e-6)


def test_a_single_channel_begins_on_a_line(monkeypatch):
    found = {}

    class TSNE:
        def __init__(self, **settings):
            found.update(settings)

        def fit_transform(self, x):
            return np.zeros((len(x), 2))

    monkeypatch.setattr("sklearn.manifold.TSNE", TSNE)
    embed_features(FEATURES[:, :1], "sklearn", perplexity=7, iterations=250)
    assert (found["init"][:, 1] == 0).all()
    assert np.std(found["init"][:, 0]) == pytest.approx(1e-4, rel=1e-5)


# ---------------------------------------------------------------- separation
def test_neighbours_of_other_cases_vote_on_the_scale_of_those_cases():
    """Written out: leave one case out, scale by the others, and let the 3 nearest pixels vote. The
    cases are of unlike scale, so that a scale of all pixels would give other neighbours."""
    case = np.repeat(np.arange(4), 10)
    y = np.tile([0, 1], 20)
    x = RNG.standard_normal((40, 3)) + 0.6 * y[:, None]
    x[case == 3, 0] *= 40
    want = []
    for held_out in range(4):
        train = case != held_out
        middle = x[train].mean(0)
        width = x[train].std(0)
        right = 0
        for pixel in np.flatnonzero(~train):
            steps = (x[train] - middle) / width - (x[pixel] - middle) / width
            nearest = np.argsort((steps**2).sum(1))[:3]
            right += (y[train][nearest].sum() >= 2) == y[pixel]
        want.append(right / 10)
    found = measure_separation(x, y, case, neighbours=3, folds=4)
    assert found.knn_case.tolist() == pytest.approx(want)
    assert found.knn == pytest.approx(np.mean(want))
    assert found.cases == [0, 1, 2, 3]


def test_the_auc_is_that_of_pairs_within_a_case():
    "A feature that orders all pixels, but shifted from case to case: within each it is perfect."
    case = np.repeat(np.arange(4), 10)
    y = np.tile([0, 1], 20)
    x = (y + 0.1 * RNG.standard_normal(40))[:, None] + 100.0 * case[:, None]
    assert measure_separation(x, y, case, neighbours=3).auc_case.tolist() == [1.0] * 4
    assert measure_separation(-x, y, case, neighbours=3).auc_case.tolist() == [1.0] * 4


def test_the_difference_is_second_minus_first():
    "Three cases: mean difference, and Student's interval by hand (t = 4.3027 for 2 degrees)."

    def separation(knn, auc):
        return Separation(0, 0, 0, 0, list("abc"), np.array(knn), np.array(auc))

    a = separation([0.5, 0.6, 0.7], [0.5, 0.5, 0.5])
    b = separation([0.6, 0.8, 0.7], [0.9, 0.8, 0.7])
    found = compare_separations(a, b)
    for name, d in (("knn", [0.1, 0.2, 0.0]), ("auc", [0.4, 0.3, 0.2])):
        mean = sum(d) / 3
        error = (sum((v - mean) ** 2 for v in d) / 2 / 3) ** 0.5
        want = (mean, mean - 4.302653 * error, mean + 4.302653 * error)
        assert found[name] == pytest.approx(want, abs=1e-6)


# ---------------------------------------------------------------- volumes
def test_projections_are_maxima_along_each_axis():
    v = RNG.integers(-9, 9, (3, 4, 5))
    found = project_volume(v, slab=2)
    for (axis, name), shape in zip(enumerate("zyx"), ((4, 5), (3, 5), (3, 4))):
        want = [
            [max(np.moveaxis(v, axis, -1)[i, j]) for j in range(shape[1])] for i in range(shape[0])
        ]
        assert found[name].tolist() == want


def test_thick_slices_become_several_rows():
    "Slices of 2.5 pixels: two of them are five rows, each row shows the slice at its middle."
    v = np.array([[[1, 2]], [[3, 4]]])
    assert project_volume(v, (2.5, 1, 1))["y"].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4], [3, 4]]


def test_kinds_of_answers_and_the_most_frequent_one_on_a_line():
    "0 background, 1 correct, 2 extra, 3 missed; a tie is missed before extra before correct."
    pred = np.array([[0, 1, 1, 0]])
    target = np.array([[0, 1, 0, 1]])
    assert classify_errors(pred, target).tolist() == [[0, 1, 2, 3]]
    for kinds, want in [
        ((1, 1, 2, 3), 1),
        ((2, 2, 1, 3), 2),
        ((3, 3, 1, 2), 3),
        ((1, 2, 0, 0), 2),
        ((2, 3, 0, 0), 3),
        ((1, 3, 0, 0), 3),
        ((0, 0, 0, 1), 1),
        ((0, 0, 0, 0), 0),
    ]:
        line = np.array(kinds)[:, None, None]
        maps, counts = project_errors(np.isin(line, (1, 2)), np.isin(line, (1, 3)))
        assert maps["z"].item() == want, kinds
        assert maps["y"].ravel().tolist() == maps["x"].ravel().tolist() == list(kinds)
        names = ("background", "correct", "extra", "missed")
        assert counts == {name: kinds.count(k) for k, name in enumerate(names)}
