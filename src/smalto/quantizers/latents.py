"""Between latent maps [B, C, h, w] and the vectors [N, D] that are quantized one by one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalto.core.errors import InputError, describe

LARGEST = 1e15  # of a number in a latent vector


def to_vectors(
    latent_map: Tensor, dtype: torch.dtype, project_in: nn.Module
) -> tuple[Tensor, Tensor]:
    """Map [B, C, h, w] -> vectors [B*h*w, D] of ``dtype`` behind ``project_in``, and which are usable, bool [B*h*w]. The others are 0."""
    vectors = as_vectors(latent_map).to(dtype)
    # Masked on both sides: 0 * NaN would reach the gradient of the projection's weights, and the others' gradient that of its bias.
    valid = usable(vectors)
    projected = project_in(keep(vectors, valid))
    valid = valid & usable(projected)
    return keep(projected, valid), valid


def usable(vectors: Tensor) -> Tensor:
    """Which vectors [N, C, ...] hold no NaN, no infinity and nothing so large that its square would overflow: bool [N, ...]."""
    return (vectors.detach().abs() < LARGEST).all(dim=1)


def as_vectors(latent_map: Tensor) -> Tensor:
    """Map [B, C, h, w] -> vectors [B*h*w, C]."""
    return latent_map.permute(0, 2, 3, 1).reshape(-1, latent_map.shape[1])


def as_map(vectors: Tensor, like: Tensor) -> Tensor:
    """Vectors [B*h*w, C] -> map [B, C, h, w] with the B, h and w of ``like``."""
    batch, _, height, width = like.shape
    return vectors.view(batch, height, width, vectors.shape[1]).permute(0, 3, 1, 2).contiguous()


def keep(vectors: Tensor, valid: Tensor) -> Tensor:
    """Vectors [N, D, ...] with zeros, and no gradient, where not ``valid`` [N, ...]."""
    return torch.where(valid.unsqueeze(1), vectors, 0)


def masked_mse(vectors: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error over the ``valid`` [N, ...] vectors of [N, D, ...]; 0 when there are none."""
    count = (valid.sum() * vectors.shape[1]).clamp(min=1)
    return keep(vectors - targets, valid).square().sum() / count


def noise_map(
    noise: Tensor | None, latent_map: Tensor, code_dim: int, dtype: torch.dtype
) -> Tensor | None:
    """Noise [B, D, h, w] in ``dtype``, or InputError where it does not fit the latents."""
    if noise is None:
        return None
    batch, _, height, width = latent_map.shape
    if not isinstance(noise, Tensor) or noise.shape != (batch, code_dim, height, width):
        raise InputError(
            f"noise must be {[batch, code_dim, height, width]}; got {describe(noise)}."
        )
    return noise.to(dtype)


def noise_vectors(
    noise: Tensor | None, latent_map: Tensor, code_dim: int, dtype: torch.dtype
) -> Tensor | None:
    """The same as vectors [B*h*w, D]."""
    checked = noise_map(noise, latent_map, code_dim, dtype)
    return None if checked is None else as_vectors(checked)


class Projection(nn.Linear):
    """A linear layer that computes in the precision of what it is given."""

    def forward(self, vectors: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.linear(
            vectors, self.weight.to(vectors.dtype), self.bias.to(vectors.dtype)
        )


def projections(latent_dim: int, code_dim: int | None) -> tuple[nn.Module, nn.Module]:
    """The ways into and out of the space of codes; without ``code_dim`` that space is the latents' own.

    They begin as one: out undoes in, on a random subspace. With two unrelated random matrices the decoder first has to learn
    to read the codes: 0.3 dB after 400 steps.
    """
    if code_dim is None:
        return nn.Identity(), nn.Identity()
    project_in, project_out = Projection(latent_dim, code_dim), Projection(code_dim, latent_dim)
    nn.init.orthogonal_(project_in.weight)
    with torch.no_grad():
        project_out.weight.copy_(project_in.weight.T)
    for projection in (project_in, project_out):
        nn.init.zeros_(projection.bias)
    return project_in, project_out
