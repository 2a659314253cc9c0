"""What training minimizes: each term a small module, with a weight that may begin late and grow."""

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
