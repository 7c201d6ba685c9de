"""The section about the recipe says what the metrics say, whichever way they fall."""

import copy
import json
from dataclasses import asdict

import pytest

from benchmarks import findings, findings_runs, recipe, recipe_runs, recipe_sentences
from ctxkv_lightning.door import check_command_line
from tests.conftest import ROOT


def made(ppl, *arguments, seed=42):
    """A run of `experiment=best` with these arguments and test PPL twice the validation PPL."""
    run = json.loads((ROOT / "docs" / "default-run" / "metrics.json").read_text())
    run["config"] = asdict(check_command_line(["experiment=best", f"seed={seed}", *arguments])[0])
    run["result"] |= {"val_ppl": ppl, "test_ppl": 2 * ppl, "train_val_gap": 5.0}
    run["decode_state"], run["ngram"] = {"bytes": {"10000": 1_000}}, {"bytes": 1_500_000}
    names = ("kneser_ney", "kneser_ney_cache", "test_kneser_ney", "test_kneser_ney_cache")
    run["footing"] = dict(zip((f"{name}_ppl" for name in names), (200.0, 70.0, 210.0, 100.0), strict=True))
    return copy.deepcopy(run)


@pytest.fixture
def runs():
    return [
        *(made(ppl, seed=seed) for ppl, seed in ((40.0, 42), (50.0, 1), (60.0, 2))),
        made(60.0, "model=recurrence", "recipe.pointer_window=602"),
        made(20.0, "model=transformer"),
        made(150.0, "recipe.pointer_heads=0", "recipe.pointer_values=false"),
        made(55.0, "recipe.ngram=false"),
        made(80.0, "recipe.pointer_heads=0", "recipe.pointer_values=false", "samples=500"),
        made(120.0, "recipe.pointer_heads=0", "recipe.pointer_values=false", "recipe.ngram=false"),
        made(40.1, "recipe.context_dropout=0"),
        made(44.0, "interval=20"),
        made(30.0, "samples=500"),
    ]


def published(run):
    other = copy.deepcopy(run)
    other["result"]["test_ppl"] = 400.0
    return {100: [other], 500: [other]}


def test_runs_are_grouped_by_what_they_change(runs):
    found = recipe_runs.groups(runs)
    assert [run["config"]["seed"] for run in recipe_runs.of(found)] == [42, 1, 2]
    assert (
        len(recipe_runs.of(found, **recipe_runs.RIVALS["recurrence"])) == len(recipe_runs.of(found, samples=500)) == 1
    )
    assert not recipe_runs.of(found, model__name="sliding_window")


def test_levers_stand_by_what_they_are_worth_against_the_same_seed(runs):
    table = recipe.lever_table(recipe_runs.groups(runs)).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == [
        "without the pointer",
        "without the pointer and without counting",
        "without counting",
        "with one interval of 20",
        "without dropout of contexts",
        "the recipe",
    ]
    assert [line.split("|")[3].strip() for line in table] == [
        "3.750 ×",
        "3.000 ×",
        "1.375 ×",
        "1.100 ×",
        "1.002 ×",
        "1",
    ]


@pytest.mark.parametrize(
    ("ppl", "verdict"), [(40.1, "worth nothing that this text shows"), (44.0, "worth something: with the current")]
)
def test_what_layers_are_worth_is_said_as_it_is(runs, ppl, verdict):
    assert recipe_sentences.worth_of_layers(recipe_runs.groups(runs)) == []
    more = [
        made(48.0, "model.layers=1"),
        made(46.0, "model.local_window=null"),
        made(ppl, "interval=1", "max_contexts=1"),
    ]
    layers, contexts = recipe_sentences.worth_of_layers(recipe_runs.groups([*runs, *more]))
    assert "alone is at a validation PPL of 48.0, four that all read the same contexts at 46.0, one and three" in layers
    assert "local ones at 40.0 (one seed)" in layers
    assert verdict in contexts
    # Of the seed that both have.
    assert f"validation PPL is {ppl / 40:.3f} × ({ppl} against 40.0), test PPL" in contexts


@pytest.mark.parametrize(
    ("val", "test", "verdict", "alike"),
    [
        ((44.0, 44.5), (90.0, 91.0), "worth something: with", 0),
        ((44.0, 44.5), (80.0, 84.0), "worth something on the validation set alone: with", 1),
        ((39.9, 41.0), (90.0, 91.0), "worth something on the test set alone: with", 1),
        ((39.9, 41.0), (80.0, 84.0), "worth nothing that these seeds tell apart: with", 2),
    ],
)
def test_what_contexts_are_worth_is_what_seeds_tell_apart(val, test, verdict, alike):
    own = [made(40.0, seed=42), made(40.4, seed=1)]
    bare = [made(ppl, "interval=1", "max_contexts=1", seed=seed) for ppl, seed in zip(val, (42, 1), strict=True)]
    for run, ppl in zip((*own, *bare), (80.0, 81.0, *test), strict=True):
        run["result"]["test_ppl"] = ppl
    (said,) = recipe_sentences.worth_of_layers(recipe_runs.groups([*own, *bare]))
    assert verdict in said
    assert said.count("; not told apart by these seeds") == alike


def test_sentences_follow_the_numbers(runs):
    said = " ".join(recipe_sentences.sentences(recipe_runs.groups(runs), published(runs[0]), {}))
    assert "0.250 × the published one's 400.0 (one seed; at most 0.27 was asked for)" in said
    assert "0.150 × the published one's" in said
    assert "the recipe is at 1.000 × (at most 1.0 was asked for)" in said
    assert "1.5 MB of counts" in said
    assert "reaches 110.0 (one seed), 1.100 × the trigram with its cache and 1.100 × the whole recipe" in said
    assert "1.429 × the trigram alone (210.0; at most 0.95 was asked for, and is missed)" in said
    assert "0.762 × the trigram alone (210.0; at most 1.0 was asked for)" in said
    assert "1.143 × the trigram: counting remembers" in said
    against = {name: next(part for part in said.split("Against ") if part.startswith(f"`{name}`")) for name in
               ("recurrence", "transformer")}  # fmt: skip
    assert "0.833 ×" in against["recurrence"]
    assert "missed" not in against["recurrence"].split(").")[0]
    assert "2.500 ×" in against["transformer"]
    assert "and is missed" in against["transformer"]
    assert "without dropout of contexts costs less than 1 %" in said


def test_a_published_run_that_might_have_gone_on_is_said_to(runs):
    other = published(runs[0])
    last = other[500][0]
    last["train"]["best_epoch"] = last["config"]["train"]["max_epochs"]
    other[100] = [copy.deepcopy(last), copy.deepcopy(last)]
    other[100][0]["train"]["best_epoch"] = 1
    said = " ".join(recipe_sentences.sentences(recipe_runs.groups(runs), other, {}))
    assert "(2 seeds, 1 of them still gaining when the epochs ended; at most 0.27" in said
    assert "(one seed, still gaining when the epochs ended" in said


def test_published_runs_that_had_the_epochs_they_wanted_are_what_is_compared_with(runs):
    plain = published(runs[0])
    patient = copy.deepcopy(plain)
    patient[100][0]["result"]["test_ppl"] = 800.0
    said = " ".join(recipe_sentences.sentences(recipe_runs.groups(runs), plain, {**patient, 500: []}))
    assert "0.125 × the published one's 800.0" in said
    assert "0.150 × the published one's" in said


def test_a_bound_that_is_missed_by_less_than_is_shown_is_said_to_be():
    assert recipe_sentences.verdict(0.97, 0.97) == "at most 0.97 was asked for"
    assert recipe_sentences.verdict(0.9702, 0.97) == "at most 0.97 was asked for, and is missed (0.9702)"
    assert recipe_sentences.verdict(0.98, 0.97) == "at most 0.97 was asked for, and is missed"


def test_times_are_compared_on_one_kind_of_machine(runs):
    plain = published(runs[0])
    plain[100][0]["machine"]["device"] = runs[0]["machine"]["device"]
    plain[100][0]["seconds"] = {**plain[100][0]["seconds"], "train": 100.0}
    plain[100][0]["pretrain"] = {**plain[100][0]["pretrain"], "seconds": 20.0}
    for run in runs[:3]:
        run["seconds"]["train"], run["pretrain"]["seconds"] = 300.0, 72.0
    said = recipe_sentences.sentences(recipe_runs.groups(runs), plain, {})
    assert any(
        "took 372 s with the recipe, 120 s without it (3.10 ×; at most 3.0 was asked for, and" in s for s in said
    )
    plain[100][0]["machine"] = {**plain[100][0]["machine"], "device": "cuda:0"}
    assert not any(
        "Both phases took" in line for line in recipe_sentences.sentences(recipe_runs.groups(runs), plain, {})
    )


def test_other_changes_and_repeated_seeds_are_no_levers(runs):
    more = [made(35.0, "recipe.pointer_heads=8"), made(36.0, "interval=20", "train.lr=0.01"), made(99.0, "interval=20")]
    assert recipe.lever_table(recipe_runs.groups([*runs, *more])) == recipe.lever_table(recipe_runs.groups(runs))


def test_page_and_comparisons_are_made_of_folders_of_runs(tmp_path, runs):
    """The recipe's runs have a page of their own: beside the published ones they would differ in everything."""
    plain = json.loads((ROOT / "docs" / "default-run" / "metrics.json").read_text())
    plain["config"] |= {"selection": "strided"}
    plain["config"]["data"]["files"] = ["elsewhere/chats.jsonl"]
    plain["decode_state"] = {"bytes": {"10000": 635_904}}
    for name, run in (("models", plain), *((f"best-{n}", run) for n, run in enumerate(runs[:3]))):
        (tmp_path / "runs" / name / "one").mkdir(parents=True)
        (tmp_path / "runs" / name / "one" / "metrics.json").write_text(json.dumps(run))
    page = findings.main(
        [str(tmp_path / "runs"), "--output", str(tmp_path / "R.md"), "--pages", str(tmp_path / "pages")]
    ).read_text()
    assert "## The recipe" in page
    kept = findings.kept_runs(tmp_path / "pages" / "runs")
    assert len(kept) == 4
    assert [run["config"]["data"]["files"] for run in kept if run["config"]["data"]["files"]] == [["chats.jsonl"]]
    assert (tmp_path / "pages" / "best" / "report.md").read_text().startswith("# 3 runs")
    assert (tmp_path / "pages" / "report.md").exists()


def test_nothing_is_said_of_what_was_not_run(runs):
    assert recipe.section(runs[3:], {}, {}) == []
    assert "500 samples" not in " ".join(recipe_sentences.sentences(recipe_runs.groups(runs[:3]), {}, {}))
    assert recipe_sentences.on_chats(runs) == []


def test_conversations_have_a_sentence_and_are_in_no_table(runs):
    on_chats = ["data=jsonl", "tokenizer=gpt2", "samples=300", "data.files=[chats.jsonl]"]
    chats = [made(30.0, *on_chats), made(100.0, *on_chats)]
    chats[1]["config"]["embedding"]["dim"] = 768
    (said,) = recipe_sentences.on_chats([*runs, *chats])
    assert "on 300 conversations of UltraChat" in said
    assert "a test PPL of 60.0 (one seed), 0.300 × the published one's 200.0 (one seed; at most 0.7 was asked" in said
    assert recipe_runs.groups([*runs, *chats]) == recipe_runs.groups(runs)
    assert findings_runs.published(chats) == []
    other = made(99.0, *on_chats, "recipe.apart=false", seed=1)
    assert recipe_sentences.on_chats([*runs, *chats, other]) == [said]  # of the recipe as it is, not as it was


def test_what_teaching_is_worth_is_said_of_the_seeds_that_both_have(runs):
    assert recipe_sentences.worth_of_teaching(recipe_runs.groups(runs)) == []
    plain = [made(ppl, "pretrain.lm_epochs=0", seed=seed) for ppl, seed in ((52.0, 42), (56.0, 1), (99.0, 7))]
    (said,) = recipe_sentences.worth_of_teaching(recipe_runs.groups([*runs, *plain]))
    assert "for 8 epochs, half of" in said
    assert said.endswith("at a test PPL of 108.0 ± 5.7 (2 seeds), 1.200 × as high.")
    less = made(55.0, "pretrain.lm_epochs=4", "pretrain.lm_weight_dropout=0")
    (said,) = recipe_sentences.worth_of_teaching(recipe_runs.groups([*runs, *plain, less]))
    assert said.endswith("1.200 × as high. Taught for half as long, by all of its weights, it brings 110.0 (one seed).")


def test_rivals_with_more_text_are_told_of_where_they_were_run(runs):
    assert recipe_sentences.with_more_text(recipe_runs.groups(runs)) == []
    more = [made(24.0, "samples=500", "model=recurrence", "recipe.pointer_window=602"), made(20.0, "samples=500")]
    more[1]["config"]["model"]["name"] = "transformer"
    (said,) = recipe_sentences.with_more_text(recipe_runs.groups([*runs, *more]))
    assert said == (
        "With 500 samples its test PPL is 1.500 × (1.500 × on the validation set, one seed) that of `transformer` and "
        "1.250 × (1.250 × on the validation set, one seed) that of `recurrence`."
    )


def with_a_quarter(ppl, model="context_kv", division=0):
    """A run that keeps a quarter of the recipe's bytes, in one of the divisions of its memory."""
    changes = recipe_runs.MEMORIES["a quarter"][model][division]
    words = [f"model={value}" if key == "model.name" else f"{key}={value}" for key, value in changes.items()]
    run = made(ppl, *(word.replace(" ", "") for word in words))
    return run | {"decode_state": {"bytes": {"10000": 250}}}


def test_less_memory_is_told_with_the_divisions_that_did_best_on_the_validation_set(runs):
    whole = recipe_runs.groups(runs)
    assert recipe_sentences.with_less_memory(whole) == []
    assert "### With less memory" not in recipe.section(runs, {}, {})
    less = [with_a_quarter(50.0), *(with_a_quarter(ppl, "sliding_window", i) for i, ppl in enumerate((62.5, 55.0)))]
    less[-1]["result"]["test_ppl"] = 120.0  # which chooses nothing
    found = recipe_runs.groups([*runs, *less])
    (said,) = recipe_sentences.with_less_memory(found)
    assert said == (
        "With a quarter of the bytes (250) the recipe's test PPL is 1.250 × (1.250 × on the validation set, one seed) "
        "as high, and 0.833 × (0.909 × on the validation set, one seed) that of a `sliding_window` with as few."
    )
    rows = recipe.memory_rows(found)
    assert [row[:2] for row in rows] == [
        ["all", "context_kv"],
        ["all", "recurrence"],
        ["a quarter", "context_kv"],
        ["a quarter", "sliding_window"],
    ]
    assert rows[0][-1] == rows[2][-1] == "1"
    assert rows[3][-1] == "0.833 × (0.909 × on the validation set, one seed)"
    assert rows[3][2] == "pointer over 126 contexts, 3 tokens in each layer"
    assert "### With less memory" in recipe.section([*runs, *less], {}, {})


@pytest.mark.parametrize("ppl", [49.9, 50.1])
def test_the_best_on_the_validation_set_is_named_where_it_is_a_rival(runs, ppl):
    models = [*runs[:3], made(60.0, "model=recurrence", "recipe.pointer_window=602"), made(ppl, "model=transformer")]
    said = recipe_sentences.best_of_all(recipe_runs.groups(models))
    named = "`transformer` with the same extras is the best of these on the validation set (49.9 against 50.0 ± 10.0)."
    assert said == ([named] if ppl < 50 else [])


def test_a_run_from_other_weights_is_not_one_of_the_recipe(runs):
    config = runs[0]["config"] | {"init_from": "somewhere"}
    assert recipe_runs.of(recipe_runs.groups([{**runs[0], "config": config}])) == []


def test_a_weight_dropout_that_nothing_reads_makes_no_other_runs(runs):
    plain, idle = made(58.0, "pretrain.lm_epochs=0", "pretrain.lm_weight_dropout=0"), made(1.0, "pretrain.lm_epochs=0")
    found = recipe_runs.groups([*runs, plain, idle])
    assert recipe_runs.of(found, **recipe_runs.UNTAUGHT) == [plain]  # the first of two alike


def test_conversations_are_those_of_the_recipe_as_it_is_taught(runs):
    on_chats = ["data=jsonl", "tokenizer=gpt2", "samples=300", "data.files=[chats.jsonl]"]
    chats = [made(90.0, *on_chats, "pretrain.lm_epochs=0"), made(100.0, *on_chats)]
    chats[1]["config"]["embedding"]["dim"] = 768
    assert recipe_sentences.on_chats([*runs, *chats]) == []
