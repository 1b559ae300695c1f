"""`python -m model_store_scripts.make_demo_models`: import the demo models into the model store."""

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

import demo_models
from model_store_scripts.command import report
from model_store_scripts.importing import ImportedModel, ImportRequest, import_model
from model_store_scripts.store import make_latest, stored_models

SETUP = {"gpus": 0}
"""Fields of `setup_config.json`: no deployment needs a GPU for models as small as these."""

_PACKAGES = Path(demo_models.__file__).parent


@dataclass(frozen=True)
class Demo:
    """A demo model of this project."""

    modality: str
    """`text` or `image`: its option on the command line."""
    name: str
    folder: Path
    """The package that writes it."""
    sources: tuple[str, ...]
    """Files and folders of the package; while they stay the same, so does the model."""
    write: Callable[[Path], object]
    """Writes the model folder."""


def _write_text(target: Path) -> object:
    # Imports torch, which takes seconds; a second run does not need it.
    from demo_models.text.build import write_demo_text_model

    return write_demo_text_model(target)


def _write_image(target: Path) -> object:
    # As above, and diffusers.
    from demo_models.image.build import write_demo_image_model

    return write_demo_image_model(target)


DEMOS = (
    Demo("text", "demo-text", _PACKAGES / "text", ("build.py", "weights"), _write_text),
    Demo(
        "image",
        "demo-image",
        _PACKAGES / "image",
        ("build.py", "components.py", "weights"),
        _write_image,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.make_demo_models",
        description="Write the demo models and import them into the BentoML model store, unless "
        "they are there already.",
    )
    for demo in DEMOS:
        parser.add_argument(
            f"--{demo.modality}",
            dest="modalities",
            action="append_const",
            const=demo.modality,
            help=f"only this one, as {demo.name} (default: all)",
        )
    parser.add_argument("--force", action="store_true", help="make a new version in any case")
    args = parser.parse_args(argv)
    codes = [
        report(partial(make, demo, force=args.force))
        for demo in DEMOS
        if not args.modalities or demo.modality in args.modalities
    ]
    return max(codes)


def make(demo: Demo, *, force: bool = False) -> ImportedModel:
    """Write a demo model and import it, unless the store has it. Raises: ConfigError."""
    recipe = source_digest(demo)
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
                origin=f"demo_models.{demo.modality}",
                metadata={"recipe": recipe},
            )
        )


def source_digest(demo: Demo) -> str:
    """A hash over `SETUP` and the names and contents of the demo's sources."""
    paths = [demo.folder / name for name in demo.sources]
    files = [
        file
        for path in paths
        for file in (filter(Path.is_file, sorted(path.rglob("*"))) if path.is_dir() else [path])
    ]
    digest = hashlib.sha256(json.dumps(SETUP).encode())
    for file in files:
        digest.update(file.relative_to(demo.folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
