"""The user's own files in, documents out: .txt and .md whole, .jsonl record by record.

Whatever cannot be read is a UserError that names the file, and the line where there is one.
"""

import codecs
import glob
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.text.corpus import Document
from ctxkv_lightning.text.hub import quiet

_BLOCK = 1 << 20


def read_files(patterns: Sequence[str], errors: str = "strict") -> list[Document]:
    """The documents in the files that match `patterns` (globs, `**` and `~` too), read by `datasets`.

    A .txt or .md file is one document; a .jsonl file holds one per line, with `text`, or with `messages`
    whose contents a newline joins. Line ends become "\\n", a byte order mark is dropped, and so are documents
    of whitespace only. `errors` says what happens to bytes that are not UTF-8, as in `bytes.decode`.
    Whatever cannot be read is a UserError that names the file, and the line where there is one.
    """
    paths = matching(patterns)
    for path in paths:
        check_file(path, errors)
    whole = [path for path in paths if path.suffix.lower() != ".jsonl"]
    lined = [path for path in paths if path.suffix.lower() == ".jsonl"]
    documents = [Document(str(path), text) for path, text in zip(whole, _load(whole, "document", errors), strict=True)]
    documents += [parse_record(*line, errors) for path in lined for line in record_lines(path, errors)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UserError(f"data.files={list(patterns)} holds no text: every document is blank.")
    return documents


def matching(patterns: Sequence[str]) -> list[Path]:
    """The files, each once, in the order of the patterns and sorted within one."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        names = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        files = [Path(name) for name in names if not os.path.isdir(name)]
        if not files and os.path.isdir(expanded):
            raise UserError(f"data.files: {pattern} is a folder, name the files in it, for example {pattern}/**/*.txt.")
        if not files:
            raise UserError(f"data.files: no file matches {pattern} (looked from {os.getcwd()}).")
        for path in files:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def check_file(path: Path, errors: str) -> None:
    """Raises the UserError that `datasets` would hide: it names neither file nor byte."""
    if path.suffix.lower() not in {".txt", ".md", ".jsonl"}:
        raise UserError(f"data.files: {path} is not a .txt, .md or .jsonl file.")
    try:
        if not path.stat().st_size:
            raise UserError(f"data.files: {path} is empty.")
        invalid = _invalid_byte(path) if errors == "strict" else None
    except OSError as error:
        raise UserError(f"data.files: {path} cannot be read ({error.strerror}).") from None
    if invalid is not None:
        raise UserError(
            f"data.files: {path} is not valid UTF-8 at byte {invalid}: convert it, or set data.errors=replace."
        )


def _invalid_byte(path: Path) -> int | None:
    """Where the file stops being UTF-8; None where all of it is."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the block before began
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return start - waiting + error.start
            if not block:
                return None
            start += len(block)


def _load(paths: Sequence[Path], sample_by: str, errors: str) -> Iterator[str]:
    """Texts of the files: one a file (`sample_by` "document") or one a line ("line"), in order."""
    if not paths:
        return
    import datasets  # half a second that data=pydocs need not wait for

    files = [glob.escape(os.path.abspath(path)) for path in paths]
    decoding = {"encoding": "utf-8-sig", "encoding_errors": errors}
    try:
        # Streaming converts nothing; the folder catches the lock and keeps the user's home untouched.
        with quiet(), tempfile.TemporaryDirectory() as folder:
            source: dict[str, Any] = {"data_files": files, "split": "train", "streaming": True, "cache_dir": folder}
            rows = datasets.load_dataset("text", sample_by=sample_by, **source, **decoding)
            for row in rows:
                yield row["text"]
    except Exception as error:  # fsspec, pyarrow and datasets share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.files: datasets cannot read {', '.join(map(str, paths[:3]))} ({reason}).") from error


def record_lines(path: Path, errors: str) -> Iterator[tuple[Path, int, str]]:
    """The lines of a .jsonl file that are not blank, each with the file and its number, read as they are asked for.

    `datasets` hands over lines, not records: its JSON builder wants every record in the shape of the first,
    fails on blank lines and cannot say which line is broken.
    """
    for number, line in enumerate(_load([path], "line", errors), start=1):
        if line.strip():
            yield path, number, line


def parse_record(path: Path, number: int, line: str, errors: str) -> Document:
    """The document in line `number` of a .jsonl file."""
    place = f"data.files: {path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({getattr(error, 'msg', error)}).") from None
    return Document(f"{path}:{number}", record_text(record, place, errors))


def record_text(record: Any, place: str, errors: str) -> str:
    """The `text` of a record, else the contents of its `messages`, joined by a newline."""
    text = record.get("text") if isinstance(record, dict) else None
    if text is None and isinstance(record, dict) and isinstance(record.get("messages"), list):
        contents = [message.get("content") if isinstance(message, dict) else None for message in record["messages"]]
        if not all(isinstance(content, str) for content in contents):
            raise UserError(f"{place} has a message whose `content` is not text.")
        text = "\n".join(map(str, contents))
    if not isinstance(text, str):
        raise UserError(f"{place} has neither a `text` nor `messages`.")
    try:
        # JSON can spell half of a surrogate pair, which UTF-8 cannot hold.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
    except UnicodeDecodeError:
        raise UserError(f"{place} has half of a surrogate pair: mend it, or set data.errors=replace.") from None
