"""Small finished runs, trained by the pipeline, for the tests of what is done with them."""

from dataclasses import replace
from pathlib import Path

from ctxkv_lightning import pipeline
from ctxkv_lightning.build import build_encoding, read_corpus
from ctxkv_lightning.config import DataConfig
from ctxkv_lightning.text.encoding import FOLDER, save_encoding
from tests.test_pipeline import SMALL

TEXT = "\n".join(
    f"Zeile {i}: die Größe von {i * i} beträgt {i} €, naïve 🙂 and then some English words." for i in range(90)
)


def small_run(root: Path, model: str = "context_kv", **options: object) -> Path:
    """The folder of a run of this model, trained within seconds on a short text that is more than ASCII."""
    (root / "a.txt").write_text(TEXT, encoding="utf-8")
    config = replace(
        SMALL,
        samples=None,
        cache_dir=str(root / "cache"),
        data=DataConfig(source="text", files=[str(root / "a.txt")]),
        trainer=replace(SMALL.trainer, precision="32-true"),
        model=replace(SMALL.model, name=model),
        **options,
    )
    folder = root / model
    pipeline.run_experiment(config, folder)
    save_encoding(build_encoding(config, read_corpus(config)), folder / FOLDER)
    return folder
