"""`python -m model_store_scripts.import_archive FILE`: fill the BentoML store from TorchServe's.

FILE is what torch-model-archiver made: a `.mar`, a `.tar.gz`, or the folder that
`--archive-format no-archive` leaves. Nothing in it is run; its handler is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from model_store_scripts.archives import Archive, open_archive
from model_store_scripts.command import add_fields, name, overrides, report, say
from model_store_scripts.importing import ImportedModel, ImportRequest, check_name, import_model
from model_store_scripts.layout import PICKLES
from runners.contracts.errors import ConfigError, IncompleteModel

EPILOG = """\
setup_config.json, or model-config.yaml with its ds-config.json, say how the model is run, as they
did for TorchServe. The weights are those in model.zip, or beside these files, or where
handler.model_path says within the archive; if the archive has none, say with --model-path where
they lie. Weights must be safetensors; models that bring code are refused. The archive's handler is
never run. Importing the same again changes nothing.
"""


SHOWN_LINES = 200
"""Of a handler; the published ones have up to 164."""
SHOWN_BYTES = 64 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 refused, 130 interrupted. Bad usage exits 2."""
    args = _parser().parse_args(argv)
    return report(lambda: _import(args))


def _import(args: argparse.Namespace) -> ImportedModel:
    with open_archive(
        args.archive, model_path=args.model_path, max_bytes=args.max_unpacked_size
    ) as archive:
        try:
            imported = import_model(_request(args, archive))
        except ConfigError as error:
            raise type(error)(error.message + _hint(archive, error)) from None
        for line in (*_mapped(archive, imported.setup_config), *_handler(archive)):
            say(line)
        notes = [archive.named(note) for note in imported.notes]
        return replace(imported, notes=(*archive.notes, *notes))


def _hint(archive: Archive, error: ConfigError) -> str:
    """What to do about an archive without weights."""
    weights = {".safetensors", *PICKLES}
    has_some = archive.model_path or any(p.suffix in weights for p in archive.folder.rglob("*"))
    missing = isinstance(error, IncompleteModel) and not has_some
    return ": say with --model-path where the weights lie" if missing else ""


def _request(args: argparse.Namespace, archive: Archive) -> ImportRequest:
    manifest = archive.manifest
    called = args.name or manifest.model_name.lower()
    try:
        check_name(called)
    except ConfigError as error:
        raise ConfigError(f"{error.message}: give one with --name") from None
    return ImportRequest(
        source=str(archive.folder),
        name=called,
        overrides=overrides(args) | {"model_version": manifest.model_version},
        convert_checkpoints=args.convert_checkpoints,
        origin=str(args.archive),
        model_path=archive.model_path,
        model_config=manifest.config_file,
        set_aside=archive.set_aside,
    )


def _mapped(archive: Archive, setup_config: Mapping[str, Any]) -> list[str]:
    manifest = archive.manifest
    return [
        f"{archive.name} holds {manifest.model_name}, version {manifest.model_version}",
        "its configuration, as the model's setup_config.json has it from now on:",
        *(f"    {key}: {json.dumps(value)}" for key, value in setup_config.items()),
    ]


def _handler(archive: Archive) -> list[str]:
    manifest = archive.manifest
    if archive.handler is None and manifest.is_torchserves:
        return [f"its handler, {manifest.handler}, is TorchServe's own; Triptych does that work"]
    if archive.handler is None:
        return [f"its handler, {manifest.handler_file}, is not in it; Triptych does its work"]
    head = f"its handler, {manifest.handler_file}, was not run; Triptych does its work"
    with archive.handler.open("rb") as file:
        content, cut = file.read(SHOWN_BYTES), bool(file.read(1))
    if not content:
        return [f"{head} (it is empty)"]
    try:
        text = getincrementaldecoder("utf-8")().decode(content, final=not cut)
    except UnicodeDecodeError:
        return [f"{head} (it is no text)"]
    lines = text.splitlines()
    shown = [f"{head}. It reads:", *(f"    | {line}" for line in lines[:SHOWN_LINES])]
    if cut:
        return [*shown, "    ... and more"]
    rest = len(lines) - SHOWN_LINES
    return [*shown, f"    ... and {rest} more lines"] if rest > 0 else shown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.import_archive",
        description="Import what torch-model-archiver made into the BentoML model store.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="FILE", help="a .mar, a .tar.gz, or a no-archive folder")
    add("--name", type=name, help="the model's name in the store (default: the archive's)")
    add(
        "--model-path",
        type=Path,
        metavar="FOLDER",
        help="where the model lies, if the archive has none",
    )
    add(
        "--max-unpacked-size",
        type=_size,
        metavar="SIZE",
        help="how large it may be unpacked, such as 300GB (default: 20 times its size)",
    )
    add_fields(parser)
    return parser


def _size(value: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise argparse.ArgumentTypeError("must be a size such as 300GB") from None


if __name__ == "__main__":
    sys.exit(main())
