"""Text to ids and back: every tokenizer is a `tiktoken.Encoding`.

`learn_bpe` learns one from the training documents, `load_encoding` takes one of tiktoken's own. A learnt
encoding is kept as a .tiktoken file (`save_ranks`, `load_ranks`); its pattern is always `GPT2_PATTERN`.
"""

import base64
import binascii
import difflib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text.corpus import SEPARATOR

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How GPT-2 splits text into words before it merges bytes within them."""

FETCH_SECONDS = 20
"""How long tiktoken may take to fetch an encoding: its own download has no time limit."""

MAX_BLANK_RUN = 100_000
"""Characters of whitespace in a row that tiktoken's regex survives; at a million its stack overflows."""


def learn_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """A byte-level BPE of at most `vocab_size` tokens: the 256 bytes, then the merges in the order learnt.

    Ids are 0 ... n_vocab-1, so any bytes can be encoded and decode to themselves. A pair is merged only
    when it occurs twice: a small text gives fewer tokens. The same texts give the same encoding.
    """
    return _encoding(_ranks(json.loads(_train(texts, vocab_size).to_str())["model"]["merges"]))


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _ranks(merges: Iterable[tuple[str, str]]) -> dict[bytes, int]:
    """tiktoken's ranks for merges in the byte alphabet of `tokenizers`."""
    byte_of = _byte_alphabet()
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merges:
        # Two merges may make the same token; its rank is that of the first.
        ranks.setdefault(bytes(byte_of[character] for character in left + right), len(ranks))
    return ranks


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of GPT-2's alphabet: itself if visible, else numbered from 256."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


def load_encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's own encoding `name`; a UserError, within seconds, if it is unknown or out of reach."""
    outcome: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            known = tiktoken.list_encoding_names()
            outcome.append(tiktoken.get_encoding(name) if name in known else _unknown(name, known))
        except Exception as error:
            outcome.append(error)

    # A daemon, so that a download which hangs cannot keep the program alive.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, tiktoken.Encoding):
        return result
    raise result if isinstance(result, UserError) else _out_of_reach(name, result)


def fetch_encoding(name: str, folder: Path) -> None:
    """Has tiktoken put the files of its encoding `name` into `folder`; what is there and intact it does not fetch."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    tiktoken.registry.ENCODINGS.pop(name, None)  # one that is loaded already would touch no file
    try:
        load_encoding(name)
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def _unknown(name: str, known: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return UserError(f"tokenizer.name={name} is not an encoding of tiktoken{guess}: it has {', '.join(known)}.")


def _out_of_reach(name: str, error: Exception) -> UserError:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    place = f"TIKTOKEN_CACHE_DIR={folder}" if folder else "TIKTOKEN_CACHE_DIR, which is not set"
    command = " ('python -m ctxkv_lightning fetch FOLDER' does it)" if name == "gpt2" else ""
    return UserError(
        f"The files of tiktoken's encoding {name} are not in {place}, and cannot be fetched from here "
        f"({type(error).__name__}): fetch them once on a machine with network{command}, and set TIKTOKEN_CACHE_DIR to "
        "the folder that holds them."
    )


def save_ranks(encoding: tiktoken.Encoding, path: Path) -> None:
    """Writes a learnt encoding in tiktoken's own format: a line `base64(token) rank` for each token."""
    if encoding._pat_str != GPT2_PATTERN or encoding._special_tokens:
        raise ValueError(f"{encoding.name} was not learnt by learn_bpe: the file holds the ranks only")
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in _sorted_ranks(encoding)]
    path.write_text("".join(lines), encoding="ascii", newline="\n")


def load_ranks(path: Path) -> tiktoken.Encoding:
    """The encoding that `save_ranks` wrote; a UserError if the file is missing or damaged."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"{path} is not a readable .tiktoken file ({error}).") from None
    every_byte = all(bytes([byte]) in ranks for byte in range(256))
    if not every_byte or list(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path} is damaged: its ranks are not 0, 1, 2, ..., or a byte is missing.")
    return _encoding(ranks)


def encode_documents(encoding: tiktoken.Encoding, texts: Sequence[str], separator: str = SEPARATOR) -> np.ndarray:
    """The ids (N,) int32 of one stream: the texts with `separator` between them.

    Each text is encoded by itself, together with the separator that follows it; special tokens in it are
    plain text. Memory beyond the ids is that of the longest text.
    """
    ends = [separator] * (len(texts) - 1) + [""]
    chunks = [
        np.asarray(encoding.encode_ordinary(piece), dtype=np.int32)
        for text, end in zip(texts, ends, strict=False)
        for piece in _pieces(text + end)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int32)


def _pieces(text: str) -> Iterator[str]:
    """The text, cut only inside runs of whitespace that would overflow tiktoken's regex."""
    start = 0
    for run in re.finditer(rf"(?<!\s)\s{{{MAX_BLANK_RUN},}}", text):
        for cut in range(run.start() + MAX_BLANK_RUN, run.end(), MAX_BLANK_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of all that decides the ids (ranks, pattern, special tokens), whatever the encoding's name."""
    ranks = [[token.hex(), rank] for token, rank in _sorted_ranks(encoding)]
    content = [encoding._pat_str, sorted(encoding._special_tokens.items()), ranks]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sorted_ranks(encoding: tiktoken.Encoding) -> list[tuple[bytes, int]]:
    return sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
