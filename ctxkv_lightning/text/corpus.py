"""Documents in; training, validation and test documents out.

Two sources: the English documentation in this Python installation (`read_pydocs`), and the user's own
files (`read_files`). `split` then holds validation and test documents back. What they are depends on the
documents alone: not on their order, not on where the files lie, and not on how many samples train.
This module knows nothing about tokens.
"""

import ast
import glob
import hashlib
import json
import os
import re
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ctxkv_lightning.errors import UserError

SEPARATOR = "\n\n"
"""Stands between the documents of a stream."""

_FEWEST_DOCUMENTS = 20  # a corpus of fewer is cut into about as many parts
_SLACK = 0.1  # how far a held-out stream may lie from the size asked for, as a share of it
# No documentation for a reader: tests, demos, bundled wheels, and a hundred generated character tables.
_LEFT_OUT = {"test", "tests", "idle_test", "turtledemo", "_bundled", "encodings", "pydoc_data"}


class Document(NamedTuple):
    """A text, and the name to call it by in messages."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Three disjoint streams; `train` is the whole pool, shuffled once and for all."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]

    def first(self, samples: int | None) -> tuple[Document, ...]:
        """The first `samples` training documents, None for all; a UserError where there are fewer."""
        available = len(self.train)
        if samples is not None and samples > available:
            raise UserError(
                f"samples={samples}, but this text has {available} training documents: set samples={available} "
                "or less, samples=null for all of them, or add text."
            )
        return self.train[:samples]


def read_pydocs() -> list[Document]:
    """The documentation of this Python: one document per `pydoc` topic and per standard-library module.

    Modules are parsed, never imported. A docstring that several modules share stands in the first only,
    so the documents depend on the Python version and on nothing else.
    """
    from pydoc_data.topics import topics

    documents = [Document(f"topic {name}", topics[name].strip()) for name in sorted(topics)]
    seen: set[str] = set()
    for path, name in _stdlib_modules(Path(sysconfig.get_path("stdlib"))):
        text = _docstrings(path, name, seen)
        if text:
            documents.append(Document(name, text))
    return _distinct(documents)


def _stdlib_modules(root: Path) -> list[tuple[Path, str]]:
    """Source files and dotted names; folders such as `site-packages` or `lib-dynload` are no packages."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and not _LEFT_OUT & set(parts):
            modules.append((path, ".".join(parts).removesuffix(".__init__")))
    return modules


def _docstrings(path: Path, module: str, seen: set[str]) -> str:
    """All docstrings of a source file not yet `seen`, each under its heading; "" where there is none."""
    try:
        with tokenize.open(path) as source, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are the business of whoever wrote the module
            tree = ast.parse(source.read())
    except (SyntaxError, ValueError, OSError):
        return ""
    blocks = []
    for heading, docstring in _entries(tree, ""):
        if docstring not in seen:
            seen.add(docstring)
            blocks.append(SEPARATOR.join(filter(None, (heading, docstring))))
    return SEPARATOR.join([module, *blocks]) if blocks else ""


def _entries(node: ast.AST, scope: str) -> Iterator[tuple[str, str]]:
    """Heading and docstring of everything in `node` that has one, in source order."""
    heading = ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        heading = f"class {scope}{node.name}" + (f"({bases})" if bases else "")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        heading = f"{scope}{node.name}({ast.unparse(node.args)})"
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = (ast.get_docstring(node) or "").strip()
        if docstring:
            yield heading, docstring
        scope += "" if isinstance(node, ast.Module) else node.name + "."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _entries(child, scope)


def read_files(patterns: Sequence[str], errors: str = "strict") -> list[Document]:
    """The documents in the files that match `patterns` (globs, `**` and `~` too), read by `datasets`.

    A .txt or .md file is one document; a .jsonl file holds one per line, with `text`, or with `messages`
    whose contents a newline joins. Line ends become "\\n", a byte order mark is dropped, and so are documents
    of whitespace only. `errors` says what happens to bytes that are not UTF-8, as in `bytes.decode`.
    Whatever cannot be read is a UserError that names the file, and the line where there is one.
    """
    paths = _matching(patterns)
    for path in paths:
        _check_file(path, errors)
    whole = [path for path in paths if path.suffix.lower() != ".jsonl"]
    lined = [path for path in paths if path.suffix.lower() == ".jsonl"]
    documents = [Document(str(path), text) for path, text in zip(whole, _load(whole, "document", errors), strict=True)]
    documents += [document for path in lined for document in _records(path, errors)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UserError(f"data.files={list(patterns)} holds no text: every document is blank.")
    return documents


def _matching(patterns: Sequence[str]) -> list[Path]:
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


def _check_file(path: Path, errors: str) -> None:
    """Raises the UserError that `datasets` would hide: it names neither file nor byte."""
    if path.suffix.lower() not in {".txt", ".md", ".jsonl"}:
        raise UserError(f"data.files: {path} is not a .txt, .md or .jsonl file.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.files: {path} cannot be read ({error.strerror}).") from None
    if not content:
        raise UserError(f"data.files: {path} is empty.")
    if errors == "strict":
        try:
            content.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.files: {path} is not valid UTF-8 at byte {error.start}: convert it, or set data.errors=replace."
            ) from None


def _load(paths: Sequence[Path], sample_by: str, errors: str) -> list[str]:
    """Texts of the files: one a file (`sample_by` "document") or one a line ("line"), in order."""
    if not paths:
        return []
    import datasets  # half a second that data=pydocs need not wait for

    files = [glob.escape(os.path.abspath(path)) for path in paths]
    decoding = {"encoding": "utf-8-sig", "encoding_errors": errors}
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # Streaming converts nothing; the folder catches the lock and keeps the user's home untouched.
        with tempfile.TemporaryDirectory() as folder:
            source: dict[str, Any] = {"data_files": files, "split": "train", "streaming": True, "cache_dir": folder}
            rows = datasets.load_dataset("text", sample_by=sample_by, **source, **decoding)
            return [row["text"] for row in rows]
    except Exception as error:  # fsspec, pyarrow and datasets share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.files: datasets cannot read {', '.join(map(str, paths[:3]))} ({reason}).") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _records(path: Path, errors: str) -> Iterator[Document]:
    """The documents of a .jsonl file.

    `datasets` hands over lines, not records: its JSON builder wants every record in the shape of the first,
    fails on blank lines and cannot say which line is broken.
    """
    for number, line in enumerate(_load([path], "line", errors), start=1):
        place = f"data.files: {path}, line {number}"
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON ({getattr(error, 'msg', error)}).") from None
            yield Document(f"{path}:{number}", _record_text(record, place, errors))


def _record_text(record: Any, place: str, errors: str) -> str:
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


def split(documents: Iterable[Document], heldout_bytes: int) -> Corpus:
    """Validation and test documents of about `heldout_bytes` UTF-8 bytes each; the rest trains.

    Never more than a tenth of the text each. Documents come in the order of the SHA-256 of their text. Of
    documents with the same text one is kept: otherwise a held-out text could be trained on. Fewer than 20
    documents are cut at line ends into about 20 parts, `name#1`, `name#2`, ..., so that one book will do.
    A UserError where there are not three documents to be had.
    """
    pool = _distinct(documents)
    total = sum(map(_size, pool))
    if len(pool) < _FEWEST_DOCUMENTS:
        pool = [part for document in pool for part in _parts(document, total / _FEWEST_DOCUMENTS)]
    if len(pool) < 3:
        raise UserError(f"{total} bytes of text are too little for training, validation and test: add text.")
    target = min(heldout_bytes, total // 10)
    pool.sort(key=lambda document: (hashlib.sha256(document.text.encode()).digest(), document.name))
    validation, pool = _take(pool, target)
    test, pool = _take(pool, target)
    return Corpus(tuple(pool), tuple(validation), tuple(test))


def _size(document: Document) -> int:
    return len(document.text.encode())


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """Each text once, under the first of its names; no empty ones."""
    named = {document.text: document for document in sorted(documents, reverse=True)}
    return sorted(document for text, document in named.items() if text)


def _take(pool: Sequence[Document], target: int) -> tuple[list[Document], list[Document]]:
    """Documents from the front of `pool` that add up to about `target` bytes, and those left."""
    taken, left, size = [], [], 0
    for document in pool:
        after = size + _size(document)
        if size < target * (1 - _SLACK) and after <= target * (1 + _SLACK):
            taken.append(document)
            size = after
        else:
            left.append(document)
    if not taken:  # every document is larger than the target: the smallest comes nearest
        taken = [min(pool, key=_size)]
        left.remove(taken[0])
    return taken, left


def _parts(document: Document, part_bytes: float) -> list[Document]:
    """The document in parts of about `part_bytes`, which concatenated are its text again."""
    name, text = document
    count = min(max(1, round(_size(document) / part_bytes)), len(text))
    if count == 1:
        return [document]
    reach = min(len(text) // count // 4, 10_000)
    cuts = [_cut_near(text, len(text) * part // count, reach) for part in range(1, count)]
    bounds = zip([0, *cuts], [*cuts, len(text)], strict=True)
    return [Document(f"{name}#{number}", text[start:end]) for number, (start, end) in enumerate(bounds, start=1)]


def _cut_near(text: str, position: int, reach: int) -> int:
    """The end of a line within `reach` characters of `position`, else of a word, else any."""
    for boundary in (r"\n", r"\s"):
        ends = [match.end() for match in re.compile(boundary).finditer(text, position - reach, position + reach)]
        if ends:
            return min(ends, key=lambda end: abs(end - position))
    return position
