"""Terms of the training objective, each with a weight that may start late and ramp up."""

from smalto.losses.adversarial import PatchDiscriminator
from smalto.losses.config import AdversarialConfig, LossesConfig, PerceptualConfig, Weight
from smalto.losses.objective import Objective

__all__ = [
    "AdversarialConfig",
    "LossesConfig",
    "Objective",
    "PatchDiscriminator",
    "PerceptualConfig",
    "Weight",
]
