"""What the import commands share: options for the configuration, and the report to the user."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO, get_args

from model_store_scripts.importing import ImportedModel, check_name
from runners.config.base import Dtype, Engine, Task
from runners.config.engines import DEVICE_STRATEGIES
from runners.contracts.errors import ConfigError

# Options that are fields of setup_config.json, under the same names.
FIELDS = (
    *("engine", "task", "dtype", "device_map", "max_memory", "offload_folder", "max_length"),
    *("max_batch_size", "tensor_parallel", "gpus"),
)


def report(run: Callable[[], ImportedModel]) -> int:
    """Run an import and print its outcome; returns the exit code."""
    # SIGTERM unwinds as Ctrl-C does, so that the staging folder is deleted.
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        imported = run()
    except (ConfigError, OSError) as error:
        advice = getattr(error, "__notes__", [])
        print_line(": ".join([f"error: {error}", *advice]), file=sys.stderr)
        return 1
    except MemoryError:
        print("error: this machine has too little memory for this model", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was imported", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    for note in imported.notes:
        print_line(f"note: {note}", file=sys.stderr)
    for line in _outcome(imported):
        print_line(line)
    return 0


def _outcome(imported: ImportedModel) -> tuple[str, str]:
    """The tag with a summary, and the command that serves the model."""
    metadata = imported.metadata
    outcome = "imported" if imported.new else "already in the store, unchanged"
    variable = "TRIPTYCH_IMAGE_MODEL" if imported.task == "text-to-image" else "TRIPTYCH_TEXT_MODEL"
    return (
        f"{imported.tag}  {outcome}: {metadata['architecture']}, "
        f"{metadata['parameters']:,} parameters, {metadata['dtype']}, "
        f"{metadata['total_bytes']:,} bytes, for {metadata['engine']}",
        f"serve it with: {variable}={imported.tag} bentoml serve .",
    )


def print_line(line: str, *, file: TextIO | None = None) -> None:
    """Print one line; terminal controls and line breaks in it are replaced."""
    printable = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.expandtabs())
    print("".join(printable), file=file or sys.stdout)


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Add the options for fields of `setup_config.json`, and for the conversion of pickles."""
    add = parser.add_argument
    add("--engine", choices=get_args(Engine), help="the engine (default: accelerate)")
    add("--task", choices=get_args(Task), help="the task (default: as the model's files say)")
    add("--dtype", choices=get_args(Dtype), help="the type of the weights (default: auto)")
    strategies = ", ".join(DEVICE_STRATEGIES)
    add(
        "--device-map",
        type=_device_map,
        help=f"{strategies}, a device, or JSON of module to device",
    )
    add("--max-memory", type=_json_object, help='JSON such as {"0": "10GiB", "cpu": "30GiB"}')
    add("--offload-folder", help="folder for weights that fit on no device and not in memory")
    add("--max-length", type=int, help="maximum prompt length in tokens")
    add("--max-batch-size", type=int, help="maximum number of sequences in a batch")
    add("--tensor-parallel", type=int, help="number of ranks to split the model over")
    add("--gpus", type=int, help="GPUs that a deployment requests (default: as many as it uses)")
    add("--convert-checkpoints", action="store_true", help="convert .bin and .pt to safetensors")


def overrides(args: argparse.Namespace) -> dict[str, object]:
    """The fields that these options set; None for those that are not given."""
    return {field: getattr(args, field) for field in FIELDS}


def model_name(value: str) -> str:
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
