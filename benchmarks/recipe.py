"""The part of RESULTS.md about `experiment=best`: models with the same extras, every lever alone, and what they say."""

from collections.abc import Sequence
from typing import Any

from benchmarks.recipe_runs import (
    LEVERS,
    RIVALS,
    TAUGHT,
    TAUGHT_MODELS,
    Key,
    Published,
    Run,
    first_seed,
    groups,
    lever_rows,
    mean,
    of,
    spread,
)
from benchmarks.recipe_sentences import on_chats, sentences


def section(runs: Sequence[Run], published: Published, patient: Published) -> list[str]:
    """The section as Markdown parts; nothing where the recipe was not run.

    `patient` are the published runs that had as many epochs as they wanted.
    """
    found = groups(runs)
    if not of(found):
        return []
    parts = ["## The recipe: `experiment=best`", INTRODUCTION, model_table(found, {"context_kv": {}, **RIVALS})]
    if of(found, **TAUGHT):
        parts += ["### With an encoder that was also taught to predict", TAUGHT_ARE, model_table(found, TAUGHT_MODELS)]
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
    "and values of its own. One extra is not shared: `context_kv` reads the current context beside its attention, "
    "which `recurrence` does in place of one, and models that attend to tokens do in the next table alone. Made by "
    "`make results-best`; [side by side](docs/results/best/report.md)."
)
TAUGHT_ARE = (
    f"`{' '.join(f'{key}={value}' for key, value in TAUGHT.items())}`, no part of the recipe yet, chosen on the "
    "validation set with `context_kv`: the same encoder for every model, whose pointer points at its contexts, and "
    "every model reads the current one directly. No extra is left that a rival does not have."
)
LEVERS_ARE = (
    "What the validation PPL becomes when one thing is done to the recipe, and nothing but what the row says; the last "
    "two columns are of the same with a taught encoder, as in the table above, where that was run."
)


def model_table(found: dict[Key, list[Run]], models: dict[str, dict[str, Any]]) -> str:
    """A row per model and number of samples."""
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
    own, taught = first_seed(found) or of(found)[:1], first_seed(found, **TAUGHT)
    base, rows = mean(own), []
    for ppl, name, runs in lever_rows(found):
        also = first_seed(found, **{**TAUGHT, **LEVERS[name]}) if "pretrain.lm_epochs" not in LEVERS[name] else []
        rows.append([name, f"{ppl:.1f}", f"{ppl / base:.3f} ×", *sizes(runs[0]), *against(also, taught)])
    rows.append(["the recipe", f"{base:.1f}", "1", *sizes(own[0]), *against(taught, taught)])
    head = ["", "val. PPL", "against the recipe", "bytes kept", "trained parameters", "taught", "against the taught"]
    return markdown(head, rows, left=1)


def against(runs: Sequence[Run], base: Sequence[Run]) -> list[str]:
    """The validation PPL of runs, and its ratio to that of others; blank where there are none."""
    if not runs or not base:
        return ["", ""]
    return [f"{mean(runs):.1f}", "1" if runs is base else f"{mean(runs) / mean(base):.3f} ×"]


def sizes(run: Run) -> list[str]:
    return [f"{run['decode_state']['bytes']['10000']:,}", f"{run['parameters']['trainable']:,}"]


def numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, start=1))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are words."""
    rule = [*["---"] * left, *["---:"] * (len(head) - left)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))
