"""The groups of the configuration: every key below `Config`, with its type, its range and what it means."""

from dataclasses import dataclass, field
from typing import Any

from ctxkv_lightning.lm.recipe import LARGEST
from ctxkv_lightning.text.mqar import Task


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
    """Where the text comes from; for `source: mqar`, the size of the recall task."""

    source: str = choice("pydocs", "text", "jsonl", "hub", "mqar")
    files: list[str] = field(default_factory=list)
    """Globs of .txt, .md and .jsonl files, for `source: text`; of .jsonl files, for `source: jsonl`."""
    dataset: str = "HuggingFaceH4/ultrachat_200k"
    """For `source: hub`: the data set, of records with `messages` or `text`."""
    split: str = "train_sft"
    """For `source: hub`: its split."""
    validation: list[int] = field(default_factory=lambda: [50_000, 50_020])
    """For `source: hub` and `jsonl`: the records that validate, as [first, end)."""
    test: list[int] = field(default_factory=lambda: [50_020, 50_040])
    """For `source: hub` and `jsonl`: the records that test, as [first, end)."""
    errors: str = choice("strict", "replace", "ignore")
    """What to do with bytes that are not UTF-8, as in `bytes.decode`."""
    heldout_bytes: int = number(100_000, at_least=2)
    """UTF-8 bytes of the validation set and of the test set (about 25,000 tokens each)."""
    mqar: Task = field(default_factory=Task)


@dataclass
class TokenizerConfig:
    """How text becomes ids; always a `tiktoken.Encoding`. `symbols`: a token for each symbol of `data=mqar`."""

    source: str = choice("bpe", "tiktoken", "symbols")
    vocab_size: int = number(8192, at_least=257)
    """For `source: bpe`: tokens to learn, the 256 bytes included."""
    name: str = "gpt2"
    """For `source: tiktoken`: the encoding's name."""


@dataclass
class EmbeddingConfig:
    """The frozen table E (V, D)."""

    source: str = choice("svd", "random", "gpt2")
    file: str | None = None
    """For `source: gpt2`: a safetensors file that holds `wte.weight`; null: the one on the hub."""
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
    lm_epochs: int = number(0, at_least=0)
    """Epochs in which the encoder learns to predict the next token after that, as a recurrent language model."""
    lm_weight_dropout: float = number(0.0, at_least=0, below=1)
    """Share of the encoder's weights on its last context that are left out of each batch meanwhile."""


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

    name: str = choice("context_kv", "cascade", "transformer", "sliding_window", "recurrence")
    window_tokens: int | None = number(None, at_least=1)
    """For `sliding_window`: tokens whose keys and values are kept in each layer; null: as many as fit into the bytes
    that `context_kv` would keep with the same interval, max_contexts, selection, context_dim and layers."""
    dropout: float = number(0.1, at_least=0, below=1)
    ffn_dim: int = number(3072, at_least=1)
    layers: int = number(1, at_least=1)
    """Layers of attention and feed-forward; those of `context_kv` all read the same contexts."""
    local_window: int | None = number(None, at_least=1)
    """For `context_kv`: its layers after the first attend instead to what the layer before them made of so many tokens,
    the current one among them; null: they read contexts."""


@dataclass
class RecipeConfig:
    """What a model has beyond the published one; the cascade takes none of it (lm/recipe.py)."""

    norm: str = choice("post", "pre")
    """Layers are normalised after the sum, as published, or before each layer."""
    train_embedding: bool = False
    """Input and output share a trained copy of the table; the encoder goes on reading the frozen one."""
    embedding_dropout: float = number(0.0, at_least=0, below=1)
    context_dropout: float = number(0.0, at_least=0, below=1)
    output_dropout: float = number(0.0, at_least=0, below=1)
    projection: bool = False
    """logits = E W h + b: W starts at zero, b at the unigram."""
    read_current: bool = False
    """The current context is also read directly, beside attention: by layers that read contexts, else by the first."""
    pointer_heads: int = number(0, at_least=0, below=LARGEST)
    """Heads of a pointer to the tokens that followed contexts like the current one; 0: none."""
    pointer_dim: int = number(64, at_least=1, at_most=LARGEST)
    pointer_window: int = number(620, at_least=1, at_most=LARGEST)
    """Contexts that the pointer looks back on: (max_contexts-1) × interval are kept anyway."""
    pointer_values: bool = False
    """What is pointed at is also read into the final state, as attention reads values."""
    ngram: bool = False
    """The Kneser-Ney trigram of the training text speaks too; in training, that of the text's other nine tenths."""
    apart: bool = False
    """The head learns by its own loss, not the mixture's, and how to mix pointer and trigram with it is learnt in the
    first epoch alone, on text that it has not seen."""


@dataclass
class TrainConfig:
    """How Phase 2 trains, whatever the model."""

    lr: float = number(0.001, above=0)
    schedule: str = choice("constant", "linear")
    """`linear`: the learning rate falls in a line over `max_epochs`, and only matrices decay."""
    warmup_steps: int = number(0, at_least=0)
    """For `schedule: linear`: steps over which the learning rate rises first."""
    weight_decay: float = number(0.01, at_least=0)
    batch_tokens: int = number(8880, at_least=1)
    """Positions in one optimizer step."""
    max_epochs: int = number(40, at_least=1)
    compile: str = choice("auto", "on", "off")
    """Whether torch.compile is used; `auto`: on a GPU, for runs long enough to earn back what it takes."""
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
