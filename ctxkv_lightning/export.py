"""A finished run for others: weights, constructor arguments, tokenizer and a model card, in one folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.model import TiedLM
from ctxkv_lightning.lm.state import state_bytes
from ctxkv_lightning.report.markdown import percent, ppl, table
from ctxkv_lightning.run.folder import RunFolder
from ctxkv_lightning.run.saved import check_measured
from ctxkv_lightning.text.encoding import FOLDER, save_encoding
from ctxkv_lightning.use import BEST, TrainedModel, open_run

CARD = "README.md"
SOURCES = {
    "pydocs": "the English documentation inside a Python installation",
    "text": "the author's own files",
    "jsonl": "the author's own conversations",
    "mqar": "an associative recall task, of which only the answers are scored",
}
"""What a run's text was; that of the hub has a name."""


def export_run(run: Path, folder: Path) -> Path:
    """Writes the best checkpoint of a finished run into a new `folder`, aside and then renamed; the folder.

    Raises UserError for what is no finished run or was trained since it was measured, for a folder that is there
    already, and when the disk refuses.
    """
    trained = open_run(run)
    assert trained.metrics is not None
    check_measured(trained.metrics, RunFolder(run).checkpoints / BEST, run)
    if folder.exists():
        raise UserError(f"{folder} is there already: name a folder that is not")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        aside.mkdir(parents=True)
        (aside / CARD).write_text(model_card(trained, folder.name), encoding="utf-8")
        trained.model.save_pretrained(aside)
        save_encoding(trained.encoding, aside / FOLDER)
        for file in aside.iterdir():
            _finish(file)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): make room or name another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def model_card(trained: TrainedModel, name: str) -> str:
    """The Markdown of the card, from what the run measured; its head is the YAML that the hub reads."""
    assert trained.metrics is not None
    metrics, model = trained.metrics, trained.model
    data, config = metrics["data"], metrics["config"]
    source = SOURCES.get(config["data"]["source"], f"the data set {config['data'].get('dataset')}")
    head = "---\nlibrary_name: ctxkv-lightning\npipeline_tag: text-generation\ntags:\n- context-kv\n---"
    parts = [
        head,
        f"# {name}",
        f"A `{type(model).__name__}` of {metrics['parameters']['total']:,} parameters, of which "
        f"{metrics['parameters']['trainable']:,} were trained, on {data['train_tokens']:,} tokens of {source} "
        f"({data['train_documents']:,} documents, vocabulary {data['vocab_size']:,}). {_memory(model)}",
        f"## Measured\n\n{table(['', 'PPL', 'Accuracy'], _rows(metrics))}\n\nOver {data['val_tokens']:,} tokens of "
        f"validation and {data['test_tokens']:,} of test text, by the best of {len(metrics['train']['epochs'])} epochs "
        f"({metrics['train']['best_epoch']}). Counting models saw the same tokens.",
        f"## Use\n\n{_usage(type(model).__name__, name)}",
        f"## Arguments\n\n```json\n{json.dumps(model.arguments(), indent=2)}\n```",
        "## Limits\n\nA small model of one kind of text, for studying memory: what it writes is not true, and nothing "
        "was done to make it safe.",
    ]
    return "\n\n".join(parts) + "\n"


def _memory(model: TiedLM) -> str:
    few, many = (state_bytes(model, tokens) for tokens in (10_000, 100_000))
    if few == many:
        return f"To go on writing it keeps {few:,} bytes, however long the text."
    return f"To go on writing it keeps {few:,} bytes after 10,000 tokens, {many:,} after 100,000."


def _rows(metrics: dict[str, Any]) -> list[list[str]]:
    result, footing = metrics["result"], metrics["footing"]
    rows = [
        ["validation", ppl(result["val_ppl"]), percent(result["val_accuracy"])],
        ["test", ppl(result["test_ppl"]), percent(result.get("test_accuracy"))],
    ]
    names = {"unigram_ppl": "unigram", "kneser_ney_ppl": "Kneser-Ney", "kneser_ney_cache_ppl": "Kneser-Ney with cache"}
    return rows + [[f"{name}, validation", ppl(footing[key]), "–"] for key, name in names.items() if key in footing]


def _usage(kind: str, name: str) -> str:
    return f"""```python
from ctxkv_lightning.lm.{"model" if kind == "ContextKVLM" else "rivals"} import {kind}

model = {kind}.from_pretrained("{name}")
```

```
python -m ctxkv_lightning generate {name} --prompt "..."
```

Loading reads `config.json` and `model.safetensors`, and runs no code of this folder. `tokenizer/` has the ranks in
tiktoken's format, and the pattern."""


def _finish(path: Path) -> None:
    """Flushes a file to disk, as readable as any other of this user's: safetensors keeps its files to their owner."""
    if path.is_file():
        shutil.copymode(path.with_name(CARD), path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
