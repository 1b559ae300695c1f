"""The weights in a pipeline's folder: which files count, and that nothing is missing from them.

diffusers and transformers make up what a file lacks, and say so in a log only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runners.contracts.errors import IncompleteModel

# As `model.safetensors`, `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`, and,
# older, `model-00001-of-00002.fp16.safetensors`.
_FILE = re.compile(r"[^.]+(\.(?P<variant>\w+)(-\d+-of-\d+)?)?\.safetensors")


class Weights:
    """Those of the models in `folder`, whose classes `kinds` tells by the names of components."""

    def __init__(self, folder: Path, kinds: Mapping[str, Any]) -> None:
        self.kinds = kinds
        self._folder = folder
        self._files = {name: _by_variant(folder / name) for name in kinds}
        lacking = [files for files in self._files.values() if files and None not in files]
        self.variant: str | None = min(filter(None, lacking[0])) if lacking else None
        """None if all models have files of plain names, else the variant that is loaded where a
        model has it."""

    def files(self, name: str) -> list[Path]:
        """The files of a component that are loaded; none if it has none."""
        return self._files.get(name, {}).get(self._variant_of(name), [])

    def load(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """All models, on the CPU; `dtypes` by name, or `default`. Raises: IncompleteModel."""
        return {
            name: self._checked(name, dtype=dtypes.get(name, dtypes["default"]))
            for name in self.kinds
        }

    def check(self) -> None:
        """See to it that nothing is missing, and keep no weight. Raises: IncompleteModel."""
        for name in self.kinds:
            self._checked(name, device_map={"": "meta"})

    def _variant_of(self, name: str) -> str | None:
        return self.variant if self.variant in self._files.get(name, {}) else None

    def _checked(self, name: str, **options: Any) -> Any:
        kind = self.kinds[name]
        model, report = kind.from_pretrained(
            self._folder / name,
            variant=self._variant_of(name),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        if missing := report["missing_keys"]:
            raise IncompleteModel.missing_weights(name, kind, missing)
        return model


def _by_variant(folder: Path) -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := _FILE.fullmatch(path.name):
            found.setdefault(match["variant"], []).append(path)
    return found
