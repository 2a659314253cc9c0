"""Settings of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from smalto.core.config import Config
from smalto.features.lite0 import Lite0
from smalto.features.lpips import LPIPS
from smalto.losses.adversarial import PatchDiscriminator
from smalto.losses.reconstruction import L1, L2, Perceptual


class Weight(Config):
    """How much a term counts at each step."""

    weight: float = Field(0.0, ge=0, description="factor of the term; 0: it is not computed")
    start: int = Field(0, ge=0, description="steps before it counts at all")
    ramp: int = Field(0, ge=0, description="steps over which it then grows to its weight")

    def at(self, step: int) -> float:
        """The weight at ``step``, counted from 1."""
        if step <= self.start:
            return 0.0
        return self.weight * (min(1.0, (step - self.start) / self.ramp) if self.ramp else 1.0)


class PerceptualConfig(Weight):
    """Distance in the maps of a frozen network."""

    network: Literal["lite0", "lpips-vgg"] = Field(
        "lite0", description="lite0 comes with smalto[eval]; lpips-vgg needs its file"
    )
    weights: str | None = Field(
        None,
        description="of lpips-vgg: the file of torch.save(lpips.LPIPS(net='vgg').state_dict(), file)",
    )

    @model_validator(mode="after")
    def _has_its_weights(self) -> PerceptualConfig:
        if self.weight and self.network == "lpips-vgg" and not self.weights:
            raise ValueError(
                "network lpips-vgg needs weights, a file: where the package lpips is installed, "
                "torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips-vgg.pth') writes it. network = \"lite0\" needs none."
            )
        return self

    def build(self) -> Perceptual:
        if self.network == "lpips-vgg":
            assert self.weights is not None
            return Perceptual(LPIPS(self.weights))
        return Perceptual(Lite0(self.weights))


class AdversarialConfig(Weight):
    """A discriminator that tells reconstructions from images, and how the tokenizer learns from it."""

    lead: int = Field(
        0,
        ge=0,
        description="the last steps before start in which the discriminator learns and the tokenizer does not feel it",
    )
    adaptive: bool = Field(
        True,
        description="weight is a share of the reconstruction's gradient at the last layer, not a fixed factor",
    )
    max_factor: float = Field(
        100.0, gt=0, description="adaptive: the factor is never more than this"
    )
    lr: float = Field(2e-4, gt=0, description="learning rate of the discriminator")
    betas: tuple[float, float] = Field((0.5, 0.9), description="of the discriminator's AdamW")
    width: int = Field(64, ge=1, le=4096, description="channels of the discriminator's first layer")
    layers: int = Field(
        3, ge=1, le=8, description="its strided layers: 3 look at patches of 70 pixels, 2 at 34"
    )

    def learns_at(self, step: int) -> bool:
        """Whether the discriminator learns at ``step``."""
        return bool(self.weight) and step > self.start - self.lead

    def build(self, in_channels: int) -> PatchDiscriminator:
        return PatchDiscriminator(in_channels, self.width, self.layers)


class LossesConfig(Config):
    """All terms. Their sum is what the tokenizer minimizes."""

    l1: Weight = Weight()
    l2: Weight = Weight(weight=1.0)
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    quantizer: Weight = Weight(weight=1.0)

    def build_terms(self) -> dict[str, nn.Module]:
        """The terms that compare a reconstruction with its image and ever count, by name."""
        builders: dict[str, Callable[[], nn.Module]] = {
            "l1": L1,
            "l2": L2,
            "perceptual": self.perceptual.build,
        }
        return {name: build() for name, build in builders.items() if getattr(self, name).weight}

    @model_validator(mode="after")
    def _compares(self) -> LossesConfig:
        if not (self.l1.weight or self.l2.weight or self.perceptual.weight):
            raise ValueError(
                "at least one of l1, l2 and perceptual needs a weight, or nothing says what a good reconstruction is."
            )
        return self
