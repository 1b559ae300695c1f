"""Bits that do not depend on the batch: operators of torch with a fixed order of summation.

cuBLAS and torch's reductions choose the order of a sum by the number of rows. A rank that promises
the same bits in any batch replaces these operators for its device, by those of `kernels.linear`,
`kernels.matmul` and `kernels.rows`. Models, their modules and graphs need not know of it. A call of
a replaced operator takes some microseconds of Python more, which the replay of a graph does not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runners.contracts.errors import first_line
from runners.text.engine import ModelRunner, PagedEngine
from runners.text.gpu import kernels
from runners.text.gpu.step import StepLimits
from runners.text.samplers import HostSampler

logger = logging.getLogger("triptych.text")

SHORT = 32
"""Rows up to which torch sums in one thread, so always in the same order."""
PROOF_SIZE = 1024
"""Inputs and outputs of the layer that the tiles of linear layers are proved on."""
BATCHES = (2, 3, 9, 17, 33, 65, 130)
"""Sequences of a batch that a sequence must have the same bits in."""

_libraries: dict[str, Any] = {}
_library: Callable[..., Any] = torch.library.Library


def install_invariant_operators(device_type: str) -> None:
    """Replace the operators for the tensors of a device type in this process.

    Raises: RuntimeError if the kernels do not run on it.
    """
    if device_type in _libraries:
        return
    if not kernels.runs_on(torch.device(device_type)):
        raise RuntimeError(f"no Triton kernels for {device_type}")
    library: Any = _library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*[Oo]verrid")
        for name, function in _OVERRIDES.items():
            library.impl(name, function, device_type.upper(), allow_override=True)
    _libraries[device_type] = library


def remove_invariant_operators(device_type: str) -> None:
    """Restore torch's operators."""
    if (library := _libraries.pop(device_type, None)) is not None:
        library._destroy()


def installed(device_type: str) -> bool:
    """Whether the operators for the tensors of a device type are replaced in this process."""
    return device_type in _libraries


def find_batch_dependence(
    run: Callable[[Sequence[Sequence[int]]], torch.Tensor], most: int, vocab_size: int
) -> str | None:
    """In which batch a sequence gets other bits than alone, if in any.

    `run` returns the logits `[n, vocab]` after each of n prompts of 1 to 4 tokens, computed in one
    batch of up to `most`.
    """
    prompts = [[(7 * i + 11 * k + 1) % vocab_size for k in range(i % 4 + 1)] for i in range(most)]
    sizes = sorted({min(size, most) for size in BATCHES})
    alone = {i: run([prompts[i]])[0] for i in {0, 3 % most, most - 1}}
    different = []
    # All of them in any case: ranks that share a model have to run the same steps.
    for size in sizes:
        logits = run(prompts[:size])
        if any(i < size and not torch.equal(logits[i], alone[i]) for i in alone):
            different.append(size)
    return f"among {' or '.join(map(str, different))}" if different else None


def log_batch_dependence(
    name: str, limits: StepLimits, create_runner: Callable[[int], ModelRunner]
) -> None:
    """Log whether a model gives sequences the same bits in any batch.

    `create_runner` returns a runner with a number of KV blocks. It is released before this returns.
    """
    most = min(limits.sequences, max(1, limits.rows // 4), BATCHES[-1])
    runner = create_runner(most)

    def run(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        engine = PagedEngine(runner, HostSampler(), blocks=len(prompts), prefix_caching=False)
        for uid, prompt in enumerate(prompts):
            engine.open(uid, prompt)
            engine.extend(uid, len(prompt))
        chunks = {uid: prompt[:-1] for uid, prompt in enumerate(prompts) if len(prompt) > 1}
        if chunks:
            engine.put(list(chunks), list(chunks.values()))
        return engine.put(range(len(prompts)), [prompt[-1:] for prompt in prompts])

    vocab_size = run([[0]]).shape[1]
    if (where := find_batch_dependence(run, most, vocab_size)) is None:
        logger.info("%s gives a sequence the same bits in any batch", name)
    else:
        logger.warning("%s: alone a sequence has other bits than %s sequences", name, where)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not _multiply(a, b):
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return _product(a, b, None)


def _addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    is_layer = beta == 1 and alpha == 1 and bias.shape == b.shape[1:]
    if not is_layer or not _multiply(a, b) or not _takes(a, bias):
        out = a.new_empty(a.shape[0], b.shape[1])
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=out)
    return _product(a, b, bias.contiguous())


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if not _multiply(a, b) or len(a) != len(b):
        return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))
    from runners.text.gpu.kernels.matmul import batched

    return batched(a, b)


def _grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if x.dim() != 2 or weight.dim() != 3 or offs is None or not _multiply(x, weight):
        # This operator has no variant with `out`, by which the original could be called.
        raise NotImplementedError("with batch_invariant, only groups of rows can be multiplied")
    from runners.text.gpu.kernels.matmul import grouped

    result = grouped(x, weight, offs.to(torch.int32))
    if bias is not None:
        result = result + bias
    return result if out_dtype is None else result.to(out_dtype)


def _mean(
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if not _sums_rows(x, dim):
        dims = None if dim is None else list(dim)
        return torch.mean(x, dims, keepdim, dtype=dtype, out=_reduced(x, dim, keepdim, dtype))
    from runners.text.gpu.kernels.rows import row_sum

    mean = row_sum(x) / x.shape[-1]
    return (mean.unsqueeze(-1) if keepdim else mean).to(dtype or x.dtype)


def _sum(
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if not _sums_rows(x, dim):
        if dtype is None and not x.is_floating_point() and not x.is_complex():
            dtype = torch.int64
        dims = None if dim is None else list(dim)
        return torch.sum(x, dims, keepdim, dtype=dtype, out=_reduced(x, dim, keepdim, dtype))
    from runners.text.gpu.kernels.rows import row_sum

    total = row_sum(x)
    return (total.unsqueeze(-1) if keepdim else total).to(dtype or x.dtype)


_OVERRIDES: dict[str, Callable[..., torch.Tensor]] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "_grouped_mm": _grouped_mm,
    "mean.dim": _mean,
    "sum.dim_IntList": _sum,
}
"""Variants with `out` stay torch's: through them the original is called."""


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`a @ b + bias`; b is the transpose of a layer's weight, if it is as `nn.Linear` has it."""
    from runners.text.gpu.kernels.linear import linear
    from runners.text.gpu.kernels.matmul import batched

    if b.stride(0) == 1:
        with kernels.current_device(a):
            return linear(a, b.t(), bias, _tiles(a.dtype, a.device))
    result = batched(a[None], b[None])[0]
    return result if bias is None else result + bias


def _tiles(dtype: torch.dtype, device: torch.device) -> Sequence[Any]:
    """The tiles that are proved to give the same bits.

    The proof waits for the device. A capture that comes before it gets the base tile, whose bits
    the others have.
    """
    from runners.text.gpu.kernels.linear import BASE, Tile

    if device.type != "cuda":
        # NumPy, which multiplies in the interpreter, gives a row the same bits in any place of 8.
        return [Tile(8, 32)]
    if (dtype, device) not in _proved_tiles:
        if torch.cuda.is_current_stream_capturing():
            return [BASE]
        _proved_tiles[dtype, device] = _prove(dtype, device)
    return _proved_tiles[dtype, device]


_proved_tiles: dict[tuple[torch.dtype, torch.device], Sequence[Any]] = {}


def _prove(dtype: torch.dtype, device: torch.device) -> Sequence[Any]:
    from runners.text.gpu.kernels.linear import BASE, TILES, prove_tiles

    try:
        tiles = prove_tiles(PROOF_SIZE, PROOF_SIZE, dtype, device)
    except RuntimeError as error:
        logger.warning("linear layers in %s: %s", dtype, first_line(error))
        return [BASE]
    logger.info("linear layers in %s: %d of %d tiles serve", dtype, len(tiles), len(TILES))
    return tiles


def _takes(*tensors: torch.Tensor) -> bool:
    from runners.text.gpu.kernels.rows import DTYPES

    dtype = tensors[0].dtype
    return dtype in DTYPES and all(each.dtype == dtype and each.numel() for each in tensors)


def _multiply(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the kernels take `a @ b`; torch says what is wrong with what they do not take."""
    return _takes(a, b) and a.device == b.device and a.shape[-1] == b.shape[-2]


def _sums_rows(x: torch.Tensor, dim: Sequence[int] | None) -> bool:
    """Whether a reduction is over the last dimension only, and long."""
    if not dim or not x.dim() or len(dim) != 1 or dim[0] not in (-1, x.dim() - 1):
        return False
    return x.shape[-1] > SHORT and _takes(x)


def _reduced(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
) -> torch.Tensor:
    """Memory for a reduction."""
    reduced = {d % max(1, x.dim()) for d in (dim or range(x.dim()))}
    shape = [1 if i in reduced else n for i, n in enumerate(x.shape) if keepdim or i not in reduced]
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
