"""The weights in a pipeline's folder: which files are loaded, and that they are complete.

diffusers and transformers initialise missing weights at random and only log it. Used by `pipeline`,
in rank processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runners.contracts.errors import IncompleteModel

# Matches `model.safetensors`, `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors` and
# the older `model-00001-of-00002.fp16.safetensors`.
_FILE_NAME = re.compile(r"[^.]+(\.(?P<variant>\w+)(-\d+-of-\d+)?)?\.safetensors")


class Weights:
    """The weights of the models in `folder`; `classes`: model classes by component name."""

    def __init__(self, folder: Path, classes: Mapping[str, Any]) -> None:
        self.classes = classes
        self._folder = folder
        self._files = {name: _files_by_variant(folder / name) for name in classes}
        variants_only = [files for files in self._files.values() if files and None not in files]
        self.variant: str | None = min(filter(None, variants_only[0])) if variants_only else None
        """The variant that is loaded where a model has it; None if every model has files without
        one."""

    def files(self, name: str) -> list[Path]:
        """The files of a component that are loaded; empty if it has none."""
        return self._files.get(name, {}).get(self._variant_of(name), [])

    def load(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """All models by component name, on the CPU.

        `dtypes`: by component name, `default` for the others. Raises: IncompleteModel.
        """
        return {
            name: self._load_complete(name, dtype=dtypes.get(name, dtypes["default"]))
            for name in self.classes
        }

    def check(self) -> None:
        """Check that no weights are missing, without keeping any. Raises: IncompleteModel."""
        for name in self.classes:
            self._load_complete(name, device_map={"": "meta"})

    def _variant_of(self, name: str) -> str | None:
        return self.variant if self.variant in self._files.get(name, {}) else None

    def _load_complete(self, name: str, **options: Any) -> Any:
        cls = self.classes[name]
        model, report = cls.from_pretrained(
            self._folder / name,
            variant=self._variant_of(name),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        if missing := report["missing_keys"]:
            raise IncompleteModel.missing_weights(name, cls, missing)
        return model


def _files_by_variant(folder: Path) -> dict[str | None, list[Path]]:
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := _FILE_NAME.fullmatch(path.name):
            files.setdefault(match["variant"], []).append(path)
    return files
