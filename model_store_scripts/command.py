"""What the commands that import a model share: their options, and how they tell what happened."""

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
    """Import, and tell the user how it went; returns the exit code."""
    # A polite kill unwinds like Ctrl-C, so that no staging folder stays behind.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        imported = run()
    except (ConfigError, OSError) as error:
        say(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: this machine has too little memory for that", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was imported", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    for note in imported.notes:
        say(f"note: {note}", file=sys.stderr)
    for line in _outcome(imported):
        say(line)
    return 0


def _outcome(imported: ImportedModel) -> tuple[str, str]:
    """The tag, and the command that serves it."""
    about = imported.metadata
    how = "imported" if imported.new else "already in the store, unchanged"
    variable = "TRIPTYCH_IMAGE_MODEL" if imported.task == "text-to-image" else "TRIPTYCH_TEXT_MODEL"
    return (
        f"{imported.tag}  {how}: {about['architecture']}, {about['parameters']:,} parameters, "
        f"{about['dtype']}, {about['total_bytes']:,} bytes, for {about['engine']}",
        f"serve it with: {variable}={imported.tag} bentoml serve .",
    )


def say(line: str, *, file: TextIO | None = None) -> None:
    """Print one line, without what a terminal would obey or take for another line."""
    seen = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.expandtabs())
    print("".join(seen), file=file or sys.stdout)


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
