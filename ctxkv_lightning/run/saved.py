"""Checkpoints that were saved: found, verified against their manifest, read. Loads torch and nothing of Lightning.

What a checkpoint holds is tensors, numbers, texts, lists and dictionaries: nothing in it is ever imported. Using a
trained model begins with reading one, and should not wait for what only training needs.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ctxkv_lightning.errors import UserError

SUFFIX = ".ckpt"


def manifest_of(path: Path) -> Path:
    """Where the manifest of a checkpoint stands."""
    return path.with_name(path.name + ".json")


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint of ours, verified. Raises UserError when it is missing, damaged or not plain data."""
    verify(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch's reader raises whatever it stumbles over
        raise UserError(
            f"{path} holds more than tensors and plain values, or is no checkpoint: it is not read"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{path} is no checkpoint of a run, it has no global_step: it is not read")
    return checkpoint


def verify(path: Path) -> None:
    """Raises UserError unless the file has the size and SHA-256 that its manifest states."""
    try:
        stated, found = stated_of(path), sha256_of(path)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no checkpoint {path}, or no manifest beside it ({error.filename} is missing)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} or its manifest cannot be read ({error})") from None
    if found not in stated:
        saved = " or ".join(f"{digest[:12]}…" for digest in stated) or "none"
        raise UserError(f"the checkpoint {path} is damaged: its SHA-256 is {found[:12]}…, saved was {saved}")


def stated_of(path: Path) -> list[str]:
    """The digests that the manifest of a checkpoint states; what reading and parsing a file raises, where it cannot."""
    return [str(digest)[:64] for digest in json.loads(manifest_of(path).read_text(encoding="utf-8"))["sha256"]]


def check_measured(metrics: Mapping[str, Any], best: Path, run: Path) -> None:
    """Raises UserError where a run's numbers are those of other weights than its best checkpoint has by now.

    `weights` of metrics.json is the SHA-256 of the checkpoint that was measured; older ones do not say.
    """
    if metrics.get("weights") not in (None, sha256_of(best)):
        named = shlex.quote(f"resume={run}")
        raise UserError(
            f"{run} was trained further after it was measured, and its metrics.json is of other weights: 'python "
            f"train.py {named}' measures it again, with train.max_epochs=N where it has had N epochs, more than planned"
        )


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that is as it was saved, and what is wrong with newer ones."""
    complaints: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            verify(path)
            return path, complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def steps_done(checkpoint: Path | None) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return 0 if checkpoint is None else read(checkpoint)["global_step"]


def epochs_done(checkpoint: Path | None) -> int:
    """Epochs that a checkpoint has behind it, whole ones."""
    return 0 if checkpoint is None else read(checkpoint)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def sha256_of(path: Path) -> str:
    """The digest that a manifest states."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
