#!/usr/bin/env bash
# Runs at the end of the image build, where bentofile.yaml's packages are installed.
set -euo pipefail
# DeepSpeed asks for torch while it is built: not in isolation. Its operators are compiled when a
# model first needs them, for the GPU that is there; DS_BUILD_* of the base image say otherwise.
uv pip install "setuptools>=77" wheel
DS_BUILD_OPS="${DS_BUILD_OPS:-0}" uv pip install --no-build-isolation deepspeed==0.19.8
# MII's own requirements name wrong packages; bentofile.yaml has the right ones.
uv pip install --no-deps deepspeed-mii==0.3.3
if command -v nvcc >/dev/null; then
    # The compiled part of FastGen's kernels; x86 only, as FastGen is.
    uv pip install deepspeed-kernels==0.0.1.dev1698255861
fi
