"""Frozen networks: convolutions by name, with weights from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.core.errors import DataError


class FrozenNetwork(nn.Module):
    """Convolutions with fixed weights; gradients propagate to the images.

    Attributes:
        name: name of the network in all output.
        sha256: SHA-256 of the file of its weights.
    """

    name: str

    def __init__(self, sha256: str) -> None:
        super().__init__()
        self.sha256 = sha256

    def add(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Register a convolution's weights under ``name``."""
        self.register_buffer(f"{name}.weight".replace(".", "/"), weight.float(), persistent=False)
        self.register_buffer(
            f"{name}.bias".replace(".", "/"),
            None if bias is None else bias.float(),
            persistent=False,
        )

    def convolve(
        self,
        x: Tensor,
        name: str,
        stride: int = 1,
        padding: tuple[int, int] | int = 0,
        groups: int = 1,
    ) -> Tensor:
        """Apply the convolution ``name``: [B, C, H, W] -> [B, C', h, w]."""
        weight = getattr(self, f"{name}.weight".replace(".", "/"))
        bias = getattr(self, f"{name}.bias".replace(".", "/"))
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)


class PerceptualNetwork(FrozenNetwork, ABC):
    """Network that measures the perceptual distance of two images."""

    @abstractmethod
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, [B], 0 for equal images.

        Both arguments are [B, 3, H, W] in [-1, 1].
        """


class PooledNetwork(FrozenNetwork, ABC):
    """Network whose last feature maps, averaged over the image, serve for Fréchet distances.

    Attributes:
        dim: number of features.
    """

    dim: int

    @abstractmethod
    def pooled(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, dim]."""


def fold_norm(
    weight: Tensor, state: Mapping[str, Tensor], norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one convolution that includes the batch norm after it."""
    gain, shift, mean, variance = (
        state[f"{norm}.{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / torch.sqrt(variance + eps)
    return (weight.double() * scale.view(-1, 1, 1, 1)).float(), (shift - mean * scale).float()


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str, what: str
) -> None:
    """Raise an error if a state dict has missing or unexpected keys, or other shapes.

    Raises:
        DataError: the message gives the first differences.
    """
    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    parts = [f"{', '.join(missing[:3])} missing"] if missing else []
    parts += [f"{', '.join(map(str, foreign[:3]))} unexpected"] if foreign else []
    parts += shapes[:3]
    if parts:
        raise DataError(
            f"{source}: got {'; '.join(parts)}; expected {what}. Name a file of these weights."
        )


def unit_difference(both: Tensor, eps: float) -> Tensor:
    """Return the squared difference of normalized maps: [2B, C, h, w] -> [B, C, h, w].

    The first B maps are compared with the last B. Channel vectors are scaled to length 1.
    """
    a, b = both.chunk(2)
    return (F.normalize(a, dim=1, eps=eps) - F.normalize(b, dim=1, eps=eps)).square()
