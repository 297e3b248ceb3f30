"""The start of t-SNE: the first two principal components, scaled to a spread of 1e-4."""

import numpy as np
import pytest

from unpaired_kd.analysis.tsne import embed_features

sklearn = pytest.importorskip("sklearn.manifold")


def test_it_begins_at_two_components_scaled_to_a_small_spread(monkeypatch):
    seen = {}

    class Probe:
        def __init__(self, init, **settings):
            seen.update(settings, init=init)

        def fit_transform(self, x):
            seen["x"] = x
            return np.zeros((len(x), 2))

    monkeypatch.setattr(sklearn, "TSNE", Probe)
    r = np.random.default_rng(0)
    features = r.standard_normal((80, 5)) @ np.diag([5.0, 3.0, 1.0, 1.0, 1.0])
    features = features @ r.standard_normal((5, 5)) + 7
    embed_features(features, "sklearn", perplexity=20, iterations=300, seed=3, components=3)
    scaled = (features - features.mean(0)) / features.std(0)
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    components = u * s
    start = seen["init"]
    assert start.shape == (80, 2) and seen["x"].shape == (80, 3)
    for k in range(2):
        wanted = components[:, k] / components[:, 0].std() * 1e-4
        sign = np.sign((wanted * start[:, k]).sum())
        assert np.allclose(start[:, k], sign * wanted, atol=1e-9)
    assert start[:, 0].std() == pytest.approx(1e-4, rel=1e-4)
    assert (seen["perplexity"], seen["max_iter"], seen["random_state"]) == (20, 300, 3)
