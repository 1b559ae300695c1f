"""Compile `kernels.cpp` for this machine, once, and call it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("triptych.kernels")

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 300

_switched_off: list[bool] = []
_P, _I = ctypes.c_void_p, ctypes.c_int64


class AttentionShape(ctypes.Structure):
    """`Shape` of kernels.cpp."""

    _fields_ = (
        *((name, _I) for name in ("heads", "kv_heads", "key_size", "value_size")),
        *((name, _I) for name in ("value_stride", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class LinearWeights(ctypes.Structure):
    """`Linear` of kernels.cpp."""

    _fields_ = (
        *((name, _P) for name in ("weight", "scale", "bias")),
        *((name, _I) for name in ("input", "output", "type")),
    )


class NormWeights(ctypes.Structure):
    """`Norm` of kernels.cpp."""

    _fields_ = (("weight", _P), ("eps", ctypes.c_float), ("offset", ctypes.c_float))


class LayerWeights(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        *((name, NormWeights) for name in ("before_attention", "before_mlp", "query", "key")),
        *((name, LinearWeights) for name in ("qkv", "output_projection", "gate_up", "down")),
        ("shape", AttentionShape),
    )


TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Weights' types, numbered as in kernels.cpp."""


class Kernels:
    """The compiled library. Arguments are those of the functions in kernels.cpp."""

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        self.panel_width: int = library.triptych_panel_width()
        self.block_size: int = library.triptych_block_size()
        self.linear = {
            dtype: _function(
                library,
                f"triptych_linear_{str(dtype).removeprefix('torch.')}",
                [_P] * 5 + [_I] * 3,
            )
            for dtype in TYPES
        }
        size, real = [_I, _I], ctypes.c_float
        self.rms_norm = _function(library, "triptych_rms_norm", [_P, _P, _P, *size, real, real])
        self.gated_silu = _function(library, "triptych_gated_silu", [_P, _P, *size])
        self.decoder_layer = _function(
            library,
            "triptych_decoder_layer",
            [ctypes.POINTER(LayerWeights), _P, _I, _P, _P, _P, _P, _P, _I, _P, _P],
        )
        rows = [_P, _I, _I] * 3
        self.attention = _function(
            library,
            "triptych_attention",
            [*rows, _P, _P, _P, _P, _I, _P, ctypes.POINTER(AttentionShape), _P],
        )


def _function(library: ctypes.CDLL, name: str, arguments: list[type]) -> ctypes._NamedFuncPointer:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    return function  # type: ignore[no-any-return]


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
            return Kernels(_compiled(_cache_folder()))
        except _NoCache as error:
            logger.warning("the CPU kernels are compiled anew at each start: %s", error)
            with tempfile.TemporaryDirectory(prefix="triptych-") as own:
                return Kernels(_compiled(Path(own)))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()
        logger.warning("no CPU kernels, torch's own are slower here: %s", (reason or ["?"])[0])
        return None


class _NoCache(Exception):
    """There is no folder to keep compiled kernels in."""


def _compiled(folder: Path) -> Path:
    """The shared library in `folder`, made anew unless it was by this source, compiler and CPU."""
    compiler = _compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = [*FLAGS, native]
    made_of = [SOURCE.read_text(encoding="utf-8"), version, *flags, _cpu()]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    target = folder / f"kernels-{digest}.so"
    if not target.exists():
        # Under a name of its own until whole: ranks start together, and may be killed meanwhile.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "kernels.so"
            subprocess.run(
                [*compiler, *flags, "-o", str(made), str(SOURCE)],
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


def _cache_folder() -> Path:
    """A folder that nobody else can write to: what lies in it gets executed. Raises: _NoCache."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "triptych"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise _NoCache(str(error)) from None
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _NoCache(f"{folder} can be written by others")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _NoCache(f"{folder} can not be written to")
    return folder
