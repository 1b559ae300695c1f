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

from model_store_scripts.layout import TRAINING_STATE
from runners.contracts.errors import ConfigError, IncompleteModel, ModelNotFound

EPILOG = """\
The index lists the .safetensors, .bin or .pt files in FOLDER and the folders below it, by their
paths relative to FOLDER, which DeepSpeed expects as base_dir. Safetensors take precedence over the
others. Triptych needs no index, since its ranks map the weights directly from their files; it is
for scripts that run DeepSpeed themselves.
"""

SUFFIXES = (".safetensors", ".bin", ".pt")


def create_checkpoints_json(model_path: Path, checkpoints_json: Path) -> list[str]:
    """Write the index of the weight files below a folder; returns notes for the user.

    Raises: ModelNotFound (no such folder), IncompleteModel (no weights in it), ConfigError (both
    `.bin` and `.pt` files), OSError (the index cannot be written).
    """
    if not model_path.is_dir():
        raise ModelNotFound(f"{model_path} is not a folder")
    names = _files(model_path)
    files = {suffix: [n for n in names if n.endswith(suffix)] for suffix in SUFFIXES}
    suffixes = [suffix for suffix in SUFFIXES if files[suffix]]
    if not suffixes:
        raise IncompleteModel(f"{model_path} has no weights: no .safetensors, .bin or .pt file")
    if suffixes == [".bin", ".pt"]:
        raise ConfigError(
            f"{model_path} has both .bin and .pt files, such as {files['.bin'][0]} and "
            f"{files['.pt'][0]}: keep only those that are the weights"
        )
    index = {"type": "ds_model", "checkpoints": files[suffixes[0]], "version": 1.0}
    checkpoints_json.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    others = " and ".join(suffixes[1:])
    return [f"{others} files are left out: there are safetensors"] if others else []


def _files(root: Path) -> list[str]:
    """Names relative to `root`, sorted, without hidden folders and the state of a training run."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in TRAINING_STATE):
                paths.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 1 refused. Bad usage exits 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model_store_scripts.create_checkpoints_json",
        description="Write the index of a model's weight files that DeepSpeed calls checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder of the weights")
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
    print(f"{args.output}: use it with DeepSpeed's base_dir {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
