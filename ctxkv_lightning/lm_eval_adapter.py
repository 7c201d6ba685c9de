"""A trained model for EleutherAI's lm-evaluation-harness (extra `eval`), as its model `ctxkv`.

    python -m ctxkv_lightning.lm_eval_adapter run --model ctxkv --model_args run=RUN --tasks TASK

Texts of any length are scored whole, in one parallel pass over all that the model remembers: nothing is truncated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.sampling import Sampler
from ctxkv_lightning.lm.scoring import score_tokens
from ctxkv_lightning.text.corpus import SEPARATOR
from ctxkv_lightning.use import open_trained
from ctxkv_lightning.write import Writer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UserError("lm-evaluation-harness is not installed: pip install 'ctxkv-lightning[eval]' brings it") from error

MAX_TOKENS = 256
"""Tokens written where a task does not say how many."""


@register_model("ctxkv")
class ContextKVEvaluation(LM):
    """The model in the folder `run`, of a finished run or of an export; one text at a time, whatever `batch_size` is.

    There is no token that begins a text, so an empty context stands for what stands between documents in training.
    """

    def __init__(
        self,
        run: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.trained, self.seed = open_trained(Path(run)), seed
        if device is not None:
            self.trained.model.to(device)
        self._device = self.trained.model.embedding.weight.device

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's caches of requests apart."""
        return self.trained.encoding.name

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether it is what greedy decoding gives.

        As everywhere in the harness, spaces at the end of a context belong to the continuation. A token that holds
        the end of the context and the beginning of the continuation counts as continuation.
        """
        return [self._answer("loglikelihood", request.args, self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text."""
        return [
            self._answer("loglikelihood_rolling", request.args, self._pair("", *request.args)[0])
            for request in requests
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to one of `until`; greedy unless `do_sample` or a temperature says otherwise.

        As all that is written: a pointer is not shown the model's own words, which the likelihoods know nothing of.
        """
        return [self._answer("generate_until", request.args, self._text(*request.args)) for request in requests]

    def _answer(self, kind: str, arguments: Sequence[Any], answer: Any) -> Any:
        self.cache_hook.add_partial(kind, arguments, answer)
        return answer

    def _pair(self, context: str, continuation: str) -> tuple[float, bool]:
        tokens, given = self._encode(context, continuation)
        if given == len(tokens):
            return 0.0, True
        losses, hits = score_tokens(self.trained.model, tokens, given)
        return -float(losses.double().sum()), bool(hits.all())

    def _encode(self, context: str, continuation: str) -> tuple[Tensor, int]:
        """The tokens (N,) of both, and how many of them are context, at least one."""
        bare = context.rstrip()
        whole, alone = (self.trained.encode(text) for text in (context + continuation, bare))
        shared = min(len(whole), len(alone))
        given = int((whole[:shared] == alone[:shared]).long().cumprod(0).sum())
        if given:
            return whole, given
        before = self.trained.encode(SEPARATOR)
        return torch.cat([before, whole]), len(before)

    def _text(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        temperature = float(options.get("temperature") or 0.0)
        if not options.get("do_sample", temperature > 0):
            temperature = 0.0
        sampler = Sampler(temperature, options.get("top_k") or None, float(options.get("top_p") or 1.0), self.seed)
        tokens = int(options.get("max_gen_toks") or MAX_TOKENS)
        stops = [until] if isinstance(until, str) else list(until)
        return Writer(self.trained, sampler, tokens, stops).text(context or SEPARATOR)[0]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
