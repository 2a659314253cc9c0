"""What a generation is asked for: labels, seeds and tokens to keep, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smalto.core.errors import InputError, describe
from smalto.generator.config import GeneratorConfig

Labels = Tensor | Sequence[int] | int | None


@dataclass(frozen=True)
class Fixed:
    """Tokens that a generation keeps, for in-painting.

    Attributes:
        tokens: int64 [B, L], or [1, L] for all images.
        mask: bool of the same shape, True for the tokens to keep.
    """

    tokens: Tensor
    mask: Tensor

    def rows(self, chosen: slice) -> Fixed:
        """Return those of some images."""
        if len(self.tokens) == 1:
            return self
        return Fixed(self.tokens[chosen], self.mask[chosen])


def checked_labels(
    labels: Tensor | None, number: int, config: GeneratorConfig, device: torch.device
) -> Tensor:
    """Return the labels of rows, int64 [B]; ``num_classes`` for no label.

    Raises:
        InputError: they are not ``number`` integers, or one is out of range.
    """
    if labels is None:
        return torch.full((number,), config.num_classes, device=device)
    labels = torch.as_tensor(labels, device=device)
    if labels.shape != (number,) or labels.is_floating_point():
        raise InputError(f"got labels {describe(labels)}; expected {number} integers, one per row.")
    wrong = labels[(labels < 0) | (labels >= config.num_classes)]
    if len(wrong):
        expected = f"0 to {config.num_classes - 1}" if config.num_classes else "none"
        raise InputError(f"got label {int(wrong[0])}; expected {expected}.")
    return labels.long()


def labels_and_seeds(
    labels: Labels,
    num_images: int | None,
    seeds: Sequence[int] | Tensor | None,
    config: GeneratorConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return one label and one seed per image, int64 [B] each.

    Raises:
        InputError: their numbers differ, or a label is out of range.
    """
    if num_images is not None and not isinstance(num_images, int):
        raise InputError(f"got num_images={num_images!r}; expected an integer.")
    if isinstance(labels, int):
        labels = [labels] * (1 if num_images is None else num_images)
    if labels is not None:
        labels = _integers("labels", labels)
    seeds = None if seeds is None else _integers("seeds", seeds)
    numbers = {len(values) for values in (labels, seeds) if values is not None}
    numbers |= {num_images} if num_images is not None else set()
    if len(numbers) > 1 or min(numbers, default=1) < 1:
        raise InputError(
            f"got num_images={num_images}, {_number_of(labels)} labels and "
            f"{_number_of(seeds)} seeds; expected the same number of each that is given, at "
            "least 1."
        )
    number = numbers.pop() if numbers else 1
    seeds = torch.randint(2**62, (number,)) if seeds is None else seeds
    return checked_labels(labels, number, config, device), seeds.to(device)


def checked_fixed(
    fixed: Fixed | None, number: int, config: GeneratorConfig, device: torch.device
) -> Fixed | None:
    """Return the tokens to keep, on the device of the generator.

    Raises:
        InputError: they are not tokens of ``number`` of its images.
    """
    if fixed is None:
        return None
    if not isinstance(fixed, Fixed):
        raise InputError(f"got fixed {describe(fixed)}; expected Fixed(tokens, mask).")
    sizes = [(rows, sum(config.steps)) for rows in (1, number)]
    fits = fixed.tokens.shape in sizes and fixed.mask.shape == fixed.tokens.shape
    if not fits or fixed.mask.dtype != torch.bool or fixed.tokens.dtype != torch.int64:
        raise InputError(
            f"got fixed tokens {describe(fixed.tokens)} and mask {describe(fixed.mask)}; "
            f"expected int64 tokens and a bool mask, both {list(sizes[0])} or "
            f"{list(sizes[1])}. Encode the image with generator.tokenizer.encode."
        )
    kept = fixed.tokens[fixed.mask]
    wrong = kept[(kept < 0) | (kept >= config.codebook_size)]
    if len(wrong):
        raise InputError(
            f"got the fixed token {int(wrong[0])}; expected 0 to "
            f"{config.codebook_size - 1}. Encode the image with "
            "generator.tokenizer.encode."
        )
    return Fixed(fixed.tokens.to(device), fixed.mask.to(device))


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """Return labels or seeds as int64 [B]; raise InputError if they are anything else."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(())
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        given = describe(values) if isinstance(values, Tensor) else repr(values)
        raise InputError(f"got {name} {given}; expected a list of integers, one per image.")
    return tensor.long()


def _number_of(values: Tensor | None) -> str:
    return "no" if values is None else str(len(values))
