"""A trained model, opened from the folder of a finished run or of an export, and nothing but that folder."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.model import ContextKVLM, TiedLM
from ctxkv_lightning.lm.pretrained import CLASS, CONFIG
from ctxkv_lightning.lm.rivals import CascadeLM, RecurrenceLM, TransformerLM, build_model
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import read
from ctxkv_lightning.text.encoding import FOLDER, open_encoding
from ctxkv_lightning.text.tokenizer import encode_documents, fingerprint

BEST = "best.ckpt"
PREFIX = "model."
"""Of the model's weights in a checkpoint."""

CLASSES: dict[str, type[TiedLM]] = {
    each.__name__: each for each in (ContextKVLM, CascadeLM, RecurrenceLM, TransformerLM)
}
"""The classes that an exported folder may name: no other is ever looked up."""


@dataclass(frozen=True)
class TrainedModel:
    """A model with its tokenizer, in evaluation mode on its device, and what its run measured (None for exports)."""

    model: TiedLM
    encoding: tiktoken.Encoding
    metrics: dict[str, Any] | None = None

    def encode(self, text: str) -> Tensor:
        """The ids (N,) of a text, on the model's device; raises UserError for text that is not Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not UTF-8 at character {error.start}: convert it first") from None
        return torch.from_numpy(encode_documents(self.encoding, [text])).long().to(self.model.embedding.weight.device)


def open_trained(folder: Path) -> TrainedModel:
    """The model of a finished run or of an exported folder, on a GPU where there is one; needs nothing but the folder.

    Raises UserError where there is none, where the run is not finished, and for a file that is not as it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run {folder}: name the folder of a finished run or of an export")
    trained = open_export(folder) if (folder / CONFIG).is_file() else open_run(folder)
    trained.model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    return trained


def open_run(folder: Path) -> TrainedModel:
    """The best checkpoint of a finished run, on the CPU. Raises UserError as `open_trained`."""
    run = RunFolder(folder)
    if not run.config.is_file() and (Path(folder) / CONFIG).is_file():
        raise UserError(f"{folder} is an export, which is no run: name the run that it was made of")
    if not run.config.is_file():
        raise UserError(f"{folder} is no run: it has no {run.config.name}, nor the {CONFIG} of an export")
    if not run.metrics.is_file():
        raise UserError(f"the run {folder} is not finished: go on with it by 'python train.py resume={folder}'")
    encoding = open_encoding(folder / FOLDER)
    checkpoint = read(run.checkpoints / BEST)
    model = _model_of(checkpoint, run.checkpoints / BEST)
    _check_tokenizer(run, encoding, model)
    return TrainedModel(model, encoding, run.read_metrics())


def open_export(folder: Path) -> TrainedModel:
    """The model of an exported folder, on the CPU. Raises UserError as `open_trained`."""
    try:
        named = json.loads((folder / CONFIG).read_text(encoding="utf-8"))[CLASS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is not that of an export ({error!r}): export the run again") from None
    if named not in CLASSES:
        raise UserError(f"{folder / CONFIG} names the model '{named}', which is none of {', '.join(CLASSES)}")
    return TrainedModel(CLASSES[named].from_pretrained(folder), open_encoding(folder / FOLDER))


def _model_of(checkpoint: dict[str, Any], path: Path) -> TiedLM:
    try:
        options, stored = checkpoint["hyper_parameters"], checkpoint["state_dict"].items()
        weights = {key.removeprefix(PREFIX): value for key, value in stored if key.startswith(PREFIX)}
        arguments = {name: options[name] for name in inspect.signature(build_model).parameters if name in options}
        recipe = options.get("recipe") or {}
        of_tokens = options["model"] in ("transformer", "sliding_window")
        if of_tokens and recipe.get("read_current") and "attention.read.weight" not in weights:
            arguments["recipe"] = {**recipe, "read_current": False}  # they had the key before it had an effect on them
        model = build_model(options["model"], **arguments)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not the checkpoint of a model of this version ({reason})") from error
    return model


def _check_tokenizer(run: RunFolder, encoding: tiktoken.Encoding, model: TiedLM) -> None:
    """Raises UserError where the tokenizer in the folder is not the one that the run's tokens were made with."""
    known = json.loads(run.identity.read_text(encoding="utf-8")) if run.identity.is_file() else {}
    same = known.get("tokenizer") in (None, fingerprint(encoding))
    if not same or encoding.n_vocab != len(model.embedding.weight):
        raise UserError(f"the tokenizer in {run.path / FOLDER} is not the one that the run was trained with")
