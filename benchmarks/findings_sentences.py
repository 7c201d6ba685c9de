"""What the published model and its rivals say, sentence by sentence.

No sentence states more than its numbers: which side wins, and whether seeds agree, is decided here, run by run.
"""

import statistics
from collections.abc import Sequence

from benchmarks.findings_runs import (
    DIRECT,
    GRID,
    HEADS,
    LEARNT,
    OURS,
    PATIENT,
    TOKENS,
    TOLD,
    Row,
    crossed,
    spread,
)
from benchmarks.recipe_runs import Run, apart
from benchmarks.recipe_sentences import IN_REACH


def sentences(runs: Sequence[Run], rows: Sequence[Row], more: Sequence[Row] = ()) -> list[str]:
    """A sentence for each question, of the rows at 100 samples and at 500; those whose runs are missing are out."""
    by_name = {row.name: row for row in rows}
    ours, said = by_name.get(OURS), []
    if ours is None:
        return ["The published recipe itself has not been run."]
    first = ours.runs[0]
    said.append(_footing(ours, first["footing"]))
    for name, why in (
        ("sliding_window", "the keys and values of the last tokens"),
        ("transformer", f"attention over all tokens, PPL measured with {IN_REACH} in reach"),
        ("recurrence", "the current context alone, no attention"),
        ("cascade", "two contexts of two encoders, no attention"),
        (GRID, "contexts at multiples of the interval"),
        (HEADS, "near and far in one layer"),
        (OURS + LEARNT, "contexts of an encoder that was also taught to predict, before they were stored"),
        ("recurrence" + LEARNT, "the current context alone, of such an encoder"),
        (OURS + DIRECT, "the current context is also read as `recurrence` reads it"),
        (OURS + TOLD, "the current context of such an encoder is also read as `recurrence` reads it"),
        ("sliding_window" + TOLD, "the last tokens, and the very same context"),
        ("transformer" + TOLD, "all tokens, and the very same context"),
    ):
        if name in by_name:
            said.append(_against(ours, by_name[name], why))
    if OURS + TOLD in by_name:
        said.append(_taught_against_rivals(by_name))
        said += [
            _told_the_same(by_name[OURS + TOLD], by_name[name + TOLD]) for name in TOKENS if name + TOLD in by_name
        ]
    if len(crossed(runs)) > 1:
        said.append(_sweep(crossed(runs)))
    said.append(_overfitting(rows))
    if any(row.name == OURS for row in more):
        said.append(_with_more_text(more))
    return said


def _footing(ours: Row, footing: dict[str, float]) -> str:
    mean = statistics.mean(ours.val)
    unigram, trigram, cache = (footing[f"{name}_ppl"] for name in ("unigram", "kneser_ney", "kneser_ney_cache"))
    return (
        f"The published recipe reaches a validation PPL of {spread(ours.val)}: {mean / unigram:.2f} × word "
        f"frequencies ({unigram:.1f}), but {mean / trigram:.2f} × a Kneser-Ney trigram ({trigram:.1f}) and "
        f"{mean / cache:.1f} × the trigram with a cache ({cache:.1f}) that counted the same tokens."
    )


def _against(ours: Row, other: Row, why: str) -> str:
    both = ((ours.val, other.val), (ours.test, other.test))
    (val, test), (val_ratio, test_ratio) = (
        [_side(*each) for each in both],
        [statistics.mean(theirs) / statistics.mean(own) for own, theirs in both],
    )
    verdict = f"{val} the published selection"
    if val != test:
        verdict = f"{val} the published selection on the validation set and {test} it on the test set"
    kept = (
        f"{other.bytes:,} bytes kept and {other.trained:,} parameters trained, "
        f"against {ours.bytes:,} and {ours.trained:,}"
    )
    return (
        f"`{other.name}` ({why}; {kept}) {verdict}: validation PPL {spread(other.val)} against {spread(ours.val)}, "
        f"{val_ratio:.3f} ×; test PPL {spread(other.test)} against {spread(ours.test)}, {test_ratio:.3f} ×."
    )


def _side(ours: Sequence[float], other: Sequence[float]) -> str:
    """How the other one stands to ours, in words that its name follows."""
    if min(len(ours), len(other)) < 2:
        return "(one seed) is above" if statistics.mean(other) > statistics.mean(ours) else "(one seed) is below"
    if not apart(ours, other):
        return "is not told apart from"
    return "loses to" if statistics.mean(other) > statistics.mean(ours) else "beats"


def _taught_against_rivals(rows: dict[str, Row]) -> str:
    """Test PPL of contexts that were taught and are read directly, beside rivals and beside each of the two alone."""
    ours = rows[OURS + TOLD]
    test = statistics.mean(ours.test)
    others = [rows[name] for name in (*TOKENS, "recurrence" + LEARNT) if name in rows]
    told = "; ".join(
        f"{test / statistics.mean(row.test):.3f} × that of `{row.name}` ({spread(row.test)}, {row.bytes:,} bytes)"
        for row in others
    )
    parts = {OURS + LEARNT: "the teaching alone", OURS + DIRECT: "the direct read alone", OURS: "neither"}
    alone = ", ".join(f"with {what} {spread(rows[name].test)}" for name, what in parts.items() if name in rows)
    return (
        f"Contexts that are both taught and read directly bring a test PPL of {spread(ours.test)} ({ours.bytes:,} "
        f"bytes kept); {alone}. That is {told}."
    )


def _told_the_same(ours: Row, other: Row) -> str:
    """Attention to contexts against attention to tokens, where both read the current context of the same encoder.

    Of the seeds that both have, for each has an encoder of its own.
    """
    own = same_seeds(ours, other)
    ratio = statistics.mean(own) / statistics.mean(other.test)
    what = "attention to contexts does better" if ratio < 1 else "attention to contexts does worse"
    if len(own) < 2:
        what = "one seed says no more"
    elif not apart(own, other.test):
        what = "attention to contexts and to tokens are not told apart by these seeds"
    seeds = f"{len(other.test)} seeds" if len(other.test) > 1 else "one seed"
    return (
        f"Given the same context of the same encoder to read, `{other.name.removesuffix(TOLD)}` is at a test PPL of "
        f"{spread(other.test)} ({other.bytes:,} bytes kept; {seeds}), against which ours is at "
        f"{ratio:.3f} ×: {what}."
    )


def same_seeds(ours: Row, other: Row) -> list[float]:
    """Test PPL of ours with the seeds that the other one has."""
    seeds = {run["config"]["seed"] for run in other.runs}
    return [run["result"]["test_ppl"] for run in ours.runs if run["config"]["seed"] in seeds]


def _sweep(found: dict[tuple[int, int], list[Run]]) -> str:
    ppl = {place: runs[-1]["result"]["val_ppl"] for place, runs in found.items()}
    best, worst = (choose(ppl, key=lambda place: ppl[place]) for choose in (min, max))
    words = [f"`interval={interval} max_contexts={contexts}`" for interval, contexts in (best, worst)]
    return (
        f"Over interval and max_contexts, validation PPL is best at {words[0]} ({ppl[best]:.1f}), worst at {words[1]} "
        f"({ppl[worst]:.1f}; one seed): {ppl[worst] / ppl[best] - 1:.1%} apart."
    )


def _with_more_text(rows: Sequence[Row]) -> str:
    (ours,) = [row for row in rows if row.name == OURS]
    mean = statistics.mean(ours.val)
    better = [row for row in rows if statistics.mean(row.val) < mean and row.name != PATIENT]
    named = ", ".join(f"`{row.name}` {spread(row.val)}" for row in better)
    trigram = ours.runs[0]["footing"]["kneser_ney_ppl"]
    return (
        f"With 500 samples the published selection is at a validation PPL of {spread(ours.val)}, {mean / trigram:.2f} "
        f"× the trigram ({trigram:.1f}); "
        + (f"better than it are {named}." if better else "nothing here is better than it.")
    )


def _overfitting(rows: Sequence[Row]) -> str:
    by_ratio = {statistics.mean(row.val) / row.train: row.name for row in rows}
    least, most = min(by_ratio), max(by_ratio)
    return (
        "All models fit their training text better than the validation text: at the best epoch validation PPL is from "
        f"{least:.2f} × (`{by_ratio[least]}`) to {most:.2f} × (`{by_ratio[most]}`) the PPL on the training text, which "
        "is read with dropout."
    )
