"""The second door: `python -m ctxkv_lightning COMMAND`, for all that is done with runs when they are over.

A command is a function below, named in `COMMANDS`: its docstring is its help, it declares its arguments on the parser
and returns what runs it. Whatever is slow to import is imported there, so that `--help` is quick.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ctxkv_lightning.errors import EXIT_CODE, UserError

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


COMMANDS: tuple[Callable[[argparse.ArgumentParser], Handler], ...] = (report,)


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
        options = build_parser().parse_args(arguments)
        options.handler(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
