"""Finds runs below folders and reads what the comparison needs of their `metrics.json` and `status.json`."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.report.markdown import leaves
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.unread import CHOOSING, Chosen, Voices, unread_keys

Metrics = dict[str, Any]

STATUS = "status.json"

NO_EFFECT = ("cache_dir", "embeddings", "resume", "trainer.enable_progress_bar")
"""Keys that change no number of a run."""

LATER = {
    "init_from": None,
    "pretrain.lm_epochs": 0,
    "pretrain.lm_weight_dropout": 0.0,
    "model.layers": 1,
    "model.local_window": None,
    "recipe.norm": "post",
    "recipe.train_embedding": False,
    "recipe.embedding_dropout": 0.0,
    "recipe.context_dropout": 0.0,
    "recipe.output_dropout": 0.0,
    "recipe.projection": False,
    "recipe.read_current": False,
    "recipe.pointer_heads": 0,
    "recipe.ngram": False,
    "recipe.apart": False,
    "train.schedule": "constant",
}
"""Keys that runs of earlier versions do not have, and what those runs did."""


@dataclass(frozen=True)
class Run:
    """A finished run, as the comparison sees it."""

    name: str
    """Its folder, as short as tells the runs apart."""
    settings: dict[str, Any]
    """Every dotted configuration key that its model reads, the seed included; lists as tuples."""
    val_ppl: float
    train_ppl: float
    """At the best epoch, as is `gap`: validation minus train PPL."""
    gap: float
    test_ppl: float | None
    val_accuracy: float
    best_epoch: int
    trained: int
    """Parameters trained."""
    kept: int | None
    """Bytes that a decoder keeps after 10,000 tokens, fp32; None in metrics that do not say."""
    seconds: float
    footing: dict[str, float]
    scored: tuple[int, int | None]
    """Validation tokens and vocabulary: only among runs that agree on both do PPLs compare."""

    @property
    def model(self) -> str:
        """The model's name, and in which ways its contexts are not chosen as published."""
        grid = [", grid"] if self.settings.get("selection") == "grid" else []
        by_head = [", per head"] if isinstance(self.settings.get("interval"), tuple) else []
        return "".join([str(self.settings["model.name"]), *grid, *by_head])


class Unfinished(NamedTuple):
    """A trial without metrics."""

    name: str
    asked: str
    """The overrides that made it, as typed."""
    state: str
    reason: str


class Skipped(NamedTuple):
    """A `metrics.json` or `status.json` that is not used."""

    name: str
    reason: str


class Found(NamedTuple):
    """Everything below the folders that were asked for; `runs` best first."""

    runs: list[Run]
    unfinished: list[Unfinished]
    skipped: list[Skipped]


def collect(folders: Sequence[Path]) -> Found:
    """Reads every run in and below `folders`, each once.

    Raises UserError for a folder that does not exist and when there is no finished run at all.
    """
    found = Found([], [], [])
    texts: dict[bytes, str] = {}
    places = list(_run_folders(folders, found.skipped))
    root = os.path.commonpath([place.parent for place in places]) if places else ""
    for place in places:
        name = Path(os.path.relpath(place, root)).as_posix()
        run = RunFolder(place)
        if not run.metrics.exists():
            _read_status(place, name, found)
            continue
        try:
            text = run.metrics.read_bytes()
            if text in texts:
                found.skipped.append(Skipped(name, f"the same metrics.json as {texts[text]}"))
                continue
            found.runs.append(as_run(name, run.read_metrics()))
            texts[text] = name
        except (UserError, OSError) as error:
            found.skipped.append(Skipped(name, _unreadable(run, error)))
    if not found.runs:
        raise UserError(_nothing(folders, found))
    found.runs.sort(key=lambda run: run.val_ppl)
    return found


def as_run(name: str, metrics: Metrics) -> Run:
    """What the comparison needs of `metrics`; raises UserError naming the entry that is missing or of a wrong kind."""
    try:
        result, train = metrics["result"], metrics["train"]
        (best,) = [row for row in train["epochs"] if row["epoch"] == train["best_epoch"]]
        state = metrics.get("decode_state")
        return Run(
            name=name,
            settings=settings(metrics),
            val_ppl=_number(result["val_ppl"], "result.val_ppl"),
            train_ppl=_number(best["train_ppl"], "train.epochs.train_ppl"),
            gap=_number(result["train_val_gap"], "result.train_val_gap"),
            test_ppl=result.get("test_ppl"),
            val_accuracy=_number(result["val_accuracy"], "result.val_accuracy"),
            best_epoch=train["best_epoch"],
            trained=metrics["parameters"]["trainable"],
            kept=state["bytes"]["10000"] if state else None,
            seconds=_number(metrics["seconds"]["total"], "seconds.total"),
            footing=metrics["footing"],
            scored=(metrics["data"]["val_tokens"], metrics["data"].get("vocab_size")),
        )
    except KeyError as missing:
        raise UserError(f"it lacks the entry {missing}") from missing
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"its entries are not those of a run ({error})") from error


def settings(metrics: Metrics) -> dict[str, Any]:
    """The configuration of a run as dotted keys without those that its model does not read or that change nothing."""
    config = metrics["config"]
    name, values = config["model"]["name"], dict(leaves(config))
    values |= {key: value for key, value in LATER.items() if key not in values}
    layers, choosing = values["model.layers"], [values[key] for key in CHOOSING]
    unread = (*NO_EFFECT, *unread_keys(name, voices_of(values), Chosen(*choosing)))
    kept = {key: _hashable(value) for key, value in values.items() if not _below(key, unread)}
    if kept.get("samples", 0) is None:
        kept["samples"] = metrics["data"]["train_documents"]
    if name == "sliding_window" and kept.get("model.window_tokens") is None:
        kept["model.window_tokens"] = (metrics["window"]["span_tokens"] - 1) // layers + 1
    return kept


def voices_of(values: Mapping[str, Any]) -> Voices:
    """Which voices a run has, whose settings are `values` by dotted key."""
    return Voices(*(bool(values.get(f"recipe.{name}")) for name in ("pointer_heads", "ngram", "read_current")))


def reads(model: str, key: str, voices: Voices) -> bool:
    """Whether a model of this name, with these voices, reads this dotted key."""
    return not _below(key, unread_keys(model, voices))


def _below(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(each) for each in value) if isinstance(value, list) else value


def _number(value: Any, entry: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"its entry {entry} is {json.dumps(value)}, not a finite number")
    return value


def _run_folders(folders: Sequence[Path], skipped: list[Skipped]) -> Iterator[Path]:
    """Every folder with a metrics.json or a status.json, in a fixed order and once, whichever way it is reached."""
    seen = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: name a run's folder or one that contains runs.")

        def unreadable(error: OSError) -> None:
            skipped.append(Skipped(str(error.filename), f"cannot be read ({error.strerror})"))

        for place, below, files in os.walk(folder, onerror=unreadable):
            below[:] = sorted(name for name in below if not name.startswith("."))
            path = Path(place).resolve()
            if path not in seen and {"metrics.json", STATUS} & set(files):
                yield path
            seen.add(path)


def _read_status(place: Path, name: str, found: Found) -> None:
    try:
        status = json.loads((place / STATUS).read_text(encoding="utf-8"))
        state, reason = str(status["state"]), status.get("reason")
        asked = " ".join(map(str, status.get("overrides") or ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found.skipped.append(Skipped(name, f"{STATUS} cannot be read"))
        return
    silent = {
        "running": "still running, or ended without a word",
        "finished": "said to be finished, but there is no metrics.json",
    }
    found.unfinished.append(Unfinished(name, asked, state, str(reason or silent.get(state, "no reason was recorded"))))


def _unreadable(run: RunFolder, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"metrics.json cannot be read ({error.strerror})"
    return str(error).replace(f"{run.metrics} ", "metrics.json ").split(", choose another")[0]


def _nothing(folders: Sequence[Path], found: Found) -> str:
    where = ", ".join(map(str, folders))
    others = [(each.name, each.reason) for each in found.unfinished]
    others += [(each.name, each.reason) for each in found.skipped]
    if not others:
        return f"There is no run in {where}: name folders that contain a metrics.json, at any depth."
    name, reason = others[0]
    return f"There is no finished run in {where} ({len(others)} others; {name}: {reason}): name finished ones."
