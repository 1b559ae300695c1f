"""Part e: DeepSpeed on one rank and, where there are as many GPUs, on two; NCCL between ranks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache import ROOT
from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.fastgen import family_model, require
from benchmarks.gpu_check.models import small_model
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.serving import StartFailed, serving
from benchmarks.gpu_check.session import Output
from benchmarks.gpu_check.tokens import compare, generate, make_prompts

PROBE_S = 60


def run(check: Context) -> None:
    """NCCL alone, then the engine. Raises: Skipped."""
    gpus = torch.cuda.device_count()
    for ranks in check.device.pick((1, 2), (2,)):
        error = probe(check.device, ranks)
        name = f"a sum over {ranks} ranks on {min(ranks, max(gpus, 1))} devices"
        if error and ranks > gpus and not check.device.dry:
            check.record.skip(name, error)  # NCCL has the right to refuse one GPU twice
        else:
            check.record.check(name, not error, error)
    require({"deepspeed": "deepspeed"})
    folders = {
        "llama": lambda: small_model("llama", torch.float32, check.folder),
        "opt": lambda: family_model("opt", check.folder),
    }
    for kind in check.device.pick(("llama", "opt"), ("opt",)):
        folder = folders[kind]()
        dtype = torch.float32 if kind == "llama" or check.device.dry else torch.bfloat16
        prompts = [p for p in make_prompts(check.device) if len(p) < 300]
        references = generate(check.device, folder, prompts, count=8)
        for name, options in _variants(check.device, kind).items():
            try:
                outputs = asyncio.run(_answers(check.device, folder, prompts, options))
            except StartFailed as error:
                if options.get("tensor_parallel", 1) > gpus and not check.device.dry:
                    check.record.skip(f"{kind}, {name}", str(error)[:300])
                else:
                    check.record.check(f"{kind}, {name}", False, str(error)[:300])
                continue
            compare(check, f"{kind}, {name}", outputs, references, dtype)


def _variants(device: Device, kind: str) -> dict[str, dict[str, Any]]:
    if device.dry:
        return {"one rank": {}}
    variants: dict[str, dict[str, Any]] = {"one rank": {}, "two ranks": {"tensor_parallel": 2}}
    if kind == "opt":
        variants["DeepSpeed's kernels"] = {"deepspeed": {"replace_with_kernel_inject": True}}
    return variants


async def _answers(
    device: Device, folder: Path, prompts: list[list[int]], options: dict[str, Any]
) -> list[Output]:
    async with serving(device, folder, engine="deepspeed", **options) as served:
        return [Output(a.tokens) for a in await served.generate_all(prompts, 8)]


def probe(device: Device, ranks: int) -> str:
    """Sum a tensor over ranks that share the devices there are. Returns the error, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        command = [sys.executable, "-m", __name__, "cpu" if device.dry else "cuda", store]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        errors = []
        for process in processes:
            try:
                _, log = process.communicate(timeout=PROBE_S)
            except subprocess.TimeoutExpired:
                errors.append(f"no result within {PROBE_S} s")
            else:
                if process.returncode:
                    lines = [line.strip() for line in log.splitlines() if line.strip()]
                    errors.append(_cause(lines)[:300])
            finally:
                process.kill()
                process.wait()
    return errors[0] if errors else ""


def _cause(lines: list[str]) -> str:
    """What NCCL says of its error, else the last line."""
    named = [line for line in lines if "uplicate GPU" in line]
    return (named or lines or ["it ended without a message"])[-1]


def main() -> None:
    """One rank of the probe."""
    import torch.distributed as dist

    kind, store, rank, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
    )
    tensor = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    expected = ranks * (ranks + 1) / 2
    if not bool((tensor == expected).all()):
        raise ValueError(f"the sum is {float(tensor[0])}, expected {expected}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
