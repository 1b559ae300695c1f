"""`python -m model_store_scripts.import_model SOURCE --name NAME`: fill the BentoML store."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from model_store_scripts.importing import ImportedModel, ImportRequest, check_name, import_model
from runners.config import DEVICE_STRATEGIES, Dtype, Engine, Task
from runners.errors import ConfigError

EPILOG = """\
SOURCE is a folder or the id of a hub model; HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE work as with
the hub's own tools. A folder is a Hugging Face model or as TorchServe has it: setup_config.json, or
model-config.yaml and ds-config.json, beside model/ or the folder that handler.model_path names.
Weights must be safetensors; models that bring code are refused. Importing the same again changes
nothing.
"""

# Options that are fields of setup_config.json, under the same names.
FIELDS = (
    *("engine", "task", "dtype", "device_map", "max_memory", "offload_folder", "max_length"),
    *("max_batch_size", "tensor_parallel", "gpus"),
)


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


def report(run: Callable[[], ImportedModel]) -> int:
    """Import, and tell the user how it went; returns the exit code."""
    # A polite kill unwinds like Ctrl-C, so that no staging folder stays behind.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        imported = run()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was imported", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    for note in imported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(describe(imported))
    return 0


def describe(imported: ImportedModel) -> str:
    """The outcome in two lines: the tag, and the command that serves it."""
    about = imported.metadata
    how = "imported" if imported.new else "already in the store, unchanged"
    variable = "TRIPTYCH_IMAGE_MODEL" if imported.task == "text-to-image" else "TRIPTYCH_TEXT_MODEL"
    return (
        f"{imported.tag}  {how}: {about['architecture']}, {about['parameters']:,} parameters, "
        f"{about['dtype']}, {about['total_bytes']:,} bytes, for {about['engine']}\n"
        f"serve it with: {variable}={imported.tag} bentoml serve ."
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
    add("--name", type=name, required=True, help="the model's name in the store")
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--setup-config",
        type=Path,
        metavar="FILE",
        help="a published setup_config.json, or a model-config.yaml with its ds-config.json beside "
        "it, to take over in place of SOURCE's own",
    )
    add_fields(parser)
    return parser


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Options for how the model is run, whatever it comes in."""
    add = parser.add_argument
    add("--engine", choices=get_args(Engine), help="what runs it (default: accelerate)")
    add("--task", choices=get_args(Task), help="what it does (default: what the files say)")
    add("--dtype", choices=get_args(Dtype), help="type to run it in (default: auto)")
    strategies = ", ".join(DEVICE_STRATEGIES)
    add(
        "--device-map",
        type=_device_map,
        help=f"{strategies}, a device, or JSON of module to device",
    )
    add("--max-memory", type=_json_object, help='JSON such as {"0": "10GiB", "cpu": "30GiB"}')
    add("--offload-folder", help="where weights go that fit nowhere else")
    add("--max-length", type=int, help="longest prompt in tokens")
    add("--max-batch-size", type=int, help="sequences generated together")
    add("--tensor-parallel", type=int, help="over how many ranks to split it")
    add("--gpus", type=int, help="GPUs that a deployment asks for (default: as many as it uses)")
    add("--convert-checkpoints", action="store_true", help="convert .bin and .pt to safetensors")


def overrides(args: argparse.Namespace) -> dict[str, object]:
    """What these options say; None where they say nothing."""
    return {field: getattr(args, field) for field in FIELDS}


def name(value: str) -> str:
    """The type of an option that names a model in the store."""
    try:
        check_name(value)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _json_object(value: str) -> dict[str, Any]:
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return parsed


def _device_map(value: str) -> str | dict[str, Any]:
    return _json_object(value) if value.lstrip().startswith("{") else value


if __name__ == "__main__":
    sys.exit(main())
