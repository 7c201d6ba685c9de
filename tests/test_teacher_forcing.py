"""What training and validation score in parallel is what a decoder would score, token by token."""

import numpy as np
import pytest
import torch

from ctxkv_lightning.context.encoder import ContextEncoder
from ctxkv_lightning.context.pretrain import save_encoder
from ctxkv_lightning.datamodule import ContextDataModule
from ctxkv_lightning.lm.head import score
from ctxkv_lightning.lm.model import ContextKVLM
from ctxkv_lightning.store import create_array, get_or_build
from tests.oracles import step_by_step_nll


def make(root, V, D, C, sizes):
    """Folders of token, embedding and encoder stores over random streams."""
    torch.manual_seed(3)

    def tokens(folder):
        for split, size in sizes.items():
            create_array(folder, split, (size,), np.int32)[:] = torch.randint(0, V, (size,)).numpy()

    def table(folder):
        create_array(folder, "table", (V, D), np.float32)[:] = 0.05 * torch.randn(V, D).numpy()

    builders = {
        "tokens": tokens,
        "embedding": table,
        "encoder": lambda folder: save_encoder(ContextEncoder(C, D), folder),
    }
    folders = {kind: str(get_or_build(root, kind, {}, build).path) for kind, build in builders.items()}
    return {"encoders": [folders.pop("encoder")], **folders}


@pytest.mark.parametrize(("interval", "max_contexts", "length"), [(20, 32, 1300), (1, 1, 30), (50, 64, 40), (7, 3, 2)])
def test_teacher_forced_validation_equals_step_by_step(tmp_path, interval, max_contexts, length):
    V, D, C = 150, 768, 256
    folders = make(tmp_path, V, D, C, {"train": 10, "validation": length, "test": 5})
    data = ContextDataModule(**folders, cache_dir=str(tmp_path), history=(max_contexts - 1) * interval)
    data.prepare_data()
    data.setup("validate")
    model = ContextKVLM(V, D, C, interval=interval, max_contexts=max_contexts).eval().requires_grad_(False)
    model.embedding.weight.copy_(data.table)
    model.encoder.load_state_dict(data.encoders()[0].state_dict())
    losses = []
    for windows in data.val_dataloader():
        hidden = model(windows.embeddings, windows.memory, windows.first).flatten(0, 1)
        hidden = hidden if windows.counted is None else hidden[windows.counted]
        losses.append(score(hidden, model.embedding.weight, windows.targets)[0])
    expected = step_by_step_nll(model, data.streams["validation"].tokens)
    torch.testing.assert_close(torch.cat(losses), expected, atol=1e-4, rtol=0)
