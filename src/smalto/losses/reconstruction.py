"""Terms that compare a reconstruction with its image.

Both are [B, C, H, W] in [-1, 1]; the result is a scalar.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from smalto.core.precision import without_autocast
from smalto.features.frozen import PerceptualNetwork


class L1(nn.Module):
    """Mean absolute difference."""

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return F.l1_loss(reconstruction, images)


class L2(nn.Module):
    """Mean squared difference."""

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return F.mse_loss(reconstruction, images)


class Perceptual(nn.Module):
    """Mean distance between feature maps of a frozen network, in float32 even under autocast."""

    def __init__(self, network: PerceptualNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        with without_autocast(images.device):
            return self.network.distance(reconstruction.float(), images.float()).mean()
