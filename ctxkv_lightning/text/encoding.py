"""A tokenizer kept beside the model that was trained with it: all that decides its ids, and nothing that is run.

The folder has `ranks.tiktoken`, the tokens in tiktoken's own format, and `encoding.json`: name, pattern, special
tokens, and the fingerprint that both must have.
"""

import base64
import binascii
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tiktoken

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text.tokenizer import fingerprint

FOLDER = "tokenizer"
"""What the folder is called, beside a run's checkpoints or an exported model."""

RANKS, FACTS = "ranks.tiktoken", "encoding.json"


def save_encoding(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Writes the encoding into a new `folder`, aside and then renamed; one that is there already stays as it is.

    Raises UserError when the disk refuses.
    """
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    facts = {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "sha256": fingerprint(encoding),
    }
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    try:
        aside.mkdir(parents=True)
        _write(aside / RANKS, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks))
        _write(aside / FACTS, json.dumps(facts, indent=2) + "\n")
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"the tokenizer cannot be kept in {folder} ({error.strerror}): make room there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def open_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding that `save_encoding` wrote; a UserError if the folder is missing or not as it was written."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        lines = (folder / RANKS).read_text(encoding="ascii").splitlines()
        ranks = dict(_token_and_rank(line) for line in lines)
        encoding = tiktoken.Encoding(
            facts["name"], pat_str=facts["pattern"], mergeable_ranks=ranks, special_tokens=facts["special_tokens"]
        )
        intact = fingerprint(encoding) == facts["sha256"]
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UserError(f"there is no tokenizer in {folder} ({missing} is missing): put the run's own there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise UserError(f"the tokenizer in {folder} cannot be read ({_first_line(error)})") from None
    if not intact:
        raise UserError(f"the tokenizer in {folder} is damaged: its fingerprint is not the one it was written with")
    return encoding


def token_bytes(encoding: tiktoken.Encoding) -> list[bytes]:
    """What each id stands for; ids that stand for nothing, which some encodings have, are empty."""
    pieces = [b""] * encoding.n_vocab
    for token, rank in encoding._mergeable_ranks.items():
        pieces[rank] = token
    for text, rank in encoding._special_tokens.items():
        pieces[rank] = text.encode()
    return pieces


def _token_and_rank(line: str) -> tuple[bytes, int]:
    token, rank = line.split()
    return base64.b64decode(token, validate=True), int(rank)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _first_line(error: Any) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
