"""Trains the demo image model from scratch: `python -m model_store_scripts.demo_image.train`.

First the autoencoder, then the denoiser together with the text encoder. The result is the folder
`weights` beside this file, which the repository holds; nobody needs to train in order to use the
model. Takes under an hour on one processor core. A run that was broken off goes on where its last
checkpoint (`--work`) was written.
"""

import argparse
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import l1_loss, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_cosine_schedule_with_warmup

from model_store_scripts.demo_image.build import WEIGHTS, assemble
from model_store_scripts.demo_image.drawing import draw
from model_store_scripts.demo_image.parts import (
    new_autoencoder,
    new_denoiser,
    new_scheduler,
    new_text_encoder,
)
from model_store_scripts.demo_image.tokenizer import train_tokenizer
from model_store_scripts.demo_image.world import Scene, scene

AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_RATE = 1800, 16, 2e-3
DENOISER_STEPS, DENOISER_BATCH, DENOISER_RATE = 5000, 32, 1.2e-3
KL_WEIGHT = 1e-6
UNPROMPTED = 0.1
"""Share of pictures learnt without their prompt, which classifier-free guidance needs
(arXiv:2207.12598)."""
EMA_DECAY = 0.998
_SCENES = 12_000
_TOKENIZER_PROMPTS = 5000
_SAVE_EVERY = 200


class Denoiser(torch.nn.Module):
    """What is trained together: the U-Net and the text encoder that tells it what to paint."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.unet = new_denoiser()
        self.text_encoder = new_text_encoder(tokenizer)

    def forward(self, latents: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> Any:
        """The velocity, for latents (n, 4, 16, 16), times (n) and token ids (n, 32)."""
        states = self.text_encoder(ids).last_hidden_state
        return self.unet(latents, times, states).sample


class Run:
    """The state of one training, which a checkpoint holds."""

    def __init__(self, model: Any, rate: float, steps: int, checkpoint: Path) -> None:
        self.model, self.steps, self.done, self._checkpoint = model, steps, 0, checkpoint
        self.average = AveragedModel(
            model,
            multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY),  # type: ignore[no-untyped-call]
        )
        self.optimizer = torch.optim.AdamW(
            model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, steps // 30, steps)
        if checkpoint.is_file():
            self._load(torch.load(checkpoint, weights_only=True))

    def steps_left(self) -> Iterator[Any]:
        """One progress bar over the steps still to do, saving in between."""
        progress = tqdm(range(self.done, self.steps), initial=self.done, total=self.steps)
        for _ in progress:
            yield progress
            if self.done % _SAVE_EVERY == 0 or self.done == self.steps:
                self._save()

    def learn(self, loss: torch.Tensor) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        self.done += 1

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def _save(self) -> None:
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        partial = self._checkpoint.with_suffix(".part")
        torch.save(state | {"done": self.done}, partial)
        partial.replace(self._checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.done = state["done"]


def pictures(scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    """Drawn scenes as (n, 3, side, side) from -1 to 1."""
    drawn = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous() * 2 - 1


def fit_autoencoder(work: Path, rng: random.Random) -> Any:
    """The trained autoencoder, its latents scaled to unit variance."""
    run = Run(new_autoencoder(), AUTOENCODER_RATE, AUTOENCODER_STEPS, work / "autoencoder.pt")
    for progress in run.steps_left():
        pixels = pictures([scene(rng) for _ in range(AUTOENCODER_BATCH)], rng)
        latents = run.model.encode(pixels).latent_dist
        restored = run.model.decode(latents.sample()).sample
        loss = l1_loss(restored, pixels) + 2 * mse_loss(restored, pixels)
        run.learn(loss + KL_WEIGHT * latents.kl().mean())
        progress.set_postfix(loss=f"{loss.item():.4f}")
    autoencoder: Any = run.average.module
    autoencoder.eval()
    sample = pictures([scene(rng) for _ in range(512)], rng)
    scale = 1 / _latents(autoencoder, sample).std().item()
    autoencoder.register_to_config(scaling_factor=scale)
    return autoencoder


def _latents(autoencoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        parts = torch.split(pixels, 64)
        return torch.cat([autoencoder.encode(part).latent_dist.mode() for part in parts])


def fit_denoiser(autoencoder: Any, tokenizer: Any, work: Path, rng: random.Random) -> Any:
    """The trained U-Net and text encoder, in one `Denoiser`."""
    run = Run(Denoiser(tokenizer), DENOISER_RATE, DENOISER_STEPS, work / "denoiser.pt")
    if run.done == run.steps:
        return run.average.module.eval()
    scenes = [scene(rng) for _ in range(_SCENES)]
    pieces = [
        _latents(autoencoder, pictures(scenes[start : start + 512], rng))
        for start in tqdm(range(0, _SCENES, 512), desc="encoding pictures")
    ]
    stored = torch.cat(pieces) * autoencoder.config.scaling_factor
    scheduler = new_scheduler()
    smooth = 0.0
    for progress in run.steps_left():
        chosen = rng.sample(range(_SCENES), DENOISER_BATCH)
        prompts = ["" if rng.random() < UNPROMPTED else scenes[i].prompt(rng) for i in chosen]
        ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        latents, noise = stored[chosen], torch.randn(DENOISER_BATCH, *stored.shape[1:])
        times = torch.randint(0, scheduler.config.num_train_timesteps, (DENOISER_BATCH,))
        noisy = scheduler.add_noise(latents, noise, times)
        predicted = run.model(noisy, times, ids.input_ids)
        loss = mse_loss(predicted, scheduler.get_velocity(latents, noise, times))
        run.learn(loss)
        smooth = loss.item() if smooth == 0.0 else 0.98 * smooth + 0.02 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}")
    return run.average.module.eval()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains the demo image model from scratch.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights")
    parser.add_argument("--work", type=Path, default=Path("build/demo-image"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pictures and the weights")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)  # noqa: S311 (pictures are no secret)
    prompts = [scene(rng).prompt(rng) for _ in range(_TOKENIZER_PROMPTS)]
    tokenizer = train_tokenizer(prompts, arguments.work / "tokenizer")
    autoencoder = fit_autoencoder(arguments.work, rng)
    denoiser = fit_denoiser(autoencoder, tokenizer, arguments.work, rng)
    pipeline = assemble(copy.deepcopy(autoencoder), denoiser.unet, denoiser.text_encoder, tokenizer)
    pipeline.to(dtype=torch.float16).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
