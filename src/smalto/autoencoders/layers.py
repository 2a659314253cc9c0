"""Layers of the autoencoders. All work on maps [B, C, h, w]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smalto.autoencoders.locality import input_range
from smalto.core.errors import RunError

NUM_GROUPS = 32
_INITIALIZED_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def check_layer_initialization() -> None:
    """Raise RunError if this process builds torch's layers without initializing their weights.

    VAR's ``build_vae_var`` replaces ``reset_parameters`` of the classes in ``torch.nn`` by a
    function that does nothing. Layers built later in that process hold uninitialized memory. The
    check passes under ``torch.device("meta")``, where weights are loaded after the build.

    Raises:
        RunError: the ``reset_parameters`` of a layer is not the one that torch defines.
    """
    if torch.get_default_device().type == "meta":
        return
    for layer in _INITIALIZED_LAYERS:
        reset = layer.reset_parameters
        if getattr(reset, "__module__", None) != layer.__module__:
            found = getattr(reset, "__qualname__", repr(reset))
            raise RunError(
                f"torch.nn.{layer.__name__}.reset_parameters was replaced in this process: got "
                f"{found}; expected torch's own function, because a new tokenizer would have "
                "uninitialized weights. VAR's build_vae_var replaces it. Build the tokenizer "
                "before VAR's models, or in a separate process."
            )


class GroupNorm(nn.GroupNorm):
    """Group normalization that accepts one value per group, which torch refuses in training.

    The output for a map of one position and one channel per group is the bias.

    Args:
        width: channels.
        window: side of the square of positions whose statistics normalize a position (TLC, Chu et
            al. 2022, arXiv 2112.04491); at the borders the nearest whole window. 0: the whole map.
        groups: number of groups of channels.
    """

    def __init__(self, width: int, window: int = 0, groups: int = NUM_GROUPS) -> None:
        super().__init__(groups, width, eps=1e-6)
        self.window = window
        self.is_local = window > 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.window or max(x.shape[2:]) <= self.window:
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        groups = x.unflatten(1, (self.num_groups, -1)).float()
        mean = _window_mean(groups.mean(dim=2), self.window)
        square = _window_mean(groups.square().mean(dim=2), self.window)
        scale = (square - mean.square()).clamp_min(0).add(self.eps).rsqrt()
        normalized = ((groups - mean.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1, 2).to(x.dtype)
        return normalized * self.weight[:, None, None] + self.bias[:, None, None]

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        return first - self.window, last + self.window


def _window_mean(maps: Tensor, window: int) -> Tensor:
    """Return for each position of maps [B, G, h, w] the mean over its window."""
    for dim in (2, 3):
        length = maps.shape[dim]
        side = min(window, length)
        sums = F.pad(maps.double().cumsum(dim), (1, 0) if dim == 3 else (0, 0, 1, 0))
        whole = sums.narrow(dim, side, length - side + 1) - sums.narrow(dim, 0, length - side + 1)
        starts = torch.arange(length, device=maps.device) - side // 2
        maps = whole.index_select(dim, starts.clamp(0, length - side)) / side
    return maps.float()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels at each position (arXiv 1910.07467).

    Each position is divided by the root mean square of its channels, so the layer does not look at
    other positions.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))  # type: ignore[no-untyped-call]
        return out


class _RMSNorm(torch.autograd.Function):
    """The norm with its own gradient, which needs half the passes over memory of autograd's.

    A training step of a small VQGAN network (stride 8, ch 64) in bf16 and channels-last: 623 ms,
    with autograd's gradient 702 ms, with group norm 649 ms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if x.is_contiguous(memory_format=torch.channels_last):
            squares = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).square()
        else:  # the norm is five times as slow if channels are not innermost
            squares = x.square().sum(dim=1, keepdim=True, dtype=dtype)
        scale = (squares / x.shape[1] + 1e-6).rsqrt().to(x.dtype)
        ctx.save_for_backward(x, scale, weight)
        return torch.addcmul(bias[:, None, None], x * scale, weight[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, weight = ctx.saved_tensors
        normalized = x * scale
        product = gradient * normalized
        weight = weight[:, None, None]
        mean = (product * weight).sum(dim=1, keepdim=True) / x.shape[1]
        of_x = torch.addcmul(gradient * weight, normalized, mean, value=-1).mul_(scale)
        return of_x, product.sum((0, 2, 3)), gradient.sum((0, 2, 3))


class SpatialNorm(nn.Module):
    """Group normalization whose scale and shift follow from the quantized latents.

    MoVQ (Zheng et al. 2022, arXiv 2209.09002).

    Args:
        width: channels of the map.
        latent_dim: channels of the quantized latents.
    """

    is_local = False

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(width)
        self.conv_y = nn.Conv2d(latent_dim, width, 1)
        self.conv_b = nn.Conv2d(latent_dim, width, 1)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = F.interpolate(latents, size=x.shape[2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(latents) + self.conv_b(latents)


class Affine(nn.Module):
    """Scale and shift per channel: batch normalization whose statistics no longer change."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


Norm = Callable[[int], nn.Module]  # width -> a normalization


def conv3x3(in_width: int, out_width: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_width, out_width, 3, padding=1)


def _init_zero(convolution: nn.Conv2d) -> None:
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)


class ResBlock(nn.Module):
    """Residual block: norm, SiLU and a 3x3 convolution, twice.

    The shortcut is a 1x1 convolution if the width changes. The last convolution is initialized to
    zero (Goyal et al. 2017, arXiv 1706.02677), so that the block starts as its shortcut: 1.7 dB
    more after 300 steps of var-small than torch's default initialization. ``condition`` is passed
    to the norms.
    """

    def __init__(
        self, in_width: int, out_width: int, dropout: float = 0.0, norm: Norm = GroupNorm
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_width)
        self.conv1 = conv3x3(in_width, out_width)
        self.norm2 = norm(out_width)
        self.conv2 = conv3x3(out_width, out_width)
        self.dropout = nn.Dropout(dropout)
        _init_zero(self.conv2)
        self.nin_shortcut = (
            nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)
        )

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, *condition), inplace=True))
        h = self.conv2(self.dropout(F.silu(self.norm2(h, *condition), inplace=True)))
        return h.add_(self.nin_shortcut(x))

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        for layer in (self.conv2, self.norm2, self.conv1, self.norm1):
            first, last = input_range(layer, first, last)
        return first, last


class AttentionBlock(nn.Module):
    """Self-attention over all positions with one head of ``width`` channels, plus a shortcut.

    The output projection is initialized to zero, so that the block starts as the identity.
    """

    is_local = False

    def __init__(self, width: int, norm: Norm = GroupNorm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)
        _init_zero(self.proj_out)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        # The fused kernels need channels as the innermost dimension, and otherwise torch keeps all
        # positions x positions weights: +750 instead of +26 MiB at 96 x 96, 64 channels, float32.
        qkv = self.qkv(self.norm(x, *condition)).contiguous(memory_format=torch.channels_last)
        # [B, 3, 1 head, positions, C]
        q, k, v = qkv.view(batch, 3, 1, width, height * columns).transpose(3, 4).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj_out(h.transpose(2, 3).reshape(batch, width, height, columns)).add_(x)


class Downsample(nn.Module):
    """Half the height and width: a 3x3 convolution of stride 2, padded at the right and bottom.

    Args:
        in_width, out_width: channels.
        shortcut: add the input, whose 2x2 patches become channels and whose channels are averaged
            in groups (DC-AE, Chen et al. 2024, arXiv 2410.10733).
    """

    def __init__(self, in_width: int, out_width: int, shortcut: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3, stride=2)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.pad(x, (0, 1, 0, 1)))
        if not self.shortcut:
            return h
        return h + F.pixel_unshuffle(x, 2).unflatten(1, (h.shape[1], -1)).mean(dim=2)

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        return 2 * first, 2 * last + 2


class Upsample(nn.Module):
    """Twice the height and width: nearest-neighbor upsampling, then a 3x3 convolution.

    Several of the nine taps always meet copies of one pixel. ``fold`` adds those taps up in
    advance. Four 2x2 convolutions of the small map result, one for each position in a 2x2 patch of
    the large map, with less than half of the multiplications.

    Args:
        in_width, out_width: channels.
        shortcut: add the input, whose channels are repeated and become 2x2 patches (DC-AE).
    """

    folded: Tensor | None

    def __init__(self, in_width: int, out_width: int, shortcut: bool = False) -> None:
        super().__init__()
        self.conv = conv3x3(in_width, out_width)
        self.shortcut = shortcut
        self.register_buffer("folded", None, persistent=False)  # [4·C, C, 2, 2]

    @torch.no_grad()
    def fold(self) -> None:
        """Switch to the folded form, for inference: it does not follow later weight updates."""
        # Output position 0 meets the pixel before it and its own, position 1 its own and the next;
        # along rows first, then along columns.
        first, middle, last = self.conv.weight.unbind(dim=2)
        rows = torch.stack(
            [torch.stack([first, middle + last], dim=2), torch.stack([first + middle, last], dim=2)]
        )
        first, middle, last = rows.unbind(dim=4)
        positions = torch.stack(
            [
                torch.stack([first, middle + last], dim=4),
                torch.stack([first + middle, last], dim=4),
            ],
            dim=1,
        )
        self.folded = positions.flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self._convolve(x)
        if not self.shortcut:
            return h
        return h + F.pixel_shuffle(x.repeat_interleave(4 * h.shape[1] // x.shape[1], dim=1), 2)

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        return (first - 1) // 2, (last + 1) // 2

    def _convolve(self, x: Tensor) -> Tensor:
        if self.folded is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert self.conv.bias is not None
        batch, _, rows, columns = x.shape
        width = self.conv.out_channels
        bias = self.conv.bias.repeat(4)
        positions = F.conv2d(x, self.folded, bias, padding=1).split(width, dim=1)
        out = torch.empty(
            batch,
            width,
            2 * rows,
            2 * columns,
            dtype=positions[0].dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for number, values in enumerate(positions):
            down, right = divmod(number, 2)
            out[:, :, down::2, right::2] = values[:, :, down : down + rows, right : right + columns]
        return out


class ToPatches(nn.PixelUnshuffle):
    """Patches of side ``downscale_factor`` become channels."""

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        return (
            first * self.downscale_factor,
            last * self.downscale_factor + self.downscale_factor - 1,
        )


class FromPatches(nn.PixelShuffle):
    """Channels become patches of side ``upscale_factor``."""

    def input_range(self, first: int, last: int) -> tuple[int, int]:
        return first // self.upscale_factor, last // self.upscale_factor
