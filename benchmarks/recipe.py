"""The part of RESULTS.md about `experiment=best`: models with the same extras, every lever alone, and what they say.

A run belongs here by its settings: those of `experiment=best` but for what the tables compare.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from ctxkv_lightning.config import Config, flat
from ctxkv_lightning.door import check_command_line

Run = dict[str, Any]

APART = ("seed", "cache_dir", "resume", "init_from", "trainer.enable_progress_bar")
"""Keys by which runs of one kind differ."""

FIRST_LAYER, CONTEXT_LAYERS = "with its first layer alone", "with layers that all read contexts"
NO_CONTEXTS = "with no context but the current one for attention"

LEVERS: dict[str, dict[str, Any]] = {
    "without the pointer": {"recipe.pointer_heads": 0, "recipe.pointer_values": False},
    "without counting": {"recipe.ngram": False},
    "without the pointer and without counting": {
        "recipe.pointer_heads": 0,
        "recipe.pointer_values": False,
        "recipe.ngram": False,
    },
    "without reading what is pointed at": {"recipe.pointer_values": False},
    "without reading the current context beside attention": {"recipe.read_current": False},
    "with head and shares learnt jointly, in all epochs": {"recipe.apart": False},
    "without a trained embedding": {"recipe.train_embedding": False},
    "without a projection before the head, and its bias": {"recipe.projection": False},
    "with norms after the layers (and no dropout in the feed-forward layer)": {"recipe.norm": "post"},
    FIRST_LAYER: {"model.layers": 1},
    CONTEXT_LAYERS: {"model.local_window": None},
    NO_CONTEXTS: {"interval": 1, "max_contexts": 1},
    "without dropout of contexts": {"recipe.context_dropout": 0.0},
    "with the published dropout alone": {
        "recipe.embedding_dropout": 0.0,
        "recipe.output_dropout": 0.0,
        "model.dropout": 0.1,
    },
    "with one interval of 20": {"interval": 20},
    "with the grid (fewer contexts for attention)": {"selection": "grid"},
    "with the published steps of 8,880 tokens (the warm-up takes the first epoch)": {"train.batch_tokens": 8880},
    "with a constant learning rate (and everything decaying)": {"train.schedule": "constant", "train.warmup_steps": 0},
}
"""What is done to the recipe, in words, and the keys that do it (`make results-best`)."""

HALVES: dict[str, Any] = {"model.name": "sliding_window", "model.window_tokens": 25, "recipe.pointer_window": 310}
MOST: dict[str, Any] = {"model.name": "sliding_window", "model.window_tokens": 9, "recipe.pointer_window": 500}
"""A sliding window and a pointer that keep, together, as many bytes as the recipe: half for each, or four fifths.

A recurrence has room for more of the pointer's contexts, keeping no others.
"""

RIVALS: dict[str, dict[str, Any]] = {
    "transformer": {"model.name": "transformer"},
    "sliding_window": {"model.name": "sliding_window"},
    "sliding_window, half for its pointer": HALVES,
    "sliding_window, most for its pointer": MOST,
    "recurrence": {"model.name": "recurrence", "recipe.pointer_window": 602},
}
"""Other models with the same extras, and the keys that choose them."""

Key = tuple[tuple[str, Any], ...]
Published = Mapping[int, Sequence[Run]]
"""Runs of the published model on the default text, by samples."""


def groups(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """The runs of the recipe, by what they change in it: sorted (key, value) pairs, none for the recipe itself."""
    base, plain = settings(), flat(asdict(Config()))
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if not has_recipe(run) or run["config"]["data"]["source"] != base["data.source"]:
            continue
        own = {**plain, **flat(run["config"])}  # a key that came later was as it comes
        changed = tuple(
            sorted((key, str(own.get(key))) for key in base if key not in APART and own.get(key) != base[key])
        )
        kept = found.setdefault(changed, [])
        if own["seed"] not in [other["config"]["seed"] for other in kept]:
            kept.append(run)
    return found


@cache
def settings() -> dict[str, Any]:
    """Every setting of the recipe, by its dotted key."""
    return flat(asdict(check_command_line(["experiment=best"])[0]))


def has_recipe(run: Run) -> bool:
    """Whether a run is one of `experiment=best`, whatever was changed in it."""
    config: dict[str, Any] = run["config"]
    return "recipe" in config and config["embedding"]["dim"] == settings()["embedding.dim"]


def of(found: dict[Key, list[Run]], **changed: Any) -> list[Run]:
    """The runs that change exactly this (dots as double underscores)."""
    wanted = tuple(sorted((key.replace("__", "."), str(value)) for key, value in changed.items()))
    return found.get(wanted, [])


def mean(runs: Sequence[Run], name: str = "val_ppl") -> float:
    """Mean of a result over seeds."""
    return statistics.mean(run["result"][name] for run in runs)


def spread(runs: Sequence[Run], name: str = "val_ppl") -> str:
    """Mean ± sample standard deviation over seeds; the value alone where there is one."""
    values = [run["result"][name] for run in runs]
    return f"{mean(runs, name):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def section(runs: Sequence[Run], published: Published, patient: Published) -> list[str]:
    """The section as Markdown parts; nothing where the recipe was not run.

    `patient` are the published runs that had as many epochs as they wanted.
    """
    found = groups(runs)
    if not of(found):
        return []
    parts = ["## The recipe: `experiment=best`", INTRODUCTION, model_table(found)]
    if lever_rows(found):
        parts += ["### Every lever alone, seed 42", LEVERS_ARE, lever_table(found)]
    parts += ["### What the recipe says", numbered([*sentences(found, published, patient), *on_chats(runs)])]
    return parts


INTRODUCTION = (
    "The same extras for every model: pre-norm, trained embedding, projection, dropouts, schedule, pointer, a voice "
    "for counting, a head that learns apart from both, and four layers, with the settings that were found for "
    "`context_kv` by about sixty short runs of one seed, chosen on the validation set alone; the rivals were not tuned "
    "further, which favours `context_kv`. Its first layer reads contexts, the others what the layer before them made "
    "of the last eight tokens; all layers of a rival are of its own kind, and each that attends to tokens keeps keys "
    "and values of its own. `context_kv` alone reads the current context beside its attention, which `recurrence` does "
    "in place of one; the models that attend to tokens were not given it. Made by `make results-best`; "
    "[side by side](docs/results/best/report.md)."
)
LEVERS_ARE = "What the validation PPL becomes when one thing is done to the recipe, and nothing but what the row says."


def model_table(found: dict[Key, list[Run]]) -> str:
    """A row per model and number of samples."""
    rows = []
    for samples in ("100", "500"):
        more = {} if samples == "100" else {"samples": samples}
        for model, changed in {"context_kv": {}, **RIVALS}.items():
            if chosen := of(found, **more, **changed):
                rows.append((mean(chosen), [samples, model, *cells(chosen)]))
        footing = next((run["footing"] for key, each in found.items() if dict(key) == more for run in each), None)
        if footing:
            for name, label in (
                ("kneser_ney", "Kneser-Ney trigram"),
                ("kneser_ney_cache", "Kneser-Ney trigram + cache"),
            ):
                ppl, test = footing[f"{name}_ppl"], footing[f"test_{name}_ppl"]
                rows.append((ppl, [samples, label, f"{ppl:.1f}", f"{test:.1f}", "", "", "", ""]))
    rows.sort(key=lambda row: (row[1][0], row[0]))
    head = ["samples", "", "val. PPL", "test PPL", "best epoch", "bytes kept", "trained parameters", "seeds"]
    return markdown(head, [cells for _, cells in rows], left=2)


def cells(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    return [
        spread(runs),
        spread(runs, "test_ppl"),
        "/".join(str(run["train"]["best_epoch"]) for run in runs),
        f"{first['decode_state']['bytes']['10000']:,}",
        f"{first['parameters']['trainable']:,}",
        str(len(runs)),
    ]


def lever_rows(found: dict[Key, list[Run]]) -> list[tuple[float, str, list[Run]]]:
    """Validation PPL, what was done, and the runs; most harmful first. Of each group, the first seed."""
    rows = []
    for name, changed in LEVERS.items():
        chosen = [run for run in of(found, **changed) if run["config"]["seed"] == 42]
        if chosen:
            rows.append((mean(chosen), name, chosen))
    return sorted(rows, key=lambda row: -row[0])


def lever_table(found: dict[Key, list[Run]]) -> str:
    """A row for each lever that was taken out, the recipe itself last."""
    own = [run for run in of(found) if run["config"]["seed"] == 42] or of(found)[:1]
    base, rows = mean(own), []
    for ppl, name, runs in lever_rows(found):
        rows.append([name, f"{ppl:.1f}", f"{ppl / base:.3f} ×", *sizes(runs[0])])
    rows.append(["the recipe", f"{base:.1f}", "1", *sizes(own[0])])
    return markdown(["", "val. PPL", "against the recipe", "bytes kept", "trained parameters"], rows, left=1)


def sizes(run: Run) -> list[str]:
    return [f"{run['decode_state']['bytes']['10000']:,}", f"{run['parameters']['trainable']:,}"]


def sentences(found: dict[Key, list[Run]], published: Published, patient: Published) -> list[str]:
    """What the tables say, each with the bound that was set beforehand; test PPL where the bound is on it."""
    return [
        *against_published(found, {**published, **{size: runs for size, runs in patient.items() if runs}}),
        *against_cache(found),
        *with_counts_and_without(found),
        *without_pointer(found),
        *against_rivals(found),
        *best_of_all(found),
        *worth_of_layers(found),
        *worth_of_levers(found),
        *time_and_text(found, published),
    ]


def sized(samples: int) -> dict[str, Any]:
    """What a run of this size changes in the recipe."""
    return {} if samples == 100 else {"samples": samples}


def seeds(runs: Sequence[Run]) -> str:
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def verdict(ratio: float, bound: float) -> str:
    """A bound, and whether it was kept; with one digit more where three do not show that it was not."""
    missed = f", and is missed ({ratio:.4f})" if round(ratio, 3) == bound else ", and is missed"
    return f"at most {bound} was asked for{'' if ratio <= bound else missed}"


def against_published(found: dict[Key, list[Run]], published: Published) -> list[str]:
    """The recipe against the published model, at both sizes."""
    said = []
    for samples, bound in ((100, 0.27), (500, 0.3)):
        best, theirs = of(found, **sized(samples)), published.get(samples, [])
        if best and theirs:
            ratio = mean(best, "test_ppl") / mean(theirs, "test_ppl")
            said.append(
                f"With {samples} samples the recipe reaches a test PPL of {spread(best, 'test_ppl')} ({seeds(best)}), "
                f"{ratio:.3f} × the published one's {spread(theirs, 'test_ppl')} ({seeds(theirs)}"
                f"{still_gaining(theirs)}; {verdict(ratio, bound)})."
            )
    return said


def still_gaining(runs: Sequence[Run]) -> str:
    """How many of these runs were best at the last epoch that they might take, in words; nothing if none was."""
    last = sum(run["train"]["best_epoch"] == run["config"]["train"]["max_epochs"] for run in runs)
    if not last:
        return ""
    return f", {'' if last == len(runs) else f'{last} of them '}still gaining when the epochs ended"


def against_cache(found: dict[Key, list[Run]]) -> list[str]:
    """The recipe against counting with a cache, at both sizes."""
    said = []
    for samples in (100, 500):
        best = of(found, **sized(samples))
        if best:
            footing = best[0]["footing"]
            test, val = (footing[f"{prefix}kneser_ney_cache_ppl"] for prefix in ("test_", ""))
            ratio = mean(best, "test_ppl") / test
            said.append(
                f"With {samples} samples a Kneser-Ney trigram with a cache of the last 640 tokens, its weights fitted "
                f"on the validation set, reaches {test:.1f} on the test set: the recipe is at {ratio:.3f} × "
                f"({verdict(ratio, 1.0)}), on the validation set at {mean(best) / val:.3f} ×."
            )
    return said


def with_counts_and_without(found: dict[Key, list[Run]]) -> list[str]:
    """What the recipe is without the trigram that is one of its own voices."""
    best, bare = of(found), of(found, recipe__ngram=False)
    if not bare or not best[0].get("ngram"):
        return []
    test, cache = mean(bare, "test_ppl"), best[0]["footing"]["test_kneser_ney_cache_ppl"]
    return [
        f"One of its voices is that very trigram ({best[0]['ngram']['bytes'] / 1e6:.1f} MB of counts of the training "
        "text, which do not grow with the text that is read). Without it the recipe reaches "
        f"{spread(bare, 'test_ppl')} ({seeds(bare)}), {test / cache:.3f} × the trigram with its cache "
        f"and {test / mean(best, 'test_ppl'):.3f} × the whole recipe."
    ]


def without_pointer(found: dict[Key, list[Run]]) -> list[str]:
    """The recipe without its pointer against counting without a cache; and the network alone."""
    said, change = [], {"recipe__pointer_heads": 0, "recipe__pointer_values": False}
    for samples, bound in ((100, 0.95), (500, 1.0)):
        bare = of(found, **change, **sized(samples))
        if bare:
            counts = bare[0]["footing"]["test_kneser_ney_ppl"]
            ratio = mean(bare, "test_ppl") / counts
            said.append(
                f"Without its pointer, at {samples} samples, it is at a test PPL of {spread(bare, 'test_ppl')} "
                f"({seeds(bare)}), {ratio:.3f} × the trigram alone ({counts:.1f}; {verdict(ratio, bound)})."
            )
    alone = of(found, **change, recipe__ngram=False)
    if alone:
        counts = alone[0]["footing"]["test_kneser_ney_ppl"]
        ratio = mean(alone, "test_ppl") / counts
        said.append(
            f"The network alone, with neither pointer nor counts, is at {spread(alone, 'test_ppl')} ({seeds(alone)}), "
            f"{ratio:.3f} × the trigram: "
            + ("counting remembers what it saw once better." if ratio > 1 else "it beats counting by itself.")
        )
    return said


def against_rivals(found: dict[Key, list[Run]]) -> list[str]:
    """A sentence for each rival with the same extras."""
    said = []
    for name, bound, words in (
        ("transformer", 1.05, "attention over all tokens, its state growing with the text"),
        ("sliding_window", 0.97, "keys and values of the last tokens, twice the bytes with the pointer's contexts"),
        ("sliding_window, half for its pointer", 0.97, "25 tokens in each layer and a pointer over 310 contexts"),
        ("sliding_window, most for its pointer", 0.97, "9 tokens in each layer and a pointer over 500 contexts"),
        ("recurrence", 0.97, "the current context alone in each layer, and a pointer over 602 contexts"),
    ):
        if rival := of(found, **RIVALS[name]):
            said.append(against(of(found), rival, name, bound, words))
    return said


def worth_of_layers(found: dict[Key, list[Run]]) -> list[str]:
    """What the local layers add, and what attention to contexts adds beside them."""
    alone, contexts, bare = (
        [run for run in of(found, **LEVERS[name]) if run["config"]["seed"] == 42]
        for name in (FIRST_LAYER, CONTEXT_LAYERS, NO_CONTEXTS)
    )
    own = [run for run in of(found) if run["config"]["seed"] == 42]
    if not (alone and contexts and bare and own):
        return []
    base = mean(own)
    worth = mean(bare) / base
    said = (
        "adds nothing that this text shows" if worth < 1.01 else f"is still worth something (without it, {worth:.3f} ×)"
    )
    return [
        f"The first layer alone is at a validation PPL of {mean(alone):.1f}, four that all read the same contexts at "
        f"{mean(contexts):.1f}, one and three local ones at {base:.1f}; with no context but the current one in reach "
        f"of the first, it is {mean(bare):.1f} (one seed): beside a pointer over the same contexts and layers over the "
        f"last few tokens, attention to contexts {said}."
    ]


def worth_of_levers(found: dict[Key, list[Run]]) -> list[str]:
    """Which changes harm the recipe most, and which hardly."""
    best, said = of(found), []
    rows = lever_rows(found)
    if rows:
        base = mean([run for run in best if run["config"]["seed"] == 42] or best)
        worth = ", ".join(f"{name} ({ppl / base:.2f} ×)" for ppl, name, _ in rows[:3])
        idle = [name for ppl, name, _ in rows if ppl < 1.01 * base]
        said.append(f"What harms the recipe most, of the changes in the table, is to train it {worth}; one seed each.")
        if idle:
            said.append(f"To train it {', or '.join(idle)} costs less than 1 % or helps (one seed).")
    return said


def time_and_text(found: dict[Key, list[Run]], published: Published) -> list[str]:
    """What the recipe costs, and what it lacks."""
    best, said = of(found), []
    on_cpu, alike = (
        [run for run in runs if run["machine"]["device"] == "cpu"] for runs in (best, published.get(100, []))
    )
    if on_cpu and alike:
        own, theirs = (statistics.mean(run["seconds"]["train"] for run in runs) for runs in (on_cpu, alike))
        said.append(
            f"Phase 2 took {own:.0f} s with the recipe, {theirs:.0f} s without it ({own / theirs:.2f} ×), one thread "
            "each, not side by side, on machines that had other work too."
        )
    last = [run["train"]["epochs"][-1] for run in best]
    train, val = (statistics.mean(epoch[f"{name}_ppl"] for epoch in last) for name in ("train", "val"))
    if train < val:
        said.append(
            f"In its last epoch it is at {train:.0f} on the training text, with dropout, and at {val:.0f} on the "
            "validation text: more text, not more model, is what it lacks."
        )
    return said


def on_chats(runs: Sequence[Run]) -> list[str]:
    """The recipe, untouched, against the published model on conversations of UltraChat."""
    chats = [run for run in runs if run["config"]["data"]["source"] == "jsonl"]
    recipe = {key: value for key, value in settings().items() if key.startswith("recipe.")}
    best = [run for run in chats if has_recipe(run) and recipe.items() <= flat(run["config"]).items()]
    theirs = [run for run in chats if not has_recipe(run)]
    if not best or not theirs:
        return []
    ratio, footing = mean(best, "test_ppl") / mean(theirs, "test_ppl"), best[0]["footing"]
    return [
        f"Untouched, on {best[0]['config']['samples']} conversations of UltraChat with GPT-2's BPE and an SVD "
        f"embedding, it reaches a test PPL of {spread(best, 'test_ppl')} ({seeds(best)}), {ratio:.3f} × the published "
        f"one's {spread(theirs, 'test_ppl')} ({seeds(theirs)}; {verdict(ratio, 0.7)}); the trigram reaches "
        f"{footing['test_kneser_ney_ppl']:.1f}, with its cache {footing['test_kneser_ney_cache_ppl']:.1f}."
    ]


def best_of_all(found: dict[Key, list[Run]]) -> list[str]:
    """Which model does best with the extras, by validation PPL, where that is not the recipe's own."""
    models = {name: of(found, **changed) for name, changed in RIVALS.items()}
    ranked = sorted((mean(runs), model) for model, runs in models.items() if runs)
    if not ranked or ranked[0][0] >= mean(of(found)):
        return []
    return [
        f"So `{ranked[0][1]}` with the pointer is the best of these on the validation set ({ranked[0][0]:.1f} against "
        f"{mean(of(found)):.1f}): once a pointer reads all contexts that are kept, attention to some of them adds "
        "parameters, not memory."
    ]


def against(best: list[Run], rival: list[Run], name: str, bound: float, words: str) -> str:
    """How the recipe does against a rival with the same extras, of which at most `bound` × was asked for."""
    ratio = mean(best, "test_ppl") / mean(rival, "test_ppl")
    kept, theirs = (runs[0]["decode_state"]["bytes"]["10000"] for runs in (best, rival))
    return (
        f"Against `{name}` with the same extras ({words}; {theirs:,} bytes kept against {kept:,}), test PPL is "
        f"{ratio:.3f} × ({spread(best, 'test_ppl')} against {spread(rival, 'test_ppl')}; {verdict(ratio, bound)})."
    )


def numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, start=1))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are words."""
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
