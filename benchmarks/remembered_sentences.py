"""What evaluations of memory say, in sentences.

No sentence states more than its numbers. Two figures differ where two standard errors of their difference lie between
them.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.recorded import EDGES, OURS, Row, moved, percent
from ctxkv_lightning.report.drawing import count
from ctxkv_lightning.report.recall_tables import mean_recall
from ctxkv_lightning.report.words import enumerated


def task_sentences(rows: Sequence[Row]) -> list[str]:
    """What the task says, each sentence where there are runs for it."""
    ours = [row for row in rows if row.model == "context_kv"]
    if not ours:
        return []
    said = [_bytes_against_recall(ours), *_window(ours)]
    rivals: dict[str, list[Row]] = {}
    for row in rows:
        if row.model != "context_kv":
            rivals.setdefault(row.kind, []).append(row)
    said += [_rival(ours, rival) for rival in rivals.values() if not all(map(_has_not_learnt, rival))]
    return [*said, *_no_memory(rows)]


def _bytes_against_recall(ours: Sequence[Row]) -> str:
    least, best, most = ours[0], max(ours, key=lambda row: row.recall), ours[-1]
    text = (
        f"Trained to recall, `context_kv` finds {least.said()} % with {least.bytes:,} bytes ({least.name}) and at best "
        f"{best.said()} % with {best.bytes:,} ({best.name})"
    )
    if best is not most:
        text += f"; {most.bytes:,} bytes ({most.name}) find {most.said()} %, {apart(most, best)}"
    return text + "."


def _window(ours: Sequence[Row]) -> list[str]:
    """What is found of what the window still reads, and of what lies behind it."""
    edged = [row for row in ours if row.within(True) and row.within(False)]
    if not edged:
        return []
    words = [
        f"{percent(statistics.mean(row.within(True)))} % inside it and {percent(statistics.mean(row.within(False)))} % "
        f"behind it (`{row.name}`)"
        for row in edged
    ]
    return [f"By where the value stands to the window, {'; '.join(words)} are found."]


def _rival(ours: Sequence[Row], rival: Sequence[Row]) -> str:
    """A rival's best against the best of ours that keeps no more bytes."""
    best = max(rival, key=lambda row: row.recall)
    text = f"`{best.name}` finds {best.said()} % with {best.bytes:,} bytes"
    small = [row for row in ours if row.bytes <= best.bytes]
    if not small:
        return f"{text}, fewer than any `context_kv` here keeps."
    own = max(small, key=lambda row: row.recall)
    return f"{text}; `{own.name}`, with {own.bytes:,}, {own.said()} %, {apart(own, best)}."


def apart(one: Row, other: Row) -> str:
    """Which of two recalls is the higher, where seeds can tell."""
    error = math.hypot(*(row.deviation / math.sqrt(len(row.seeds)) for row in (one, other)))
    if abs(one.recall - other.recall) <= 2 * error:
        return "which these seeds do not tell apart"
    seeds = "" if min(len(one.seeds), len(other.seeds)) > 1 else " (one seed)"
    by = "more" if one.recall > other.recall else "less"
    return f"{by} by {100 * abs(one.recall - other.recall):.1f} points{seeds}"


def _has_not_learnt(row: Row) -> bool:
    """Whether it finds no more than who knows which values were said, but not by which key."""
    return row.recall <= 1 / row.entries[0]["task"]["pairs"]


def _no_memory(rows: Sequence[Row]) -> list[str]:
    """Who does not get beyond what needs no association."""
    guessing = [row for row in rows if _has_not_learnt(row)]
    if not guessing:
        return ["All of them find more than one who knows which values were said, but not by which key."]
    names = enumerated([f"`{row.name}` ({row.said()} %)" for row in guessing])
    return [f"No more than one finds who knows the values of a document, but not their keys: {names}."]


def text_sentences(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """What the suites on the text say, each sentence where there are runs for it."""
    if not evaluations:
        return []
    said = [_who_recalls(evaluations, suite) for suite in ("copy", "passkey")]
    if OURS in evaluations:
        said += [_at_edges(evaluations[OURS]["suites"]["copy"], edges) for edges in EDGES]
    said.append(_how_far_back(evaluations))
    if OURS in evaluations:
        said += _where_ours_loses(evaluations)
    return said


def _who_recalls(evaluations: dict[str, dict[str, Any]], suite: str) -> str:
    """Who beats chance in a suite, over all lags."""
    asked = {name: each["suites"][suite] for name, each in evaluations.items()}
    chance = next(iter(asked.values()))["chance"]
    found = {name: (mean_recall(each), *moved(each)) for name, each in asked.items()}
    above = [
        f"`{name}` ({percent(recall)} % recalled, {percent(share)} % moved)"
        for name, (recall, share, error) in found.items()
        if max(recall, share) - chance > 2 * error
    ]
    if not above:
        return (
            f"In {suite} none of {count(len(found), 'model')} is above chance over all lags: at most "
            f"{percent(max(each[0] for each in found.values()))} % recalled and "
            f"{percent(max(each[1] for each in found.values()))} % moved, of {percent(chance)} % by guessing."
        )
    rest = count(len(found) - len(above), "other")
    return (
        f"In {suite}, above chance ({percent(chance)} %) over all lags: {enumerated(above)}; {rest} not above chance."
    )


def _at_edges(copy: dict[str, Any], edges: Sequence[int]) -> str:
    """What the published selection does where a context that it reads is the answer's, and one token beside it."""
    lags = {each["first"]: each for each in copy["lags"]}
    before, on, after = (lags[edge] for edge in edges)
    beside = (before["gain"]["value"] + after["gain"]["value"]) / 2
    error = math.hypot(on["gain"]["error"], before["gain"]["error"] / 2, after["gain"]["error"] / 2)
    difference = on["gain"]["value"] - beside
    verdict = "is not told apart from" if abs(difference) <= 2 * error else "is above" if difference > 0 else "is below"
    shares = ", ".join(percent(each["raised"]["value"]) for each in (before, on, after))
    gains = ", ".join(f"{each['gain']['value']:+.3f}" for each in (before, on, after))
    return (
        f"At lags {', '.join(map(str, edges))}, around {'the nearest' if edges[1] == 20 else 'the farthest'} context "
        f"of the published window, having read the answer gains `{OURS}` {gains} nats (% moved: {shares}): lag "
        f"{edges[1]} {verdict} its neighbours ({difference:+.3f} ± {error:.3f})."
    )


def _how_far_back(evaluations: dict[str, dict[str, Any]]) -> str:
    """The shortest history after which a token costs each model no more than after all of the text."""
    found: dict[float, list[str]] = {}
    for name, each in evaluations.items():
        cut = [one for one in each["suites"]["position"]["histories"] if one["tokens"] is not None]
        enough = [one["tokens"] for one in cut if one["excess"]["value"] <= 2 * one["excess"]["error"]]
        found.setdefault(min(enough, default=math.inf), []).append(f"`{name}`")
    words = [
        f"{tokens:,} for {enumerated(names)}"
        if math.isfinite(tokens)
        else f"more than were tried for {enumerated(names)}"
        for tokens, names in sorted(found.items())
    ]
    return (
        "How far back a text still helps: the fewest last tokens of those tried after which the next costs no more "
        f"than after all of them (to two standard errors) are {'; '.join(words)}."
    )


def _where_ours_loses(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """Rivals that predict the text better, or move an answer more often, than the published selection."""
    ours = evaluations[OURS]["suites"]
    lost = [
        f"to `{name}` ({each['suites']['copy']['state_bytes']:,} bytes) in {enumerated(better)}"
        for name, each in evaluations.items()
        if (better := _better_at(each["suites"], ours))
    ]
    subject = f"`{OURS}` ({ours['copy']['state_bytes']:,} bytes)"
    return [f"{subject} loses {'; '.join(lost)}." if lost else f"{subject} loses to none of these."]


def _better_at(its: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """In what a rival is better than ours, with both figures."""
    found = []
    for suite in ("copy", "passkey"):
        (share, error), (own, _) = moved(its[suite]), moved(ours[suite])
        if share - own > 2 * math.sqrt(2) * error:
            found.append(f"{suite} ({percent(share)} % moved against {percent(own)} %)")
    ppl, own_ppl = (suites["position"]["ppl"]["value"] for suites in (its, ours))
    return [*found, f"PPL ({ppl:.1f} against {own_ppl:.1f})"] if ppl < own_ppl else found
