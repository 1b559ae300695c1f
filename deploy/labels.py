"""`python -m deploy.labels BENTO`: labels for a bento's OCI image, as options of containerize.

    bentoml containerize BENTO $(python -m deploy.labels BENTO)

BentoML copies nothing of bento.yaml into the image's labels, which are all that a scheduler sees.
"""

from __future__ import annotations

import shlex
import sys

import bentoml
from bentoml.exceptions import BentoMLException

USAGE = "usage: python -m deploy.labels BENTO"


def main() -> int:
    """Print the options on one line; returns the exit code."""
    if len(sys.argv) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        labels = image_labels(sys.argv[1])
    except BentoMLException as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(shlex.join(word for k, v in labels.items() for word in ("--opt", f"label={k}={v}")))
    return 0


def image_labels(tag: str) -> dict[str, str]:
    """Values by label; labels of the OCI image spec where it defines one.

    Raises: BentoMLException if the store has no such bento.
    """
    bento = bentoml.bentos.get(tag)
    service = next(s for s in bento.info.services if s.name == bento.info.entry_service)
    models = sorted({str(model.tag) for model in bento.info.all_models})
    return {
        "org.opencontainers.image.title": bento.tag.name,
        "org.opencontainers.image.version": str(bento.tag.version),
        "org.opencontainers.image.created": f"{bento.info.creation_time:%Y-%m-%dT%H:%M:%SZ}",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "triptych.gpus": f"{service.config.get('resources', {}).get('gpu', 0):g}",
        "triptych.models": "+".join(models) or "none",
    }


if __name__ == "__main__":
    sys.exit(main())
