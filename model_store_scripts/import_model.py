"""`python -m model_store_scripts.import_model SOURCE --name NAME`: import a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model_store_scripts.command import add_fields, model_name, overrides, report
from model_store_scripts.importing import ImportRequest, import_model

EPILOG = """\
SOURCE is a folder or the id of a hub model; HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE have the same
effect as with the hub's own tools. A folder is a Hugging Face model, or has setup_config.json or
model-config.yaml and ds-config.json, as for TorchServe, next to model/ or to the folder that
handler.model_path names. Weights must be safetensors; models with code are refused. Importing the
same model again changes nothing.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 refused, 130 interrupted. Bad usage exits 2."""
    args = _parser().parse_args(argv)
    return report(
        lambda: import_model(
            ImportRequest(
                source=args.source,
                name=args.name,
                overrides=overrides(args),
                revision=args.revision,
                setup_config=args.setup_config,
                convert_checkpoints=args.convert_checkpoints,
            )
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.import_model",
        description="Import a model into the BentoML model store.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder or a hub id")
    add("--name", type=model_name, required=True, help="the model's name in the store")
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--setup-config",
        type=Path,
        metavar="FILE",
        help="a published setup_config.json, or a model-config.yaml with its ds-config.json in the "
        "same folder, to use instead of SOURCE's",
    )
    add_fields(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
