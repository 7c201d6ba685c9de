"""`experiment=published`: its settings, its numbers, its data from the hub and from files that `fetch` has prepared."""

import json
import math
import shlex
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import save_file

from ctxkv_lightning import build, pipeline
from ctxkv_lightning.config import Config
from ctxkv_lightning.datamodule import stored_bytes
from ctxkv_lightning.door import check_command_line
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.metrics import describe_window
from ctxkv_lightning.text import embedding
from ctxkv_lightning.text.fetch import fetch
from tests.conftest import SHARED_DATA
from tests.text.stand_ins import DataSet, Network, conversation, text

MB = 2**20
SAMPLE = SHARED_DATA / "ultrachat_sample.jsonl"
with_shared_data = pytest.mark.skipif(not SAMPLE.exists(), reason="UltraChat and GPT-2's tokenizer are not here")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpt2(monkeypatch):
    """GPT-2's tokenizer."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    return tiktoken.get_encoding("gpt2")


def composed(*arguments: str, **options) -> Config:
    (config,) = check_command_line(["experiment=published", *arguments])
    return replace(config, **options)


def write(path, numbers) -> str:
    path.write_text("".join(json.dumps(conversation(number)) + "\n" for number in numbers))
    return str(path)


def test_every_setting_is_the_published_one():
    settings = asdict(composed())
    expected = {
        "interval": 20,
        "selection": "strided",
        "heads": 8,
        "max_contexts": 32,
        "context_dim": 256,
        "samples": 100,
        "seed": 42,
        "embeddings": "tokens",
        "cache_dir": "outputs/cache",
        "data": {
            "source": "hub",
            "files": [],
            "dataset": "HuggingFaceH4/ultrachat_200k",
            "split": "train_sft",
            "validation": [50_000, 50_020],
            "test": [50_020, 50_040],
        },
        "tokenizer": {"source": "tiktoken", "name": "gpt2"},
        "embedding": {"source": "gpt2", "file": None, "dim": 768},
        "pretrain": {
            "max_iterations": 60,
            "lr": 0.002,
            "clip_norm": 2.0,
            "batch_tokens": 5000,
            "noise": 0.1,
            "centroid_weight": 0.1,
            "move_threshold": 0.03,
            "target_rate": 0.9,
            "plateau_rate": 0.5,
        },
        "contexts": {"dtype": "float32"},
        "model": {"name": "context_kv", "dropout": 0.1, "ffn_dim": 3072},
        "train": {"lr": 0.001, "weight_decay": 0.01, "batch_tokens": 8880, "max_epochs": 40, "patience": 3},
        "trainer": {"precision": "32-true"},
    }
    for name, value in expected.items():
        found = {key: settings[name][key] for key in value} if isinstance(value, dict) else settings[name]
        assert found == value, name
    assert torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"] == settings["train"]["weight_decay"]


def test_the_command_line_has_the_last_word():
    config = composed("data=jsonl", "data.files=[a.jsonl]", "embedding.file=b", "samples=500", "interval=50")
    assert (config.data.source, config.data.files, config.embedding.file) == ("jsonl", ["a.jsonl"], "b")
    assert (config.samples, config.interval, config.embedding.source) == (500, 50, "gpt2")
    assert (config.data.validation, config.tokenizer.name) == ([50_000, 50_020], "gpt2")
    assert composed("embedding=random", "model=transformer").model.name == "transformer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("embedding=gpt2", "embedding=gpt2 needs tokenizer=gpt2"),
        ("embedding=gpt2 tokenizer=gpt2 tokenizer.name=r50k_base", "embedding=gpt2 needs tokenizer=gpt2"),
        ("experiment=published embedding.dim=512", r"embedding=gpt2 has embedding\.dim=768, not 512"),
        ("embedding.file=a", r"embedding\.file has no effect with embedding=svd, choose embedding=gpt2"),
        ("data=ultrachat tokenizer=bpe", r"data\.source=hub needs tokenizer=gpt2"),
        ("experiment=published data.files=[a.jsonl]", r"no effect with data\.source=hub, choose data=jsonl"),
        ("data.validation=[1,5] data.test=[4,9]", r"data\.validation=\[1, 5\] and data\.test=\[4, 9\] overlap"),
        ("data.validation=[4,9] data.test=[1,5]", "overlap"),
        ("data.test=[50000,50020]", "overlap"),
        ("data.validation=[5,5]", r"data\.validation=\[5, 5\] must be \[first, end\)"),
        ("data.test=[5]", r"data\.test=\[5\] must be"),
    ],
)
def test_contradictions_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        check_command_line(arguments.split())
    assert "\n" not in str(caught.value)


def test_ranges_that_touch_do_not_overlap():
    assert check_command_line(["data.validation=[4,9]", "data.test=[0,4]"])


def published_model() -> torch.nn.Module:
    with torch.device("meta"):
        return pipeline.build_module(composed(), 50_257).model


def test_parameters_are_the_published_ones():
    assert published_model().parameter_counts() == {
        "total": 45_163_264,
        "trainable": 6_301_440,
        "embedding": 38_597_376,
        "embedding_norm": 1_536,
        "encoder": 262_912,
        "attention": 1_577_472,
        "ffn": 4_723_968,
    }


def test_the_window_is_the_published_one():
    window = describe_window(published_model(), 122_794)
    assert (window["interval"], window["max_contexts"], window["selection"]) == (20, 32, "strided")
    assert window["theoretical_max"] == 6_140
    assert window["span_tokens"] == 621  # slots at t, t-20, ..., t-620; as published, 32 * 20
    assert window["max_contexts"] * window["interval"] == 640


@pytest.mark.parametrize("validation_tokens", [22_800, 22_860])
def test_cache_sizes_are_the_published_ones(validation_tokens):
    tokens = {"train": 122_794, "validation": validation_tokens}
    config = composed()
    sizes = stored_bytes(tokens, 50_257, config.embedding.dim, config.context_dim)
    parts = [sizes[name] / MB for name in ("train_context", "val_context", "train_embedding", "val_embedding")]
    assert [round(part) for part in parts] == [120, 22, 360, 67]
    assert int(sum(parts)) == 568


@pytest.fixture
def hub(monkeypatch):
    import datasets

    local = datasets.load_dataset

    def put(*arguments):
        stand_in = DataSet(local, *arguments)
        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        return stand_in

    return put


@with_shared_data
def test_of_the_data_set_only_what_is_needed_is_read(tmp_path, hub, gpt2):
    data_set = hub(60_000)
    config = composed(cache_dir=str(tmp_path / "cache"), samples=40)
    prepared = pipeline.prepare_text(config)
    assert data_set.read == 50_040
    assert data_set.calls == [(("HuggingFaceH4/ultrachat_200k",), {"split": "train_sft", "streaming": True})]
    parts = {"train": range(40), "validation": range(50_000, 50_020), "test": range(50_020, 50_040)}
    for name, numbers in parts.items():
        assert [document.text for document in prepared.documents[name]] == [text(number) for number in numbers]
    pipeline.prepare_text(replace(config, samples=20))
    assert data_set.read == 50_040


@with_shared_data
def test_nothing_stands_between_training_conversations_and_blank_lines_between_others(tmp_path, gpt2):
    arguments = (
        f"data=jsonl data.files=[{write(tmp_path / 'a.jsonl', range(20))}] data.validation=[9,12] data.test=[12,13]"
    )
    config = composed(*arguments.split(), cache_dir=str(tmp_path / "cache"), samples=10)
    tokens = pipeline.prepare_text(config).tokens
    train = [gpt2.encode_ordinary(text(number)) for number in (*range(9), 13)]
    assert tokens.array("train").tolist() == [token for ids in train for token in ids]
    assert gpt2.decode(tokens.array("validation").tolist()) == "\n\n".join(map(text, (9, 10, 11)))
    assert gpt2.decode(tokens.array("test").tolist()) == text(12)
    as_text = check_command_line(["data=text", f"data.files=[{tmp_path}/a.jsonl]", "tokenizer=gpt2", "samples=9"])[0]
    separated = pipeline.prepare_text(replace(as_text, cache_dir=config.cache_dir)).tokens
    assert gpt2.decode(separated.array("train").tolist()).count("\n\n") == 8


def test_the_separator_is_part_of_the_key(tmp_path, monkeypatch):
    """The same documents, once with nothing between them and once with blank lines, are two streams."""
    path = write(tmp_path / "a.jsonl", range(20))
    options = [f"data.files=[{path}]", "data.validation=[9,12]", "data.test=[12,13]", "tokenizer.vocab_size=300"]
    (config,) = check_command_line(["data=jsonl", "samples=5", *options])
    config = replace(config, cache_dir=str(tmp_path / "cache"), interval=5)
    without = pipeline.prepare_text(config)
    read = build.read_corpus
    monkeypatch.setattr(build, "read_corpus", lambda config: replace(read(config), train_separator="\n\n"))
    between = pipeline.prepare_text(config)
    assert between.documents == without.documents
    assert len(between.tokens.array("train")) > len(without.tokens.array("train"))


def test_a_learnt_tokenizer_does_not_depend_on_samples(tmp_path):
    path = write(tmp_path / "a.jsonl", range(100))
    options = [f"data.files=[{path}]", "data.validation=[90,95]", "data.test=[95,100]", "tokenizer.vocab_size=400"]
    streams = {}
    for samples in (8, 30):
        (config,) = check_command_line(["data=jsonl", f"samples={samples}", *options])
        prepared = pipeline.prepare_text(replace(config, cache_dir=str(tmp_path / "cache"), interval=5))
        assert len(prepared.documents["train"]) == samples
        streams[samples] = {name: prepared.tokens.array(name).tolist() for name in ("train", "validation", "test")}
    assert streams[8]["validation"] == streams[30]["validation"]
    assert streams[8]["train"] == streams[30]["train"][: len(streams[8]["train"])]
    assert len(list((tmp_path / "cache" / "bpe").glob("*/manifest.json"))) == 1


def test_more_samples_than_conversations_are_refused_with_the_count(tmp_path):
    path = write(tmp_path / "a.jsonl", range(30))
    (config,) = check_command_line(
        ["data=jsonl", f"data.files=[{path}]", "data.validation=[9,12]", "data.test=[12,13]"]
    )
    with pytest.raises(UserError, match="samples=100, but this text has 26 training documents: set samples=26"):
        pipeline.prepare_text(replace(config, cache_dir=str(tmp_path / "cache")))


@with_shared_data
def test_the_sample_is_too_short_for_the_published_ranges(tmp_path, gpt2):
    config = composed("data=jsonl", f"data.files=[{SAMPLE}]", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=r"data\.files has 1,000 records, .* set data\.validation=\[960,980\] data\.test=\[980,1000\]"
    ):
        pipeline.run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_offline_the_data_set_is_one_sentence_and_no_run_folder_is_left(tmp_path, hub):
    hub(60_000, 0)
    with pytest.raises(UserError, match=r"ultrachat_200k.*'python -m ctxkv_lightning fetch FOLDER'") as caught:
        pipeline.run_experiment(composed(cache_dir=str(tmp_path / "cache")), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def few_conversations(tmp_path):
    """The text stage's outcome on a few conversations."""
    path = write(tmp_path / "few.jsonl", range(20))
    arguments = ["data=jsonl", f"data.files=[{path}]", "data.validation=[9,12]", "data.test=[12,13]", "samples=9"]
    (config,) = check_command_line([*arguments, "tokenizer.vocab_size=300"])
    return pipeline.prepare_text(replace(config, cache_dir=str(tmp_path / "cache"), interval=5))


def test_the_stored_table_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "GPT2_SHAPE", (6, 4))
    one, other = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
    save_file({"wte.weight": one}, tmp_path / "a")
    save_file({"transformer.wte.weight": one, "more": torch.zeros(5)}, tmp_path / "b")
    save_file({"wte.weight": other}, tmp_path / "c")
    config = composed(cache_dir=str(tmp_path / "cache"))
    prepared = few_conversations(tmp_path)
    stores = [
        pipeline.build_embedding(
            replace(config, embedding=replace(config.embedding, file=str(tmp_path / name))), prepared
        )
        for name in "abc"
    ]
    assert stores[0].path == stores[1].path != stores[2].path
    for store, table in zip(stores, (one, one, other), strict=True):
        np.testing.assert_array_equal(store.array("table"), table.numpy())


def test_offline_the_embedding_is_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    config = composed(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"embedding=gpt2.* cannot be had .*'python -m ctxkv_lightning fetch FOLDER'"):
        pipeline.build_embedding(config, few_conversations(tmp_path))


@with_shared_data
def test_what_fetch_writes_is_what_the_experiment_reads(tmp_path, monkeypatch):
    network = Network(tmp_path, monkeypatch, conversations=70)
    command = fetch(tmp_path / "all", "a/b", "train", records=60)[-1]
    network.down = {"data", "table", "tokenizer"}
    variable, _, _, *arguments = shlex.split(command)
    monkeypatch.setenv(*variable.split("=", 1))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    (offline,) = check_command_line([*arguments, "samples=30"])
    prepared = pipeline.prepare_text(replace(offline, cache_dir=str(tmp_path / "cache")))
    assert prepared.vocab_size == 50_257
    parts = {"train": range(30), "validation": range(48, 54), "test": range(54, 60)}
    for name, numbers in parts.items():
        assert [document.text for document in prepared.documents[name]] == [text(number) for number in numbers]
    store = pipeline.build_embedding(replace(offline, cache_dir=str(tmp_path / "cache")), prepared)
    np.testing.assert_array_equal(store.array("table"), embedding.gpt2_table(str(network.weights)).numpy())


@pytest.fixture
def big(tmp_path):
    """A folder whose hundreds of megabytes do not outlive the test."""
    folder = tmp_path / "big"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@with_shared_data
def test_the_experiment_runs_through_on_local_files(big, gpt2):
    table = 0.01 * torch.randn(50_257, 768, generator=torch.Generator().manual_seed(0))
    save_file({"wte.weight": table}, big / "gpt2.safetensors")
    arguments = f"""
        data=jsonl data.files=[{SAMPLE}] embedding.file={big}/gpt2.safetensors data.validation=[990,993]
        data.test=[993,995] samples=3 train.max_epochs=1 pretrain.max_iterations=2 cache_dir={big}/cache
    """
    pipeline.run_experiment(composed(*arguments.split()), big / "run")
    metrics = json.loads((big / "run" / "metrics.json").read_text())
    records = [json.loads(line)["messages"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = ["\n".join(message["content"] for message in messages) for messages in records]
    lengths = [len(gpt2.encode_ordinary(each)) for each in texts]
    assert metrics["data"]["train_documents"] == 3
    assert metrics["data"]["train_tokens"] == sum(lengths[:3])
    # A blank line is a token or two, unless it merges with what stands before it.
    assert sum(lengths[990:993]) <= metrics["data"]["val_tokens"] <= sum(lengths[990:993]) + 2 * 2
    assert metrics["data"]["vocab_size"] == 50_257
    assert (metrics["parameters"]["total"], metrics["parameters"]["trainable"]) == (45_163_264, 6_301_440)
    assert metrics["window"]["theoretical_max"] == metrics["data"]["train_tokens"] // 20 + 1
    assert metrics["machine"]["precision"] == "32-true"
    assert math.isfinite(metrics["result"]["val_ppl"])
    assert metrics["result"]["val_ppl"] < 2 * 50_257
    (stored,) = (big / "cache").glob("contexts/*/train.npy")
    assert metrics["contexts"]["bytes"]["train_context"] == np.load(stored, mmap_mode="r").nbytes
    (stored,) = (big / "cache").glob("embeddings/*/validation.npy")
    assert metrics["contexts"]["bytes"]["val_embedding"] == np.load(stored, mmap_mode="r").nbytes
    (stored,) = (big / "cache").glob("embedding/*/table.npy")
    np.testing.assert_array_equal(np.load(stored, mmap_mode="r"), table.numpy())
