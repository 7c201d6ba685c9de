"""A finished run is opened from its folder alone, and writes what its model would."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxkv_lightning import use
from ctxkv_lightning.__main__ import main
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.sampling import Sampler
from ctxkv_lightning.lm.scoring import score_tokens
from ctxkv_lightning.run.checkpoint import VerifiedCheckpointIO
from ctxkv_lightning.run.saved import read
from ctxkv_lightning.use import open_trained
from ctxkv_lightning.write import Writer, read_prompt, show
from tests.lm.test_generate import parallel_logits
from tests.small_run import small_run

PROMPT = "Zeile 3: die Größe von"
RIVALS = ["transformer", "sliding_window", "cascade", "recurrence"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(run, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


def greedy(trained, prompt, tokens):
    """What the model goes on with, by recomputing the whole text for every token."""
    ids = trained.encode(prompt)
    for _ in range(tokens):
        ids = torch.cat([ids, parallel_logits(trained.model, ids)[-1:].argmax(-1)])
    return trained.encoding.decode_bytes(ids.tolist()).decode("utf-8", "replace")[len(prompt) :]


@pytest.mark.parametrize("model", RIVALS)
def test_every_model_writes(model, tmp_path):
    trained = open_trained(small_run(tmp_path, model))
    text = Writer(trained, Sampler(0.0), max_tokens=25).text(PROMPT)[0]
    assert text == greedy(trained, PROMPT, 25)[: len(text)]
    assert len(text) >= 20


def test_greedy_text_is_that_of_the_parallel_pass(run):
    trained = open_trained(run)
    text = Writer(trained, Sampler(0.0), max_tokens=60).text(PROMPT)[0]
    assert text == greedy(trained, PROMPT, 60)[: len(text)]
    assert len(text) >= 60


@pytest.mark.parametrize("options", [{"selection": "grid"}, {"interval": [3, 5]}], ids=str)
def test_other_windows_open_too(options, tmp_path):
    trained = open_trained(small_run(tmp_path, **options))
    assert Writer(trained, Sampler(0.0), max_tokens=10).text(PROMPT)[0]


def test_the_model_is_the_best_checkpoint_of_the_run(run):
    """Its validation PPL, computed here, is the one that the run has measured."""
    trained = open_trained(run)
    (tokens,) = run.parent.glob("cache/tokens/*/validation.npy")
    ids = torch.from_numpy(np.load(tokens)).long()
    perplexity = float(score_tokens(trained.model, ids)[0].double().mean().exp())
    assert perplexity == pytest.approx(trained.metrics["result"]["val_ppl"], rel=1e-5)
    assert not trained.model.training


def test_a_seed_repeats_and_a_row_does_not_depend_on_its_neighbours(run):
    trained = open_trained(run)

    def texts(seed, batch):
        return Writer(trained, Sampler(1.0, seed=seed, batch=batch), max_tokens=30).text(PROMPT)

    assert texts(1, 3) == texts(1, 3)
    assert texts(1, 3)[1:] == texts(2, 2)
    assert texts(1, 3)[2:] == texts(3, 1)
    assert len(set(texts(1, 3))) == 3


def test_a_penalty_reaches_back_into_the_prompt(run):
    """So high a penalty never lets one of a row's last four tokens come again, of the prompt's as of its own."""
    trained = open_trained(run)
    ids = trained.encode(PROMPT).tolist()
    chosen: list[int] = []

    class Noted(Sampler):
        def __call__(self, logits, last):
            assert last.tolist()[0][-4:] == [*ids, *chosen][-4:]
            chosen.append(int(super().__call__(logits, last)))
            return torch.tensor(chosen[-1:])

    Writer(trained, Noted(0.0, presence_penalty=1e4), max_tokens=30).text(PROMPT)
    written = [*ids[-4:], *chosen]
    assert all(token not in written[i : i + 4] for i, token in enumerate(chosen))


def test_text_comes_token_by_token_and_what_it_took_is_told(run):
    trained = open_trained(run)
    writer = Writer(trained, Sampler(seed=1, batch=2), max_tokens=12)
    pieces = list(writer.write(PROMPT))
    assert len(pieces) == 12 + 1
    assert {len(piece) for piece in pieces} == {2}
    speed = writer.speed
    assert (speed.tokens, speed.prompt_tokens) == (12, len(trained.encode(PROMPT)))
    assert speed.state_bytes == 2 * (3 * 5 + 1) * 16 * 4
    assert speed.tokens_per_second == pytest.approx(11 / speed.seconds)
    assert "12 tokens" in str(speed)
    assert "2,048 bytes, which does not grow" in str(speed)


def test_writing_ends_before_a_stop_string_and_when_all_rows_have(run):
    trained = open_trained(run)
    free = Writer(trained, Sampler(0.8, seed=3, batch=4), max_tokens=80)
    texts = free.text(PROMPT)
    stop = min(set.intersection(*map(set, texts)), key=texts[0].index)
    stopped = Writer(trained, Sampler(0.8, seed=3, batch=4), max_tokens=80, stops=[stop])
    assert stopped.text(PROMPT) == [text.split(stop)[0] for text in texts]
    assert stopped.speed.tokens < free.speed.tokens


def test_a_long_prompt_is_read_at_once(run):
    trained = open_trained(run)
    prompt = "Zeile 1: die Größe. " * 2000
    writer = Writer(trained, Sampler(0.0), max_tokens=3)
    assert writer.text(prompt)[0]
    assert writer.speed.prompt_tokens > 10_000
    assert writer.speed.state_bytes == (3 * 5 + 1) * 16 * 4


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("\udcff", {}, "not UTF-8 at character 0"),
        ("a", {"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(prompt, options, message, run):
    with pytest.raises(UserError, match=message):
        Writer(open_trained(run), Sampler(), **options).write(prompt)


def test_prompts_come_from_text_file_and_stdin(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes("Größe".encode())
    assert read_prompt("x", None) == "x"
    assert read_prompt(None, tmp_path / "a") == "Größe"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("€".encode())))
    assert read_prompt(None, Path("-")) == "€"
    (tmp_path / "b").write_bytes(b"ab\xff")
    (tmp_path / "c").write_bytes(b"")
    for name, message in (("b", "not UTF-8 at byte 2"), ("c", "is empty"), ("d", "cannot be read"), (".", "cannot be")):
        with pytest.raises(UserError, match=message):
            read_prompt(None, tmp_path / name)


def test_several_texts_are_shown_one_below_the_other(run):
    trained, out = open_trained(run), io.StringIO()
    show(Writer(trained, Sampler(seed=1, batch=2), max_tokens=9), PROMPT, out)
    first, second = Writer(trained, Sampler(seed=1, batch=2), max_tokens=9).text(PROMPT)
    assert out.getvalue() == f"{first}\n--- 2 ---\n{second}\n"


def test_the_command_writes_text_and_then_what_it_took(run, capsys):
    command = ["generate", str(run), "--prompt", PROMPT, "--max-tokens", "9", "--temperature", "0"]
    assert main(command) == 0
    said = capsys.readouterr()
    sampler = Sampler(0.0, presence_penalty=3.0)
    assert said.out == Writer(open_trained(run), sampler, max_tokens=9).text(PROMPT)[0] + "\n"
    assert main([*command, "--presence-penalty", "0"]) == 0
    assert capsys.readouterr().out == Writer(open_trained(run), Sampler(0.0), max_tokens=9).text(PROMPT)[0] + "\n"
    assert said.err.startswith("9 tokens after a prompt of ")
    assert main([*command, "--top-k", "0"]) == 2
    assert capsys.readouterr().err == "error: top_k=0 must be at least 1\n"
    assert main(["generate", str(run), "--prompt", "a", "--batch", "0"]) == 2
    assert capsys.readouterr().err == "error: batch=0 must be at least 1\n"


@pytest.mark.slow
def test_it_streams_and_ends_quietly_when_its_reader_has_left(run):
    command = [sys.executable, "-m", "ctxkv_lightning", "generate", str(run), "--prompt", PROMPT]
    with subprocess.Popen(
        [*command, "--max-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(20)  # long before the last token
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 0


@pytest.mark.parametrize("command", ["generate", "export"])
def test_what_only_training_needs_is_not_loaded(command, run, tmp_path):
    """It took three seconds before the first token; torch alone takes one and a half."""
    words = {"generate": ["--prompt", PROMPT, "--max-tokens", "2"], "export": [str(tmp_path / "export")]}
    code = (
        "import sys\nfrom ctxkv_lightning.__main__ import main\n"
        f"assert main({[command, str(run), *words[command]]!r}) == 0\n"
        "slow = {'lightning', 'torchmetrics', 'datasets', 'hydra', 'omegaconf', 'matplotlib', 'scipy'}\n"
        "print('loaded', sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_a_run_needs_nothing_but_its_folder(copied, monkeypatch):
    shutil.rmtree(copied.parent / "cache", ignore_errors=True)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.devnull)
    assert open_trained(copied).encoding.n_vocab == len(open_trained(copied).model.embedding.weight)


def remove(name):
    return lambda run: (run / name).unlink()


def poison(run):
    path = run / "checkpoints" / "best.ckpt"
    content = read(path)
    content["hyper_parameters"]["model"] = "os.system"
    VerifiedCheckpointIO().save_checkpoint(content, path)


def another_tokenizer(run):
    known = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**known, "tokenizer": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("metrics.json"), r"is not finished: go on with it by 'python train\.py resume="),
        (remove("config.yaml"), "is no run"),
        (remove("checkpoints/best.ckpt"), "no checkpoint"),
        (remove("tokenizer/ranks.tiktoken"), "there is no tokenizer"),
        (lambda run: (run / "checkpoints" / "best.ckpt").write_bytes(b"x" * 100), "damaged"),
        (another_tokenizer, "is not the one that the run was trained with"),
        (poison, "no model 'os.system'"),
        (shutil.rmtree, "there is no run"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(damage, message, copied, capsys):
    damage(copied)
    assert main(["generate", str(copied), "--prompt", "a"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        open_trained(copied)


def test_a_model_of_tokens_from_before_it_could_read_the_current_context_opens():
    """Its recipe says that it does, which had no effect: it has no weights for it."""
    recipe = {"pointer_heads": 1, "pointer_window": 4}
    module = ContextKVLMModule(60, 32, 16, 4, model="sliding_window", window_tokens=5, ffn_dim=48, recipe=recipe)
    told = {**module.hparams, "recipe": {**recipe, "read_current": True}}
    opened = use._model_of({"hyper_parameters": told, "state_dict": module.state_dict()}, Path("x"))
    assert not opened.recipe.read_current
    assert opened.state_dict().keys() == module.model.state_dict().keys()
