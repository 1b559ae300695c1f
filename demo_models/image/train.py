"""Trains the demo image model from scratch: `python -m demo_models.image.train`.

The autoencoder comes first; then the text encoder, which is trained to classify the scenes that
prompts describe; then the denoiser, conditioned on the trained text encoder. The result is the
folder `weights` next to this file, which is part of the repository: using the model needs no
training. Takes less than an hour on one processor core. An interrupted run resumes from its last
checkpoint (`--work`).
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, l1_loss, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_cosine_schedule_with_warmup

from demo_models.image.build import WEIGHTS, assemble
from demo_models.image.components import (
    new_autoencoder,
    new_denoiser,
    new_scheduler,
    new_text_encoder,
)
from demo_models.image.drawing import draw
from demo_models.image.tokenizer import train_tokenizer
from demo_models.image.world import COLOURS, PLACES, SHAPES, SIZES, Scene, random_scene

AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_RATE = 1800, 16, 2e-3
TEXT_ENCODER_STEPS, TEXT_ENCODER_BATCH, TEXT_ENCODER_RATE = 1200, 64, 1e-3
DENOISER_STEPS, DENOISER_BATCH, DENOISER_RATE = 3200, 32, 1.5e-3
KL_WEIGHT = 1e-6
UNPROMPTED = 0.1
"""Share of images trained on without their prompt, which classifier-free guidance needs
(arXiv:2207.12598)."""
EMA_DECAY = 0.998
ATTRIBUTES: tuple[list[Any], ...] = tuple(
    list(values) for values in (SHAPES, COLOURS, SIZES, PLACES, COLOURS)
)
"""The values of a scene's attributes: the shape's kind, colour, size and place, the background."""
_SCENES = 12_000
_TOKENIZER_PROMPTS = 5000
_SAVE_EVERY = 200


class SceneClassifier(torch.nn.Module):
    """A text encoder with one linear head per attribute of the scene, used only in training."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(tokenizer)
        width = self.text_encoder.config.hidden_size
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(width, len(values)) for values in ATTRIBUTES
        )

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss for token ids (n, 32) and labels (n, 5): the index in each of `ATTRIBUTES`."""
        states = self.text_encoder(ids).last_hidden_state
        # From the end token on, every state depends on the whole prompt.
        complete = (ids == self.text_encoder.config.eos_token_id).cumsum(1) > 0
        rows = complete.nonzero()[:, 0]
        losses = [
            cross_entropy(head(states[complete]), labels[rows, column])
            for column, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()


class Run:
    """The state of one training run, saved to a checkpoint and resumed from it."""

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
        """Yields a progress bar for each remaining step; saves a checkpoint now and then."""
        progress = tqdm(range(self.done, self.steps), initial=self.done, total=self.steps)
        for _ in progress:
            yield progress
            if self.done % _SAVE_EVERY == 0 or self.done == self.steps:
                self._save()

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        self.done += 1

    def _state_holders(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def _save(self) -> None:
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {name: holder.state_dict() for name, holder in self._state_holders().items()}
        partial = self._checkpoint.with_suffix(".part")
        torch.save(state | {"done": self.done}, partial)
        partial.replace(self._checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        for name, holder in self._state_holders().items():
            holder.load_state_dict(state[name])
        self.done = state["done"]


def draw_batch(scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    """Drawn scenes as (n, 3, side, side) from -1 to 1."""
    images = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1


def fit_autoencoder(work: Path, rng: random.Random) -> Any:
    """The trained autoencoder, its latents scaled to unit variance."""
    run = Run(new_autoencoder(), AUTOENCODER_RATE, AUTOENCODER_STEPS, work / "autoencoder.pt")
    for progress in run.steps_left():
        pixels = draw_batch([random_scene(rng) for _ in range(AUTOENCODER_BATCH)], rng)
        latents = run.model.encode(pixels).latent_dist
        restored = run.model.decode(latents.sample()).sample
        loss = l1_loss(restored, pixels) + 2 * mse_loss(restored, pixels)
        run.update(loss + KL_WEIGHT * latents.kl().mean())
        progress.set_postfix(loss=f"{loss.item():.4f}")
    autoencoder: Any = run.average.module
    autoencoder.eval()
    sample = draw_batch([random_scene(rng) for _ in range(512)], rng)
    scale = 1 / _latents(autoencoder, sample).std().item()
    autoencoder.register_to_config(scaling_factor=scale)
    return autoencoder


def _latents(autoencoder: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        parts = torch.split(pixels, 64)
        return torch.cat([autoencoder.encode(part).latent_dist.mode() for part in parts])


def fit_text_encoder(tokenizer: Any, work: Path, rng: random.Random) -> Any:
    """The trained text encoder."""
    checkpoint = work / "text_encoder.pt"
    run = Run(SceneClassifier(tokenizer), TEXT_ENCODER_RATE, TEXT_ENCODER_STEPS, checkpoint)
    for progress in run.steps_left():
        scenes = [random_scene(rng) for _ in range(TEXT_ENCODER_BATCH)]
        loss = run.model(_ids(tokenizer, [s.prompt(rng) for s in scenes]), _labels(scenes))
        run.update(loss)
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return run.model.text_encoder.eval()


def _ids(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = tokens.input_ids
    return ids


def _labels(scenes: list[Scene]) -> torch.Tensor:
    """The index of each scene's value in each of `ATTRIBUTES`, (n, 5)."""
    rows = [
        (s.shape.kind, s.shape.colour, s.shape.size, s.shape.place, s.background) for s in scenes
    ]
    return torch.tensor(
        [
            [values.index(value) for values, value in zip(ATTRIBUTES, row, strict=True)]
            for row in rows
        ]
    )


def fit_denoiser(
    autoencoder: Any, text_encoder: Any, tokenizer: Any, work: Path, rng: random.Random
) -> Any:
    """The trained U-Net.

    The text encoder stays frozen: it would lose what an untrained denoiser does not use.
    """
    run = Run(new_denoiser(), DENOISER_RATE, DENOISER_STEPS, work / "denoiser.pt")
    if run.done == run.steps:
        return run.average.module.eval()
    scenes = [random_scene(rng) for _ in range(_SCENES)]
    chunks = [
        _latents(autoencoder, draw_batch(scenes[start : start + 512], rng))
        for start in tqdm(range(0, _SCENES, 512), desc="encoding images")
    ]
    all_latents = torch.cat(chunks) * autoencoder.config.scaling_factor
    scheduler = new_scheduler()
    average_loss = 0.0
    for progress in run.steps_left():
        indices = rng.sample(range(_SCENES), DENOISER_BATCH)
        prompts = ["" if rng.random() < UNPROMPTED else scenes[i].prompt(rng) for i in indices]
        with torch.no_grad():
            states = text_encoder(_ids(tokenizer, prompts)).last_hidden_state
        latents = all_latents[indices]
        noise = torch.randn(DENOISER_BATCH, *all_latents.shape[1:])
        times = torch.randint(0, scheduler.config.num_train_timesteps, (DENOISER_BATCH,))
        noisy = scheduler.add_noise(latents, noise, times)
        predicted = run.model(noisy, times, states).sample
        loss = mse_loss(predicted, scheduler.get_velocity(latents, noise, times))
        run.update(loss)
        weight = 0.98 if average_loss else 0.0
        average_loss = weight * average_loss + (1 - weight) * loss.item()
        progress.set_postfix(loss=f"{average_loss:.4f}")
    return run.average.module.eval()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains the demo image model from scratch.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights")
    parser.add_argument("--work", type=Path, default=Path("build/demo-image"), help="checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and the weights")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)  # noqa: S311 (images are no secret)
    prompts = [random_scene(rng).prompt(rng) for _ in range(_TOKENIZER_PROMPTS)]
    tokenizer = train_tokenizer(prompts, arguments.work / "tokenizer")
    autoencoder = fit_autoencoder(arguments.work, rng)
    text_encoder = fit_text_encoder(tokenizer, arguments.work, rng)
    unet = fit_denoiser(autoencoder, text_encoder, tokenizer, arguments.work, rng)
    pipeline = assemble(autoencoder, unet, text_encoder, tokenizer)
    pipeline.to(dtype=torch.float16).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
