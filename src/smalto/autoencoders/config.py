"""Settings of any autoencoder, selected by ``kind``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from smalto.autoencoders.cnn import CNNAutoencoderConfig
from smalto.autoencoders.maskgit_autoencoder import MaskGITAutoencoderConfig
from smalto.autoencoders.simple import SimpleAutoencoderConfig


def _kind(settings: Any) -> Any:
    return (
        settings.get("kind", "simple")
        if isinstance(settings, dict)
        else getattr(settings, "kind", None)
    )


AutoencoderConfig = Annotated[
    Annotated[SimpleAutoencoderConfig, Tag("simple")]
    | Annotated[CNNAutoencoderConfig, Tag("cnn")]
    | Annotated[MaskGITAutoencoderConfig, Tag("maskgit")],
    Discriminator(_kind),
]
