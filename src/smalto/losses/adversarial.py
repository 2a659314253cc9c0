"""The discriminator and its losses (Isola et al. 2017, arXiv 1611.07004; spectral norm: Miyato et al. 2018, arXiv 1802.05957)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from smalto.core import distributed

MIN_LAST_SIDE = 3  # of the map before the two last convolutions


class PatchDiscriminator(nn.Module):
    """Images [B, C, H, W] in [-1, 1] -> one number per patch [B, 1, h, w], high for real ones.

    Strided 4x4 convolutions, every one divided by its largest singular value, so that the answer changes slowly with the image.

    Args:
        in_channels: C.
        width: channels of the first layer; every further strided one has twice as many, up to 8 times.
        layers: strided layers.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [in_channels] + [width * min(2**n, 8) for n in range(layers + 1)]
        body: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if number < layers else 1
            body += [
                spectral_norm(nn.Conv2d(before, after, 4, stride, 1)),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.body = nn.Sequential(*body, spectral_norm(nn.Conv2d(widths[-1], 1, 4, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimizes, from its answers: 2 when it knows nothing, 0 when it tells all apart with certainty."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def fooling(fake: Tensor) -> Tensor:
    """What the tokenizer minimizes, from the discriminator's answers to its reconstructions."""
    return -fake.mean()


@torch.no_grad()
def adaptive_factor(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, largest: float
) -> tuple[Tensor, Tensor]:
    """By what to multiply the adversarial gradient so that it is as long as the reconstruction's (Esser et al. 2021, arXiv 2012.09841).

    Args:
        reconstruction_gradient, adversarial_gradient: of both terms at the weights of the last layer, in this process.
        largest: upper limit. Without one, a discriminator that has no opinion yet is listened to ten thousand times too closely.

    Returns:
        the factor, and the length of the adversarial gradient relative to the reconstruction's before it, both of what all processes
        saw together.
    """
    both = distributed.all_reduce(torch.stack([reconstruction_gradient, adversarial_gradient]))
    reconstruction, adversarial = both.flatten(1).norm(dim=1)
    factor = (reconstruction / adversarial.clamp(min=1e-12)).clamp(max=largest)
    return factor, adversarial / reconstruction.clamp(min=1e-12)
