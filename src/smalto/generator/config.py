"""Settings of a generator."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from smalto.core.config import Config, parse_config
from smalto.core.errors import ConfigError, InputError
from smalto.core.layout import TokenLayout
from smalto.tokenizer import ImageTokenizer


class TransformerConfig(Config):
    """Sizes of a generator's transformer: everything that does not follow from its tokens."""

    depth: int = Field(8, ge=1, le=256, description="transformer blocks")
    width: int = Field(384, ge=1, le=2**16, description="channels of the transformer")
    num_heads: int = Field(6, ge=1, le=1024, description="attention heads; width is a multiple")
    mlp_ratio: float = Field(4.0, gt=0, le=64, description="width of an MLP as a multiple of width")
    shared_adaln: bool = Field(
        False, description="one modulation layer for all blocks (VAR d36), not one per block"
    )
    l2_attention: bool = Field(
        True, description="l2-normalized queries and keys with a learned scale per head"
    )
    label_drop: float = Field(
        0.1, ge=0, le=1, description="share of training rows without their label, for guidance"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after attention and MLPs")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="share of dropped residual branches in the last block"
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads; got {self.width} and {self.num_heads}."
            )
        return self


class GeneratorConfig(TransformerConfig):
    """Settings of a generator: sizes of its transformer, and the layout of its tokens.

    ``for_tokenizer`` fills in what follows from the tokenizer.
    """

    kind: Literal["generator"] = "generator"
    order: Literal["next-scale", "next-token"] = Field(
        "next-scale",
        description="next-scale: all tokens of a grid at once (VAR), for multi-scale tokenizers; "
        "next-token: one by one in raster order",
    )
    grids: tuple[tuple[int, int], ...] = Field(
        min_length=1, description="(rows, columns) of each grid of tokens"
    )
    codebook_size: int = Field(ge=1, description="codes of the tokenizer (V)")
    code_dim: int = Field(ge=1, description="channels of one input vector")
    num_classes: int = Field(0, ge=0, le=2**20, description="labels; 0: unconditional")
    class_names: tuple[str, ...] = Field((), description="names of the labels, if they have any")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must be empty or name all num_classes; got {len(self.class_names)} "
                f"names and {self.num_classes} classes."
            )
        return self

    @property
    def layout(self) -> TokenLayout:
        """The layout of the tokens of one image."""
        return TokenLayout(self.grids)

    @property
    def steps(self) -> tuple[int, ...]:
        """The number of tokens that each step predicts."""
        lengths = self.layout.lengths
        return lengths if self.order == "next-scale" else (1,) * sum(lengths)

    def class_name(self, number: int) -> str:
        """Return the name of a class, or its number as text."""
        return self.class_names[number] if self.class_names else str(number)

    def class_number(self, label: str | int) -> int:
        """Return the number of a class by its number, its name, or a part of its name.

        Raises:
            InputError: no class has this name, or several have.
        """
        if not self.num_classes:
            raise InputError(
                f"got the label {label!r}; this generator was trained without labels. Leave it out."
            )
        names, text = self.class_names, str(label)
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        expected = f"one of {known}" if names else f"0 to {self.num_classes - 1}"
        if text in names:
            return names.index(text)
        if text.isdecimal() and int(text) < self.num_classes:
            return int(text)
        found = [number for number, name in enumerate(names) if text.lower() in name.lower()]
        if len(found) != 1:
            several = f", which is in {', '.join(names[n] for n in found[:5])}" if found else ""
            raise InputError(f"got the label {label!r}{several}; expected {expected}.")
        return found[0]

    @classmethod
    def for_tokenizer(
        cls, tokenizer: ImageTokenizer, image_size: tuple[int, int], **settings: Any
    ) -> GeneratorConfig:
        """Return the settings of a generator of images of one size.

        Args:
            tokenizer: whose tokens are predicted.
            image_size: (height, width) in pixels.
            settings: sizes, such as ``depth=12``.
        """
        layout = tokenizer.layout(*image_size)
        return parse_config(
            cls,
            {
                "order": order_of(tokenizer),
                "grids": layout.grids,
                "codebook_size": tokenizer.quantize.codebook_size,
                "code_dim": input_dim(tokenizer, layout),
                **settings,
            },
            "a generator",
        )

    def check_tokenizer(self, tokenizer: ImageTokenizer) -> None:
        """Raise ConfigError unless a generator of these settings predicts a tokenizer's tokens."""
        rows, columns = self.grids[-1]
        stride = tokenizer.stride
        fitting = self.for_tokenizer(tokenizer, (rows * stride, columns * stride))
        for name in ("order", "grids", "codebook_size", "code_dim"):
            own, expected = getattr(self, name), getattr(fitting, name)
            if own != expected:
                raise ConfigError(
                    f"got a generator with {name} {own}; the tokenizer has {expected}. Use the "
                    "tokenizer with which the generator was trained."
                )


def order_of(tokenizer: ImageTokenizer) -> str:
    """Return the order of a tokenizer's tokens: next-scale if it is multi-scale."""
    is_multi_scale = tokenizer.quantize.configured_layout is not None
    return "next-scale" if is_multi_scale else "next-token"


def input_dim(tokenizer: ImageTokenizer, layout: TokenLayout) -> int:
    """Return the channels of ``idxBl_to_var_input`` (of no images, so nothing is computed)."""
    device = next(tokenizer.parameters()).device
    blocks = [torch.zeros(0, n, dtype=torch.int64, device=device) for n in layout.lengths]
    return tokenizer.quantize.generator_input(blocks, layout).shape[-1]
