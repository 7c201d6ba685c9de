"""The configuration schema: every key once, with its type, its range and what it means.

YAML under `conf/` states choices, never defaults that already stand here; what the data decides
(vocabulary size, token counts) is in neither. Only the front files import this module.
"""

import dataclasses
import difflib
import math
import operator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ctxkv_lightning.errors import UserError


def number(
    default: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A numeric field; its range is checked by `problems`."""
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return field(default=default, metadata={"limits": {k: v for k, v in limits.items() if v is not None}})


def choice(*allowed: str) -> Any:
    """A field that takes one of `allowed`; the first is the default."""
    return field(default=allowed[0], metadata={"choices": allowed})


@dataclass
class DataConfig:
    """Where the text comes from."""

    source: str = choice("pydocs", "text")
    files: list[str] = field(default_factory=list)
    """Globs of .txt, .md and .jsonl files, for `source: text`."""
    errors: str = choice("strict", "replace", "ignore")
    """What to do with bytes that are not UTF-8, as in `bytes.decode`."""
    heldout_bytes: int = number(100_000, at_least=2)
    """UTF-8 bytes of the validation set and of the test set (about 25,000 tokens each)."""


@dataclass
class TokenizerConfig:
    """How text becomes ids; always a `tiktoken.Encoding`."""

    source: str = choice("bpe", "tiktoken")
    vocab_size: int = number(8192, at_least=257)
    """For `source: bpe`: tokens to learn, the 256 bytes included."""
    name: str = "gpt2"
    """For `source: tiktoken`: the encoding's name."""


@dataclass
class EmbeddingConfig:
    """The frozen table E (V, D)."""

    source: str = choice("svd", "random")
    dim: int = number(768, at_least=1)
    window: int = number(4, at_least=1)
    """For `source: svd`: tokens on each side that count as co-occurring."""


@dataclass
class PretrainConfig:
    """Phase 1, OACD: the encoder learns to disperse its contexts."""

    max_iterations: int = number(60, at_least=1)
    lr: float = number(0.002, above=0)
    clip_norm: float = number(2.0, above=0)
    batch_tokens: int = number(5000, at_least=2)
    noise: float = number(0.1, at_least=0)
    """Standard deviation of the noise added to the previous contexts."""
    centroid_weight: float = number(0.1, at_least=0)
    move_threshold: float = number(0.03, above=0)
    """A position has converged when its context moved by less (mean squared over dimensions)."""
    target_rate: float = number(0.9, above=0, at_most=1)
    """Convergence rate at which Phase 1 stops."""
    plateau_rate: float = number(0.5, at_least=0, at_most=1)
    """Above this rate, two iterations in a row that gain less than a point stop it too."""


@dataclass
class ContextsConfig:
    """The exact contexts of the whole text, computed once."""

    tolerance: float = number(1e-5, above=0)
    """Largest difference allowed at the seam of two segments."""
    dtype: str = choice("float32", "bfloat16")
    """What they are stored in: bfloat16 halves the store and costs little PPL (benchmarks/precision.py)."""


@dataclass
class ModelConfig:
    """What Phase 2 trains."""

    name: str = choice("context_kv")
    dropout: float = number(0.1, at_least=0, below=1)
    ffn_dim: int = number(3072, at_least=1)


@dataclass
class TrainConfig:
    """How Phase 2 trains, whatever the model."""

    lr: float = number(0.001, above=0)
    weight_decay: float = number(0.01, at_least=0)
    batch_tokens: int = number(8880, at_least=1)
    """Positions in one optimizer step."""
    max_epochs: int = number(40, at_least=1)
    compile: str = choice("auto", "on", "off")
    """Whether torch.compile is used; `auto`: on a GPU, for runs long enough to earn back the minute it takes."""
    patience: int = number(3, at_least=1)
    """Epochs without a better validation PPL before training stops."""


@dataclass
class TrainerConfig:
    """What is handed to Lightning's Trainer as it stands."""

    accelerator: str = choice("auto", "cpu", "gpu", "cuda", "mps")
    devices: int = number(1, at_least=1)
    num_nodes: int = number(1, at_least=1)
    strategy: str = "auto"
    precision: str = choice("auto", "32-true", "bf16-mixed", "16-mixed")
    """`auto`: bf16-mixed where the processor has it, else 32-true."""
    enable_progress_bar: bool | None = None
    """null: a progress bar in a terminal, plain lines elsewhere."""


@dataclass
class Config:
    """The whole experiment."""

    interval: int = number(20, at_least=1)
    """I: tokens between the contexts that attention reads."""
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
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    contexts: ContextsConfig = field(default_factory=ContextsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check(self) -> None:
        """Raises one UserError that names every value out of range and every contradiction."""
        found = [*problems(self), *self._contradictions()]
        if found:
            raise UserError("; ".join(found) + ".")

    def _contradictions(self) -> list[str]:
        found = []
        if self.heads >= 1 and self.embedding.dim % self.heads:
            found.append(f"heads={self.heads} does not divide embedding.dim={self.embedding.dim}")
        if self.data.source == "text" and not self.data.files:
            found.append("data=text needs files, for example 'data.files=[notes/*.txt]'")
        if self.data.source != "text" and self.data.files:
            found.append(f"data.files has no effect with data.source={self.data.source}, choose data=text")
        return found


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
    return [f"{word} {limit:g}" for word, limit in limits.items() if not holds[word](limit)]


def keys(config: Any = None, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    found = []
    for spec in dataclasses.fields(Config() if config is None else config):
        value = getattr(Config() if config is None else config, spec.name)
        found += keys(value, f"{prefix}{spec.name}.") if dataclasses.is_dataclass(value) else [prefix + spec.name]
    return found


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
