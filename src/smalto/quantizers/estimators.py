"""Gradient estimators for the choice of a code, on vectors [N, D] and their codes [N, D]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from smalto.core.errors import InputError


def straight_through(vectors: Tensor, codes: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the value of ``codes`` with the gradient of ``vectors``.

    See van den Oord et al. 2017, arXiv 1711.00937. The order matters: ``vectors -
    vectors.detach()`` is exactly zero, so the value is bitwise ``codes``. The usual ``vectors +
    (codes - vectors).detach()`` is not.
    """
    return _valued(codes, vectors)


def rotation(vectors: Tensor, codes: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the value of ``codes`` with the gradient rotated and scaled as from vector to code.

    See Fifty et al. 2024, arXiv 2410.06424. ``d quantized / d vectors = λR`` with λ = |c|/|z| and R
    the rotation in the plane of z and c that turns z to c. If there is not such a plane (a zero
    vector or code, or exactly opposite ones), it is the identity.
    """
    z = vectors.detach()
    c = codes.detach()
    z_length = z.norm(dim=1, keepdim=True)
    c_length = c.norm(dim=1, keepdim=True)
    tiny = torch.finfo(z.dtype).tiny
    z_unit = z / z_length.clamp(min=tiny)
    c_unit = c / c_length.clamp(min=tiny)
    middle = z_unit + c_unit
    middle_length = middle.norm(dim=1, keepdim=True)
    # R = I - 2 m mᵀ + 2 ĉ ẑᵀ, with m the unit vector half-way between z and c. These are two
    # reflections, so a D x D matrix is not needed.
    middle = middle / middle_length.clamp(min=tiny)
    along_middle = (vectors * middle).sum(dim=1, keepdim=True)
    along_z = (vectors * z_unit).sum(dim=1, keepdim=True)
    turned = vectors - 2 * along_middle * middle + 2 * along_z * c_unit
    turned = turned * (c_length / z_length.clamp(min=tiny))
    smallest = torch.finfo(z.dtype).eps
    turns = (z_length > tiny) & (c_length > tiny) & (middle_length > smallest)
    return _valued(codes, torch.where(turns, turned, vectors))


def diveq(vectors: Tensor, codes: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return ``z + |c - z|·sg[u]``, with u the direction of ``c - z + noise``.

    This is DiVeQ (Vali et al. 2025, arXiv 2509.26469). The length of the step is differentiated,
    its direction is not. So vectors and codes both learn from the task's gradient, without a
    codebook loss. Without noise the value is exactly ``codes``; with noise it lies near them. The
    paper uses normal noise with a variance of at most 1e-3 of the squared error.
    """
    step = codes - vectors
    length = _safe_norm(step)
    towards = step.detach() if noise is None else step.detach() + noise
    direction = towards / towards.norm(dim=1, keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
    moved = vectors + length * direction
    return _valued(codes, moved) if noise is None else moved


def _valued(codes: Tensor, gradient: Tensor) -> Tensor:
    """Return bitwise the value of ``codes``, with the gradient of ``gradient``."""
    return codes.detach() + (gradient - gradient.detach())


def _safe_norm(vectors: Tensor) -> Tensor:
    """Return the lengths [N, 1] of vectors [N, D]; at zero the gradient is zero and not NaN."""
    square = vectors.square().sum(dim=1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


@dataclass(frozen=True)
class Estimator:
    """Gradient estimator and the properties that a quantizer depends on.

    Attributes:
        apply: the function (vectors, codes, noise) -> quantized vectors.
        exact: whether its value is always the code. If False, noise moves the value in training.
        teaches_codes: whether the codes learn from its gradient.
    """

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    exact: bool = True
    teaches_codes: bool = False


ESTIMATORS = {
    "straight_through": Estimator(straight_through),
    "rotation": Estimator(rotation),
    "diveq": Estimator(diveq, exact=False, teaches_codes=True),
}


def estimate(
    name: str, vectors: Tensor, codes: Tensor, valid: Tensor, noise: Tensor | None, training: bool
) -> Tensor:
    """Return quantized vectors [N, D] from the estimator called ``name``.

    Vectors that are not ``valid`` (bool [N]) pass no gradient to the codes. ``noise`` [N, D] is
    used in training only.

    Raises:
        InputError: noise is given for an estimator without noise.
    """
    estimator = ESTIMATORS[name]
    if noise is not None and estimator.exact:
        raise InputError(
            f'got noise with estimator={name!r}; only estimator="diveq" uses noise. '
            "Pass noise=None."
        )
    if estimator.teaches_codes:
        codes = torch.where(valid.unsqueeze(1), codes, codes.detach())
    return estimator.apply(vectors, codes, noise if training else None)
