"""`python -m model_store_scripts.create_checkpoints_json FOLDER`: DeepSpeed's index of weights.

The format is that of `SDLoaderFactory.get_sd_loader_json` in DeepSpeed 0.19.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from model_store_scripts.layout import NO_WEIGHTS
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound

EPILOG = """\
The index lists the .safetensors, .bin or .pt files in FOLDER and the folders below it, by their
names in FOLDER: DeepSpeed wants FOLDER itself as base_dir. Safetensors are chosen before the
others. Triptych has no use for an index, its ranks map the weights straight from their files; it is
for set-ups that DeepSpeed runs by itself.
"""

SUFFIXES = (".safetensors", ".bin", ".pt")


def create_checkpoints_json(model_path: Path, checkpoints_json: Path) -> list[str]:
    """Write the index of the weight files below a folder; returns what is worth saying about it.

    Raises: ModelNotFound (no such folder), IncompleteModel (no weights in it), ConfigError (both
    `.bin` and `.pt` files), OSError (the index can not be written).
    """
    if not model_path.is_dir():
        raise ModelNotFound(f"{model_path} is not a folder")
    names = _files(model_path)
    files = {suffix: [n for n in names if n.endswith(suffix)] for suffix in SUFFIXES}
    kinds = [suffix for suffix in SUFFIXES if files[suffix]]
    if not kinds:
        raise IncompleteModel(f"{model_path} holds no weights: no .safetensors, .bin or .pt file")
    if kinds == [".bin", ".pt"]:
        raise ConfigError(
            f"{model_path} holds both .bin and .pt files, such as {files['.bin'][0]} and "
            f"{files['.pt'][0]}: leave only those in it that are the weights"
        )
    chosen = files[kinds[0]]
    index = {"type": "ds_model", "checkpoints": chosen, "version": 1.0}
    checkpoints_json.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    others = " and ".join(kinds[1:])
    return [f"{others} files are left out: there are safetensors"] if others else []


def _files(root: Path) -> list[str]:
    """Names relative to `root`, sorted; hidden folders and what a training run leaves aside."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in NO_WEIGHTS):
                found.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 1 refused. Bad usage exits 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.create_checkpoints_json",
        description="Write the index of a model's weight files that DeepSpeed calls checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the weight files are")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("checkpoints.json"),
        help="the index to write (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        notes = create_checkpoints_json(args.folder, args.output)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{args.output}: give DeepSpeed base_dir {args.folder} with it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
