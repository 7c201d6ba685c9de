"""Everything that the published experiment downloads, into one folder, for a machine without network."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text.conversations import download, fitting_ranges
from ctxkv_lightning.text.embedding import GPT2_NAMES, gpt2_table
from ctxkv_lightning.text.hub import GPT2
from ctxkv_lightning.text.tokenizer import fetch_encoding

RECORDS = 50_040
"""As many as the default ranges of validation and test need."""

CONVERSATIONS, TABLE, TIKTOKEN, MANIFEST = "ultrachat.jsonl", "gpt2.safetensors", "tiktoken", "fetched.json"


def fetch(folder: Path, dataset: str, split: str, records: int = RECORDS) -> list[str]:
    """Prepares in `folder` what `experiment=published` needs; the lines that tell how to run it from there.

    That is the first `records` conversations of the data set, GPT-2's embedding and its tokenizer. What is there
    already and intact is not fetched again. A UserError where something cannot be had or written.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        origin = {"dataset": dataset, "split": split, "records": records}
        _ensure(folder, CONVERSATIONS, origin, lambda path: _write_conversations(path, dataset, split, records))
        _ensure(folder, TABLE, {"repository": GPT2}, _write_table)
        fetch_encoding("gpt2", folder / TIKTOKEN)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): make room or name another folder.") from error
    finally:
        if made:  # of nothing that could be had, nothing is left
            with suppress(OSError):
                folder.rmdir()
    return [
        f"{folder} holds {records:,} conversations, GPT-2's embedding and GPT-2's tokenizer; without a network, run",
        command(folder, records),
    ]


def command(folder: Path, records: int = RECORDS) -> str:
    """The command line, for a shell, that runs the published experiment from what `fetch` put into `folder`."""
    ranges = fitting_ranges(records) if records < RECORDS else None
    arguments = [
        *("python", "train.py", "experiment=published", "data=jsonl"),
        f"data.files=[{_quoted(folder / CONVERSATIONS)}]",
        f"embedding.file={_quoted(folder / TABLE)}",
        *(
            f"data.{name}=[{first},{end}]"
            for name, (first, end) in zip(("validation", "test"), ranges or (), strict=False)
        ),
    ]
    return f"TIKTOKEN_CACHE_DIR={shlex.quote(str(folder / TIKTOKEN))} {shlex.join(arguments)}"


def _quoted(path: Path) -> str:
    """The path as Hydra reads it."""
    text = str(path)
    return text if re.fullmatch(r"[\w/.-]+", text, re.ASCII) else '"{}"'.format(text.replace('"', r"\""))


def _write_conversations(path: Path, dataset: str, split: str, records: int) -> None:
    count = download(dataset, split, records, path)
    if count < records:
        raise UserError(
            f"data.dataset={dataset}, data.split={split} has {count:,} records, {records:,} were asked for."
        )


def _write_table(path: Path) -> None:
    save_file({GPT2_NAMES[0]: gpt2_table()}, path)


def _ensure(folder: Path, name: str, origin: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Has `write` make the file unless it is there, from this origin, and as it was when it was written."""
    path, manifest = folder / name, _read_manifest(folder)
    if path.is_file() and manifest.get(name) == {"origin": dict(origin), "sha256": _sha256(path)}:
        return
    _replace(path, write)
    manifest[name] = {"origin": dict(origin), "sha256": _sha256(path)}
    _replace(folder / MANIFEST, lambda aside: aside.write_text(json.dumps(manifest, indent=1)))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file aside and moves it into place: what stands under its name is whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
