"""Compile the C++ sources of `native/` for this CPU, and load them as `Kernels`.

The shared library is cached by its sources, compiler and CPU, so that only a first start compiles.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from runners.protocol.cache import CacheUnavailable, cache_folder

logger = logging.getLogger("triptych.kernels")

NATIVE = Path(__file__).with_name("native")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 300

_switched_off: list[bool] = []
_P, _I = ctypes.c_void_p, ctypes.c_int64


class LinearWeights(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = (
        *((name, _P) for name in ("weight", "scale", "bias")),
        *((name, _I) for name in ("input", "output", "type")),
    )


class NormWeights(ctypes.Structure):
    """`Norm` of decoder.h."""

    _fields_ = (("weight", _P), ("eps", ctypes.c_float), ("offset", ctypes.c_float))


class AttentionShape(ctypes.Structure):
    """`Shape` of attention.h."""

    _fields_ = (
        *((name, _I) for name in ("heads", "kv_heads", "key_size", "value_size")),
        *((name, _I) for name in ("value_stride", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Heads(ctypes.Structure):
    """`Heads` of attention.h."""

    _fields_ = (("data", _P), ("row", _I), ("head", _I))


class KVPointers(ctypes.Structure):
    """`LayerKV` of attention.h."""

    _fields_ = (("keys", _P), ("values", _P))


class LayerWeights(ctypes.Structure):
    """`Layer` of decoder.h."""

    _fields_ = (
        *((name, NormWeights) for name in ("before_attention", "before_mlp", "query", "key")),
        *((name, LinearWeights) for name in ("qkv", "output_projection", "gate_up", "down")),
        ("shape", AttentionShape),
        ("kv", KVPointers),
    )


WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Types of weights, in the order of their numbers in linear.h."""


class Kernels:
    """The compiled library. The functions take the arguments of those in kernels.cpp."""

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        self.panel_width: int = library.triptych_panel_width()
        self.block_size: int = library.triptych_block_size()

        def declare(name: str, *argtypes: type) -> ctypes._NamedFuncPointer:
            function: ctypes._NamedFuncPointer = getattr(library, f"triptych_{name}")
            function.argtypes, function.restype = argtypes, None
            return function

        linear, norm, heads = (ctypes.POINTER(t) for t in (LinearWeights, NormWeights, Heads))
        kv, shape, layer = (ctypes.POINTER(t) for t in (KVPointers, AttentionShape, LayerWeights))
        segments = (_P, _I, _P)
        self.linear = declare("linear", linear, _P, _P, _I)
        self.rms_norm = declare("rms_norm", norm, _P, _P, _I, _I)
        self.gated_mlp = declare("gated_mlp", linear, linear, _P, _P, _I)
        self.attention = declare("attention", *[heads] * 3, kv, _P, *segments, shape, _P)
        self.decoder = declare("decoder", layer, _I, *[_P] * 3, *segments)


def switch_off_kernels() -> None:
    """Make `load_kernels` return None in this process from now on."""
    _switched_off.append(True)
    load_kernels.cache_clear()


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels for this CPU; None, with a warning, if they cannot be compiled."""
    if _switched_off:
        return None
    try:
        try:
            return Kernels(_compile(cache_folder()))
        except CacheUnavailable as error:
            logger.warning("the CPU kernels are compiled anew at each start: %s", error)
            with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
                return Kernels(_compile(Path(folder)))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        logger.warning("no CPU kernels, torch's slower operators run instead: %s", reason)
        return None


def _compile(folder: Path) -> Path:
    """The shared library in `folder`, compiled unless it exists for this source, compiler and CPU.

    Raises: OSError, subprocess.SubprocessError.
    """
    compiler = _compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = [*FLAGS, native]
    sources = [file.read_text(encoding="utf-8") for file in sorted(NATIVE.iterdir())]
    key = "\0".join([*sources, version, *flags, _cpu()])
    digest = hashlib.sha256(key.encode()).hexdigest()[:20]
    target = folder / f"kernels-{digest}.so"
    if not target.exists():
        # Renamed once complete: ranks compile at the same time, and may be killed meanwhile.
        with tempfile.TemporaryDirectory(dir=folder) as build:
            output = Path(build) / "kernels.so"
            subprocess.run(
                [*compiler, *flags, "-o", str(output), str(NATIVE / "kernels.cpp")],
                capture_output=True,
                text=True,
                check=True,
                timeout=COMPILE_TIMEOUT_S,
            )
            output.replace(target)
    return target


def _compiler() -> list[str]:
    """The command of the compiler: that of CXX, else the first of `COMPILERS`. Raises: OSError."""
    cxx = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [cxx] if cxx else [[name] for name in COMPILERS]:
        if (path := shutil.which(name)) is not None:
            return [path, *options]
    names = cxx[:1] or COMPILERS
    raise OSError(f"no C++ compiler ({', '.join(names)}) is on the PATH")


def _cpu() -> str:
    """The instruction sets that `native` stands for: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())
