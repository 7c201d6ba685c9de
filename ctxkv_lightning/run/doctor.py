"""Whether this machine can run the experiments: about ten lines, found out without a network.

Each check is a function that returns one `Finding`; one that raises is itself a finding.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from unittest import mock

from packaging.requirements import Requirement

from ctxkv_lightning.errors import UserError

DISTRIBUTION = "ctxkv-lightning"
NEEDED = ("torch", "lightning", "hydra-core", "omegaconf")
PYTHONS = ">=3.10,<3.14"
ROOM = 5e9
"""Bytes below which a disk counts as nearly full: an experiment of a million tokens leaves about 2 GB."""

Mark = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and, unless it is fine, what to do."""

    subject: str
    mark: Mark
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.mark:8} {self.subject:10} {self.text}" + (f" -> {self.advice}" if self.advice else "")


def examine(cache_dir: Path, dataset: str) -> list[Finding]:
    """All findings; `dataset` is the one that the published experiment reads."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": check_packages,
        "devices": check_devices,
        "precision": check_precision,
        "threads": check_threads,
        "cache": lambda: check_cache(cache_dir),
        "disk": lambda: check_disk(cache_dir),
        "tokenizer": check_tokenizer,
        "published": lambda: check_published(cache_dir, dataset),
        "extras": check_extras,
    }
    return [_examined(subject, check) for subject, check in checks.items()]


def _examined(subject: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a package that cannot even be imported is what this is for
        reason = (str(error).strip().splitlines() or [""])[0]
        return Finding(subject, "broken", f"{type(error).__name__}: {reason}", "make setup")


def check_python() -> Finding:
    """Hydra does not run on the newest Python yet."""
    version, where = platform.python_version(), f"on {platform.system()} {platform.machine()}"
    if _fits(version, PYTHONS):
        return Finding("python", "ok", f"{version} {where}")
    return Finding("python", "broken", f"{version} {where}, needs {PYTHONS}", "make setup PYTHON=python3.12")


def check_packages() -> Finding:
    """The versions that decide, against what this package says it needs."""
    ranges = {need.name: _range(need) for need in requirements() if need.marker is None}
    found, wrong = [], []
    for name in NEEDED:
        version = _version(name)
        found.append(f"{name} {version}" if version else f"no {name}")
        if version is None or not _fits(version, ranges.get(name, "")):
            wrong.append(f"'{name}{ranges.get(name, '')}'")
    if wrong:
        return Finding("packages", "broken", ", ".join(found), f"pip install {' '.join(wrong)}")
    if not ranges:
        return Finding(
            "packages", "warning", f"{', '.join(found)}; {DISTRIBUTION} is not installed", "pip install -e ."
        )
    return Finding("packages", "ok", f"{', '.join(found)} (supported together)")


def check_devices() -> Finding:
    """What a run can compute on."""
    import torch

    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("devices", "ok", ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in each))
    if torch.backends.mps.is_available():
        return Finding("devices", "ok", "Apple GPU (mps)")
    processor = platform.processor() or platform.machine()
    return Finding("devices", "ok", f"CPU only ({processor})" + ("" if torch.version.cuda else ", torch without CUDA"))


def check_precision() -> Finding:
    """What trainer.precision=auto will choose here, and why."""
    import torch

    from ctxkv_lightning.run.machine import cpu_multiplies_bf16, resolve_precision

    on_gpu = torch.cuda.is_available()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_multiplies_bf16()
    multiplies = "multiplies bf16" if bf16 else "has no bf16 of its own"
    chosen = resolve_precision("auto", "auto")
    return Finding("precision", "ok", f"the {'GPU' if on_gpu else 'CPU'} {multiplies}: precision=auto is {chosen}")


def check_threads() -> Finding:
    """More threads than processors that this process may use slow each other down."""
    import torch

    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{threads} for torch, {usable} of {os.cpu_count()} processors usable"
    if threads > usable:
        return Finding("threads", "warning", text, f"export OMP_NUM_THREADS={usable}")
    return Finding("threads", "ok", text)


def check_cache(cache_dir: Path) -> Finding:
    """Size and health of the cache, hashes aside, and whether a run could add to it."""
    from ctxkv_lightning.run.cache import USELESS, entries, size

    found = entries(cache_dir) if cache_dir.is_dir() else []
    bad = [entry for entry in found if entry.state in USELESS]
    stores = len(found) - len(bad)
    text = f"{cache_dir}: {stores} {_plural(stores, 'store')}, {size(sum(entry.bytes for entry in found))}"
    if (refusal := _refusal(cache_dir)) is not None:
        return Finding("cache", "warning", f"{text}, not writable ({refusal})", "set cache_dir for what is not in it")
    if bad:
        advice = "python -m ctxkv_lightning cache prune"
        return Finding("cache", "warning", f"{text}, {len(bad)} that nobody can use", advice)
    return Finding("cache", "ok", f"{text}, writable")


def check_disk(cache_dir: Path) -> Finding:
    """Room where runs and caches go."""
    from ctxkv_lightning.run.cache import size

    usage = shutil.disk_usage(_existing(cache_dir))
    text = f"{size(usage.free)} of {size(usage.total)} free for {cache_dir}"
    if usage.free < ROOM:
        return Finding("disk", "warning", text, "python -m ctxkv_lightning cache prune --older-than 7")
    return Finding("disk", "ok", text)


def check_tokenizer() -> Finding:
    """Whether tokenizer=gpt2 works without a network."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR")
    place = f"TIKTOKEN_CACHE_DIR={named}" if named else "TIKTOKEN_CACHE_DIR is not set"
    if gpt2_tokenizer_is_here():
        return Finding("tokenizer", "ok", f"gpt2 is here, no network needed ({place})")
    advice = "python -m ctxkv_lightning fetch FOLDER, or stay with tokenizer=bpe"
    return Finding("tokenizer", "warning", f"gpt2 needs a network the first time ({place})", advice)


def gpt2_tokenizer_is_here() -> bool:
    """Whether tiktoken finds all files of its encoding gpt2 on this machine, intact."""
    from tiktoken.registry import ENCODINGS

    from ctxkv_lightning.text.tokenizer import load_encoding

    loaded = ENCODINGS.pop("gpt2", None)  # it would be handed out whatever the files are
    try:
        with mock.patch("tiktoken.load.read_file", side_effect=ConnectionError("not asked")):
            load_encoding("gpt2")
    except UserError:
        return False
    finally:
        if loaded is not None:
            ENCODINGS["gpt2"] = loaded
    return True


def check_published(cache_dir: Path, dataset: str) -> Finding:
    """Whether experiment=published finds its two downloads on this machine."""
    import huggingface_hub

    from ctxkv_lightning.run.cache import entries
    from ctxkv_lightning.store import Store
    from ctxkv_lightning.text.hub import GPT2, WEIGHTS

    kept = [entry for entry in (entries(cache_dir) if cache_dir.is_dir() else []) if entry.kind == "conversations"]
    usable = [Store.open(entry.path, "never") for entry in kept if entry.state in ("verified", "unverified")]
    here = {
        dataset: any(store.manifest["key"].get("dataset") == dataset for store in usable),
        GPT2: isinstance(huggingface_hub.try_to_load_from_cache(GPT2, WEIGHTS), str),
    }
    missing = [name for name, found in here.items() if not found]
    if missing:
        advice = "python -m ctxkv_lightning fetch FOLDER"
        text = f"experiment=published needs a network for {' and '.join(missing)}"
        return Finding("published", "warning", text, advice)
    return Finding("published", "ok", f"{' and '.join(here)} are here, no network needed")


def check_extras() -> Finding:
    """Optional extras: none is needed for one run."""
    needs = requirements()
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [] if needs else []
    told = []
    for extra in extras:
        own = [need for need in needs if need.marker is not None and need.marker.evaluate({"extra": extra})]
        missing = [need.name for need in own if _version(need.name) is None]
        told.append(f"{extra} {'lacks ' + ' '.join(missing) if missing else 'installed'}")
    return Finding("extras", "ok", "; ".join(told) or f"unknown: {DISTRIBUTION} is not installed")


def requirements() -> list[Requirement]:
    """What this package's metadata asks for; nothing if it is not installed."""
    try:
        return [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return []


def _range(need: Requirement) -> str:
    """From the lowest version on, as people write it."""
    return ",".join(sorted(map(str, need.specifier), reverse=True))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, specifier: str) -> bool:
    return Requirement(f"x{specifier}").specifier.contains(version, prereleases=True)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written into the folder, or into the nearest one that exists; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return None
    except OSError as error:
        return error.strerror


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
