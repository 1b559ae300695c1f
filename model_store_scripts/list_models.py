"""`python -m model_store_scripts.list_models`: the models that Triptych has imported."""

from __future__ import annotations

from model_store_scripts.command import print_line
from model_store_scripts.store import stored_models


def main() -> None:
    """Print one line per model, oldest first."""
    for model in stored_models():
        metadata = model.metadata
        print_line(
            f"{model.tag}  {metadata['task']}, {metadata['architecture']}, "
            f"{metadata['parameters']:,} parameters, {metadata['dtype']}, "
            f"for {metadata['engine']}, from {metadata['source']}"
        )


if __name__ == "__main__":
    main()
