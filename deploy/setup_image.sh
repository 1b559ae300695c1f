#!/usr/bin/env bash
# Installs Triptych's packages into the image. BentoML runs it in the bento's folder, after creating
# the virtual environment (bentofile.yaml), where service.py has put pyproject.toml: all versions are
# in there.
set -euo pipefail
project=src/pyproject.toml
uv pip install --requirements "$project"
# Building DeepSpeed takes torch, so it is not isolated. By default its operators are compiled when a
# model first needs them, for the GPU of the machine; DS_BUILD_* in the base image change that.
DS_BUILD_OPS="${DS_BUILD_OPS:-0}" uv pip install --no-build-isolation --requirements "$project" --extra mii
pinned() {
    python -c 'import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(tomllib.load(file)["tool"]["triptych"]["pinned"][sys.argv[2]])' "$project" "$1"
}
# The requirements that MII itself declares are wrong; the extra `mii` has the right ones.
uv pip install --no-deps "$(pinned mii)"
if command -v nvcc >/dev/null; then
    # The compiled part of FastGen's kernels, for x86 as FastGen itself.
    uv pip install "$(pinned fastgen-kernels)"
fi
