import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxkv_lightning import datamodule
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.pretrain import save_encoder
from ctxkv_lightning.datamodule import SPLITS, ContextDataModule
from ctxkv_lightning.run.cache import prune
from ctxkv_lightning.store import create_array, get_or_build
from ctxkv_lightning.text.ngram import KneserNeyTrigram, held_out
from ctxkv_lightning.windows import Stream, WindowLoader
from tests.oracles import contexts_step_by_step

V, D, C = 11, 8, 4
SIZES = {"train": 61, "validation": 17, "test": 2}


@pytest.fixture
def stores(tmp_path):
    """Folders of small token, embedding and encoder stores."""
    generator = torch.Generator().manual_seed(0)

    def tokens(folder):
        for split, size in SIZES.items():
            ids = torch.randint(0, V, (size,), generator=generator)
            create_array(folder, split, (size,), np.int32)[:] = ids.numpy()

    def table(folder):
        create_array(folder, "table", (V, D), np.float32)[:] = torch.randn(V, D, generator=generator).numpy()

    def encoder(folder):
        torch.manual_seed(0)
        save_encoder(ContextEncoder(C, D), folder)

    builders = {"tokens": tokens, "embedding": table, "encoder": encoder}
    folders = {kind: str(get_or_build(tmp_path, kind, {}, build).path) for kind, build in builders.items()}
    return {"encoders": [folders.pop("encoder")], **folders}


def opened(stores, tmp_path, **options):
    data = ContextDataModule(**stores, cache_dir=str(tmp_path), **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("embeddings", ["table", "tokens"])
def test_stored_tensors_are_the_exact_ones(stores, tmp_path, embeddings):
    data = opened(stores, tmp_path, embeddings=embeddings)
    normalised = torch.nn.functional.layer_norm(data.table, (D,))
    for split in SPLITS:
        stream = data.streams[split]
        expected = normalised[stream.tokens]
        assert torch.equal(stream.embeddings[stream.rows], expected)
        truth = contexts_step_by_step(data.encoders()[0], expected)
        torch.testing.assert_close(stream.contexts[0], truth, atol=1e-5, rtol=0)


def test_both_ways_of_storing_give_the_same_batches_and_their_own_sizes(stores, tmp_path):
    by_table, by_tokens = (opened(stores, tmp_path, embeddings=way) for way in ("table", "tokens"))
    for a, b in zip(by_table.train_dataloader(), by_tokens.train_dataloader(), strict=True):
        assert torch.equal(a.embeddings, b.embeddings)
        assert torch.equal(a.tokens, b.tokens)
    assert by_table.sizes() == by_tokens.sizes()
    assert by_table.sizes()["as_table"] == V * D * 4
    assert by_table.sizes()["as_tokens"] == sum(SIZES.values()) * D * 4
    assert by_table.normalised_store().size("table") == pytest.approx(V * D * 4, abs=200)


def test_what_is_read_is_not_pruned(stores, tmp_path):
    """In Phase 1 too, whose batches are copies."""
    data = ContextDataModule(**{**stores, "encoders": None}, cache_dir=str(tmp_path))
    next(iter(data.train_dataloader()))
    assert {entry.kind for entry in prune(tmp_path, 0)} == {"encoder"}
    assert len(data.token_store.array("train")) == SIZES["train"]
    assert data.table.shape == (V, D)


def test_contexts_are_shared_by_runs_that_differ_in_the_window_only(stores, tmp_path):
    first = opened(stores, tmp_path, history=4).context_stores()[0]
    second = opened(stores, tmp_path, history=5, embeddings="tokens").context_stores()[0]
    assert second.reused
    assert second.path == first.path
    assert opened(stores, tmp_path, tolerance=1e-3).context_stores()[0].path != first.path


def test_contexts_in_bf16_are_the_same_ones_rounded_in_half_the_bytes(stores, tmp_path):
    exact, rounded = (opened(stores, tmp_path, contexts_dtype=dtype) for dtype in ("float32", "bfloat16"))
    for split in SPLITS:
        assert torch.equal(rounded.streams[split].contexts[0], exact.streams[split].contexts[0].bfloat16())
    batch = next(iter(rounded.val_dataloader()))
    assert batch.memory.dtype == torch.float32
    payload = [data.context_stores()[0].size("train") - 128 for data in (exact, rounded)]
    assert payload[0] == 2 * payload[1]


def test_a_stream_stays_on_a_device_only_with_room_to_spare():
    stream = Stream(*(torch.zeros(25) for _ in range(3)), (torch.zeros(13), torch.zeros(12)))
    assert datamodule.fits(stream, 1600)
    assert not datamodule.fits(stream, 1599)


def test_phase_one_covers_the_stream_in_runs(stores, tmp_path):
    stores.pop("encoders")
    data = opened(stores, tmp_path, pretrain_batch_tokens=25)
    runs = list(data.train_dataloader())
    assert [run.start for run in runs] == [0, 25, 50]
    assert len(data.train_dataloader()) == 3
    normalised = torch.nn.functional.layer_norm(data.table, (D,))
    tokens = torch.from_numpy(data.token_store.array("train")).long()
    together = torch.cat([run.embeddings[run.inverse] for run in runs])
    assert torch.equal(together, normalised[tokens])


def test_phase_one_on_a_half_reads_that_half(stores, tmp_path):
    stores.pop("encoders")
    data = opened(stores, tmp_path, pretrain_batch_tokens=25)
    tokens = torch.from_numpy(data.token_store.array("train")).long()
    data.pretrain_on(slice(30, 60))
    runs = list(data.train_dataloader())
    assert data.pretrain_tokens == len(range(*slice(30, 60).indices(len(tokens))))
    normalised = torch.nn.functional.layer_norm(data.table, (D,))
    assert torch.equal(torch.cat([run.embeddings[run.inverse] for run in runs]), normalised[tokens[30:60]])


def test_the_memory_is_contexts_side_by_side_or_the_embeddings(stores, tmp_path):
    twice = opened({**stores, "encoders": stores["encoders"] * 2}, tmp_path, history=3)
    once = opened(stores, tmp_path, history=3)
    plain = opened({**stores, "encoders": None}, tmp_path, history=3, memory="embeddings")
    assert not plain.in_phase_one
    for two, one, none in zip(*(data.val_dataloader() for data in (twice, once, plain)), strict=True):
        assert torch.equal(two.memory, torch.cat([one.memory, one.memory], dim=-1))
        assert torch.equal(none.memory[:, 3:], one.embeddings)
        assert torch.equal(none.embeddings, one.embeddings)


def test_bytes_of_the_published_caches():
    """DESIGN: 120 / 22 MB of contexts, 360 / 67 MB of embeddings, 568 MB in all, with 22.8k validation tokens."""
    sizes = datamodule.stored_bytes({"train": 122_794, "validation": 22_830}, 50_257, 768, 256)
    mb = {name: count / 2**20 for name, count in sizes.items()}
    names = ("train_context", "val_context", "train_embedding", "val_embedding")
    assert [round(mb[name]) for name in names] == [120, 22, 360, 67]
    assert sum(mb[name] for name in names) == pytest.approx(569, abs=1)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(2, 70),
    window=st.integers(1, 30),
    history=st.integers(0, 40),
    batch=st.integers(1, 90),
    alignment=st.integers(1, 25),
    seed=st.integers(0, 9),
)
def test_every_position_counts_once_a_pass_and_sees_its_own_past(N, window, history, batch, alignment, seed):
    stream = Stream(
        torch.arange(N), torch.arange(N)[:, None] * 10.0, torch.arange(N), (torch.arange(N)[:, None] * 1.0,)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxkv_lightning.windows.WINDOW", window)
        loader = WindowLoader(stream, history, batch, alignment, seed=seed)
        batches = list(loader)
    assert len(batches) == len(loader)
    assert torch.equal(torch.cat([windows.targets for windows in batches]).sort().values, torch.arange(1, N))
    for windows in batches:
        own = windows.tokens[:, history:]
        B, T = own.shape
        assert B * T <= max(batch, window) + window + B * alignment
        assert not (own[:, 0] % alignment).any()
        tokens = own.flatten()
        assert torch.equal(windows.targets, (tokens if windows.counted is None else tokens[windows.counted]) + 1)
        assert torch.equal(windows.embeddings[..., 0], own * 10.0)
        assert windows.memory.shape == (B, history + T, 1)
        for b in range(B):
            missing = 0 if windows.first is None else int(windows.first[b])
            start = int(own[b, 0])
            past = torch.arange(start - history + missing, start + T).clamp_max(N - 1)
            assert torch.equal(windows.memory[b, missing:, 0], past.float())
            assert torch.equal(windows.tokens[b, missing:], past)


def test_order_is_a_function_of_seed_and_pass():
    stream = Stream(torch.arange(500), torch.zeros(500, 1), torch.arange(500), (torch.zeros(500, 1),))

    def order(loader):
        return torch.cat([windows.tokens.flatten() for windows in loader])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxkv_lightning.windows.WINDOW", 10)
        one, same, other = (WindowLoader(stream, 3, 50, seed=seed) for seed in (1, 1, 2))
        in_order = WindowLoader(stream, 3, 50)
    first = order(one)
    assert torch.equal(first, order(same))
    assert not torch.equal(first, order(one))
    assert not torch.equal(first, order(other))
    assert torch.equal(order(in_order), order(in_order))


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_loader_goes_on_where_its_state_was_taken(stop):
    """Two passes of six batches, broken off after `stop` of them."""
    stream = Stream(torch.arange(56), torch.zeros(56, 1), torch.arange(56), (torch.zeros(56, 1),))

    def batches(loader, count):
        seen = []
        while len(seen) < count:
            for windows in loader:
                seen.append(windows.tokens.tolist())
                if len(seen) == count:
                    break  # as Lightning does, which knows the length: the iterator is not exhausted
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxkv_lightning.windows.WINDOW", 10)
        whole, first, second = (WindowLoader(stream, 0, 10, seed=3) for _ in range(3))
    expected = batches(whole, 14)
    before = batches(first, stop)
    second.load_state_dict(first.state_dict())
    assert before + batches(second, 14 - stop) == expected


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(2, 70),
    window=st.integers(1, 30),
    batch=st.integers(1, 90),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_ranks_share_each_step_of_one_process(N, window, batch, ranks, seed):
    ids = torch.arange(N)
    stream = Stream(ids, ids[:, None] * 10.0, ids, (ids[:, None] * 1.0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxkv_lightning.windows.WINDOW", window)
        alone = list(WindowLoader(stream, 3, batch, seed=seed))
        shares = [list(WindowLoader(stream, 3, batch, seed=seed, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(alone)}
    for step, whole in enumerate(alone):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert {part.total for part in parts} == {whole.total} == {len(whole.targets)}
        assert all(len(part.tokens) for part in parts)  # nobody is without a window: all have to take part


@given(
    positions=st.integers(1, 90),
    batch_tokens=st.integers(1, 60),
    alignment=st.sampled_from([1, 4]),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_of_a_stream_that_is_scored_in_part_exactly_these_tokens_count(positions, batch_tokens, alignment, ranks, seed):
    """Whatever the windows, a pass has each token that is marked once as a target, and no other."""
    marked = torch.rand(positions + 1, generator=torch.Generator().manual_seed(seed)) < 0.3
    tokens = torch.arange(positions + 1)
    stream = Stream(tokens, torch.randn(positions + 1, D), tokens, (torch.randn(positions + 1, C),), marked)
    loaders = [
        WindowLoader(stream, 3, batch_tokens, alignment, seed=seed, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    found = []
    for batches in zip(*loaders, strict=True):
        targets = torch.cat([windows.targets for windows in batches])
        assert {windows.total for windows in batches} == {max(1, len(targets))}
        for windows in batches:
            read = windows.tokens[:, 3:].flatten()
            assert torch.equal(windows.targets, (read if windows.counted is None else read[windows.counted]) + 1)
        found += targets.tolist()
    assert sorted(found) == marked[1:].nonzero().flatten().add(1).tolist()


def test_training_windows_bring_what_counting_the_rest_of_the_text_says(stores, tmp_path):
    """Of each of their positions, and no other split's windows do."""
    data = opened(stores, tmp_path, history=3, batch_tokens=10, ngram=True)
    ids = data.token_store.array("train")
    said, seen = held_out(ids, V), 0
    for batch in data.train_dataloader():
        T = batch.embeddings.shape[1]
        for b in range(len(batch.tokens)):
            own = batch.tokens[b, -T:]
            start = next(
                i for i in range(len(ids) - T + 1) if torch.equal(torch.from_numpy(ids[i : i + T]).long(), own)
            )
            torch.testing.assert_close(batch.ngram[b], torch.from_numpy(said[start : start + T]).float())
            seen += 1
    assert seen == len(data.train_dataloader())
    assert next(iter(data.val_dataloader())).ngram is None
    assert (data.trigram().probabilities(ids) == KneserNeyTrigram(ids, V).probabilities(ids)).all()
