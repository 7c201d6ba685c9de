"""What evaluations say, as tables in which the runs stand side by side."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

Evaluation = dict[str, Any]
"""The content of an evaluation.json."""

Titled = tuple[str, Table]

ASKED = {
    "copy": "copy: the answer among {K} tokens",
    "passkey": "passkey: the key among {K}",
    "mqar": "mqar: the value among all tokens",
}
"""What each recall suite asks; K is one in its chance level."""


def tables(evaluations: Mapping[str, Evaluation]) -> list[Titled]:
    """Of each suite that was asked of any of these runs, by their names."""
    found = []
    for suite in dict.fromkeys(name for each in evaluations.values() for name in each["suites"]):
        asked = {name: each["suites"][suite] for name, each in evaluations.items() if suite in each["suites"]}
        found += position_tables(asked) if suite == "position" else recall_tables(suite, asked)
    return found


def position_tables(asked: Mapping[str, Evaluation]) -> list[Titled]:
    """PPL by position in the document, and by the history that is left."""
    first = next(iter(asked.values()))
    by_bin = _table(("position", "tokens"), asked)
    for i, each in enumerate(first["bins"]):
        last = "…" if each["last"] is None else f"{each['last']:,}"
        cells = [_estimate(one["bins"][i]["ppl"]) if i < len(one["bins"]) else "–" for one in asked.values()]
        by_bin.add_row(f"{each['first']:,} – {last}", f"{each['ppl']['count']:,}", *cells)
    by_bin.add_row("all", f"{first['ppl']['count']:,}", *(_estimate(one["ppl"]) for one in asked.values()))
    by_bin.add_row("knowing nothing", "", *(f"{one['chance']:,}" for one in asked.values()))
    by_history = _table(("tokens before", "tokens"), asked)
    for i, each in enumerate(first["histories"]):
        left = "all" if each["tokens"] is None else f"{each['tokens']:,}"
        cells = [_history(one["histories"][i]) if i < len(one["histories"]) else "–" for one in asked.values()]
        by_history.add_row(left, f"{each['ppl']['count']:,}", *cells)
    return [
        ("PPL by position in the document", by_bin),
        ("PPL of the same tokens by what is left of the text before them (nats more than after all of it)", by_history),
    ]


def recall_tables(suite: str, asked: Mapping[str, Evaluation]) -> list[Titled]:
    """Recall and gain by lag, with chance, what was never said, and the state that it took."""
    first = next(iter(asked.values()))
    title = ASKED[suite].format(K=round(1 / first["chance"]))
    recall, gain = (_table(("tokens ago", "trials"), asked) for _ in range(2))
    for i, each in enumerate(first["lags"]):
        lag = f"{each['first']:,}" + ("" if each["first"] == each["last"] else f" – {each['last']:,}")
        count = f"{each['recall']['count']:,}"
        recall.add_row(lag, count, *(_percent(one["lags"][i]["recall"]) for one in asked.values()))
        gain.add_row(lag, count, *(_gain(one["lags"][i]) for one in asked.values()))
    recall.add_section()
    recall.add_row("mean", "", *(f"{100 * mean_recall(one):.1f}" for one in asked.values()))
    if first["lags"][0]["without"] is not None:
        recall.add_row("never said", "", *(_percent(one["lags"][0]["without"]) for one in asked.values()))
    recall.add_row("state, bytes", "", *(f"{one['state_bytes']:,}" for one in asked.values()))
    chance = f"chance {100 * first['chance']:.3g} %"
    gained = "nats gained by having read it" + ("" if suite == "mqar" else " (% where no candidate gained more)")
    return [(f"{title}, % recalled ({chance})", recall), (f"{title}, {gained}", gain)]


def mean_recall(suite: Evaluation) -> float:
    """Recall over all trials."""
    found = [each["recall"] for each in suite["lags"]]
    return sum(each["value"] * each["count"] for each in found) / sum(each["count"] for each in found)


def _table(columns: tuple[str, ...], asked: Mapping[str, Evaluation]) -> Table:
    table = Table()
    for column in (*columns, *asked):
        table.add_column(Text(column), justify="right")
    return table


def _gain(each: Mapping[str, Any]) -> str:
    raised = "" if each["raised"] is None else f" ({100 * each['raised']['value']:.0f} %)"
    return _estimate(each["gain"]) + raised


def _estimate(each: Mapping[str, Any]) -> str:
    digits = 1 if abs(each["value"]) >= 100 else 2
    error = "" if each["error"] is None else f" ± {each['error']:.{digits}f}"
    return f"{round(each['value'], digits) + 0.0:,.{digits}f}{error}"  # + 0.0: no minus before a zero


def _percent(each: Mapping[str, Any]) -> str:
    return f"{100 * each['value']:.1f} ± {100 * each['error']:.1f}"


def _history(each: Mapping[str, Any]) -> str:
    if each["tokens"] is None:
        return _estimate(each["ppl"])
    return f"{_estimate(each['ppl'])} (+{_estimate(each['excess'])})".replace("+-", "-")
