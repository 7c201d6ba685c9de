import errno
import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report import comparison
from ctxkv_lightning.report.comparison import write_comparison
from tests.conftest import ROOT
from tests.report.sample_metrics import model_metrics, write_run, write_status, write_sweep


class Page(HTMLParser):
    """The tables of a page by their section, as rows of (text, what it is sorted by), and its outward links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.section, self.open, self.loaded, self.scripts = "", False, [], 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [value for key in ("src", "href", "xlink:href", "data") if (value := given.get(key))]
        self.scripts += tag == "script"
        if tag == "section":
            self.section = given["id"] or ""
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        self.open = tag in ("td", "th") or (self.open and tag in ("button", "span", "sub", "svg", "path"))
        if tag in ("td", "th"):
            self.tables[self.section][-1].append(("", given.get("data-order")))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            text, order = self.tables[self.section][-1][-1]
            self.tables[self.section][-1][-1] = (text + data.strip(), order)

    def column(self, section: str, name: str) -> list[str]:
        head, *rows = self.tables[section]
        index = [text for text, _ in head].index(name)
        return [row[index][0] for row in rows]


def compare(tmp_path: Path) -> tuple[Page, str]:
    output = tmp_path / "out"
    page = write_comparison([tmp_path], output)
    assert page == output / "report.html"
    return Page(page.read_text(encoding="utf-8")), (output / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = write_sweep(tmp_path_factory.mktemp("sweep") / "runs").parent / "out"
    return write_comparison([output.parent / "runs"], output)


@pytest.fixture(scope="module")
def page(sweep: Path) -> Page:
    return Page(sweep.read_text(encoding="utf-8"))


def test_there_is_a_row_for_every_run_best_first(page: Page) -> None:
    ppl = [float(text) for text in page.column("runs", "Val. PPL")]
    assert len(ppl) == 76
    assert ppl == sorted(ppl)
    assert page.column("runs", "model")[0] == "transformer"
    assert len(set(page.column("runs", "Folder"))) == 76
    assert [text for text, _ in page.tables["runs"][0]] == [
        *("model", "samples", "interval", "selection", "window_tokens", "seed"),
        *("Val. PPL", "Test PPL", "Accuracy", "Gap", "KB kept", "Best epoch", "Trained", "Seconds", "Folder"),
    ]


def test_numbers_sort_by_what_they_are_and_not_by_how_they_are_written(page: Page) -> None:
    head, *rows = page.tables["runs"]
    index = [text for text, _ in head].index("KB kept")
    written, exact = rows[0][index]
    assert (written, exact) == ("61,440", "61440000")
    dashes = [row for row in rows if row[2][0] == "–"]
    assert dashes
    assert all(row[2][1] is None for row in dashes)


def test_seeds_stand_together(page: Page, sweep: Path) -> None:
    assert len(page.tables["seeds"]) == 1 + 20 + 4 + 4
    runs = {"transformer": [], "cascade": []}  # type: ignore[var-annotated]
    for folder in (sweep.parent.parent / "runs").glob("*/metrics.json"):
        metrics = json.loads(folder.read_text())
        if metrics["config"]["model"]["name"] in runs and metrics["config"]["samples"] == 500:
            runs[metrics["config"]["model"]["name"]].append(metrics["result"]["val_ppl"])
    for model, ppl in runs.items():
        mean = sum(ppl) / 3
        spread = (sum((each - mean) ** 2 for each in ppl) / 2) ** 0.5
        (row,) = [r for r in page.tables["seeds"] if r[0][0] == model and r[1][0] == "500"]
        assert (row[5][0], row[6][0]) == ("3", f"{mean:.1f} ± {spread:.1f}")
    alone = [row for row in page.tables["seeds"] if row[5][0] == "1"]
    assert len(alone) == 4
    assert all("±" not in text for row in alone for text, _ in row)


def test_every_figure_is_in_the_page_and_beside_it(sweep: Path) -> None:
    names = [f"memory-{n}" for n in (500, 250, 100, 50)]
    names.append("axis-samples")
    names += [f"axis-{key}-500" for key in ("model-name", "interval", "selection", "model-window_tokens")]
    names += [f"axis-model-name-{n}" for n in (250, 100, 50)] + ["saturation", "gap"]
    found = {path.stem for path in (sweep.parent / "figures").iterdir()}
    assert found == set(names)
    markdown = (sweep.parent / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[.+?\]\(figures/(.+?)\.png\)", markdown) == names
    text = sweep.read_text(encoding="utf-8")
    assert set(re.findall(r'id="([\w-]+)-figure_1"', text)) == set(names)
    assert matplotlib.image.imread(sweep.parent / "figures" / "memory-500.png").shape[1] == 1160


def test_the_page_loads_nothing(page: Page, sweep: Path) -> None:
    text = sweep.read_text(encoding="utf-8")
    assert all(link.startswith("#") or link == "data:," for link in page.loaded)
    assert page.scripts == 1
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert str(sweep.parent.parent) not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_fits_stand_with_their_uncertainty(page: Page) -> None:
    assert page.column("saturation", "Configuration")[0] == "transformer"
    assert all(re.fullmatch(r"\d[\d.,]* ± \d[\d.,]*", text) for text in page.column("saturation", "PPLmin"))
    assert set(page.column("saturation", "Basis")) == {"4 values of samples, which leave 1 degree of freedom"}


def test_failures_are_listed_with_reason_and_folder(page: Page, sweep: Path) -> None:
    assert [[text for text, _ in row] for row in page.tables["failures"][1:]] == [
        ["900", "interval=200000", "failed", "interval=200000 must be below the 109,863 training tokens"],
        ["901", "", "interrupted", "signal 15"],
    ]
    markdown = (sweep.parent / "report.md").read_text(encoding="utf-8")
    assert "| 901    |                 | interrupted | signal 15 " in markdown
    assert "1 failed, 1 interrupted" in sweep.read_text(encoding="utf-8")


def test_both_pages_say_the_same(page: Page, sweep: Path) -> None:
    markdown = (sweep.parent / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith("# 76 runs of 5 models\n\nThey differ in model, samples, interval, selection, ")
    for section, title in (("runs", "Runs, best first"), ("seeds", "Seeds together"), ("saturation", "Saturation")):
        block = markdown.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
        lines = [line for line in block.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
        said = [[text for text, _ in row] for row in page.tables[section]]
        assert [[cell.replace("PPL_min", "PPLmin") for cell in row] for row in rows] == said


def test_nothing_but_metrics_is_read(tmp_path: Path, sweep: Path) -> None:
    again = write_comparison([sweep.parent.parent / "runs"], tmp_path)
    for name in ("report.html", "report.md", "figures/gap.png"):
        assert (tmp_path / name).read_bytes() == (sweep.parent / name).read_bytes()
    assert again.parent == tmp_path


def test_along_no_setting_but_samples_are_models_of_different_texts(tmp_path: Path) -> None:
    """With nine values of heads the best of each interval was drawn, from whichever text had the lowest PPL."""
    for i, samples in product((20, 50), (100, 500)):
        for heads in range(1, 10):
            metrics = model_metrics(val_ppl=i + heads / samples, interval=i, samples=samples)
            metrics["config"]["heads"] = heads
            write_run(tmp_path / f"{i}-{samples}-{heads}", metrics)
    for samples, value in ((100, 70), (500, 30)):
        write_run(tmp_path / f"t{samples}", model_metrics("transformer", val_ppl=value, samples=samples))
    _, markdown = compare(tmp_path)
    figures = re.findall(r"!\[.+?\]\(figures/(.+?)\.png\)\n\n\*(.+)\*", markdown)
    captions = dict(figures)
    assert captions["axis-interval-100"].startswith("Validation PPL by interval with 100 documents: the best of each")
    assert captions["axis-interval-500"].startswith("Validation PPL by interval with 500 documents: the best of each")
    assert "axis-interval" not in captions
    assert "axis-samples" in captions
    assert "together with" not in captions["axis-model-name-100"], (
        "what does not differ here changes along with nothing"
    )


def test_a_text_from_outside_stays_a_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>|$x_1$ & \"'"
    for i, source in enumerate((hostile, "pydocs")):
        metrics = model_metrics(val_ppl=100.0 + i)
        metrics["config"]["data"]["source"] = source
        write_run(tmp_path / str(i), metrics)
    write_status(tmp_path / "3", "failed", hostile)
    page, markdown = compare(tmp_path)
    assert page.scripts == 1
    assert hostile in page.column("runs", "source")[0]
    assert page.column("failures", "Reason") == [hostile]
    assert "<script>" not in markdown
    assert (tmp_path / "out" / "figures" / "axis-data-source.png").exists()


def test_one_run_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "a", model_metrics())
    page, markdown = compare(tmp_path)
    assert list(page.tables) == ["runs"]
    assert markdown.startswith("# 1 run of context_kv\n\nBest: context_kv, with a validation PPL of ")


@pytest.mark.parametrize("model", ["context_kv", "cascade", "transformer", "sliding_window", "recurrence"])
def test_two_runs_of_any_model_have_a_page(tmp_path: Path, model: str) -> None:
    for seed in (1, 2):
        write_run(tmp_path / str(seed), model_metrics(model, seed=seed))
    page, markdown = compare(tmp_path)
    assert page.column("runs", "seed") in (["1", "2"], ["2", "1"])
    assert page.column("seeds", "Seeds, n") == ["2"]
    assert "over 2 seeds" in markdown


def test_old_metrics_stand_beside_new_ones(tmp_path: Path) -> None:
    old = json.loads((ROOT / "docs" / "default-run" / "metrics.json").read_text())
    old.pop("decode_state", None)
    write_run(tmp_path / "old", old)
    for i, model in enumerate(("context_kv", "transformer")):
        metrics = model_metrics(model, val_ppl=300.0 + i)
        metrics["data"].update(val_tokens=old["data"]["val_tokens"], vocab_size=old["data"]["vocab_size"])
        write_run(tmp_path / model, metrics)
    page, markdown = compare(tmp_path)
    assert dict(zip(page.column("runs", "Folder"), page.column("runs", "KB kept"), strict=True)) == {
        "context_kv": "636",
        "transformer": "61,440",
        "old": "–",
    }
    assert "Left out: 1 run whose metrics do not say what a decoder keeps." in markdown
    assert "compare PPLs only" not in markdown


def test_different_texts_are_a_warning(tmp_path: Path) -> None:
    write_run(tmp_path / "a", model_metrics())
    other = model_metrics(seed=1)
    other["data"]["vocab_size"] = 8192
    write_run(tmp_path / "b", other)
    _, markdown = compare(tmp_path)
    assert "(22,800 tokens of 50,257 kinds and 22,800 tokens of 8,192 kinds): compare PPLs only where they" in markdown


def test_a_run_without_a_test_text_has_a_dash(tmp_path: Path) -> None:
    for seed in (1, 2):
        metrics = model_metrics(seed=seed)
        metrics["result"]["test_ppl"] = None
        write_run(tmp_path / str(seed), metrics)
    page, _ = compare(tmp_path)
    assert page.column("runs", "Test PPL") == ["–", "–"]
    assert page.column("seeds", "Test PPL") == ["–"]


def test_figures_of_an_earlier_comparison_are_removed_and_others_left(tmp_path: Path) -> None:
    write_run(tmp_path / "a", model_metrics())
    figures = tmp_path / "out" / "figures"
    figures.mkdir(parents=True)
    for name in ("axis-heads.png", "memory-50.png", "mine.png"):
        (figures / name).touch()
    compare(tmp_path)
    assert sorted(path.name for path in figures.iterdir()) == ["gap.png", "mine.png"]


def test_a_runs_own_report_is_not_overwritten(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", model_metrics())
    with pytest.raises(UserError, match="own folder, whose report would be lost"):
        write_comparison([run], run)
    assert [path.name for path in run.iterdir()] == ["metrics.json"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_run(tmp_path / "a", model_metrics())
    monkeypatch.setattr(comparison, "save_png", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_comparison([tmp_path], tmp_path / "out")


def test_the_template_is_in_the_wheel() -> None:
    others = [path for path in (ROOT / "ctxkv_lightning").rglob("*") if path.suffix not in (".py", ".pyc", "")]
    assert [path.name for path in others] == ["comparison.html"]
    assert '"ctxkv_lightning.report" = ["comparison.html"]' in (ROOT / "pyproject.toml").read_text()
