"""`python -m model_store_scripts.import_archive FILE`: import an archive of TorchServe's.

FILE is what torch-model-archiver wrote: a `.mar`, a `.tar.gz`, or the folder of
`--archive-format no-archive`. No code in it is run; its handler is shown.
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
from model_store_scripts.command import add_fields, model_name, overrides, print_line, report
from model_store_scripts.importing import ImportedModel, ImportRequest, check_name, import_model
from runners.contracts.errors import ConfigError, IncompleteModel

EPILOG = """\
setup_config.json, or model-config.yaml with its ds-config.json, say how to run the model, as for
TorchServe. The weights are those in model.zip, or next to these files, or where handler.model_path
points in the archive; if the archive has none, give their folder with --model-path. Weights must be
safetensors; models with code are refused. The archive's handler is never run. Importing the same
archive again changes nothing.
"""


SHOWN_LINES = 200
"""Of a handler; the published ones have at most 164."""
SHOWN_BYTES = 64 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 refused, 130 interrupted. Bad usage exits 2."""
    args = _parser().parse_args(argv)
    return report(lambda: _import(args))


def _import(args: argparse.Namespace) -> ImportedModel:
    with open_archive(
        args.archive, model_path=args.model_path, max_bytes=args.max_unpacked_size
    ) as archive:
        request = _request(args, archive)
        try:
            imported = import_model(request)
        except IncompleteModel as error:
            if not archive.has_weights():
                error.add_note("give the folder of the weights with --model-path")
            raise
        for line in (*_configuration(archive, imported.setup_config), *_handler(archive)):
            print_line(line)
        return replace(imported, notes=(*archive.notes, *imported.notes))


def _request(args: argparse.Namespace, archive: Archive) -> ImportRequest:
    manifest = archive.manifest
    name = args.name or manifest.model_name.lower()
    try:
        check_name(name)
    except ConfigError as error:
        error.add_note("choose another with --name")
        raise
    return ImportRequest(
        source=str(archive.files.path),
        name=name,
        overrides=overrides(args) | {"model_version": manifest.model_version},
        convert_checkpoints=args.convert_checkpoints,
        source_name=archive.files.name,
        origin=str(args.archive),
        model=archive.model,
        model_config=manifest.config_file,
        excluded=archive.excluded,
    )


def _configuration(archive: Archive, setup_config: Mapping[str, Any]) -> list[str]:
    manifest = archive.manifest
    return [
        f"{archive.files.name} contains {manifest.model_name}, version {manifest.model_version}",
        "its configuration, written to the model's setup_config.json:",
        *(f"    {key}: {json.dumps(value)}" for key, value in setup_config.items()),
    ]


def _handler(archive: Archive) -> list[str]:
    manifest = archive.manifest
    if archive.handler is None and manifest.names_builtin_handler:
        return [f"its handler, {manifest.handler}, is part of TorchServe; Triptych replaces it"]
    if archive.handler is None:
        return [f"its handler, {manifest.handler_file}, is not in it; Triptych replaces it"]
    summary = f"its handler, {manifest.handler_file}, was not run; Triptych replaces it"
    with archive.handler.open("rb") as file:
        content, is_longer = file.read(SHOWN_BYTES), bool(file.read(1))
    if not content:
        return [f"{summary} (it is empty)"]
    try:
        text = getincrementaldecoder("utf-8")().decode(content, final=not is_longer)
    except UnicodeDecodeError:
        return [f"{summary} (it is not text)"]
    lines = text.splitlines()
    output = [f"{summary}. Its source:", *(f"    | {line}" for line in lines[:SHOWN_LINES])]
    if is_longer:
        return [*output, "    ... and more"]
    rest = len(lines) - SHOWN_LINES
    return [*output, f"    ... and {rest} more lines"] if rest > 0 else output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.import_archive",
        description="Import an archive of torch-model-archiver into the BentoML model store.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("archive", type=Path, metavar="FILE", help="a .mar, a .tar.gz, or a no-archive folder")
    add(
        "--name",
        type=model_name,
        help="the model's name in the store (default: the archive's, in lower case)",
    )
    add(
        "--model-path",
        type=Path,
        metavar="FOLDER",
        help="the model's folder, if it is not in the archive",
    )
    add(
        "--max-unpacked-size",
        type=_size,
        metavar="SIZE",
        help="maximum unpacked size, such as 300GB (default: 20 times the archive's size)",
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
