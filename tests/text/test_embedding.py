import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

from ctxkv_lightning.text import embedding


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices: two threads that wait for each other cost more than they bring, on a busy machine much more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text_like(length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """A stream whose tokens are frequent and rare, each followed by one of few."""
    generator = np.random.default_rng(seed)
    followers = np.minimum(generator.zipf(1.3, (vocab_size, 6)) - 1, vocab_size - 1)
    ids = np.zeros(length, np.int64)
    for t in range(1, length):
        ids[t] = followers[ids[t - 1], generator.integers(6)] if generator.random() < 0.7 else 0
        if ids[t] == 0:
            ids[t] = min(generator.zipf(1.2), vocab_size) - 1
    return ids


def slow_ppmi(ids: list[int], vocab_size: int, window: int) -> np.ndarray:
    counts = np.zeros((vocab_size, vocab_size))
    for t in range(len(ids)):
        for s in range(len(ids)):
            if 1 <= abs(s - t) <= window:
                counts[ids[t], ids[s]] += 1 / abs(s - t)
    smoothed = counts.sum(axis=0) ** embedding.CONTEXT_SMOOTHING
    result = np.zeros_like(counts)
    for w, c in zip(*counts.nonzero(), strict=True):
        joint = counts[w, c] / counts.sum()
        word, context = counts[w].sum() / counts.sum(), smoothed[c] / smoothed.sum()
        result[w, c] = max(0.0, math.log(joint / (word * context)))
    return result


def untrained_loss(table: torch.Tensor, ids: np.ndarray, seed: int = 7) -> float:
    """The mean loss of h = LayerNorm(E[x]) + LayerNorm(noise) against every next token, all logits at once."""
    D = table.shape[1]
    noise = torch.randn(len(ids) - 1, D, generator=torch.Generator().manual_seed(seed))
    ids = torch.from_numpy(ids)
    h = F.layer_norm(table[ids[:-1]], (D,)) + F.layer_norm(noise, (D,))
    return F.cross_entropy(h @ table.T, ids[1:]).item()


@pytest.mark.parametrize("window", [1, 2, 4, 50])
@pytest.mark.parametrize("ids", [[0], [3, 1], [2, 2, 2], [0, 1, 2, 1, 0, 1, 4, 4, 1, 2, 0, 1]])
def test_ppmi_equals_its_slow_twin(ids, window):
    fast = embedding.ppmi(np.array(ids), 6, window).toarray()
    np.testing.assert_allclose(fast, slow_ppmi(ids, 6, window), atol=1e-12)


def test_ppmi_equals_its_slow_twin_on_a_longer_stream():
    ids = text_like(200, 30)
    np.testing.assert_allclose(embedding.ppmi(ids, 30).toarray(), slow_ppmi(ids.tolist(), 30, 4), atol=1e-12)


@pytest.mark.parametrize("rank", [5, 40, 60])
def test_svd_equals_numpys_on_a_small_matrix(rank):
    dense = embedding.ppmi(text_like(400, 40), 40).toarray()
    U, S = embedding.truncated_svd(sparse.csr_array(dense), rank, seed=0)
    U_numpy, S_numpy, _ = np.linalg.svd(dense)
    K = min(rank, 40)
    assert U.shape == (40, K)
    np.testing.assert_allclose(S, S_numpy[:K], atol=1e-4 * S_numpy[0])
    # dense · denseᵀ = U S² Uᵀ is free of the signs that a singular vector may choose.
    np.testing.assert_allclose((U * S**2) @ U.T, (U_numpy[:, :K] * S_numpy[:K] ** 2) @ U_numpy[:, :K].T, atol=2e-2)


def test_randomised_svd_keeps_almost_all_that_rank_allows():
    dense = embedding.ppmi(text_like(5000, 300), 300).toarray()
    U, S = embedding.truncated_svd(sparse.csr_array(dense), 40, seed=0)
    best = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(S, best[:40], rtol=0.02)
    left = np.linalg.norm(dense - U.numpy() @ (U.numpy().T @ dense))
    assert left <= 1.01 * np.linalg.norm(best[40:])


def test_rows_point_where_singular_vectors_times_root_singular_values_do():
    ids = text_like(4000, 60)
    table = embedding.svd_table(ids, 60, 10)
    U, S, _ = np.linalg.svd(embedding.ppmi(ids, 60).toarray())
    gram = (U[:, :10] * S[:10]) @ U[:, :10].T
    lengths = np.sqrt(gram.diagonal())
    known = lengths > 1e-3
    assert known.sum() > 40
    cosines = F.normalize(table, dim=1) @ F.normalize(table, dim=1).T
    expected = gram[known][:, known] / np.outer(lengths[known], lengths[known])
    np.testing.assert_allclose(cosines.numpy()[known][:, known], expected, atol=1e-2)


def test_all_rows_are_of_one_length():
    lengths = embedding.svd_table(text_like(4000, 60), 70, 10).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(70))


def tables(vocab_size: int, dim: int, seed: int = 42):
    ids = text_like(3000, vocab_size)
    yield embedding.svd_table(ids, vocab_size, dim, seed=seed)
    yield embedding.random_table(vocab_size, dim, seed=seed)


def test_same_inputs_same_bits_and_the_global_random_state_untouched():
    torch.manual_seed(1)
    numpy_before, before = np.random.get_state()[1].copy(), torch.get_rng_state()
    once, again, other = (list(tables(200, 64, seed)) for seed in (42, 42, 43))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    for first, second, third in zip(once, again, other, strict=True):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


def test_calibration_is_the_same_whatever_scale_it_starts_from():
    table, ids = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)), text_like(2000, 100)
    torch.testing.assert_close(
        embedding.calibrate(1000 * table, ids), embedding.calibrate(table, ids), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize(("vocab_size", "dim"), [(1000, 256), (300, 768)])
def test_the_untrained_loss_is_near_that_of_guessing(vocab_size, dim):
    ids = text_like(4000, vocab_size)
    svd = embedding.svd_table(ids, vocab_size, dim)
    uniform = np.random.default_rng(0).integers(0, vocab_size, 4000)
    random = embedding.random_table(vocab_size, dim)
    assert untrained_loss(svd, ids) == pytest.approx(math.log(vocab_size), abs=0.2)
    assert untrained_loss(random, uniform) == pytest.approx(math.log(vocab_size), abs=0.2)
    assert untrained_loss(random, ids) == pytest.approx(math.log(vocab_size), abs=0.2)


def test_calibration_noise_is_independent_of_a_random_table_of_the_same_seed():
    uniform = np.random.default_rng(1).integers(0, 2000, 8000)
    loss = untrained_loss(embedding.random_table(2000, 256, seed=3), uniform)
    assert loss == pytest.approx(math.log(2000) + embedding.EXCESS_NATS, abs=0.05)


def test_calibration_stops_at_the_largest_scale_allowed():
    ids = text_like(4000, 400)
    table = embedding.svd_table(ids, 400, 128)
    allowed = math.log(400) + embedding.EXCESS_NATS
    assert untrained_loss(table, ids) == pytest.approx(allowed, abs=0.1)
    assert untrained_loss(1.5 * table, ids) > allowed + 0.1


@pytest.mark.parametrize(
    ("ids", "vocab_size", "dim"),
    [([0, 1], 2, 2), ([0, 1], 50, 8), ([5, 5], 6, 16), ([3], 4, 8), ([0, 0], 1, 4), ([0, 1, 2, 0, 1], 3, 768)],
)
def test_tiny_streams_and_vocabularies_give_finite_distinct_rows(ids, vocab_size, dim):
    for table in (embedding.svd_table(np.array(ids), vocab_size, dim), embedding.random_table(vocab_size, dim)):
        assert table.shape == (vocab_size, dim)
        assert table.isfinite().all()
        assert (table.norm(dim=1) > 0).all()
        assert len(table.unique(dim=0)) == vocab_size


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="exceeds matrix dimension"):
        embedding.svd_table(np.array([0, 9]), 9, 4)


def test_ids_of_any_integer_type_give_the_same_table():
    ids = text_like(500, 30)
    assert torch.equal(embedding.svd_table(ids.astype(np.int32), 30, 8), embedding.svd_table(ids, 30, 8))


def test_unseen_tokens_have_a_direction_in_common_and_one_of_their_own():
    ids = text_like(4000, 500)
    ids[ids >= 400] = 0
    unseen = embedding.svd_table(ids, 500, 64)[400:]
    cosines = F.normalize(unseen, dim=1) @ F.normalize(unseen, dim=1).T
    others = cosines[~torch.eye(100, dtype=torch.bool)]
    assert 0.4 < others.mean() < 0.6
    assert others.max() < 0.95
    assert F.layer_norm(unseen, (64,)).std(dim=1).min() > 0.2


def test_columns_beyond_the_rank_are_filled_with_small_noise():
    table = embedding.svd_table(text_like(2000, 20), 20, 64)
    assert table.std(dim=0).min() > 0
    assert table[:, 20:].square().mean() < table[:, :20].square().mean()


@pytest.mark.slow
def test_the_vocabulary_of_gpt2_fits_time_and_memory():
    ids = np.random.default_rng(0).zipf(1.2, 125_000) % 50_257
    table = embedding.svd_table(ids, 50_257, 768)
    assert table.isfinite().all()
