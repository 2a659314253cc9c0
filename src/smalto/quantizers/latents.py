"""Conversion between latent maps [B, C, h, w] and the vectors [N, D] that are quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalto.core.errors import InputError, describe

LARGEST = 1e15  # absolute value in a latent vector: the square of larger ones could overflow


def to_vectors(
    latent_map: Tensor, dtype: torch.dtype, project_in: nn.Module
) -> tuple[Tensor, Tensor]:
    """Map [B, C, h, w] -> vectors [B*h*w, D] behind ``project_in``, and validity, bool [B*h*w].

    The vectors have dtype ``dtype``; those that are not valid are 0.
    """
    vectors = as_vectors(latent_map).to(dtype)
    # Masked on both sides: 0 * NaN would reach the gradient of the projection's weight, and the
    # gradient of invalid vectors would reach its bias.
    valid = usable(vectors)
    projected = project_in(keep(vectors, valid))
    valid = valid & usable(projected)
    return keep(projected, valid), valid


def usable(vectors: Tensor) -> Tensor:
    """Return which vectors [N, C, ...] are valid, bool [N, ...].

    A valid vector holds only finite values with an absolute value below 1e15.
    """
    return (vectors.detach().abs() < LARGEST).all(dim=1)


def as_vectors(latent_map: Tensor) -> Tensor:
    """Map [B, C, h, w] -> vectors [B*h*w, C]."""
    return latent_map.permute(0, 2, 3, 1).reshape(-1, latent_map.shape[1])


def as_map(vectors: Tensor, like: Tensor) -> Tensor:
    """Vectors [B*h*w, C] -> map [B, C, h, w] with the B, h and w of ``like``."""
    batch, _, height, width = like.shape
    return vectors.view(batch, height, width, vectors.shape[1]).permute(0, 3, 1, 2).contiguous()


def keep(vectors: Tensor, valid: Tensor) -> Tensor:
    """Return vectors [N, D, ...] with zeros and without gradient if not ``valid`` [N, ...]."""
    return torch.where(valid.unsqueeze(1), vectors, 0)


def masked_mse(vectors: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Return the mean squared error over the ``valid`` [N, ...] vectors of [N, D, ...].

    The result is a scalar; 0 if none is valid.
    """
    count = (valid.sum() * vectors.shape[1]).clamp(min=1)
    return keep(vectors - targets, valid).square().sum() / count


def noise_map(
    noise: Tensor | None, latent_map: Tensor, code_dim: int, dtype: torch.dtype
) -> Tensor | None:
    """Return noise [B, D, h, w] in ``dtype``, or None if there is none.

    Raises:
        InputError: its shape does not fit the latents.
    """
    if noise is None:
        return None
    batch, _, height, width = latent_map.shape
    if not isinstance(noise, Tensor) or noise.shape != (batch, code_dim, height, width):
        raise InputError(
            f"got {describe(noise)}; noise must be {[batch, code_dim, height, width]}."
        )
    return noise.to(dtype)


def noise_vectors(
    noise: Tensor | None, latent_map: Tensor, code_dim: int, dtype: torch.dtype
) -> Tensor | None:
    """Return noise [B, D, h, w] as vectors [B*h*w, D] in ``dtype``; see ``noise_map``."""
    checked = noise_map(noise, latent_map, code_dim, dtype)
    return None if checked is None else as_vectors(checked)


class Projection(nn.Linear):
    """Linear layer that computes in the dtype of its input."""

    def forward(self, vectors: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.linear(
            vectors, self.weight.to(vectors.dtype), self.bias.to(vectors.dtype)
        )


def projections(latent_dim: int, code_dim: int | None) -> tuple[nn.Module, nn.Module]:
    """Build the projections into and out of the code space; identities if ``code_dim`` is None.

    The second is initialized as the transpose of the first, so it inverts it on a random subspace.
    With two unrelated random matrices the decoder must first learn to read the codes, which costs
    0.3 dB after 400 steps.
    """
    if code_dim is None:
        return nn.Identity(), nn.Identity()
    project_in = Projection(latent_dim, code_dim)
    project_out = Projection(code_dim, latent_dim)
    nn.init.orthogonal_(project_in.weight)
    with torch.no_grad():
        project_out.weight.copy_(project_in.weight.T)
    for projection in (project_in, project_out):
        nn.init.zeros_(projection.bias)
    return project_in, project_out
