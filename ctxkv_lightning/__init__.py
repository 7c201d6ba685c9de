"""Context-KV Lightning: how good can a language model be whose memory does not grow with the text?

The data flows one way, and so do the imports:

    text/          documents -> tokens -> the frozen embedding table E
    context/       a recurrent encoder, trained to disperse its contexts (Phase 1), solved exactly
    datamodule.py  stored contexts and embeddings -> batches, for both phases
    lm/            strided attention + feed-forward + tied head, trained on the contexts (Phase 2)
    run/           the run folder, what is told while it goes on
    report/        metrics.json -> report.md and figures; pipeline.py strings all of it together

Letters used everywhere: N tokens in a stream, T positions in a window, S contexts of history before it,
V vocabulary, D embedding dimension, C context dimension, H heads, d = D / H, I interval, M max contexts, B rows
of a batch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxkv_lightning.context.pretrain import OACDPretrainModule
    from ctxkv_lightning.datamodule import ContextDataModule
    from ctxkv_lightning.lm.model import ContextKVLM
    from ctxkv_lightning.lm.module import ContextKVLMModule

__all__ = ["ContextDataModule", "ContextKVLM", "ContextKVLMModule", "OACDPretrainModule"]

_HOMES = {
    "ContextDataModule": "datamodule",
    "ContextKVLM": "lm.model",
    "ContextKVLMModule": "lm.module",
    "OACDPretrainModule": "context.pretrain",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that a mistyped option is refused before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
