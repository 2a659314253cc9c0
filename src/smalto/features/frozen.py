"""Networks that do not learn: convolutions by name, out of a file of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.core.errors import DataError


class FrozenNetwork(nn.Module):
    """Convolutions with fixed weights; gradients go through to the images.

    Attributes:
        name: what every output calls it.
        sha256: of the file that its weights come from.
    """

    name: str

    def __init__(self, sha256: str) -> None:
        super().__init__()
        self.sha256 = sha256

    def add(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Keep a convolution's weights under ``name``."""
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
        weight, bias = (
            getattr(self, f"{name}.{kind}".replace(".", "/")) for kind in ("weight", "bias")
        )
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)


class PerceptualNetwork(FrozenNetwork, ABC):
    """A network that tells how different two images look."""

    @abstractmethod
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two batches [B, 3, H, W] in [-1, 1]: a distance per pair, [B], 0 for equal ones."""


class PooledNetwork(FrozenNetwork, ABC):
    """A network whose last maps, averaged over the image, describe it for Fréchet distances."""

    dim: int

    @abstractmethod
    def pooled(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, dim]."""


def fold_norm(
    weight: Tensor, state: Mapping[str, Tensor], norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    """A convolution's weight and the batch norm after it as one convolution: weight, bias."""
    gain, shift, mean, variance = (
        state[f"{norm}.{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / torch.sqrt(variance + eps)
    return (weight.double() * scale.view(-1, 1, 1, 1)).float(), (shift - mean * scale).float()


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str, what: str
) -> None:
    """Compare keys and shapes; keys that are not expected are errors too.

    Raises:
        DataError: names the first differences.
    """
    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    shapes = [
        f"{key} is {list(state[key].shape)} and should be {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    parts = [f"it lacks {', '.join(missing[:3])}"] if missing else []
    parts += [f"it has {', '.join(map(str, foreign[:3]))} too much"] if foreign else []
    parts += shapes[:3]
    if parts:
        raise DataError(f"{source} holds no {what}: {'; '.join(parts)}.")


def unit_difference(both: Tensor, eps: float) -> Tensor:
    """Squared difference of the two halves of maps [2B, C, h, w] whose vectors are scaled to length 1."""
    a, b = both.chunk(2)
    return (F.normalize(a, dim=1, eps=eps) - F.normalize(b, dim=1, eps=eps)).square()
