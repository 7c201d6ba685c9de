"""The configuration schema: every key once, with its type, its range and what it means.

YAML under `conf/` states choices, never defaults that already stand here; what the data decides
(vocabulary size, token counts) is in neither. Only the front files import this module.
"""

import copy
import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.schema import (
    ContextsConfig,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PretrainConfig,
    RecipeConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
    choice,
    number,
)
from ctxkv_lightning.unread import CHOOSING, Chosen, Voices, unread_keys


@dataclass
class Config:
    """The whole experiment."""

    interval: Any = 20
    """I: tokens between the contexts that attention reads; a list gives each head its own."""
    selection: str = choice("strided", "grid")
    """Contexts at t, t-I, t-2I, …, or the current one and those at multiples of I."""
    heads: int = number(8, at_least=1)
    """H: attention heads."""
    max_contexts: int = number(32, at_least=1)
    """M: contexts read at each position."""
    context_dim: int = number(256, at_least=1)
    """C: numbers in a context."""
    samples: int | None = number(100, at_least=1)
    """Training documents; null for all."""
    seed: int = number(42, at_least=0, below=2**32)
    embeddings: str = choice("table", "tokens")
    """Store the normalised table once (V, D), or a row per token (N, D) as published."""
    cache_dir: str = "outputs/cache"
    resume: str | None = None
    """An interrupted run to go on with: its folder; `last`, the newest; or `auto`, one with these settings, if any."""
    init_from: str | None = None
    """A run whose trained weights are the start."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check(self) -> None:
        """Raises one UserError that names every value out of range and every contradiction."""
        found = [*problems(self), *self._contradictions()]
        if found:
            raise UserError("; ".join(found) + ".")

    @property
    def intervals(self) -> tuple[int, ...]:
        """The interval of each head (H,)."""
        return tuple(self.interval) if isinstance(self.interval, list) else (self.interval,) * self.heads

    @property
    def kept_contexts(self) -> int:
        """Contexts that a decoder of `context_kv` keeps: of the grid, those of each interval for itself."""
        intervals = set(self.intervals)
        return (self.max_contexts - 1) * (len(intervals) if self.selection == "grid" else max(intervals)) + 1

    @property
    def local_reach(self) -> int:
        """Tokens whose states the layers after the first of `context_kv` keep, all together."""
        return (self.model.layers - 1) * ((self.model.local_window or 1) - 1)

    @property
    def window_tokens(self) -> int:
        """k of `sliding_window`: as asked for, or the most with which it keeps no more than `context_kv` does.

        Of k tokens, a layer keeps the keys and values of the k-1 before the current one.
        """
        pair = 2 * self.embedding.dim
        contexts = self.kept_contexts - self.recipe.read_current  # one is kept besides, where it is read
        fitting = (contexts * self.context_dim + self.local_reach * pair) // (pair * self.model.layers)
        return self.model.window_tokens or 1 + fitting

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys, or groups of them, that have no effect here."""
        recipe = self.recipe
        voices = Voices(bool(recipe.pointer_heads), recipe.ngram, recipe.read_current)
        return unread_keys(self.model.name, voices, Chosen(*operator.attrgetter(*CHOOSING)(self)))

    def effective(self) -> "Config":
        """This configuration with whatever its model does not read at the default: equal ones are one experiment."""
        plain, kept = Config(), copy.deepcopy(self)
        kept.cache_dir, kept.embeddings, kept.resume = plain.cache_dir, plain.embeddings, None
        kept.trainer.enable_progress_bar = None
        if self.model.name == "sliding_window":
            kept.model.window_tokens = self.window_tokens
        for key in self.unread:
            holder, _, name = key.rpartition(".")
            target, default = (operator.attrgetter(holder)(c) if holder else c for c in (kept, plain))
            setattr(target, name, getattr(default, name))
        return kept

    @property
    def _attends_to_tokens(self) -> bool:
        local = self.model.layers > 1 and self.model.local_window is not None
        return self.model.name in ("transformer", "sliding_window") or (self.model.name == "context_kv" and local)

    def _contradictions(self) -> list[str]:
        found = [*self._interval_problems()]
        if not self.cache_dir.strip():
            found.append("cache_dir= names no folder: give it one, or leave it out")
        if self.heads >= 1 and self.embedding.dim % self.heads:
            found.append(f"heads={self.heads} does not divide embedding.dim={self.embedding.dim}")
        elif self._attends_to_tokens and self.heads >= 1 and self.embedding.dim // self.heads % 2:
            found.append(
                f"heads={self.heads} leaves an odd number of the {self.embedding.dim} dimensions to each, of which "
                "rotary positions turn pairs: choose another number of heads"
            )
        if self.data.source in ("text", "jsonl") and not self.data.files:
            found.append(f"data={self.data.source} needs files, for example 'data.files=[notes/*.jsonl]'")
        if self.data.source not in ("text", "jsonl") and self.data.files:
            reader = "jsonl" if self.data.source == "hub" else "text"
            found.append(f"data.files has no effect with data.source={self.data.source}, choose data={reader}")
        if self.recipe.pointer_values and not self.recipe.pointer_heads:
            found.append(
                "recipe.pointer_values has no effect without recipe.pointer_heads: give it heads, or leave it out"
            )
        if self.model.name == "cascade" and self.recipe != RecipeConfig():
            found.append("model=cascade takes no recipe: leave recipe.* out, or choose another model")
        if self.pretrain.lm_epochs and self.init_from is not None:
            found.append("pretrain.lm_epochs has no effect with init_from, which brings its encoder: set it to 0")
        if self.pretrain.lm_epochs and self.data.source == "mqar":
            found.append("pretrain.lm_epochs would teach all symbols of data=mqar, not its answers: set it to 0")
        return [*found, *self._range_problems(), *self._embedding_problems(), *self._mqar_problems()]

    def _range_problems(self) -> list[str]:
        spans = {"data.validation": self.data.validation, "data.test": self.data.test}
        found = [
            f"{name}={span} must be [first, end) with 0 <= first < end"
            for name, span in spans.items()
            if len(span) != 2 or not 0 <= span[0] < span[1]
        ]
        if not found and max(first for first, _ in spans.values()) < min(end for _, end in spans.values()):
            found.append(" and ".join(f"{name}={span}" for name, span in spans.items()) + " overlap")
        return found

    def _embedding_problems(self) -> list[str]:
        found = []
        if self.data.source == "hub" and self.tokenizer.source == "bpe":
            found.append(
                "data.source=hub needs tokenizer=gpt2, for tokenizer=bpe would be learnt from the whole data set"
            )
        if self.embedding.source != "gpt2" and self.embedding.file is not None:
            found.append(f"embedding.file has no effect with embedding={self.embedding.source}, choose embedding=gpt2")
        if self.embedding.source == "gpt2" and (self.tokenizer.source, self.tokenizer.name) != ("tiktoken", "gpt2"):
            found.append("embedding=gpt2 needs tokenizer=gpt2")
        if self.embedding.source == "gpt2" and self.embedding.dim != 768:
            found.append(f"embedding=gpt2 has embedding.dim=768, not {self.embedding.dim}")
        return found

    def _mqar_problems(self) -> list[str]:
        symbols, random = self.tokenizer.source == "symbols", self.embedding.source == "random"
        if self.data.source != "mqar":
            return ["tokenizer=symbols has the symbols of data=mqar only, choose tokenizer=bpe"] if symbols else []
        endless = ["data=mqar has no end: give samples"] if self.samples is None else []
        foreign = [] if symbols and random else ["data=mqar needs tokenizer=symbols embedding=random"]
        return [*(f"data.mqar.{phrase}" for phrase in self.data.mqar.contradictions()), *foreign, *endless]

    def _interval_problems(self) -> list[str]:
        listed = self.interval if isinstance(self.interval, list) else [self.interval]
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in listed):
            return [
                f"interval={self.interval} must be a whole number, at least 1, or a list of them, one for each head"
            ]
        if isinstance(self.interval, list) and len(listed) != self.heads:
            return [
                f"interval={self.interval} lists {len(listed)} intervals for heads={self.heads}: give one for each head"
            ]
        return []


def problems(config: Any, prefix: str = "") -> list[str]:
    """Every field below `config` whose value its declaration forbids, as phrases."""
    found = []
    for spec in dataclasses.fields(config):
        key, value = prefix + spec.name, getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            found += problems(value, key + ".")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{key}={value} must be a finite number")
        elif "choices" in spec.metadata and value not in spec.metadata["choices"]:
            found.append(f"{key}={value} must be one of {', '.join(spec.metadata['choices'])}")
        elif value is not None:
            found += [f"{key}={value} must be {phrase}" for phrase in _broken_limits(value, spec.metadata)]
    return found


def _broken_limits(value: Any, metadata: Any) -> list[str]:
    holds = {
        "at least": lambda limit: value >= limit,
        "above": lambda limit: value > limit,
        "at most": lambda limit: value <= limit,
        "below": lambda limit: value < limit,
    }
    limits = metadata.get("limits", {})
    return [f"{word} {limit:.12g}" for word, limit in limits.items() if not holds[word](limit)]


def keys(config: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    found = []
    for spec in dataclasses.fields(Config() if config is None else config):
        value = getattr(Config() if config is None else config, spec.name)
        found += keys(value, f"{prefix}{spec.name}.") if dataclasses.is_dataclass(value) else [prefix + spec.name]
    return found


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def plain_options() -> Iterator[tuple[str, dict[str, str]]]:
    """Every option of a configuration group that only chooses a name, as group and content."""
    for group, name in (("data", "source"), ("embedding", "source"), ("model", "name"), ("trainer", "accelerator")):
        spec = next(spec for spec in dataclasses.fields(getattr(Config(), group)) if spec.name == name)
        left_out = ("text", "jsonl", "hub", "mqar") if group == "data" else ()
        yield from ((group, {name: choice}) for choice in spec.metadata["choices"] if choice not in left_out)
    yield from (("tokenizer", {"source": source}) for source in ("bpe", "symbols"))


def check_key(key: str) -> None:
    """Raises UserError, naming the nearest keys, if the schema has no such key."""
    known = keys()
    if key in known:
        return
    namesakes = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    near = namesakes or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    leaves = difflib.get_close_matches(key.split(".")[-1], [other.split(".")[-1] for other in known], n=1)
    near = near or [other for other in known if other.split(".")[-1] in leaves]
    hint = f"did you mean {' or '.join(near)}?" if near else "see the keys with 'python train.py --cfg job'."
    raise UserError(f"there is no key '{key}': {hint}")


def expected(key: str) -> str:
    """What a value of this key has to be, in words."""
    if key == "interval":
        return "a whole number or a list of them, one for each head"
    words = {int: "a whole number", float: "a number", str: "a text", list: "a list such as [a,b]"}
    default = operator.attrgetter(key)(Config())
    return words.get(type(default), "true, false or null") + (" or null for all" if key == "samples" else "")


def check_choice(group: str, value: Any, choices: list[str]) -> None:
    """Raises UserError, naming the nearest choice, if a configuration group has no such choice."""
    if value in choices or (group == "experiment" and value is None):
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{group}={value} does not exist: {hint}The choices are {', '.join(choices)}.")


def from_composed(composed: DictConfig) -> Config:
    """A checked `Config` from a composed one; UserError lists everything that is wrong with its values."""
    for line in OmegaConf.to_yaml(composed).splitlines():
        if "${" in line:  # it could read the environment, which the run folder would then keep
            raise UserError(f"'{line.strip()}' has an interpolation, which is not resolved: write the value itself.")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    config.check()
    return config


def load_config(run: RunFolder) -> Config:
    """The configuration that a run was started with; a UserError where it is missing, damaged or none of ours."""
    try:
        saved = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        composed = OmegaConf.merge(OmegaConf.structured(Config), saved)
    except FileNotFoundError:
        raise UserError(f"{run.path} is no run folder: it has no {run.config.name}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{run.config} cannot be read ({str(error).splitlines()[0]})") from None
    assert isinstance(composed, DictConfig)
    return from_composed(composed)
