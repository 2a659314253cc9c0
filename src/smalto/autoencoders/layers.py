"""Layers of the autoencoders. All work on maps [B, C, h, w]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def normalize(width: int) -> nn.GroupNorm:
    """Return the normalization of VQGAN for ``width`` channels."""
    return GroupNorm(NUM_GROUPS, width, eps=1e-6)


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
    more after 300 steps of var-small than torch's default initialization.
    """

    def __init__(self, in_width: int, out_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = normalize(in_width)
        self.conv1 = conv3x3(in_width, out_width)
        self.norm2 = normalize(out_width)
        self.conv2 = conv3x3(out_width, out_width)
        self.dropout = nn.Dropout(dropout)
        _init_zero(self.conv2)
        self.nin_shortcut = (
            nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=True)))
        return h.add_(self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention over all positions with one head of ``width`` channels, plus a shortcut.

    The output projection is initialized to zero, so that the block starts as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = normalize(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)
        _init_zero(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, columns = x.shape
        # The fused kernels need channels as the innermost dimension, and otherwise torch keeps all
        # positions x positions weights: +750 instead of +26 MiB at 96 x 96, 64 channels, float32.
        qkv = self.qkv(self.norm(x)).contiguous(memory_format=torch.channels_last)
        # [B, 3, 1 head, positions, C]
        q, k, v = qkv.view(batch, 3, 1, width, height * columns).transpose(3, 4).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj_out(h.transpose(2, 3).reshape(batch, width, height, columns)).add_(x)


class Downsample(nn.Module):
    """Half the height and width: a 3x3 convolution of stride 2, padded at the right and bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: nearest-neighbor upsampling, then a 3x3 convolution.

    Several of the nine taps always meet copies of one pixel. ``fold`` adds those taps up in
    advance. Four 2x2 convolutions of the small map result, one for each position in a 2x2 patch of
    the large map, with less than half of the multiplications.
    """

    folded: Tensor | None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, width)
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
        if self.folded is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert self.conv.bias is not None
        batch, width, rows, columns = x.shape
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
