"""Part f: images of two random U-Nets, next to diffusers' own pipeline in the same run.

One has Stable Diffusion 1.5's shape at 512 pixels, the other Stable Diffusion XL's at 1024.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.fastgen import require
from benchmarks.gpu_check.image_models import image_model, prompt_of
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.peers import in_new_process

Pixels = NDArray[np.uint8]
COUNTS = (1, 4, 8)
STEPS, GUIDANCE = 20, 5.0
SIDES = {"sd15": 512, "sdxl": 1024}
SIMILAR_DB = 30.0
"""Peak signal-to-noise ratio from which on two images differ by rounding only."""


def run(check: Context) -> None:
    """Speed and equality of both models, then the kinds of offloading. Raises: Skipped."""
    require({"diffusers": "diffusers", "greenlet": "greenlet"})
    warnings.filterwarnings("ignore", module="diffusers")
    for kind in check.device.pick(("sd15", "sdxl"), ("sd15",)):
        _check_model(check, kind)
        check.device.release()


def _check_model(check: Context, kind: str) -> None:
    device = check.device
    folder = image_model(kind, device, check.folder)
    side = device.pick(SIDES[kind], 32)
    counts = device.pick(COUNTS, (1, 2))
    [(peer, expected)] = _diffusers(device, folder, side, counts)
    if not device.dry:
        torch.cuda.reset_peak_memory_stats()
    with Program(device, folder, max_batch_images=max(counts)) as program:
        program.generate(1, side)
        alone = [program.generate(1, side, seed=s)[0][0] for s in range(device.pick(2, 2))]
        ratios = {}
        for count in counts:
            images, seconds = program.generate(count, side)
            rate = count / seconds
            check.record.figure(f"{kind} {count} together, images_per_second", rate)
            check.record.figure(f"{kind} {count} together, times diffusers", rate / peer[count])
            ratios[count] = f"{rate / peer[count]:.2f} with {count}"
            same = all(np.array_equal(a, b) for a, b in zip(images, alone, strict=False))
            check.record.check(f"{kind} {count} together: same bits as alone", same)
        check.record.headline(f"{kind}, times diffusers: {', '.join(ratios.values())} together")
        similarity = psnr(alone[0], expected)
        check.record.check(
            f"{kind}: the image of diffusers", similarity >= SIMILAR_DB, f"{similarity:.1f} dB"
        )
        if not device.dry:
            check.record.figure(f"{kind} peak_gib", torch.cuda.max_memory_allocated() / 2**30)
    for offload in device.pick(("model", "sequential"), ()):
        _check_offload(check, kind, folder, offload, alone[0])


def _check_offload(check: Context, kind: str, folder: Path, offload: str, expected: Pixels) -> None:
    check.device.release()
    torch.cuda.reset_peak_memory_stats()
    side = SIDES[kind]
    name = f"{kind} cpu_offload {offload}"
    try:
        with Program(check.device, folder, max_batch_images=2, cpu_offload=offload) as program:
            program.generate(1, side)
            images, seconds = program.generate(1, side)
    except Exception as error:
        check.record.check(name, False, f"{type(error).__name__}: {error}"[:300])
        return
    similarity = psnr(images[0], expected)
    check.record.check(name, similarity >= SIMILAR_DB, f"{similarity:.1f} dB")
    check.record.figure(f"{name}, s", seconds)
    check.record.figure(f"{name}, peak_gib", torch.cuda.max_memory_allocated() / 2**30)


class Program:
    """An image program in this process, without a rank; a context that ends with its memory."""

    def __init__(self, device: Device, folder: Path, **options: Any) -> None:
        from runners.config.model import validate
        from runners.engines.images import load_program
        from runners.rank.program import RankContext

        values = {
            "engine": "accelerate",
            "task": "text-to-image",
            "name": folder.name,
            "model_path": folder,
            "device_map": device.pick("cuda:0", "cpu"),
        }
        self._device = device
        self._messages: list[Any] = []
        self._work_dir = tempfile.TemporaryDirectory()
        context = RankContext(
            config=validate(values | options),
            rank=0,
            num_threads=1,
            work_dir=Path(self._work_dir.name),
            emit=self._messages.append,
        )
        self._program: Any = load_program(context)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._program
        self._work_dir.cleanup()
        self._device.release()

    def generate(self, count: int, side: int, *, seed: int = 0) -> tuple[list[Pixels], float]:
        """Images with the seeds from `seed` on that run together, and the seconds they took."""
        from runners.contracts.images import ImageRequest
        from runners.protocol.messages import Submit

        self._messages.clear()
        start = time.perf_counter()
        for number in range(count):
            request = ImageRequest(
                request_id=str(number),
                prompt=prompt_of(seed + number),
                height=side,
                width=side,
                num_inference_steps=self._device.pick(STEPS, 2),
                guidance_scale=GUIDANCE,
                seed=seed + number,
            )
            self._program.receive(Submit(request))
        images: dict[str, Pixels] = {}
        while len(images) < count:
            with torch.no_grad():
                self._program.step()
            images |= self._finished()
        seconds = time.perf_counter() - start
        return [images[str(number)] for number in range(count)], seconds

    def _finished(self) -> dict[str, Pixels]:
        from runners.protocol.messages import Events, Failed

        images = {}
        for message in self._messages:
            if isinstance(message, Failed):
                raise RuntimeError(f"{message.error}: {message.reason}")
            if isinstance(message, Events):
                for event in message.events:
                    image: Any = getattr(event, "image", None)
                    if image is not None:
                        shape = (image.height, image.width, 3)
                        pixels = np.frombuffer(image.data, np.uint8).reshape(shape)
                        images[event.request_id] = pixels
        self._messages.clear()
        return images


@in_new_process
def _diffusers(
    device: Device, folder: Path, side: int, counts: Sequence[int]
) -> Iterator[tuple[dict[int, float], Pixels]]:
    """Images per second of diffusers by the number of prompts in one call, and its first image.

    Triptych changes settings of cuDNN and of torch, so diffusers has a process for each model.
    """
    import diffusers

    warnings.filterwarnings("ignore", module="diffusers")
    pipelines: Any = diffusers.DiffusionPipeline
    dtype = device.pick(torch.bfloat16, torch.float32)
    pipeline = pipelines.from_pretrained(folder, torch_dtype=dtype)
    pipeline.to(device.target)
    pipeline.set_progress_bar_config(disable=True)

    def generate(count: int) -> Any:
        return pipeline(
            [prompt_of(number) for number in range(count)],
            height=side,
            width=side,
            num_inference_steps=device.pick(STEPS, 2),
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for number in range(count)],
        ).images

    rates = {}
    for count in counts:
        generate(count)
        start = time.perf_counter()
        generate(count)
        rates[count] = count / (time.perf_counter() - start)
    yield rates, np.asarray(generate(1)[0])


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf
