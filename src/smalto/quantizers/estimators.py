"""How a gradient passes through the choice of a code."""

from torch import Tensor


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """Value of ``codes``, gradient of ``latents`` (van den Oord et al. 2017, arXiv 1711.00937).

    The order matters: ``latents - latents.detach()`` is exactly zero, so the value is bitwise ``codes``;
    the usual ``latents + (codes - latents).detach()`` is not.
    """
    return codes.detach() + (latents - latents.detach())
