"""The models a server holds: a text model, an image model, or both."""

from __future__ import annotations

from dataclasses import dataclass

from api.generation import TextModel
from api.painting import ImageModel
from runners.errors import ModelNotServed


@dataclass(frozen=True)
class Served:
    """What there is; at least one of the two."""

    text_model: TextModel | None = None
    image_model: ImageModel | None = None

    @property
    def text(self) -> TextModel:
        """The text model. Raises: ModelNotServed."""
        if self.text_model is None:
            raise ModelNotServed("this server holds no text model, only one for images")
        return self.text_model

    @property
    def image(self) -> ImageModel:
        """The image model. Raises: ModelNotServed."""
        if self.image_model is None:
            raise ModelNotServed("this server holds no image model, only one for text")
        return self.image_model
