"""What the runs of `experiment=best` and of its rivals say, sentence by sentence."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.recipe_runs import (
    LAYERS,
    LEVERS,
    MEMORIES,
    NO_CONTEXTS,
    RIVALS,
    TAUGHT_BRIEFLY,
    UNTAUGHT,
    WHOLE,
    Key,
    Published,
    Run,
    best_split,
    first_seed,
    has_recipe,
    lever_rows,
    mean,
    of,
    settings,
    spread,
    told_apart,
)
from ctxkv_lightning.config import flat
from ctxkv_lightning.windows import WINDOW

IN_REACH = f"the last {WINDOW:,} to {2 * WINDOW - 1:,}"
"""Tokens that a full transformer reads where it is trained, validated and tested: its window's history and place."""


def sentences(found: dict[Key, list[Run]], published: Published, patient: Published) -> list[str]:
    """What the tables say, each with the bound that was set beforehand; test PPL where the bound is on it."""
    return [
        *against_published(found, {**published, **{size: runs for size, runs in patient.items() if runs}}),
        *against_cache(found),
        *with_counts_and_without(found),
        *without_pointer(found),
        *against_rivals(found),
        *with_more_text(found),
        *best_of_all(found),
        *with_less_memory(found),
        *worth_of_layers(found),
        *worth_of_levers(found),
        *worth_of_teaching(found),
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


RIVALS_ARE = (
    (
        "transformer",
        1.05,
        f"attention over all tokens, its state growing with the text; PPL is measured with {IN_REACH} in reach",
    ),
    ("sliding_window", 0.97, "keys and values of the last tokens, twice the bytes with the pointer's contexts"),
    ("sliding_window, half for its pointer", 0.97, "25 tokens in each layer and a pointer over 310 contexts"),
    ("sliding_window, most for its pointer", 0.97, "9 tokens in each layer and a pointer over 500 contexts"),
    ("recurrence", 0.97, "the current context alone in each layer, and a pointer over 602 contexts"),
)
"""Each rival, at most how many times its PPL was asked for, and what it is."""


def against_rivals(found: dict[Key, list[Run]]) -> list[str]:
    """A sentence for each rival with the same extras."""
    each = [(of(found, **RIVALS[name]), name, bound, words) for name, bound, words in RIVALS_ARE]
    return [against(of(found), rival, *rest) for rival, *rest in each if rival]


def with_more_text(found: dict[Key, list[Run]]) -> list[str]:
    """How the recipe does with 500 samples against the rivals that were trained on as many."""
    own, more = of(found, **sized(500)), {name: of(found, **sized(500), **changed) for name, changed in RIVALS.items()}
    beside = [f"{times(own, runs)} that of `{name}`" for name, runs in more.items() if own and runs]
    return [f"With 500 samples its test PPL is {' and '.join(beside)}."] if beside else []


def with_less_memory(found: dict[Key, list[Run]]) -> list[str]:
    """What less memory costs the recipe, and where it then stands against rivals that keep no more."""
    whole, said = best_split(found, MEMORIES[WHOLE]["context_kv"]), []
    for share, models in MEMORIES.items():
        own = best_split(found, models["context_kv"])
        if share == WHOLE or not own or not whole:
            continue
        theirs = {name: best_split(found, splits) for name, splits in models.items() if name != "context_kv"}
        beside = [f"{times(own, runs)} that of a `{name}`" for name, runs in theirs.items() if runs]
        kept = own[0]["decode_state"]["bytes"]["10000"]
        said.append(
            f"With {share} of the bytes ({kept:,}) the recipe's test PPL is {times(own, whole)} as high"
            + (f", and {' and '.join(beside)} with as few." if beside else ".")
        )
    return said


def times(own: list[Run], others: list[Run]) -> str:
    """PPL against that of others, over the seeds that both have."""
    first, second = of_the_same_seeds(own, others)
    test, validation = (mean(first, name) / mean(second, name) for name in ("test_ppl", "val_ppl"))
    return f"{test:.3f} × ({validation:.3f} × on the validation set, {seeds(first)}{told_apart(first, second)})"


def worth_of_layers(found: dict[Key, list[Run]]) -> list[str]:
    """What the local layers add, and what attention to contexts adds beside them."""
    said, own = [], first_seed(found)
    alone, contexts = (first_seed(found, **LEVERS[name]) for name in LAYERS)
    if alone and contexts and own:
        said.append(
            f"The first layer alone is at a validation PPL of {mean(alone):.1f}, four that all read the same contexts "
            f"at {mean(contexts):.1f}, one and three local ones at {mean(own):.1f} (one seed)."
        )
    own, bare = of_the_same_seeds(of(found), of(found, **LEVERS[NO_CONTEXTS]))
    if bare:
        val, test = (
            f"{mean(bare, name) / mean(own, name):.3f} × ({spread(bare, name)} against {spread(own, name)}"
            f"{told_apart(own, bare, name)})"
            for name in ("val_ppl", "test_ppl")
        )
        said.append(
            "Beside a pointer over the same contexts and layers over the last few tokens, attention to contexts is "
            f"worth {_something(own, bare)}: with the current one alone in reach of the first layer, validation PPL is "
            f"{val}, test PPL {test}; {seeds(bare)}, {_worse(own, bare)} worse without it."
        )
    return said


def _something(own: list[Run], bare: list[Run]) -> str:
    """What is lost by the second, in words: what a seed shows by more than 1 %, or several tell apart."""
    if len(bare) < 2:
        return "something" if mean(bare) > 1.01 * mean(own) else "nothing that this text shows"
    where = [
        text
        for text, name in (("validation", "val_ppl"), ("test", "test_ppl"))
        if mean(bare, name) > mean(own, name) and not told_apart(own, bare, name)
    ]
    if not where:
        return "nothing that these seeds tell apart"
    return "something" if len(where) == 2 else f"something on the {where[0]} set alone"


def _worse(own: list[Run], bare: list[Run]) -> str:
    """With how many seeds the second has a higher test PPL than the first, in words."""
    first, second = ({run["config"]["seed"]: run["result"]["test_ppl"] for run in runs} for runs in (own, bare))
    worse = sum(second[seed] > first[seed] for seed in first)
    return "each of them" if worse == len(first) > 1 else f"{worse} of them"


def of_the_same_seeds(own: list[Run], others: list[Run]) -> tuple[list[Run], list[Run]]:
    """Of two lists, the runs with a seed that both have."""
    both = {run["config"]["seed"] for run in own} & {run["config"]["seed"] for run in others}
    first, second = ([run for run in runs if run["config"]["seed"] in both] for runs in (own, others))
    return first, second


def worth_of_levers(found: dict[Key, list[Run]]) -> list[str]:
    """Which changes harm the recipe most, and which hardly."""
    best, said = of(found), []
    rows = lever_rows(found)
    if rows:
        base = mean(first_seed(found) or best)
        worth = ", ".join(f"{name} ({ppl / base:.2f} ×)" for ppl, name, _ in rows[:3])
        idle = [name for ppl, name, _ in rows if ppl < 1.01 * base]
        said.append(f"What harms the recipe most, of the changes in the table, is to train it {worth}; one seed each.")
        if idle:
            said.append(f"To train it {', or '.join(idle)} costs less than 1 % or helps (one seed).")
    return said


def worth_of_teaching(found: dict[Key, list[Run]]) -> list[str]:
    """What it is worth that the encoder was taught to predict before its contexts were stored."""
    own, plain = of_the_same_seeds(of(found), of(found, **UNTAUGHT))
    briefly = of(found, **TAUGHT_BRIEFLY)
    if not plain:
        return []
    ratio, epochs = mean(plain, "test_ppl") / mean(own, "test_ppl"), settings()["pretrain.lm_epochs"]
    for_less = (
        f" Taught for half as long, by all of its weights, it brings {spread(briefly, 'test_ppl')} ({seeds(briefly)})."
        if briefly
        else ""
    )
    return [
        f"Its encoder is also taught to predict for {epochs} epochs, half of its recurrent weights left out of each "
        "batch (weight dropping, Merity, Keskar & Socher, 2018). With one that was not, the recipe is at a test PPL of "
        f"{spread(plain, 'test_ppl')} ({seeds(plain)}), {ratio:.3f} × as high.{for_less}"
    ]


def time_and_text(found: dict[Key, list[Run]], published: Published) -> list[str]:
    """What the recipe costs, and what it lacks."""
    best, said = of(found), []
    on_cpu, alike = (
        [run for run in runs if run["machine"]["device"] == "cpu"] for runs in (best, published.get(100, []))
    )
    if on_cpu and alike:
        own, theirs = (
            statistics.mean(run["pretrain"]["seconds"] + run["seconds"]["train"] for run in runs)
            for runs in (on_cpu, alike)
        )
        said.append(
            f"Both phases took {own:.0f} s with the recipe, {theirs:.0f} s without it ({own / theirs:.2f} ×; "
            f"{verdict(own / theirs, 3.0)}), one thread each, not side by side, on machines that had other work too."
        )
    last = [run["train"]["epochs"][-1] for run in best]
    train, val = (statistics.mean(epoch[f"{name}_ppl"] for epoch in last) for name in ("train", "val"))
    if train < val:
        said.append(
            f"In its last epoch it is at {train:.0f} on the training text, which is read with dropout, and at "
            f"{val:.0f} on the validation text."
        )
    return said


def on_chats(runs: Sequence[Run]) -> list[str]:
    """The recipe, untouched, against the published model on conversations of UltraChat."""
    chats = [run for run in runs if run["config"]["data"]["source"] == "jsonl"]
    recipe = {key: value for key, value in settings().items() if key.startswith(("recipe.", "pretrain."))}
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
    ranked = sorted((mean(runs), name) for name, runs in models.items() if runs)
    if not ranked or ranked[0][0] >= mean(of(found)):
        return []
    name = ranked[0][1]
    return [
        f"`{name}` with the same extras is the best of these on the validation set ({spread(models[name])} against "
        f"{spread(of(found))})."
    ]


def against(best: list[Run], rival: list[Run], name: str, bound: float, words: str) -> str:
    """How the recipe does against a rival with the same extras, of which at most `bound` × was asked for."""
    ratio = mean(best, "test_ppl") / mean(rival, "test_ppl")
    kept, theirs = (runs[0]["decode_state"]["bytes"]["10000"] for runs in (best, rival))
    return (
        f"Against `{name}` with the same extras ({words}; {theirs:,} bytes kept against {kept:,}), test PPL is "
        f"{ratio:.3f} × ({spread(best, 'test_ppl')} against {spread(rival, 'test_ppl')}, "
        f"{seeds(rival)}{told_apart(best, rival)}; {verdict(ratio, bound)})."
    )
