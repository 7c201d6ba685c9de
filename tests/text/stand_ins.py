"""Stand-ins for all that comes over the network: a data set of conversations, GPT-2's weights and tokenizer."""

import hashlib

import torch
from safetensors.torch import save_file

from ctxkv_lightning.text import hub
from tests.conftest import SHARED_DATA


def conversation(number: int) -> dict:
    """A conversation that tells its number."""
    turns = [f"question {number}", f"answer\nof two lines {number}"]
    return {
        "messages": [{"content": turn, "role": role} for turn, role in zip(turns, ("user", "assistant"), strict=True)]
    }


def text(number: int) -> str:
    """What `conversation(number)` says, written down by hand."""
    return f"question {number}\nanswer\nof two lines {number}"


class DataSet:
    """Stands in for `datasets.load_dataset`: so many conversations, and how many of them were read.

    Local files are still read by the real one, `local`.
    """

    def __init__(self, local, count: int, fails_at: int | None = None) -> None:
        self.local, self.count, self.fails_at, self.read, self.calls = local, count, fails_at, 0, []

    def __call__(self, *arguments, **options):
        if arguments[0] == "text":
            return self.local(*arguments, **options)
        self.calls.append((arguments, options))
        return self

    def __iter__(self):
        for number in range(self.count):
            if number == self.fails_at:
                raise ConnectionError("Couldn't reach it\nand more")
            self.read += 1
            yield {"prompt": "p", "prompt_id": "0", **conversation(number)}


class Network:
    """Stands in for the three downloads of `fetch`, and lists them; whatever is in `down` fails."""

    SHAPE = (6, 4)

    def __init__(self, folder, monkeypatch, conversations=200):
        self.fetched, self.down, self.conversations = [], set(), conversations
        self.weights = folder / "model.safetensors"
        table = torch.randn(self.SHAPE, generator=torch.Generator().manual_seed(0))
        save_file({"wte.weight": table, "wpe.weight": torch.zeros(3, 4)}, self.weights)
        monkeypatch.setattr(hub, "records", self.records)
        monkeypatch.setattr(hub, "gpt2_weights", self.gpt2_weights)
        monkeypatch.setattr("tiktoken.load.read_file", self.read_file)
        monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
        monkeypatch.setattr("ctxkv_lightning.text.embedding.GPT2_SHAPE", self.SHAPE)

    def _fetch(self, what):
        if what in self.down:
            raise ConnectionError("no network in tests")
        self.fetched.append(what)

    def records(self, dataset, split):
        with hub._reaching("it"):
            self._fetch("data")
            yield from ({"prompt": "p", **conversation(number)} for number in range(self.conversations))

    def gpt2_weights(self):
        with hub._reaching("it"):
            self._fetch("table")
        return str(self.weights)

    def read_file(self, address):
        self._fetch("tokenizer")
        return (SHARED_DATA / "tiktoken_cache" / hashlib.sha1(address.encode()).hexdigest()).read_bytes()
