"""One page that lays many runs side by side: `report.html`, `report.md` and `figures/`, from their metrics.json."""

import html
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report.content import Content, content_of
from ctxkv_lightning.report.drawing import save_png, styled, to_svg
from ctxkv_lightning.report.looks import SIGNS, Drawn, look
from ctxkv_lightning.report.markdown import table as markdown_table
from ctxkv_lightning.report.runs import collect
from ctxkv_lightning.report.tables import Cell, Column, Table

FIGURES = "figures"
OWN_FIGURES = ("memory", "axis-", "gap", "saturation")
"""How this page's figures begin: those of an earlier comparison in the same place are removed."""

NOTES = (
    "PPL is per token of each run's own tokenizer; val. is the text by which the best epoch is chosen, test is read "
    "once, at the end, by the checkpoint of that epoch.",
    "KB kept counts the tensors that a decoder of one text really keeps after 10,000 tokens, in fp32; 1 KB is 1,000 "
    "bytes. A transformer keeps every token, but its PPL is measured in windows, with fewer in reach than that.",
    "A dash stands for a setting that the model does not read, or a number that a run does not have.",
)


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Compares all runs in and below `folders`; writes the pages into `output`, returns the path of `report.html`.

    Raises UserError when there is no finished run, when `output` is a run's own folder, and when the disk refuses.
    """
    found = collect(folders)
    if (output / "metrics.json").exists():
        raise UserError(f"{output} is a run's own folder, whose report would be lost: name another with --output.")
    with styled():
        content = content_of(found)
        try:
            _save_figures(content, output / FIGURES)
            (output / "report.md").write_text(as_markdown(content), encoding="utf-8", newline="\n")
            (output / "report.html").write_text(as_html(content), encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"Cannot write into {output} ({error.strerror}): make room or name another.") from error
    return output / "report.html"


def _drawn(content: Content) -> Iterator[Drawn]:
    for section in content.sections:
        yield from section.figures


def _save_figures(content: Content, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.name.startswith(OWN_FIGURES):
            old.unlink()
    for drawn in _drawn(content):
        save_png(drawn.figure, folder / f"{drawn.name}.png", dpi=200)


def as_markdown(content: Content) -> str:
    """The page as Markdown, whose figures lie in `figures/`."""
    blocks = [f"# {content.title}", _plain(content.summary), content.warning and f"**{content.warning}**"]
    for section in content.sections:
        blocks += [f"## {section.title}", section.text]
        if section.table:
            blocks.append(_markdown_table(section.table))
        for drawn in section.figures:
            blocks.append(f"![{drawn.name}]({FIGURES}/{drawn.name}.png)\n\n*{_plain(drawn.caption)}*")
    blocks += ["## How to read this", "\n".join(f"- {note}" for note in NOTES)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(table: Table) -> str:
    rows = [[_plain(cell.text) for cell in row] for row in table.rows]
    left = next((i for i, column in enumerate(table.columns) if column.numeric), len(table.columns))
    return markdown_table([column.name for column in table.columns], rows, left)


def _plain(text: str) -> str:
    """What comes from a configuration or an error stays a text, also where Markdown allows HTML."""
    return html.escape(text, quote=False)


def as_html(content: Content) -> str:
    """The page as HTML that loads nothing: style, script and figures are in it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["formula"] = _formula
    template = environment.from_string(page_template())
    figures = {drawn.name: Markup(to_svg(drawn.figure, drawn.name)) for drawn in _drawn(content)}
    return template.render(page=content, figures=figures, notes=NOTES, mark=_mark, kind=_kind)


def page_template() -> str:
    """The page's template, with its style sheet and its script."""
    return resources.files(__package__).joinpath("comparison.html").read_text("utf-8")


def _formula(text: str) -> Markup:
    """PPL_min and n^-a as they are set in print."""
    return escape(text).replace("PPL_min", Markup("PPL<sub>min</sub>")).replace("n^-a", Markup("n<sup>−a</sup>"))


def _kind(column: Column, cell: Cell) -> str:
    """The classes of a table's cell, which the style sheet knows."""
    kinds = {
        "num": column.numeric,
        "best": cell.best,
        "path": column.name == "Folder",
        "long": column.name in ("Reason", "Why", "Basis"),
    }
    return " ".join(name for name, holds in kinds.items() if holds)


def _mark(model: str) -> Markup:
    """The colour and sign that a model has in the figures."""
    index = look(model).index
    svg = '<svg class="mark" viewBox="-6 -6 12 12" aria-hidden="true"><path d="{}" fill="var(--c{})"/></svg>'
    return Markup(svg).format(SIGNS[index], index)
