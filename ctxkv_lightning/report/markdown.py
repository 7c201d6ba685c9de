"""Tables in Markdown and numbers as the pages write them."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """A Markdown table whose source is aligned too; the first `left` columns to the left, others to the right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def thinned(rows: Sequence[Any], keep: int | None = None, limit: int = 20) -> list[Any]:
    """About `limit` evenly spaced `rows` of a longer table; the first, the last and number `keep` always stay."""
    step = math.ceil(len(rows) / limit)
    return [row for i, row in enumerate(rows) if i % step == 0 or i in (keep, len(rows) - 1)]


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict as dotted keys and values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def flat(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """The leaves of a nested dict as dotted keys and values, written as on the command line."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in leaves(tree)
    ]


def ppl(value: float | None) -> str:
    """A perplexity with one decimal."""
    return "–" if value is None else f"{value:,.1f}"


def percent(share: float | None) -> str:
    """A share as per cent with one decimal."""
    return "–" if share is None else f"{100 * share:.1f} %"


def ratio(ours: float | None, its: float | None) -> str:
    """How many times `its` is `ours`."""
    return "–" if ours is None or not its else f"{ours / its:.2f} ×"


def kilobytes(count: int) -> str:
    """Bytes in units of 1,000, whole ones from a hundred on, three digits of fewer: 636 KB, 0.064 KB."""
    return f"{count / 1000:,.0f} KB" if count >= 100_000 else f"{count / 1000:.3g} KB"


def megabytes(count: int) -> str:
    """Bytes in units of 2^20, as in the published tables."""
    return f"{count / 2**20:,.2f}"
