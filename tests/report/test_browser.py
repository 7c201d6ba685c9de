"""The comparison page in a real browser: the system's Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctxkv_lightning.report.comparison import write_comparison
from tests.report.sample_metrics import write_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    return write_comparison([write_sweep(folder / "runs")], folder / "out")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, opened; at the end nothing may have gone wrong in it and nothing may have been fetched."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    page.close()
    assert wrong == []
    assert [url for url in fetched if not url.startswith("data:")] == [page_file.as_uri()]


def column(page: Any, section: str, name: str) -> list[str]:
    names = page.locator(f"#{section} thead th").all_inner_texts()
    return page.locator(f"#{section} tbody td:nth-child({names.index(name) + 1})").all_inner_texts()


def header(page: Any, section: str, name: str) -> Any:
    return page.locator(f"#{section} thead th").filter(has=page.get_by_role("button", name=name, exact=True))


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace(",", "").rstrip(" %")) for text in texts]


@pytest.mark.parametrize("name", ["Val. PPL", "Test PPL", "Accuracy", "Gap", "KB kept", "samples", "Seconds"])
def test_a_click_sorts_by_number_and_another_turns_it_round(page: Any, name: str) -> None:
    head = header(page, "runs", name)
    if head.get_attribute("aria-sort") == "ascending":  # as it was written
        head.click()
    head.get_by_role("button").click()
    rising = numbers(column(page, "runs", name))
    assert head.get_attribute("aria-sort") == "ascending"
    assert rising == sorted(rising)
    assert len(set(rising)) > 1 or name == "Seconds"
    head.get_by_role("button").click()
    falling = numbers(column(page, "runs", name))
    assert head.get_attribute("aria-sort") == "descending"
    assert falling == sorted(falling, reverse=True)
    assert len(falling) == 76


def test_only_one_column_says_that_it_is_sorted(page: Any) -> None:
    header(page, "runs", "Gap").get_by_role("button").click()
    states = page.locator("#runs thead th").evaluate_all("all => all.map(th => th.getAttribute('aria-sort'))")
    assert sorted(state for state in states if state != "none") == ["ascending"]
    assert header(page, "seeds", "Val. PPL").get_attribute("aria-sort") == "ascending"


def test_names_sort_as_names_with_what_is_missing_last(page: Any) -> None:
    button = header(page, "runs", "model").get_by_role("button")
    button.click()
    assert column(page, "runs", "model") == sorted(column(page, "runs", "model"))
    button = header(page, "runs", "window_tokens").get_by_role("button")
    for reverse in (False, True):
        button.click()
        found = column(page, "runs", "window_tokens")
        present = [float(text) for text in found if text != "–"]
        assert present == sorted(present, reverse=reverse)
        assert found[len(present) :] == ["–"] * (len(found) - len(present))


def test_folders_sort_by_the_numbers_in_them(page: Any) -> None:
    header(page, "runs", "Folder").get_by_role("button").click()
    assert column(page, "runs", "Folder") == [str(i) for i in range(76)]


def test_rows_stay_whole(page: Any) -> None:
    def rows() -> list[str]:
        return page.locator("#seeds tbody tr").all_inner_texts()

    before = rows()
    header(page, "seeds", "KB kept").get_by_role("button").click()
    assert rows() != before
    assert sorted(rows()) == sorted(before)


def test_the_keyboard_sorts_too(page: Any) -> None:
    button = header(page, "runs", "Gap").get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    gaps = numbers(column(page, "runs", "Gap"))
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1360, 900)])
def test_nothing_sticks_out_of_the_page(page: Any, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in (figure.bounding_box() for figure in page.locator("figure:not(.wide) > svg").all()):
        assert box is not None
        assert box["width"] <= width
        assert box["height"] > 200 * min(1, width / 500)


def test_print_shows_all_rows_and_no_navigation(page: Any) -> None:
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    scroller = page.locator("#runs .scroller")
    assert scroller.evaluate("box => box.scrollHeight <= box.clientHeight + 2")
    shown = page.locator("#runs th").first.evaluate("th => getComputedStyle(th, '::before').content")
    assert shown == '"model"'


def test_dark_pages_have_light_ink(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    ink, paper = page.evaluate("(style => [style.color, style.backgroundColor])(getComputedStyle(document.body))")
    light, dark = (sum(map(int, colour.strip("rgb()").split(","))) for colour in (ink, paper))
    assert light > 3 * 200
    assert dark < 3 * 40
