"""Models that are saved to, and loaded from, a folder or a repository of the hub, by huggingface_hub's own mixin.

A folder has `model.safetensors` and `config.json`, the arguments of the constructor. Nothing else is read and nothing
is run. The mixin alone would leave missing weights as they fell, and unpickle where there is no safetensors file.
"""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from torch import nn

from ctxkv_lightning.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CLASS = "architecture"
"""The key of `config.json` that names the class."""

Model = TypeVar("Model", bound="PretrainedModule")


class PretrainedModule(nn.Module, PyTorchModelHubMixin, library_name="ctxkv-lightning", license="mit"):
    """A module with `save_pretrained`, `push_to_hub` and `from_pretrained`, whose constructor takes plain values.

    `from_pretrained` takes a folder or the name of a repository; it raises UserError for what is not the whole export
    of this very class.
    """

    def arguments(self) -> dict[str, Any]:
        """What the constructor was called with, defaults included."""
        assert isinstance(self._hub_mixin_config, dict)
        return self._hub_mixin_config

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        config = {CLASS: type(self).__name__, **self.arguments()}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls: type[Model],
        *,
        model_id: str,
        config: Any = None,
        map_location: str = "cpu",
        strict: bool = True,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **arguments: Any,
    ) -> Model:
        """Called by the mixin with the content of `config.json`, and with what the constructor takes of it."""
        named = config.get(CLASS) if isinstance(config, dict) else None
        if named != cls.__name__:
            raise UserError(f"{model_id} is no exported {cls.__name__}: its {CONFIG} is missing or names {named}")
        weights = os.path.join(model_id, WEIGHTS)
        if not os.path.isdir(model_id):
            weights = hf_hub_download(
                model_id,
                WEIGHTS,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        try:
            return cls._load_as_safetensor(cls(**arguments), weights, map_location, strict)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{model_id} cannot be loaded as {cls.__name__} ({reason}): export it again") from error
