"""Narrow a model's attention windows for a moment, so that a short probe reaches beyond them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

NARROW = 4
_WINDOWS = ("sliding_window", "attention_chunk_size")


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Every sliding window and attention chunk that is in force is `NARROW` tokens inside.

    Some architectures hand the window to the attention function, some have it in the mask only: the
    former keep it in their modules, both read it from the configuration.
    """
    owners = [model.config, model.config.get_text_config(), *model.modules()]
    changed: list[tuple[object, str, int]] = []
    try:
        for owner in owners:
            for name in _WINDOWS:
                width = getattr(owner, name, None)
                if isinstance(width, int) and not isinstance(width, bool) and width > NARROW:
                    changed.append((owner, name, width))
                    setattr(owner, name, NARROW)
        yield
    finally:
        for owner, name, width in reversed(changed):
            setattr(owner, name, width)
