"""The part of RESULTS.md about `experiment=best`: models with the same extras, every lever alone, and what they say."""

from collections.abc import Sequence
from typing import Any

from benchmarks.recipe_runs import (
    MEMORIES,
    RIVALS,
    Key,
    Published,
    Run,
    best_split,
    first_seed,
    groups,
    lever_rows,
    mean,
    of,
    spread,
)
from benchmarks.recipe_sentences import on_chats, sentences, times


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
    memories = memory_rows(found)
    if len({share for share, *_ in memories}) > 1:
        head = ["memory", "", "divided", "val. PPL", "test PPL", "bytes kept", "seeds", "ours is at"]
        parts += ["### With less memory", MEMORIES_ARE, markdown(head, memories, left=3)]
    parts += ["### What the recipe says", numbered([*sentences(found, published, patient), *on_chats(runs)])]
    return parts


INTRODUCTION = (
    "The same extras for every model: an encoder that was also taught to predict, pre-norm, trained embedding, "
    "projection, dropouts, schedule, pointer, a direct read of the current context, a voice for counting, a head that "
    "learns apart from both, and four layers, with the settings that were found for `context_kv` by short runs of one "
    "seed, chosen on the validation set alone; the rivals were not tuned further, which favours "
    "`context_kv`. Its first layer reads contexts, the others what the layer before them made of the last eight "
    "tokens; all layers of a rival are of its own kind, and each that attends to tokens keeps keys and values of its "
    "own. Made by `make results-best`; [side by side](docs/results/best/report.md)."
)
LEVERS_ARE = "What the validation PPL becomes when one thing is done to the recipe, and nothing but what the row says."


def model_table(found: dict[Key, list[Run]]) -> str:
    """A row per model and number of samples."""
    models: dict[str, dict[str, Any]] = {"context_kv": {}, **RIVALS}
    rows = []
    for samples in ("100", "500"):
        more = {} if samples == "100" else {"samples": samples}
        footing = None
        for model, changed in models.items():
            if chosen := of(found, **more, **changed):
                rows.append((mean(chosen), [samples, model, *cells(chosen)]))
                footing = chosen[0]["footing"]
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


def lever_table(found: dict[Key, list[Run]]) -> str:
    """A row for each lever that was taken out, the recipe itself last."""
    own = first_seed(found) or of(found)[:1]
    base = mean(own)
    rows = [[name, f"{ppl:.1f}", f"{ppl / base:.3f} ×", *sizes(runs[0])] for ppl, name, runs in lever_rows(found)]
    rows.append(["the recipe", f"{base:.1f}", "1", *sizes(own[0])])
    return markdown(["", "val. PPL", "against the recipe", "bytes kept", "trained parameters"], rows, left=1)


MEMORIES_ARE = (
    "As many bytes as the recipe keeps, and fewer: each model with the division of its memory that did best on the "
    "validation set with seed 42, of those that were tried. The last column is the recipe's PPL over the model's."
)


def memory_rows(found: dict[Key, list[Run]]) -> list[list[str]]:
    """A row for each memory and model, ours first."""
    rows = []
    for share, models in MEMORIES.items():
        own = best_split(found, models["context_kv"])
        for model, splits in models.items():
            if own and (chosen := best_split(found, splits)):
                kept = f"{chosen[0]['decode_state']['bytes']['10000']:,}"
                ppl = [spread(chosen), spread(chosen, "test_ppl")]
                against = "1" if model == "context_kv" else times(own, chosen)
                rows.append([share, model, divided(chosen[0]), *ppl, kept, str(len(chosen)), against])
    return rows


def divided(run: Run) -> str:
    """What a run's memory is for, in words."""
    config = run["config"]
    pointed_at = f"pointer over {config['recipe']['pointer_window']} contexts"
    if config["model"]["name"] == "context_kv":
        reach = max(config["interval"]) * (config["max_contexts"] - 1)
        return f"{pointed_at}, {reach} in reach, local layers over {config['model']['local_window']} tokens"
    if config["model"]["name"] == "sliding_window":
        return f"{pointed_at}, {config['model']['window_tokens']} tokens in each layer"
    return pointed_at


def sizes(run: Run) -> list[str]:
    return [f"{run['decode_state']['bytes']['10000']:,}", f"{run['parameters']['trainable']:,}"]


def numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, start=1))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are words."""
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
