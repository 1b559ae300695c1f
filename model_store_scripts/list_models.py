"""`python -m model_store_scripts.list_models`: the models that Triptych has imported."""

from __future__ import annotations

from model_store_scripts.command import say
from model_store_scripts.store import stored_models


def main() -> None:
    """Print one line per model, oldest first."""
    for model in stored_models():
        about = model.metadata
        say(
            f"{model.tag}  {about['task']}, {about['architecture']}, "
            f"{about['parameters']:,} parameters, {about['dtype']}, for {about['engine']}, "
            f"from {about['source']}"
        )


if __name__ == "__main__":
    main()
