"""What comes over the network: the records of a data set, and GPT-2's weights.

Everything else reads files. Whatever cannot be had from here is a UserError that names the command which fetches
it elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctxkv_lightning.errors import UserError

GPT2 = "openai-community/gpt2"
WEIGHTS = "model.safetensors"


def records(dataset: str, split: str) -> Iterator[dict[str, Any]]:
    """The records of a data set, in its order; it is downloaded only as far as they are asked for."""
    import datasets  # half a second that data=pydocs need not wait for

    with _reaching(f"data.dataset={dataset}, data.split={split}"), quiet():
        yield from datasets.load_dataset(dataset, split=split, streaming=True)


def gpt2_weights() -> str:
    """The path of GPT-2's safetensors file, downloaded the first time (548 MB)."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(GPT2, WEIGHTS)
    if isinstance(cached, str):  # asking the hub whether it is the newest would need a network in every run
        return cached
    with _reaching(f"{WEIGHTS} of {GPT2}, for embedding=gpt2,"), quiet():
        return huggingface_hub.hf_hub_download(GPT2, WEIGHTS)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the bars of `datasets`, the hub's warnings about its retries, and what is reported to the hub.

    `datasets` counts every load there, those of local files too, and without a network waits for it.
    """
    import datasets
    import huggingface_hub.utils.logging as hub_logging

    bars, level = not datasets.are_progress_bars_disabled(), hub_logging.get_verbosity()
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        hub_logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the clients of the hub share no base class
        raise UserError(
            f"{what} cannot be had from here ({_reason(error)}): 'python -m ctxkv_lightning fetch FOLDER', where there "
            "is a network, prepares everything and says how to use it."
        ) from error


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *(line.rstrip(".:") for line in first)])
