"""How often a run writes what it has just written, by temperature and presence penalty, beside the text itself.

Each row goes on from the first tokens of a held-out document; the text itself is what that document goes on with. Of
the tokens: how many are the one before again, how many are among the last four, how many are distinct within a row.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import parse, parser, save
from ctxkv_lightning.config import load_config
from ctxkv_lightning.evaluate import held_out
from ctxkv_lightning.lm.generate import Decoder
from ctxkv_lightning.lm.sampling import PENALISED, Sampler
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.use import TrainedModel, open_trained

TEMPERATURES = (0.6, 0.8, 1.0)
PENALTIES = (0.0, 1.0, 2.0, 3.0, 4.0)
ROWS, GIVEN, WRITTEN = 32, 16, 120
"""Documents at most, tokens of each that are given, and tokens that are written."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes with each run at every setting; prints the shares, in %."""
    made = parser(__doc__)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    options = parse(made, argv)
    options.command = []  # the folders are paths of this machine; what the runs are stands in the result
    rows, given, written = (3, 4, 12) if options.quick else (ROWS, GIVEN, WRITTEN)
    settings = list(itertools.product(TEMPERATURES, PENALTIES))[:: 7 if options.quick else 1]
    table, result = [["layers", "T", "penalty", "again, %", "in last 4, %", "distinct, %"]], []
    for folder in options.runs:
        run, trained = RunFolder(folder), open_trained(folder)
        config = load_config(run)
        long = [text[: given + written] for text in held_out(run, config, trained, "validation")]
        texts = torch.stack([text for text in long if len(text) == given + written][:rows])
        settled = [(t, p, shares(*go_on(trained, texts[:, :given], written, t, p))) for t, p in settings]
        itself = shares(texts[:, :given], texts[:, given:])
        made_of = {"model": config.model.name, "layers": config.model.layers, "samples": config.samples}
        asked = [{"temperature": t, "presence_penalty": p, **found} for t, p, found in settled]
        result.append({**made_of, "seed": config.seed, "rows": len(texts), "text": itself, "settings": asked})
        name = str(config.model.layers)
        told = [("the text", "", "", itself), *((name, f"{t:g}", f"{p:g}", found) for t, p, found in settled)]
        table += [[*words, *(f"{100 * share:.1f}" for share in found.values())] for *words, found in told]
    whole = {"given": given, "written": written, "last": PENALISED, "runs": result}
    save("repetition", whole, table, options)
    return whole


def go_on(
    trained: TrainedModel, prompts: Tensor, tokens: int, temperature: float, penalty: float
) -> tuple[Tensor, ...]:
    """Prompts (B, n), and so many tokens (B, ·) that follow them."""
    device = trained.model.embedding.weight.device
    sampler = Sampler(temperature, batch=len(prompts), presence_penalty=penalty)
    decoder, last, written = Decoder(trained.model, len(prompts), writing=True), prompts.to(device), []
    logits = decoder.read(last)
    for _ in range(tokens):
        written.append(sampler(logits, last))
        last = torch.cat([last[:, 1:], written[-1][:, None]], dim=1)
        logits = decoder.step(written[-1])
    return prompts, torch.stack(written, dim=1).cpu()


def shares(prompts: Tensor, written: Tensor) -> dict[str, float]:
    """What part of the tokens (B, n) after prompts is the one before, among the last four, distinct in its row."""
    windows = torch.cat([prompts[:, -PENALISED:], written], dim=1).unfold(1, PENALISED + 1, 1)
    own, before = windows[..., -1:], windows[..., :-1]
    return {
        "again": float((before[..., -1:] == own).double().mean()),
        "among_last": float((before == own).any(dim=-1).double().mean()),
        "distinct": sum(len(row.unique()) for row in written) / written.numel(),
    }


if __name__ == "__main__":
    main()
