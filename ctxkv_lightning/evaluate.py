"""What trained runs remember, from their folders to tables, figures and evaluation.json."""

import json
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ctxkv_lightning.build import Text, prepare_text
from ctxkv_lightning.config import Config, load_config
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.state import state_bytes
from ctxkv_lightning.remember.association import mqar_suite
from ctxkv_lightning.remember.copying import LAGS, TRIALS, copy_suite, edges
from ctxkv_lightning.remember.passkey import DISTANCES, Encode, passkey_suite, shortest_distance
from ctxkv_lightning.remember.passkey import TRIALS as PASSKEY_TRIALS
from ctxkv_lightning.remember.position import TARGETS, Positions, position_suite
from ctxkv_lightning.remember.recall import Recall
from ctxkv_lightning.report.recall_figure import write_figures
from ctxkv_lightning.report.recall_tables import tables
from ctxkv_lightning.report.runs import Run, as_run
from ctxkv_lightning.report.words import phrases, short_names
from ctxkv_lightning.resume import check_identity
from ctxkv_lightning.run.folder import RunFolder, write_whole
from ctxkv_lightning.run.saved import check_measured
from ctxkv_lightning.text.corpus import SEPARATOR
from ctxkv_lightning.text.tokenizer import encode_documents, fingerprint
from ctxkv_lightning.use import BEST, TrainedModel, open_trained

EVALUATION = "evaluation.json"

ON_TEXT, ON_MQAR = ("position", "copy", "passkey"), ("mqar",)


@dataclass(frozen=True)
class Asked:
    """How a run is to be examined."""

    suites: Sequence[str]
    named: bool
    """Whether these suites were asked for by name: one that cannot be asked is left out otherwise."""
    split: str
    seed: int
    trials: int | None
    """Of each question; None for what the suite thinks enough."""
    lags: Sequence[int]


def run_evaluate(options: Namespace) -> None:
    """The command; raises UserError for what is no finished run, and for a suite that does not fit one."""
    configs = {folder: load_config(RunFolder(folder)) for folder in options.folders}
    suites = {folder: suites_of(folder, config, options.suite) for folder, config in configs.items()}
    lags = common_lags(list(configs.values()))
    if options.seed < 0:
        raise UserError(f"seed={options.seed} must be at least 0")
    if options.trials is not None and options.trials < 1:
        raise UserError(f"trials={options.trials} must be at least 1")
    output = options.output or options.folders[0]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made ({error.strerror}): name another folder") from None
    names = named({folder: as_run(str(folder), RunFolder(folder).read_metrics()) for folder in configs})
    shown = {}
    for folder, config in configs.items():
        asked = Asked(suites[folder], options.suite is not None, options.split, options.seed, options.trials, lags)
        shown[names[folder]] = evaluate_run(folder, config, asked)
    console = Console()
    for title, table in tables(shown):
        console.print(title, style="bold", soft_wrap=True, highlight=False)
        console.print(table)
    if len({each["tokenizer"] for each in shown.values()}) > 1:
        print("These runs have different tokenizers: each was asked in texts of its own tokens.")
    for path in write_figures(shown, output):
        print(path)


def suites_of(folder: Path, config: Config, asked: Sequence[str] | None) -> Sequence[str]:
    """The suites to ask of a run: all that fit its data, or those that were named, which must."""
    fitting = ON_MQAR if config.data.source == "mqar" else ON_TEXT
    for name in asked or ():
        if name not in fitting:
            advice = "train one by 'python train.py data=mqar'" if name in ON_MQAR else "name a run that read text"
            raise UserError(f"--suite {name} does not fit {folder}, trained on data={config.data.source}: {advice}")
    return asked or fitting


def common_lags(configs: Sequence[Config]) -> list[int]:
    """Lags to ask every run for: the same for all, with the edges of each one's window."""
    return sorted(set(LAGS).union(*(edges_of(config) for config in configs)))


def edges_of(config: Config) -> set[int]:
    """Lags at which what a run can read changes: of its selection, its window of tokens, its pointer's window."""
    found = set(edges(config.intervals, config.max_contexts)) if config.model.name == "context_kv" else set()
    if config.model.name == "context_kv" and config.local_reach:
        found |= {lag + config.local_reach for lag in found}  # contexts that states of tokens before have read
    if config.model.name == "sliding_window":
        found |= {config.model.layers * (config.window_tokens - 1) + 1 + side for side in (-1, 0, 1)}
    if config.recipe.pointer_heads:
        found |= {config.recipe.pointer_window + side for side in (-1, 0, 1)}
    return {lag for lag in found if lag >= 1}


def evaluate_run(folder: Path, config: Config, asked: Asked) -> dict[str, Any]:
    """Asks one run, writes its evaluation.json, in which suites asked before stay, and returns what was asked now."""
    run, trained = RunFolder(folder), open_trained(folder)
    check_measured(run.read_metrics(), run.checkpoints / BEST, folder)
    assert trained.metrics is not None
    documents = held_out(run, config, trained, asked.split)
    about = {
        "model": as_run(folder.name, trained.metrics).model,
        "tokenizer": fingerprint(trained.encoding),
        "split": asked.split,
        "seed": asked.seed,
    }
    before, found = asked_before(folder / EVALUATION), dict[str, Any]()
    for name in asked.suites:
        began = time.perf_counter()
        try:
            result = ask(name, trained, config, documents, asked)
        except UserError as error:
            if asked.named or (name == asked.suites[-1] and not found):
                raise
            print(f"{folder}: left out: {error}", file=sys.stderr)
            continue
        state = {"state_bytes": state_bytes(trained.model, result.tokens)} if isinstance(result, Recall) else {}
        found[name] = {**asdict(result), **state, "split": asked.split, "seed": asked.seed}
        print(f"{folder}: {name} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        content = {**about, "suites": {**before, **found}}  # suite by suite: the next may take long, or fail
        write_whole(folder / EVALUATION, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return {**about, "suites": found}


def asked_before(path: Path) -> dict[str, Any]:
    """The suites of an evaluation.json, none where there is none; raises UserError for a file that is no such thing."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["suites"]) if path.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an evaluation ({error!r}): remove it, and it is written anew") from None


def held_out(run: RunFolder, config: Config, trained: TrainedModel, split: str) -> list[Tensor]:
    """The documents of a split, each with the separator that follows it, as the tokens that the run counted.

    Raises UserError where the text is no longer the one that the run was trained with.
    """
    text: Text = prepare_text(config)
    if run.identity.is_file():
        check_identity(run, text)
    texts = [document.text for document in text.documents[split]]
    ends = [SEPARATOR] * (len(texts) - 1) + [""]
    pieces = [encode_documents(trained.encoding, [each + end]) for each, end in zip(texts, ends, strict=True)]
    return [torch.from_numpy(piece.astype(np.int64)) for piece in pieces]


def ask(
    name: str, trained: TrainedModel, config: Config, documents: Sequence[Tensor], asked: Asked
) -> Positions | Recall:
    """One suite's result."""
    model, stream = trained.model, torch.cat(list(documents))

    def encode(text: str) -> Tensor:
        return trained.encode(text).cpu()

    try:
        match name:
            case "position":
                return position_suite(model, documents, asked.seed, asked.trials or TARGETS)
            case "copy":
                return copy_suite(model, stream, asked.lags, asked.seed, asked.trials or TRIALS)
            case "passkey":
                trials = asked.trials or PASSKEY_TRIALS
                return passkey_suite(model, encode, stream, reachable(encode), asked.seed, trials)
            case _:
                return mqar_suite(model, config.data.mqar, stream)
    except ValueError as error:
        raise UserError(f"--suite {name} cannot be asked of this run ({error})") from error


def reachable(encode: Encode) -> list[int]:
    """Passkey distances that have room for what stands between, in tokens of this run's; all, where none has."""
    return [distance for distance in DISTANCES if distance >= shortest_distance(encode)] or list(DISTANCES)


def named(runs: Mapping[Path, Run]) -> dict[Path, str]:
    """What to call the runs: by their models, with the settings that tell those of one model apart, else the folder."""
    names = {}
    for folder, run in runs.items():
        alike = [other for other in runs.values() if other.model == run.model]
        keys = {key for each in alike for key in each.settings} - {"data.files"}  # paths would be long names
        differing = sorted(key for key in keys if len({str(each.settings.get(key)) for each in alike}) > 1)
        own = {key: run.settings.get(key) for key in differing}
        names[folder] = ", ".join([run.model, *([phrases(own, short_names(own))] if own else [])])
    once = Counter(names.values())
    return {folder: name if once[name] == 1 else f"{name}, {folder}" for folder, name in names.items()}
