"""Documents in; training, validation and test documents out.

One source stands here, the English documentation in this Python installation (`read_pydocs`); `files` reads the
user's own. `split` then holds validation and test documents back. What they are depends on the
documents alone: not on their order, not on where the files lie, and not on how many samples train.
This module knows nothing about tokens.
"""

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
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
    train_separator: str = SEPARATOR
    """Stands between training documents; between those held out it is always `SEPARATOR`."""

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


def pydocs_state() -> dict[str, Any]:
    """What `read_pydocs` would read, told without reading it: this Python, its files, their sizes and times.

    JSON. Where it is the same, so are the documents, as Python itself assumes when it reuses a compiled module; this
    module, which reads them, is part of it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    read = [root / "pydoc_data" / "topics.py", *(path for path, _ in _stdlib_modules(root))]
    stats = {str(path): path.stat() for path in read if path.exists()}
    files = [[path, found.st_size, found.st_mtime_ns] for path, found in stats.items()]
    told = {"files": json.dumps(files).encode(), "reader": Path(__file__).read_bytes()}
    return {"python": sys.version, **{name: hashlib.sha256(data).hexdigest() for name, data in told.items()}}


def _stdlib_modules(root: Path) -> list[tuple[Path, str]]:
    """Source files and dotted names; folders such as `site-packages` or `lib-dynload` are no packages."""
    modules = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _is_module(name)]
        inside = Path(folder).relative_to(root).parts
        for name in files:
            if name.endswith(".py") and _is_module(stem := name.removesuffix(".py")):
                modules.append((Path(folder, name), ".".join([*inside, stem]).removesuffix(".__init__")))
    return sorted(modules)


def _is_module(name: str) -> bool:
    return name.isidentifier() and name not in _LEFT_OUT


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
