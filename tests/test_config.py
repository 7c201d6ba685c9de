from dataclasses import replace
from pathlib import Path

import pytest

from ctxkv_lightning.build import build_module
from ctxkv_lightning.config import Config, check_key, keys, plain_options
from ctxkv_lightning.door import CONF, check_command_line
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.state import state_bytes

KEYS = """
interval selection heads max_contexts context_dim samples seed embeddings cache_dir resume init_from
data.source data.files data.dataset data.split data.validation data.test data.errors data.heldout_bytes
data.mqar.pairs data.mqar.length data.mqar.keys data.mqar.values data.mqar.heldout
tokenizer.source tokenizer.vocab_size tokenizer.name
embedding.source embedding.file embedding.dim embedding.window
pretrain.max_iterations pretrain.lr pretrain.clip_norm pretrain.batch_tokens pretrain.noise pretrain.centroid_weight
pretrain.move_threshold pretrain.target_rate pretrain.plateau_rate pretrain.lm_epochs
pretrain.lm_weight_dropout
contexts.tolerance contexts.dtype
model.name model.window_tokens model.dropout model.ffn_dim model.layers model.local_window
recipe.norm recipe.train_embedding recipe.embedding_dropout recipe.context_dropout recipe.output_dropout
recipe.projection recipe.read_current recipe.pointer_heads recipe.pointer_dim recipe.pointer_window
recipe.pointer_values recipe.ngram recipe.apart
train.lr train.schedule train.warmup_steps train.weight_decay train.batch_tokens train.max_epochs train.compile
train.patience
trainer.accelerator trainer.devices trainer.num_nodes trainer.strategy trainer.precision trainer.enable_progress_bar
""".split()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """No test may leave anything behind; `leaves_nothing` checks it."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def test_the_options_are_these_and_no_others():
    assert keys() == KEYS


def test_the_defaults_are_the_published_settings():
    (config,) = check_command_line([])
    assert config == replace(Config(), train=replace(Config().train, max_epochs=8))
    assert (config.interval, config.heads, config.max_contexts, config.context_dim) == (20, 8, 32, 256)
    assert (config.samples, config.seed, config.embedding.dim, config.model.ffn_dim) == (100, 42, 768, 3072)
    assert (config.train.lr, config.train.batch_tokens, config.train.max_epochs, config.train.patience) == (
        1e-3,
        8880,
        8,
        3,
    )
    assert (config.pretrain.lr, config.pretrain.clip_norm, config.pretrain.batch_tokens) == (2e-3, 2.0, 5000)
    assert (config.pretrain.max_iterations, config.pretrain.noise, config.pretrain.target_rate) == (60, 0.1, 0.9)


def test_options_read_the_way_they_are_typed():
    (config,) = check_command_line(
        ["interval=50", "max_contexts=64", "train.lr=3e-4", "tokenizer=gpt2", "samples=null"]
    )
    assert (config.interval, config.max_contexts, config.train.lr) == (50, 64, 3e-4)
    assert (config.tokenizer.source, config.tokenizer.name, config.samples) == ("tiktoken", "gpt2", None)


def test_text_takes_all_documents_unless_told_otherwise():
    (config,) = check_command_line(["data=text", "data.files=[a.txt,b/*.md]"])
    assert (config.data.files, config.samples) == (["a.txt", "b/*.md"], None)
    assert check_command_line(["data=text", "data.files=[a.txt]", "samples=7"])[0].samples == 7


def test_a_multirun_is_every_combination():
    trials = check_command_line(["-m", "interval=20,50,100", "heads=4,8"])
    assert [(t.interval, t.heads) for t in trials] == [(i, h) for i in (20, 50, 100) for h in (4, 8)]


GROUPS = [f"{path.parent.name}={path.stem}" for path in sorted(Path(CONF).glob("*/*.yaml"))]
GROUPS += [f"{group}={next(iter(option.values()))}" for group, option in plain_options()]


@pytest.mark.parametrize("choice", GROUPS)
def test_every_shipped_configuration_composes(choice):
    needed = {
        "data=text": ["data.files=[a.jsonl]"],
        "data=jsonl": ["data.files=[a.jsonl]"],
        "embedding=gpt2": ["tokenizer=gpt2"],
        "tokenizer=symbols": ["data=mqar"],
    }
    assert check_command_line([choice, *needed.get(choice, [])])


def test_there_are_at_most_twenty_configuration_files():
    assert len(list(Path(CONF).rglob("*.yaml"))) <= 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrain.lm_epochs=1 init_from=a", "which brings its encoder: set it to 0"),
        ("pretrain.lm_epochs=1 data=mqar", "would teach all symbols of data=mqar"),
        ("intervl=50", r"no key 'intervl': did you mean interval\?"),
        ("+intervl=50", r"did you mean interval\?"),
        ("++intervl=50", r"did you mean interval\?"),
        ("+typo=5", "no key 'typo'"),
        ("++model.dmi=8", "no key 'model.dmi'"),
        ("model.drop=0.2", r"did you mean model.dropout\?"),
        ("lr=0.1", r"did you mean pretrain.lr or train.lr\?"),
        ("precision=fp8", r"did you mean trainer.precision\?"),
        ("+x._target_=os.system", "no key 'x._target_'"),
        ("+data._target_=os.system", "no key 'data._target_'"),
        ("~interval", "would delete"),
        ("+interval=5", r"leave out the '\+'"),
        ("interval=0", "interval=0 must be a whole number, at least 1"),
        ("interval=-3", "interval=-3 must be a whole number, at least 1"),
        ("interval=fifty", "interval=fifty must be a whole number"),
        ("interval=50.5", "interval=50.5 must be a whole number"),
        ("interval=true", "interval=True must be a whole number"),
        ("interval=null", "interval=None must be a whole number"),
        ("interval=", "interval= must be a whole number"),
        ("interval=[1,5]", "lists 2 intervals for heads=8"),
        ("interval=[]", "lists 0 intervals for heads=8"),
        ("interval=[1,1,1,1,5,5,5,0]", "must be a whole number, at least 1"),
        ("data.validation=[5,5]", r"first, end"),
        ("data=jsonl", "data=jsonl needs files"),
        ("heads=7", "heads=7 does not divide embedding.dim=768"),
        ("heads=0", "heads=0 must be at least 1"),
        ("max_contexts=0", "max_contexts=0"),
        ("samples=0", "samples=0 must be at least 1"),
        ("recipe.pointer_window=2000000", "recipe.pointer_window=2000000 must be at most 1048576"),
        ("recipe.pointer_heads=1048576", "recipe.pointer_heads=1048576 must be below 1048576"),
        ("recipe.pointer_dim=2000000", "recipe.pointer_dim=2000000 must be at most 1048576"),
        ("samples=ten", "samples: Value 'ten'"),
        ("seed=-1", "seed=-1"),
        ("train.lr=nan", "train.lr=nan must be a finite number"),
        ("pretrain.lr=inf", "pretrain.lr=inf must be a finite number"),
        ("train.lr=-1", "train.lr=-1.0 must be above 0"),
        ("train.batch_tokens=0", "train.batch_tokens=0"),
        ("model.dropout=1", "model.dropout=1.0 must be below 1"),
        ("trainer.precision=fp8", "must be one of auto, 32-true, bf16-mixed, 16-mixed"),
        ("embeddings=token", "embeddings=token must be one of table, tokens"),
        ("data=pydoc", r"did you mean pydocs\? The choices are jsonl, mqar, pydocs, text"),
        ("data=mqar tokenizer=gpt2", "needs tokenizer=symbols embedding=random"),
        ("data=mqar embedding=svd", "needs tokenizer=symbols embedding=random"),
        ("data=mqar samples=null", "data=mqar has no end: give samples"),
        ("data=mqar data.mqar.length=30", "data.mqar.length=30 must be even and at least 32"),
        ("data=mqar data.mqar.length=63", "data.mqar.length=63 must be even"),
        ("data=mqar data.mqar.keys=7", "data.mqar.keys=7 must be at least 8"),
        ("data=mqar data.mqar.values=7", "data.mqar.values=7 must be at least 8"),
        ("data.mqar.keys=20001", "data.mqar.keys=20001 must be at most 20000"),
        ("data.mqar.pairs=0", "data.mqar.pairs=0 must be at least 1"),
        ("tokenizer=symbols", "symbols of data=mqar only"),
        ("experiment=quik", r"did you mean quick\?"),
        ("model=null", "model=None does not exist"),
        ("data=text", "data=text needs files"),
        ("data.files=[a.txt]", "choose data=text"),
        ("cache_dir=${oc.env:HOME}", "interpolation"),
        ("cache_dir=a=b", "cannot be read"),
        ("interval=1,2", "several values: add -m"),
        ("interval", "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        check_command_line(arguments.split())
    assert "\n" not in str(error.value)


def test_everything_wrong_is_said_at_once():
    with pytest.raises(UserError) as error:
        check_command_line(["interval=0", "heads=7", "train.lr=nan", "embeddings=x"])
    for part in ("interval=0", "heads=7", "train.lr=nan", "embeddings=x"):
        assert part in str(error.value)


def test_every_bad_trial_of_a_multirun_is_named_before_any_starts():
    with pytest.raises(UserError) as error:
        check_command_line(["-m", "interval=20,0", "heads=8,7"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert not any(line.strip().startswith("interval=20 heads=8:") for line in lines)


def test_a_known_key_passes():
    check_key("train.lr")


def test_an_outputs_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "outputs").touch()
    try:
        for arguments in ([], ["-m", "interval=2,3"]):
            with pytest.raises(UserError, match=r"outputs/.* cannot be made .*set hydra\.(run|sweep)\.dir"):
                check_command_line(arguments)
    finally:
        (tmp_path / "outputs").unlink()


DIRECT = "recipe.read_current=true"


def test_an_interval_for_each_head():
    (config,) = check_command_line(["interval=[1,1,5,5,20,20,80,80]", "max_contexts=16"])
    assert config.intervals == (1, 1, 5, 5, 20, 20, 80, 80)
    assert config.kept_contexts == 15 * 80 + 1
    (plain,) = check_command_line(["heads=4"])
    assert plain.intervals == (20,) * 4


def test_the_cache_has_a_name():
    with pytest.raises(UserError, match="cache_dir= names no folder"):
        check_command_line(["cache_dir="])


@pytest.mark.parametrize("model", ["model=transformer", "model=sliding_window", "model.layers=2 model.local_window=4"])
def test_rotary_positions_need_pairs(model):
    with pytest.raises(UserError, match="heads=8 leaves an odd number of the 264"):
        check_command_line(["embedding.dim=264", *model.split()])
    check_command_line(["embedding.dim=264", "model.layers=2"])


def test_bytes_kept_decide_the_sliding_window():
    (config,) = check_command_line(["model=sliding_window"])
    assert config.kept_contexts == 621
    assert config.window_tokens == 1 + 621 * 256 // (2 * 768)
    assert check_command_line(["model=sliding_window", "model.window_tokens=640"])[0].window_tokens == 640
    assert check_command_line(["model=sliding_window", "model.layers=3"])[0].window_tokens == 1 + 621 * 256 // (6 * 768)
    assert check_command_line(["selection=grid"])[0].kept_contexts == 32


@pytest.mark.parametrize(
    "arguments",
    ["", "experiment=mqar max_contexts=4", "interval=1 max_contexts=1", "model.layers=3", "recipe.read_current=true",
     "model.layers=4 model.local_window=8", "experiment=best", "selection=grid", "selection=grid interval=20",
     "selection=grid interval=[1,1,5,5,20,20,20,20] model.layers=2"],
)  # fmt: skip
def test_a_sliding_window_is_as_long_as_its_bytes_allow(arguments):
    def kept(*more):
        silent = ["recipe.pointer_heads=0", "recipe.pointer_values=false", "recipe.ngram=false"]
        config = check_command_line([*arguments.split(), *silent, *more])[0]
        return state_bytes(build_module(config, 10).model, 10_000), config.window_tokens

    allowed, _ = kept("model=context_kv")
    fitting, tokens = kept("model=sliding_window")
    assert fitting <= allowed < kept("model=sliding_window", f"model.window_tokens={tokens + 1}")[0]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("model=recurrence interval=50", "model=recurrence selection=grid heads=4", True),
        ("model=cascade max_contexts=8", "model=cascade model.ffn_dim=64", True),
        ("model=cascade", "model=cascade model.layers=2", True),
        ("model.local_window=5", "model.local_window=6", True),
        ("model.layers=2 model.local_window=5", "model.layers=2 model.local_window=6", False),
        ("model=transformer model.layers=2", "model=transformer model.layers=2 model.local_window=6", True),
        ("model=recurrence", "model=recurrence model.layers=2", False),
        ("model=transformer context_dim=64", "model=transformer pretrain.lr=1", True),
        ("model=transformer recipe.read_current=true", "model=transformer", False),
        ("model=sliding_window recipe.read_current=true", "model=sliding_window", False),
        ("model=recurrence recipe.read_current=true", "model=recurrence", True),
        (f"model=transformer {DIRECT}", f"model=transformer {DIRECT} pretrain.lr=1", False),
        (f"model=transformer {DIRECT}", f"model=transformer {DIRECT} recipe.context_dropout=0.5", False),
        (f"model=transformer {DIRECT}", f"model=transformer {DIRECT} recipe.pointer_window=9", True),
        ("model=sliding_window", "model=sliding_window model.window_tokens=104", True),
        ("model=sliding_window", "model=sliding_window max_contexts=64", False),
        ("model=context_kv cache_dir=a", "model=context_kv embeddings=tokens", True),
        ("model=context_kv", "selection=grid", False),
        ("model=transformer heads=4", "model=transformer", False),
        ("pretrain.lm_weight_dropout=0.5", "", True),
        ("pretrain.lm_epochs=1 pretrain.lm_weight_dropout=0.5", "pretrain.lm_epochs=1", False),
        ("tokenizer.name=cl100k_base", "", True),
        ("tokenizer=gpt2 tokenizer.name=cl100k_base", "tokenizer=gpt2", False),
        ("tokenizer=gpt2 tokenizer.vocab_size=999", "tokenizer=gpt2", True),
        ("tokenizer.vocab_size=999", "", False),
        ("embedding=random embedding.window=9", "embedding=random", True),
        ("embedding.window=9", "", False),
        ("init_from=a pretrain.lr=0.1", "init_from=a", True),
        ("seed=1", "seed=2", False),
    ],
)
def test_configurations_are_one_experiment_when_they_differ_in_what_the_model_does_not_read(one, other, same):
    (first,), (second,) = (check_command_line(words.split()) for words in (one, other))
    assert (first.effective() == second.effective()) is same
