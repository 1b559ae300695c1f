"""Compile `native/` for this machine, once, and call it."""

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


class Pool(ctypes.Structure):
    """`Pool` of attention.h."""

    _fields_ = (("keys", _P), ("values", _P))


class LayerWeights(ctypes.Structure):
    """`Layer` of decoder.h."""

    _fields_ = (
        *((name, NormWeights) for name in ("before_attention", "before_mlp", "query", "key")),
        *((name, LinearWeights) for name in ("qkv", "output_projection", "gate_up", "down")),
        ("shape", AttentionShape),
        ("pool", Pool),
    )


TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Weights' types, numbered as in linear.h."""


class Kernels:
    """The compiled library. Arguments are those of the functions in kernels.cpp."""

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        self.panel_width: int = library.triptych_panel_width()
        self.block_size: int = library.triptych_block_size()

        def function(name: str, *arguments: type) -> ctypes._NamedFuncPointer:
            found: ctypes._NamedFuncPointer = getattr(library, f"triptych_{name}")
            found.argtypes, found.restype = arguments, None
            return found

        layer, norm, heads = (ctypes.POINTER(t) for t in (LinearWeights, NormWeights, Heads))
        self.linear = function("linear", layer, _P, _P, _I)
        self.rms_norm = function("rms_norm", norm, _P, _P, _I, _I)
        self.gated_mlp = function("gated_mlp", layer, layer, _P, _P, _I)
        step = (_P, _I, _P)
        self.attention = function(
            "attention",
            *[heads] * 3,
            ctypes.POINTER(Pool),
            _P,
            *step,
            ctypes.POINTER(AttentionShape),
            _P,
        )
        self.decode = function("decode", ctypes.POINTER(LayerWeights), _I, *[_P] * 3, *step)


def switch_off_kernels() -> None:
    """From now on this process has none."""
    _switched_off.append(True)
    load_kernels.cache_clear()


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels for this CPU; None, with a warning, where they can not be compiled."""
    if _switched_off:
        return None
    try:
        try:
            return Kernels(_compiled(cache_folder()))
        except CacheUnavailable as error:
            logger.warning("the CPU kernels are compiled anew at each start: %s", error)
            with tempfile.TemporaryDirectory(prefix="triptych-") as own:
                return Kernels(_compiled(Path(own)))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()
        logger.warning("no CPU kernels, torch's own are slower here: %s", (reason or ["?"])[0])
        return None


def _compiled(folder: Path) -> Path:
    """The shared library in `folder`, made anew unless it was by this source, compiler and CPU."""
    compiler = _compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = [*FLAGS, native]
    sources = [file.read_text(encoding="utf-8") for file in sorted(NATIVE.iterdir())]
    made_of = [*sources, version, *flags, _cpu()]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    target = folder / f"kernels-{digest}.so"
    if not target.exists():
        # Under a name of its own until whole: ranks start together, and may be killed meanwhile.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "kernels.so"
            subprocess.run(
                [*compiler, *flags, "-o", str(made), str(NATIVE / "kernels.cpp")],
                capture_output=True,
                text=True,
                check=True,
                timeout=COMPILE_TIMEOUT_S,
            )
            made.replace(target)
    return target


def _compiler() -> list[str]:
    own = shlex.split(os.environ.get("CXX", ""))
    for command in [own] if own else [[name] for name in COMPILERS]:
        if (found := shutil.which(command[0])) is not None:
            return [found, *command[1:]]
    names = own[:1] or COMPILERS
    raise OSError(f"no C++ compiler ({', '.join(names)}) is on the PATH")


def _cpu() -> str:
    """What `native` means here; a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())
