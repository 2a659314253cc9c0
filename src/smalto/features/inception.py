"""Inception v3, the network that defines the FID.

Szegedy et al. 2015, arXiv 1512.00567; Heusel et al. 2017, arXiv 1706.08500.

The user names the file of weights: ``pt_inception-2015-12-05-6726825d.pth``. It holds the original
network of TensorFlow, as torch-fidelity and pytorch-fid publish it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.core.files import file_sha256
from smalto.core.weight_files import read_weights
from smalto.features.frozen import PooledNetwork, check_state, fold_norm

_NORM_EPS = 1e-3
_SIDE = 299

# (name, input channels, output channels, rows and columns of the kernel) of a convolution
_Convolution = tuple[str, int, int, tuple[int, int]]


class Inception(PooledNetwork):
    """Network of the FID up to its average pool.

    Images are resized to 299 x 299 as in TensorFlow 1.

    Args:
        path: ``pt_inception-2015-12-05-6726825d.pth``, or its state as safetensors.

    Raises:
        DataError: the file cannot be read, or holds other weights.
    """

    name = "inception"
    dim = 2048

    def __init__(self, path: str | Path) -> None:
        state = read_weights(path)
        super().__init__(file_sha256(path))
        state = {
            key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
        }
        check_state(
            state,
            expected_shapes(),
            str(path),
            "weights of the FID's Inception (pt_inception-2015-12-05-6726825d.pth)",
        )
        for name, *_ in _convolutions():
            weight, bias = fold_norm(state[f"{name}.conv.weight"], state, f"{name}.bn", _NORM_EPS)
            self.add(name, weight, bias)

    def pooled(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, 2048]."""
        # Rounded to integers in [0, 255] as in an image file, then scaled as in training.
        x = ((images.float() + 1) * 127.5).round().clamp(0, 255)
        x = (_resize(x, _SIDE) - 128) / 128
        x = self._conv(x, "Conv2d_1a_3x3", 2)
        x = self._conv(x, "Conv2d_2a_3x3")
        x = F.max_pool2d(self._conv(x, "Conv2d_2b_3x3", padding=1), 3, 2)
        x = self._conv(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self._conv(x, "Conv2d_4a_3x3"), 3, 2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block_a(x, name)
        x = self._block_b(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._block_c(x, name)
        x = self._block_d(x, "Mixed_7a")
        x = self._block_e(x, "Mixed_7b", _average)
        # The maximum in the last residual block is a quirk of the original that the FID keeps.
        x = self._block_e(x, "Mixed_7c", lambda maps: F.max_pool2d(maps, 3, 1, 1))
        return x.mean(dim=(2, 3))

    def _conv(
        self, x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> Tensor:
        return F.relu(self.convolve(x, name, stride, padding))

    def _along(self, x: Tensor, *names: str) -> Tensor:
        """Apply convolutions in sequence, each padded to keep the size."""
        for name in names:
            rows, columns = getattr(self, f"{name}.weight".replace(".", "/")).shape[2:]
            x = self._conv(x, name, padding=(rows // 2, columns // 2))
        return x

    def _block_a(self, x: Tensor, b: str) -> Tensor:
        return torch.cat(
            [
                self._conv(x, f"{b}.branch1x1"),
                self._along(x, f"{b}.branch5x5_1", f"{b}.branch5x5_2"),
                self._along(x, *(f"{b}.branch3x3dbl_{n}" for n in (1, 2, 3))),
                self._conv(_average(x), f"{b}.branch_pool"),
            ],
            dim=1,
        )

    def _block_b(self, x: Tensor, b: str) -> Tensor:
        double = self._along(x, f"{b}.branch3x3dbl_1", f"{b}.branch3x3dbl_2")
        return torch.cat(
            [
                self._conv(x, f"{b}.branch3x3", 2),
                self._conv(double, f"{b}.branch3x3dbl_3", 2),
                F.max_pool2d(x, 3, 2),
            ],
            dim=1,
        )

    def _block_c(self, x: Tensor, b: str) -> Tensor:
        return torch.cat(
            [
                self._conv(x, f"{b}.branch1x1"),
                self._along(x, *(f"{b}.branch7x7_{n}" for n in (1, 2, 3))),
                self._along(x, *(f"{b}.branch7x7dbl_{n}" for n in (1, 2, 3, 4, 5))),
                self._conv(_average(x), f"{b}.branch_pool"),
            ],
            dim=1,
        )

    def _block_d(self, x: Tensor, b: str) -> Tensor:
        three = self._conv(self._conv(x, f"{b}.branch3x3_1"), f"{b}.branch3x3_2", 2)
        seven = self._conv(
            self._along(x, *(f"{b}.branch7x7x3_{n}" for n in (1, 2, 3))), f"{b}.branch7x7x3_4", 2
        )
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], dim=1)

    def _block_e(self, x: Tensor, b: str, pool: Callable[[Tensor], Tensor]) -> Tensor:
        three = self._conv(x, f"{b}.branch3x3_1")
        double = self._along(x, f"{b}.branch3x3dbl_1", f"{b}.branch3x3dbl_2")
        return torch.cat(
            [
                self._conv(x, f"{b}.branch1x1"),
                *(self._along(three, f"{b}.branch3x3_2{side}") for side in "ab"),
                *(self._along(double, f"{b}.branch3x3dbl_3{side}") for side in "ab"),
                self._conv(pool(x), f"{b}.branch_pool"),
            ],
            dim=1,
        )


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _resize(x: Tensor, side: int) -> Tensor:
    """Resize bilinearly as in TensorFlow 1.

    Pixel i of the result is sampled at i · (size / side), without the usual offset of half a pixel.
    """
    rows, columns = (_weights(size, side).to(x) for size in x.shape[2:])
    return torch.einsum("oh,bchw,pw->bcop", rows, x, columns)


def _weights(size: int, side: int) -> Tensor:
    place = torch.arange(side, dtype=torch.float64) * (size / side)
    low = place.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    share = place - low
    weights = torch.zeros(side, size, dtype=torch.float64)
    numbers = torch.arange(side)
    weights[numbers, low] += 1 - share
    weights[numbers, high] += share
    return weights


def _convolutions() -> list[_Convolution]:
    one, three, five = (1, 1), (3, 3), (5, 5)
    row, column = (1, 7), (7, 1)
    found: list[_Convolution] = [
        ("Conv2d_1a_3x3", 3, 32, three),
        ("Conv2d_2a_3x3", 32, 32, three),
        ("Conv2d_2b_3x3", 32, 64, three),
        ("Conv2d_3b_1x1", 64, 80, one),
        ("Conv2d_4a_3x3", 80, 192, three),
    ]
    for b, width, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        found += [
            (f"{b}.branch1x1", width, 64, one),
            (f"{b}.branch5x5_1", width, 48, one),
            (f"{b}.branch5x5_2", 48, 64, five),
            (f"{b}.branch3x3dbl_1", width, 64, one),
            (f"{b}.branch3x3dbl_2", 64, 96, three),
            (f"{b}.branch3x3dbl_3", 96, 96, three),
            (f"{b}.branch_pool", width, pool, one),
        ]
    found += [
        ("Mixed_6a.branch3x3", 288, 384, three),
        ("Mixed_6a.branch3x3dbl_1", 288, 64, one),
        ("Mixed_6a.branch3x3dbl_2", 64, 96, three),
        ("Mixed_6a.branch3x3dbl_3", 96, 96, three),
    ]
    for b, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        found += [
            (f"{b}.branch1x1", 768, 192, one),
            (f"{b}.branch7x7_1", 768, inner, one),
            (f"{b}.branch7x7_2", inner, inner, row),
            (f"{b}.branch7x7_3", inner, 192, column),
            (f"{b}.branch7x7dbl_1", 768, inner, one),
            (f"{b}.branch7x7dbl_2", inner, inner, column),
            (f"{b}.branch7x7dbl_3", inner, inner, row),
            (f"{b}.branch7x7dbl_4", inner, inner, column),
            (f"{b}.branch7x7dbl_5", inner, 192, row),
            (f"{b}.branch_pool", 768, 192, one),
        ]
    found += [
        ("Mixed_7a.branch3x3_1", 768, 192, one),
        ("Mixed_7a.branch3x3_2", 192, 320, three),
        ("Mixed_7a.branch7x7x3_1", 768, 192, one),
        ("Mixed_7a.branch7x7x3_2", 192, 192, row),
        ("Mixed_7a.branch7x7x3_3", 192, 192, column),
        ("Mixed_7a.branch7x7x3_4", 192, 192, three),
    ]
    for b, width in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        found += [
            (f"{b}.branch1x1", width, 320, one),
            (f"{b}.branch3x3_1", width, 384, one),
            (f"{b}.branch3x3_2a", 384, 384, (1, 3)),
            (f"{b}.branch3x3_2b", 384, 384, (3, 1)),
            (f"{b}.branch3x3dbl_1", width, 448, one),
            (f"{b}.branch3x3dbl_2", 448, 384, three),
            (f"{b}.branch3x3dbl_3a", 384, 384, (1, 3)),
            (f"{b}.branch3x3dbl_3b", 384, 384, (3, 1)),
            (f"{b}.branch_pool", width, 192, one),
        ]
    return found


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, width, out, kernel in _convolutions():
        shapes[f"{name}.conv.weight"] = (out, width, *kernel)
        shapes |= {
            f"{name}.bn.{part}": (out,)
            for part in ("weight", "bias", "running_mean", "running_var")
        }
    return shapes
