"""The second door: `python -m ctxkv_lightning COMMAND`, for all that is done with runs when they are over.

A command is a function below, named in `COMMANDS`: its docstring is its help, it declares its arguments on the parser
and returns what runs it. Whatever is slow to import is imported there, so that `--help` is quick.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ctxkv_lightning.errors import EXIT_CODE, UserError
from ctxkv_lightning.run.ctrl_c import heard

Handler = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises a UserError that says what is wrong and where the help is."""
        raise UserError(f"{message}: '{self.prog} --help' shows how.")


def report(parser: argparse.ArgumentParser) -> Handler:
    """Compare runs on one page: report.html, report.md and figures/."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or runs at any depth below it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: FOLDER, or comparison/)")

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.report.comparison import write_comparison

        print(write_comparison(options.folders, options.output or _default_output(options.folders)))

    return run


def _default_output(folders: Sequence[Path]) -> Path:
    """The one folder that was named, unless it is a run, which has a report of its own."""
    if len(folders) > 1:
        return Path("comparison")
    return folders[0] / "comparison" if (folders[0] / "metrics.json").exists() else folders[0]


def fetch(parser: argparse.ArgumentParser) -> Handler:
    """Prepare a folder with all that the published experiment needs on a machine without network."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to put the files")

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.config import DataConfig
        from ctxkv_lightning.text.fetch import RECORDS, fetch

        for line in fetch(options.folder, DataConfig().dataset, DataConfig().split, records=RECORDS):
            print(line)

    return run


def fit(parser: argparse.ArgumentParser) -> Handler:
    """Go on with a run through LightningCLI: --config RUN/lightning.yaml --ckpt_path RUN/checkpoints/last.ckpt."""
    return _lightning(parser, "fit")


def validate(parser: argparse.ArgumentParser) -> Handler:
    """Validate a checkpoint through LightningCLI: --config RUN/lightning.yaml --ckpt_path CHECKPOINT."""
    return _lightning(parser, "validate")


def test(parser: argparse.ArgumentParser) -> Handler:
    """Test a checkpoint through LightningCLI: --config RUN/lightning.yaml --ckpt_path CHECKPOINT."""
    return _lightning(parser, "test")


def _lightning(parser: argparse.ArgumentParser, subcommand: str) -> Handler:
    parser.set_defaults(takes_all=True)

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.cli import run_lightning

        run_lightning(subcommand, options.rest)

    return run


def cache(parser: argparse.ArgumentParser) -> Handler:
    """List, verify or prune what runs have left in the cache for others."""
    parser.add_argument(
        "action", choices=("list", "verify", "prune"), help="prune removes what is damaged or left over"
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", default=Path("outputs/cache"), help="(default: %(default)s)"
    )
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="prune: also what was not used for so long")

    def run(options: argparse.Namespace) -> None:
        if options.older_than is not None and (options.action != "prune" or not options.older_than >= 0):
            raise UserError("--older-than goes with prune and takes a number of days, at least 0.")
        from ctxkv_lightning.run.cache import show

        if not show(options.action, options.cache_dir, options.older_than):
            raise SystemExit(1)

    return run


def doctor(parser: argparse.ArgumentParser) -> Handler:
    """Tell whether this machine is ready: versions, devices, caches, what works without a network."""
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", default=Path("outputs/cache"), help="(default: %(default)s)"
    )

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.config import DataConfig
        from ctxkv_lightning.run.doctor import examine

        findings = examine(options.cache_dir, DataConfig().dataset)
        print(*findings, sep="\n")
        if any(finding.mark == "broken" for finding in findings):
            raise SystemExit(1)

    return run


def generate(parser: argparse.ArgumentParser) -> Handler:
    """Go on with a prompt, in memory that does not grow: writes text as it comes, then, on stderr, how fast it came."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a finished run, or an exported folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to go on with")
    prompt.add_argument("--prompt-file", type=Path, metavar="F", help="a UTF-8 file of any length; - for stdin")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0: the likeliest (default: 0.6)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    parser.add_argument(
        "--presence-penalty", type=float, default=3.0, metavar="NATS", help="for the last 4 tokens (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn; the B texts differ (default: 42)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="texts to write side by side (default: 1)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.write import run_generate

        run_generate(options)

    return run


def export(parser: argparse.ArgumentParser) -> Handler:
    """Write a finished run's model, tokenizer and model card into a folder for others, and for the hub."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a finished run")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="where to; must not exist yet")

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.export import export_run

        print(export_run(options.folder, options.output))

    return run


def evaluate(parser: argparse.ArgumentParser) -> Handler:
    """Measure what runs remember: PPL by position and history, copying, passkeys, associative recall."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a finished run; several are compared")
    suites = ("position", "copy", "passkey", "mqar")
    parser.add_argument("--suite", nargs="+", choices=suites, help="what to ask (default: all that fits the run)")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--trials", type=int, metavar="N", help="texts at each lag (default: 50, passkey 20)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where figures go (default: the first RUN)")

    def run(options: argparse.Namespace) -> None:
        from ctxkv_lightning.evaluate import run_evaluate

        run_evaluate(options)

    return run


COMMANDS: tuple[Callable[[argparse.ArgumentParser], Handler], ...] = (
    fit,
    validate,
    test,
    report,
    fetch,
    cache,
    doctor,
    generate,
    export,
    evaluate,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `handler` of what it parses runs the one that was asked for."""
    parser = Parser(prog="python -m ctxkv_lightning", description="What is done with runs when they are over.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        about = command.__doc__ or ""
        name = command.__name__.replace("_", "-")
        own = commands.add_parser(name, help=about.splitlines()[0], description=about)
        own.set_defaults(handler=command(own))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code, 2 after a UserError, which is one line on stderr."""
    try:
        parser = build_parser()
        options, rest = parser.parse_known_args(arguments)
        if rest and not getattr(options, "takes_all", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.rest = rest
        options.handler(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes nowhere
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except (Exception, SystemExit):
        raise
    except BaseException as stop:  # Ctrl-C, or a signal after which training has saved
        return getattr(stop, "code", 130)
    return 0


if __name__ == "__main__":
    with heard():
        sys.exit(main())
