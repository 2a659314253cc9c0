"""How a gradient passes through the choice of a code. All work on vectors [N, D] and their codes [N, D]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalto.core.errors import InputError


def straight_through(vectors: Tensor, codes: Tensor, noise: Tensor | None = None) -> Tensor:
    """Value of ``codes``, gradient of ``vectors`` (van den Oord et al. 2017, arXiv 1711.00937).

    The order matters: ``vectors - vectors.detach()`` is exactly zero, so the value is bitwise ``codes``;
    the usual ``vectors + (codes - vectors).detach()`` is not.
    """
    return _valued(codes, vectors)


def rotation(vectors: Tensor, codes: Tensor, noise: Tensor | None = None) -> Tensor:
    """Value of ``codes``; the gradient turns and scales as the vector does on its way to the code (Fifty et al. 2024, arXiv 2410.06424).

    ``d quantized / d vectors = λR`` with λ = |c|/|z| and R the rotation in the plane of z and c that turns z to c. Where there is no
    such plane (a zero vector or code, or exactly opposite ones) it is the identity.
    """
    z, c = vectors.detach(), codes.detach()
    z_length, c_length = z.norm(dim=1, keepdim=True), c.norm(dim=1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    z_unit, c_unit = z / z_length.clamp(min=tiny), c / c_length.clamp(min=tiny)
    middle = z_unit + c_unit
    middle_length = middle.norm(dim=1, keepdim=True)
    # R = I - 2 m mᵀ + 2 ĉ ẑᵀ, with m the unit vector half-way: two reflections, so no D x D matrix is needed.
    middle = middle / middle_length.clamp(min=tiny)
    along_middle = (vectors * middle).sum(dim=1, keepdim=True)
    along_z = (vectors * z_unit).sum(dim=1, keepdim=True)
    turned = (vectors - 2 * along_middle * middle + 2 * along_z * c_unit) * (
        c_length / z_length.clamp(min=tiny)
    )
    smallest = torch.finfo(z.dtype).eps
    turns = (z_length > tiny) & (c_length > tiny) & (middle_length > smallest)
    return _valued(codes, torch.where(turns, turned, vectors))


def diveq(vectors: Tensor, codes: Tensor, noise: Tensor | None = None) -> Tensor:
    """DiVeQ (Vali et al. 2025, arXiv 2509.26469): ``z + |c - z|·sg[u]``, where u is the direction of ``c - z + noise``.

    The length of the step is differentiated, its direction is not; so vectors and codes both learn from the task's own gradient, without
    a codebook loss. Without noise the value is exactly ``codes``. With noise (normal; a variance of 1e-3 of the squared error and
    less in the paper) it lies beside.
    """
    step = codes - vectors
    length = _safe_norm(step)
    towards = step.detach() if noise is None else step.detach() + noise
    direction = towards / towards.norm(dim=1, keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
    moved = vectors + length * direction
    return _valued(codes, moved) if noise is None else moved


def _valued(codes: Tensor, gradient: Tensor) -> Tensor:
    """Bitwise the value of ``codes``, with the gradient of ``gradient``."""
    return codes.detach() + (gradient - gradient.detach())


def _safe_norm(vectors: Tensor) -> Tensor:
    """Lengths [N, 1]; at zero the gradient is zero and not NaN."""
    square = vectors.square().sum(dim=1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


@dataclass(frozen=True)
class Estimator:
    """One way to pass a gradient, and what the quantizer must know of it."""

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    exact: bool = True  # False: with noise its value in training is not the code
    teaches_codes: bool = False  # the codes learn through it


ESTIMATORS = {
    "straight_through": Estimator(straight_through),
    "rotation": Estimator(rotation),
    "diveq": Estimator(diveq, exact=False, teaches_codes=True),
}


def estimate(
    name: str, vectors: Tensor, codes: Tensor, valid: Tensor, noise: Tensor | None, training: bool
) -> Tensor:
    """Quantized vectors [N, D] by the estimator called ``name``; where not ``valid`` [N], no gradient reaches the codes.

    ``noise`` [N, D] counts in training only.

    Raises:
        InputError: noise for an estimator that takes none.
    """
    estimator = ESTIMATORS[name]
    if noise is not None and estimator.exact:
        raise InputError(f'noise is for estimator="diveq"; this quantizer has {name!r}.')
    if estimator.teaches_codes:
        codes = torch.where(valid.unsqueeze(1), codes, codes.detach())
    return estimator.apply(vectors, codes, noise if training else None)
