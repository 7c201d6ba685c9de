"""Writing with a trained model: a prompt goes in, text comes out as it is written."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.sampling import PENALISED, Sampler
from ctxkv_lightning.text.encoding import token_bytes
from ctxkv_lightning.text.stream import TextStream
from ctxkv_lightning.use import TrainedModel, open_trained

EMPTY = "the prompt is empty: give the text to go on with"


@dataclass
class Speed:
    """What writing took: filled in while it goes on."""

    prompt_tokens: int = 0
    tokens: int = 0
    """Steps taken, each of which gives every row a token."""
    first_seconds: float = 0.0
    """From the start to the first token."""
    seconds: float = 0.0
    """From the first token to the last."""
    state_bytes: int = 0
    grows: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Steps a second after the first token, which waits for the prompt; 0 where there was no other."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0

    def __str__(self) -> str:
        growth = "grows with the text" if self.grows else "does not grow"
        return (
            f"{self.tokens:,} tokens after a prompt of {self.prompt_tokens:,}: {self.tokens_per_second:,.1f} tokens/s, "
            f"the first after {self.first_seconds:.2f} s; state {self.state_bytes:,} bytes, which {growth}"
        )


@dataclass
class Writer:
    """Goes on with a prompt, in `batch` rows that draw differently, at most `max_tokens` long."""

    trained: TrainedModel
    sampler: Sampler
    max_tokens: int = 200
    stops: Sequence[str] = ()
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1")

    def write(self, prompt: str) -> Iterator[list[str]]:
        """After each token, the new characters of every row (a list of B strings); together they are the texts.

        A row ends before the stop string that is complete first; writing ends when all rows have ended. Raises
        UserError for a prompt without tokens, before anything is written.
        """
        ids = self.trained.encode(prompt)
        if not len(ids):
            raise UserError(EMPTY)
        return self._write(ids)

    def text(self, prompt: str) -> list[str]:
        """The whole texts (B,)."""
        return ["".join(pieces) for pieces in zip(*self.write(prompt), strict=True)]

    def _write(self, ids: Tensor) -> Iterator[list[str]]:
        batch, speed, pieces = len(self.sampler.generators), self.speed, token_bytes(self.trained.encoding)
        streams = [TextStream(pieces, self.stops) for _ in range(batch)]
        started = first = time.perf_counter()
        decoder = Decoder(self.trained.model, batch, writing=True)
        last = ids.expand(batch, -1)
        logits = decoder.read(last)
        speed.prompt_tokens, speed.grows = len(ids), decoder.grows
        for number in range(1, self.max_tokens + 1):
            tokens = self.sampler(logits, last)
            last = torch.cat([last[:, -PENALISED:], tokens[:, None]], dim=1)
            new = [stream.push(token) for stream, token in zip(streams, tokens.tolist(), strict=True)]
            now = time.perf_counter()
            if number == 1:
                first, speed.first_seconds = now, now - started
            speed.tokens, speed.seconds, speed.state_bytes = number, now - first, decoder.bytes()
            yield new
            if number == self.max_tokens or all(stream.stopped for stream in streams):
                break
            logits = decoder.step(tokens)
        yield [stream.finish() for stream in streams]


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt as it was given: `text` itself, or the content of a UTF-8 file, `-` being standard input.

    Raises UserError where the file cannot be read or is not UTF-8, and for an empty prompt.
    """
    try:
        if file is not None:
            text = (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt in {file} is not UTF-8 at byte {error.start}: convert it first") from None
    except OSError as error:
        raise UserError(f"the prompt {file} cannot be read ({error.strerror}): name another file") from None
    if not text:
        raise UserError(EMPTY)
    return text


def run_generate(options: Namespace) -> None:
    """`python -m ctxkv_lightning generate`; a reader that closes the pipe ends it quietly."""
    if options.batch < 1:
        raise UserError(f"batch={options.batch} must be at least 1")
    chosen = options.temperature, options.top_k, options.top_p, options.seed, options.batch, options.presence_penalty
    sampler = Sampler(*chosen)
    prompt = read_prompt(options.prompt, options.prompt_file)
    writer = Writer(open_trained(options.folder), sampler, options.max_tokens, options.stop)
    try:
        show(writer, prompt, sys.stdout)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes nowhere
    print(writer.speed, file=sys.stderr)


def show(writer: Writer, prompt: str, out: TextIO) -> None:
    """Writes the first row to `out` as it comes, then the others, each below a line with its number."""
    others: list[str] = [""] * (len(writer.sampler.generators) - 1)
    for first, *rest in writer.write(prompt):
        out.write(first)
        out.flush()
        others = [text + new for text, new in zip(others, rest, strict=True)]
    for number, text in enumerate(others, start=2):
        out.write(f"\n--- {number} ---\n{text}")
    out.write("\n")
    out.flush()
