"""PatchGAN discriminator and its losses (Isola et al. 2017, arXiv 1611.07004).

Spectral norm: Miyato et al. 2018, arXiv 1802.05957.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from smalto.core import distributed

MIN_LAST_SIDE = 3  # side of the map before the last two convolutions


class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator with spectral norm.

    Images [B, C, H, W] in [-1, 1] -> one logit per patch [B, 1, h, w], high for real images.

    It consists of strided 4x4 convolutions. Each is divided by its largest singular value, so that
    the output changes slowly with the image.

    Args:
        in_channels: C.
        width: channels of the first layer. Every further strided layer doubles them, up to 8 times
            the width.
        layers: number of strided layers.
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
        """[B, C, H, W] -> [B, 1, h, w]."""
        return self.body(images)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator from its logits for real and fake images.

    It is 2 if all logits are 0, and 0 if all images are classified with a margin of 1.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def fooling(fake: Tensor) -> Tensor:
    """Return the adversarial loss of the tokenizer from the logits of its reconstructions."""
    return -fake.mean()


@torch.no_grad()
def adaptive_factor(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, largest: float
) -> tuple[Tensor, Tensor]:
    """Return the factor that gives the adversarial gradient the norm of the reconstruction's.

    Esser et al. 2021, arXiv 2012.09841.

    Args:
        reconstruction_gradient, adversarial_gradient: gradients of both terms with respect to the
            weights of the last layer, in this process.
        largest: upper limit of the factor. Without one, the gradient of an untrained discriminator
            would be amplified ten thousand times too much.

    Returns:
        The factor, and the norm of the adversarial gradient relative to the reconstruction's
        before the factor is applied. Both are computed from the gradients of all processes.
    """
    both = distributed.all_reduce(torch.stack([reconstruction_gradient, adversarial_gradient]))
    reconstruction, adversarial = both.flatten(1).norm(dim=1)
    factor = (reconstruction / adversarial.clamp(min=1e-12)).clamp(max=largest)
    return factor, adversarial / reconstruction.clamp(min=1e-12)
