"""Settings of any quantizer: a union that ``kind`` discriminates."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from smalto.quantizers.logit import LogitVQConfig
from smalto.quantizers.multiscale import MultiScaleVQConfig
from smalto.quantizers.product import ProductVQConfig
from smalto.quantizers.residual import ResidualVQConfig
from smalto.quantizers.vector import VectorQuantizerConfig


def _kind(settings: Any) -> Any:
    if isinstance(settings, dict):
        return settings.get("kind", "vector")
    return getattr(settings, "kind", None)


QuantizerConfig = Annotated[
    Annotated[VectorQuantizerConfig, Tag("vector")]
    | Annotated[ResidualVQConfig, Tag("residual")]
    | Annotated[ProductVQConfig, Tag("product")]
    | Annotated[MultiScaleVQConfig, Tag("multiscale")]
    | Annotated[LogitVQConfig, Tag("logit")],
    Discriminator(_kind),
]
