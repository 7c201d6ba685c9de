"""One run's folder: who may have it, what its files are called, and `metrics.json`.

Knows neither Lightning nor the models; the schema of `metrics.json` stands in DESIGN §4.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.lease import locked


class RunFolder:
    """The names of everything a run leaves behind, below `path`.

    `claim` makes a folder for a new run; the constructor touches nothing, so it opens an old one.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def claim(cls, path: Path, again: bool = False) -> "RunFolder":
        """Makes `path`, parents included, for exactly one run, also among several processes.

        With `again`, one that was killed before it had written anything is none. Raises UserError when a run is there
        already or the folder cannot be written; what this call had made by then is removed again.
        """
        run = cls(path)
        if again and run.checkpoints.is_dir() and not run.config.exists():
            run._remove_claim()
        with contextlib.ExitStack() as undo:
            try:
                for folder in run._missing_folders():
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder)
                        undo.callback(_remove_if_empty, folder)
                os.mkdir(run.checkpoints)
            except FileExistsError:
                raise UserError(f"{run.path} holds a run already, choose another folder.") from None
            except OSError as error:
                raise UserError(
                    f"Cannot make the run folder {run.path} ({error.strerror}), choose one that can be written."
                ) from error
            undo.pop_all()
        return run

    def _remove_claim(self) -> None:
        """Gives up the claim of a process that is gone, if it left no checkpoint."""
        with contextlib.suppress(OSError), locked(self.lock) as held:
            if held is not False:
                _remove_if_empty(self.checkpoints)

    def _missing_folders(self) -> list[Path]:
        """`path` and those of its parents that do not exist, outermost first."""
        lineage = [self.path, *self.path.parents]
        return [folder for folder in reversed(lineage) if not folder.exists()]

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints; its existence is the claim."""
        return self.path / "checkpoints"

    @property
    def identity(self) -> Path:
        """Hashes of the text and the tokenizer."""
        return self.path / "data.json"

    @property
    def phase_one(self) -> Path:
        """What is told of the encoders that Phase 2 has the contexts of: a list, as their stores' facts."""
        return self.path / "encoders.json"

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer, so that the run can be used where its text is not."""
        return self.path / "tokenizer"

    @property
    def lock(self) -> Path:
        """Held while a process is at the run."""
        return self.path / ".lock"

    def pretrain_checkpoint(self, phase: str) -> Path:
        """Phase 1, interrupted, of the encoder that `phase` trains; gone once it has ended."""
        return self.path / f"{phase}.ckpt"

    @property
    def pretrain_checkpoints(self) -> list[Path]:
        """Those of all encoders whose Phase 1 was interrupted."""
        return sorted(self.path.glob("pretrain*.ckpt"))

    @property
    def last_checkpoint(self) -> Path:
        """Phase 2, where it stands."""
        return self.checkpoints / "last.ckpt"

    @property
    def metrics(self) -> Path:
        """Every number of the run, for programs."""
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        """Every number of the run, for people."""
        return self.path / "report.md"

    @property
    def figures(self) -> Path:
        """The folder of the report's pictures."""
        return self.path / "figures"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.path / "train.log"

    def logs(self, phase: str) -> Path:
        """The folder whose `metrics.csv` has the logged history of `phase`."""
        return self.path / phase

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Replaces `metrics.json` as a whole or leaves it as it was.

        Raises ValueError for NaN and infinity, which JSON lacks, and UserError when the disk refuses.
        """
        write_whole(self.metrics, json.dumps(metrics, indent=2, allow_nan=False) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`; raises UserError when it is missing or broken."""
        try:
            metrics = json.loads(self.metrics.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path} has no {self.metrics.name}, choose the folder of a finished run.") from None
        except OSError as error:
            raise UserError(f"Cannot read {self.metrics} ({error.strerror}), choose another run folder.") from error
        except ValueError as error:
            raise UserError(f"{self.metrics} is not valid JSON ({error}), choose another run folder.") from error
        if not isinstance(metrics, dict):
            raise UserError(f"{self.metrics} is not a JSON object, choose another run folder.")
        return metrics

    def write_config(self, text: str) -> None:
        """Replaces `config.yaml` as a whole; raises UserError when the disk refuses."""
        write_whole(self.config, text)

    @property
    def lightning(self) -> Path:
        """Phase 2 for LightningCLI."""
        return self.path / "lightning.yaml"

    def write_lightning(self, settings: str) -> None:
        """Writes `lightning.yaml`, with the command that goes on from it; raises UserError when the disk refuses."""
        command = f"python -m ctxkv_lightning fit --config {self.lightning} --ckpt_path {self.last_checkpoint}"
        write_whole(self.lightning, f"# {command}\n{settings}")

    def write_identity(self, hashes: dict[str, str]) -> None:
        """Writes the hashes of text and tokenizer; raises UserError when the disk refuses."""
        write_whole(self.identity, json.dumps(hashes, indent=2) + "\n")

    def write_phase_one(self, facts: Sequence[dict[str, Any]]) -> None:
        """Replaces `encoders.json` as a whole; raises UserError when the disk refuses."""
        write_whole(self.phase_one, json.dumps(facts) + "\n")

    def write_report(self, text: str) -> None:
        """Replaces `report.md` as a whole; raises UserError when the disk refuses."""
        write_whole(self.report, text)


@contextlib.contextmanager
def alone_in(run: RunFolder) -> Iterator[None]:
    """Holds the run during the block; raises UserError where another process has it, or the disk refuses."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(locked(run.lock))
        except OSError as error:
            raise UserError(f"Cannot write {run.lock} ({error.strerror}), copy the run to where you may.") from None
        if held is False:
            raise UserError(f"another process is at the run {run.path}: let it end, or stop it first")
        yield


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file as a whole or leaves it as it was; raises UserError when the disk refuses."""
    # The process id keeps two programs that redraw one report from sharing a half-written file.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}), make room or choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _remove_if_empty(folder: Path) -> None:
    # Another process may have moved in meanwhile; then the folder is its own.
    with contextlib.suppress(OSError):
        os.rmdir(folder)
