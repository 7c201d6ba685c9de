import math
import re
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from ctxkv_lightning.report.drawing import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    evenly,
    label_points,
    plain,
    single,
    spread,
    styled,
    to_svg,
)
from ctxkv_lightning.report.looks import MODELS, SIGNS, look, looks


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lightness(colour: str) -> float:
    """L* of CIELAB, 0 to 100."""
    return 116 * luminance(colour) ** (1 / 3) - 16


def test_colours_grow_lighter_in_even_steps_and_stand_out_from_paper() -> None:
    steps = [b - a for a, b in pairwise(map(lightness, PALETTE))]
    assert min(steps) > 5
    assert max(steps) < 8
    assert all(1.05 / (luminance(colour) + 0.05) >= 3 for colour in (*PALETTE, GREY))


def test_in_the_dark_colours_grow_darker_and_stand_out() -> None:
    from ctxkv_lightning.report.comparison import page_template

    dark = page_template().split("prefers-color-scheme: dark", 1)[1].split("}", 1)[0]
    colours = [re.search(rf"--c{i}: (#[0-9a-f]{{6}});", dark) for i in range(len(PALETTE))]
    found = [match[1] for match in colours if match]
    paper = re.search("--paper: (#[0-9a-f]{6})", dark)
    assert paper
    assert len(found) == len(PALETTE)
    assert min(a - b for a, b in pairwise(map(lightness, found))) > 4
    assert all((luminance(colour) + 0.05) / (luminance(paper[1]) + 0.05) >= 3 for colour in found)


def test_the_style_sheet_has_the_colours_of_the_figures() -> None:
    from ctxkv_lightning.report.comparison import page_template

    light = page_template().split(":root {", 1)[1].split("}", 1)[0]
    assert [f"--c{i}: {colour};" in light for i, colour in enumerate(PALETTE)] == [True] * len(PALETTE)


def test_every_look_is_complete() -> None:
    assert len(PALETTE) == len(MARKERS) == len(SIGNS) == len(MODELS)
    assert len({(look(model).colour, look(model).marker) for model in MODELS}) == len(MODELS)
    assert look("a model of tomorrow") == look("a model of tomorrow")


def test_lines_look_like_their_models_only_where_these_tell_them_apart() -> None:
    by_model = looks(["cascade", "transformer"], [{"model.name": "cascade"}, {"model.name": "transformer"}])
    assert by_model == [look("cascade"), look("transformer")]
    by_heads = looks(["context_kv", "context_kv"], [{"heads": 4}, {"heads": 8}])
    assert [each.colour for each in by_heads] == [PALETTE[0], PALETTE[-1]]


@pytest.mark.parametrize("count", range(1, 12))
def test_few_colours_are_far_apart(count: int) -> None:
    chosen = evenly(count)
    assert len(chosen) == count
    assert len(set(chosen)) == min(count, len(PALETTE))
    if 1 < count <= len(PALETTE):
        assert min(b - a for a, b in pairwise(chosen)) >= (len(PALETTE) - 1) // (count - 1)


def test_svg_takes_its_colours_and_font_from_the_page() -> None:
    with styled():
        figure, axes = single()
        axes.plot([1, 2], [3, 4], "o", color=PALETTE[2], markeredgecolor=PAPER)
        axes.set_title("a $b$ <i>&")
        svg = to_svg(figure, "name")
    assert svg.startswith("<svg style=")
    assert "a $b$ &lt;i&gt;&amp;</text>" in svg
    assert {"var(--c2)", "var(--ink)", "var(--muted)", "var(--paper)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not [colour for colour in (INK, GREY, PAPER, *PALETTE) if colour in svg]
    assert "http" not in svg
    assert "DejaVu" not in svg
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(each.startswith("name-") for each in ids)
    used = {*re.findall(r'href="#([^"]+)"', svg), *re.findall(r"url\(#([^)]+)\)", svg)}
    assert used
    assert used <= set(ids)


def test_equal_figures_give_equal_svgs() -> None:
    def svg() -> str:
        with styled():
            figure, axes = single()
            axes.plot([1, 2], [3, 4], "o")
            return to_svg(figure, "x")

    assert svg() == svg()


def test_names_of_points_lie_apart_from_points_and_each_other() -> None:
    with styled():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        points = [(1.0, 1.0), (1.3, 1.0), (2.0, 2.0), (2.1, 2.0), (3.0, 1.0)]
        axes.plot(*zip(*points, strict=True), "o")
        axes.margins(0.2)
        label_points(axes, [(*point, f"name {i}", INK) for i, point in enumerate(points)], points, [])
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        at = [axes.transData.transform(point) for point in points]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not [1 for box in boxes for x, y in at if box.x0 < x < box.x1 and box.y0 < y < box.y1]


def test_names_of_points_do_not_hide_the_bars_of_others() -> None:
    with styled():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        points = [(1.0, 1.0), (1.6, 1.2)]
        axes.plot(*zip(*points, strict=True), "o")
        axes.margins(0.4)
        below = [(1.6, 0.8), (1.6, 1.2)]
        label_points(axes, [(*points[0], "a name that is long", INK)], points, [below])
        figure.draw_without_rendering()
        box, ((x, low), (_, high)) = axes.texts[0].get_window_extent(), axes.transData.transform(below)
    assert not box.x0 < x < box.x1 or box.y1 < low or box.y0 > high


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1234, "0.123"),
        (50.03, "50.0"),
        (50.0, "50"),
        (99.9, "99.9"),
        (99.96, "100"),
        (100.4, "100"),
        (-150.4, "-150"),
        (12345.6, "12,346"),
        (2e6, "2e+06"),
    ],
)
def test_plain_numbers(value: float, text: str) -> None:
    assert plain(value) == text


@pytest.mark.parametrize("positions", [[], [0.5], [0.1, 0.5], [0.5, 0.5, 0.5], [0.4, 0.41, 0.42, 0.9]])
def test_spread_keeps_order_and_distance(positions: list[float]) -> None:
    placed = spread(positions, 0.1)
    gaps = [b - a for a, b in pairwise(placed)]
    assert all(gap >= 0.1 - 1e-4 for gap in gaps)
    assert math.isclose(sum(placed), sum(positions), abs_tol=1e-9)
