"""LPIPS with VGG-16 (Zhang et al. 2018, arXiv 1801.03924), with a file of weights from the user."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.core.files import file_sha256
from smalto.core.weight_files import read_weights
from smalto.features.frozen import PerceptualNetwork, check_state, unit_difference

# (slice, index in VGG, width) of each convolution. LPIPS compares the output of each slice, and
# all slices but the first begin with a max pool.
_CONVOLUTIONS = (
    (1, 0, 64), (1, 2, 64), (2, 5, 128), (2, 7, 128), (3, 10, 256), (3, 12, 256), (3, 14, 256),
    (4, 17, 512), (4, 19, 512), (4, 21, 512), (5, 24, 512), (5, 26, 512), (5, 28, 512),
)  # fmt: skip
_WIDTHS = (64, 128, 256, 512, 512)
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10
MIN_SIDE = 16  # halved four times it is 1 pixel


class LPIPS(PerceptualNetwork):
    """LPIPS, version 0.1, on VGG-16.

    Args:
        path: state dict of ``lpips.LPIPS(net="vgg")``, saved with
            ``torch.save(model.state_dict(), path)`` or as safetensors.

    Raises:
        DataError: the file cannot be read, or holds other weights.
    """

    name = "lpips-vgg"

    def __init__(self, path: str | Path) -> None:
        state = dict(read_weights(path))
        super().__init__(file_sha256(path))
        for key in [key for key in state if isinstance(key, str) and key.startswith("lins.")]:
            del state[key]  # lpips registers its five last layers twice
        check_state(
            state,
            expected_shapes(),
            str(path),
            "LPIPS-VGG weights (lpips.LPIPS(net='vgg').state_dict())",
        )
        for part, number, _ in _CONVOLUTIONS:
            name = f"net.slice{part}.{number}"
            self.add(name, state[f"{name}.weight"], state[f"{name}.bias"])
        for depth in range(len(_WIDTHS)):
            self.add(f"lin{depth}.model.1", state[f"lin{depth}.model.1.weight"], None)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return LPIPS of each pair: two batches [B, 3, H, W] in [-1, 1] -> [B].

        It is the sum over five depths of the squared difference of unit channel vectors, with one
        weight per channel. Sides must be at least 16.
        """
        total = a.new_zeros(len(a), dtype=torch.float32)
        for depth, maps in enumerate(self._maps(torch.cat([a, b]))):
            difference = unit_difference(maps, _EPS)
            total = total + self.convolve(difference, f"lin{depth}.model.1").mean(dim=(1, 2, 3))
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x = (images - shift) / scale
        maps = []
        for place, (part, number, _) in enumerate(_CONVOLUTIONS):
            if place and _CONVOLUTIONS[place - 1][0] != part:
                maps.append(x)
                x = F.max_pool2d(x, 2)
            x = F.relu(self.convolve(x, f"net.slice{part}.{number}", padding=1))
        return [*maps, x]


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "scaling_layer.shift": (1, 3, 1, 1),
        "scaling_layer.scale": (1, 3, 1, 1),
    }
    width = 3
    for part, number, out in _CONVOLUTIONS:
        shapes[f"net.slice{part}.{number}.weight"] = (out, width, 3, 3)
        shapes[f"net.slice{part}.{number}.bias"] = (out,)
        width = out
    return shapes | {
        f"lin{depth}.model.1.weight": (1, out, 1, 1) for depth, out in enumerate(_WIDTHS)
    }
