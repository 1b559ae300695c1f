"""`python -m model_store_scripts.make_demo_models`: the demo models, into the BentoML store."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model_store_scripts.command import report
from model_store_scripts.importing import ImportedModel, ImportRequest, import_model
from model_store_scripts.store import make_latest, stored_models

HERE = Path(__file__).parent
SETUP = {"gpus": 0}
"""Fields of `setup_config.json`: small as they are, no deployment needs a GPU for them."""


@dataclass(frozen=True)
class Demo:
    """A model that Triptych brings along."""

    kind: str
    name: str
    package: str
    recipe: tuple[str, ...]
    """Files and folders of the package; while they stay the same, so does the model."""
    write: Callable[[Path], object]
    """Writes the model folder."""


def _write_text(target: Path) -> object:
    # Imports torch, which a second run has no use for.
    from demo_models.text.build import write_demo_text_model

    return write_demo_text_model(target)


def _write_image(target: Path) -> object:
    from demo_models.image.build import write_demo_image_model

    return write_demo_image_model(target)


DEMOS = (
    Demo("text", "demo-text", "demo_text", ("build.py", "weights"), _write_text),
    Demo("image", "demo-image", "demo_image", ("build.py", "parts.py", "weights"), _write_image),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.make_demo_models",
        description="Make the demo models and import them into the BentoML model store; those that "
        "are there already are left as they are.",
    )
    for demo in DEMOS:
        parser.add_argument(
            f"--{demo.kind}",
            dest="kinds",
            action="append_const",
            const=demo.kind,
            help=f"only this one, as {demo.name} (default: all)",
        )
    parser.add_argument("--force", action="store_true", help="make a new version in any case")
    args = parser.parse_args(argv)
    codes = [
        report(partial(make, demo, force=args.force))
        for demo in DEMOS
        if not args.kinds or demo.kind in args.kinds
    ]
    return max(codes)


def make(demo: Demo, *, force: bool = False) -> ImportedModel:
    """Make a demo model and import it, unless the store has it. Raises: ConfigError."""
    recipe = _recipe(demo)
    for stored in () if force else reversed(stored_models(demo.name)):
        if stored.metadata.get("recipe") == recipe:
            make_latest(stored.tag)
            task = stored.metadata["task"]
            return ImportedModel(stored.tag, task, new=False, metadata=stored.metadata, notes=())
    with tempfile.TemporaryDirectory(prefix="triptych-demo-") as folder:
        demo.write(Path(folder, demo.name))
        return import_model(
            ImportRequest(
                source=str(Path(folder, demo.name)),
                name=demo.name,
                overrides=SETUP,
                force=force,
                origin=f"{__package__}.{demo.package}",
                metadata={"recipe": recipe},
            )
        )


def _recipe(demo: Demo) -> str:
    package = HERE / demo.package
    paths = [package / name for name in demo.recipe]
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    digest = hashlib.sha256(json.dumps(SETUP).encode())
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
