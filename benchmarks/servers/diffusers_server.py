"""Plain diffusers behind FastAPI, as in the documentation of diffusers; a server to measure.

`python -m benchmarks.servers.diffusers_server FOLDER PORT THREADS`. A pipeline is not
thread-safe, so requests are processed one at a time.
"""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import diffusers
import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel


class Body(BaseModel):
    """The fields of Triptych's native route that the benchmark uses."""

    prompt: str
    num_inference_steps: int
    guidance_scale: float
    seed: int


def main() -> None:
    """Serve until killed."""
    folder, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        folder, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    app, lock = FastAPI(), threading.Lock()

    @app.get("/ready")
    def ready() -> str:
        return "yes"

    @app.post("/generate_image")
    def generate_image(body: Body) -> Response:
        generator = torch.Generator().manual_seed(body.seed)
        with lock:
            image = pipeline(
                body.prompt,
                num_inference_steps=body.num_inference_steps,
                guidance_scale=body.guidance_scale,
                generator=generator,
            ).images[0]
        file = io.BytesIO()
        image.save(file, "png")
        return Response(file.getvalue(), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
