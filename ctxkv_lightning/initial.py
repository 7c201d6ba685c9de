"""What a run does not train itself: with `init_from=RUN` weights and encoders of a finished one; resumed, its own.

A resumed run has its encoders in its checkpoint: where the cache is gone, on another machine, they would come out
otherwise if they were trained anew.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctxkv_lightning.build import Text, build_embedding, build_module, encoder_parts
from ctxkv_lightning.config import Config
from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.pretrain import save_encoder
from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.module import ContextKVLMModule
from ctxkv_lightning.lm.recipe import Recipe
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import newest_intact, read, sha256_of
from ctxkv_lightning.store import Store, get_or_build

BEST = "best.ckpt"


def check_source(config: Config) -> None:
    """Raises UserError where the run `init_from` has no weights to start from, or, for an encoder, has not finished."""
    assert config.init_from is not None
    try:
        trained(config.init_from)
        if encoder_parts(config):
            RunFolder(Path(config.init_from)).read_metrics()
    except UserError as error:
        reason = f"init_from={config.init_from} is no start ({str(error).rstrip('.')})"
        raise UserError(f"{reason}: name the folder of a finished run") from None


def check_fit(config: Config, text: Text) -> None:
    """Raises UserError where the weights of the run `init_from` fit neither the model nor the table asked for."""
    assert config.init_from is not None
    for number, _ in encoder_parts(config):
        _encoder_weights(trained(config.init_from), config.init_from, number)
    table = torch.from_numpy(build_embedding(config, text).array("table"))
    load_weights(build_module(config, text.vocab_size), config.init_from, table)


def borrowed_encoder(source: str, cache_dir: str, number: int) -> Store:
    """The store of encoder `number` of the run `source`, with its facts; raises UserError where the run has none."""
    run = RunFolder(Path(source))
    pretrain, own = run.read_metrics()["pretrain"], _encoder_weights(trained(source), source, number)
    facts = pretrain["encoders"][number] if "encoders" in pretrain else pretrain
    key = {"init_from": sha256_of(run.checkpoints / BEST), "number": number}  # a path may be another run tomorrow
    return _stored(own, cache_dir, key, facts)


def kept_encoders(run: RunFolder, cache_dir: str, numbers: Sequence[int]) -> list[Store]:
    """The stores of the encoders that a resumed run has in its checkpoint, with the facts that it noted of them.

    None where it has no checkpoint of Phase 2 yet, or was begun by a version that noted nothing.
    """
    checkpoint = newest_intact(run.checkpoints)[0]
    if checkpoint is None or not run.phase_one.is_file():
        return []
    try:
        facts = json.loads(run.phase_one.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run.phase_one} cannot be read ({error}): restore it, or remove it") from None
    content, found = read(checkpoint), []
    for number in numbers:
        own = _encoder_weights(content, str(run.path), number)
        key = {"weights": _digest(own), "facts": facts[number]}
        try:
            store = _stored(own, cache_dir, key, facts[number])
        except UserError:  # of a cache that may only be read
            store = _stored(own, str(run.path / "cache"), key, facts[number])
        found.append(store)
    return found


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _stored(weights: dict[str, Tensor], cache_dir: str, key: dict[str, Any], facts: dict[str, Any]) -> Store:
    """The store of an encoder with these weights."""
    context_dim, both = weights["linear.weight"].shape

    def build(folder: Path) -> dict[str, Any]:
        encoder = ContextEncoder(context_dim, both - context_dim)
        encoder.load_state_dict(weights)
        save_encoder(encoder, folder)
        return facts

    return get_or_build(cache_dir, "encoder", key, build)


def _encoder_weights(checkpoint: dict[str, Any], source: str, number: int) -> dict[str, Tensor]:
    """Those of encoder `number` in a checkpoint of the run `source`; raises UserError where it has none."""
    prefixes, weights = ("model.encoder.", f"model.blocks.{number}."), checkpoint["state_dict"]
    own = {name.removeprefix(p): tensor for p in prefixes for name, tensor in weights.items() if name.startswith(p)}
    if not own:
        raise UserError(f"init_from={source}: that run has no encoder for this model, choose one of the same model")
    return own


def load_weights(module: ContextKVLMModule, source: str, table: Tensor) -> None:
    """Copies all weights of the run `source`; raises UserError where the model or its frozen `table` is another."""
    checkpoint = trained(source)
    weights = checkpoint["state_dict"]
    try:
        module.load_state_dict(weights, strict=False)
        module.starts_fresh = False
        other = set(module.model.state_dict(prefix="model.")) ^ {k for k in weights if k.startswith("model.")}
        if other:
            raise RuntimeError(f"only one of the two has {sorted(other)[0]}")
        norm = Recipe(**(checkpoint["hyper_parameters"].get("recipe") or {})).norm
        if norm != module.model.recipe.norm:
            raise RuntimeError(f"its norm is {norm}, not {module.model.recipe.norm}")
        heads = checkpoint["hyper_parameters"]["heads"]
        if hasattr(module.model, "attention") and heads != module.hparams["heads"]:
            raise RuntimeError(f"its heads are {heads}, not {module.hparams['heads']}")
        local = checkpoint["hyper_parameters"].get("local_window") is not None
        if module.model.deeper and local != (module.hparams["local_window"] is not None):
            raise RuntimeError("the layers after the first read contexts in one, tokens in the other")
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"init_from={source} does not fit this model ({reason}): choose the same model and sizes"
        ) from None
    if not torch.equal(module.model.embedding.weight, table):
        raise UserError(
            f"init_from={source} was trained on another embedding table, for which its weights mean nothing here: keep "
            "its tokenizer, embedding and the text they were learnt from, or use embedding=gpt2 in both"
        )


def trained(source: str) -> dict[str, Any]:
    """The best checkpoint of a run; raises UserError where there is none or it is damaged."""
    return read(RunFolder(Path(source)).checkpoints / "best.ckpt")
