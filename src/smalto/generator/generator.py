"""Generator: a transformer, and the tokenizer whose tokens it predicts."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from smalto.core.config import parse_config
from smalto.core.device import Precision
from smalto.core.errors import InputError, describe
from smalto.core.model_files import fingerprint
from smalto.generator.config import GeneratorConfig
from smalto.generator.kv_cache import KVCache
from smalto.generator.orders import ORDERS
from smalto.generator.requests import (
    Fixed,
    Labels,
    checked_fixed,
    checked_labels,
    labels_and_seeds,
)
from smalto.generator.sampling import SamplingSettings, guided
from smalto.generator.transformer import Transformer
from smalto.tokenizer import ImageTokenizer

MAX_CACHE_BYTES = 2**30  # of the images that are made at a time


@dataclass(frozen=True)
class Samples:
    """Images that a generator made.

    Attributes:
        idx_Bl: token blocks, one int64 [B, h_k·w_k] per grid.
        images: [B, C, H, W] in [-1, 1].
        seeds: int64 [B].
    """

    idx_Bl: list[Tensor]  # noqa: N815
    images: Tensor
    seeds: Tensor


class Generator(nn.Module):
    """Next-scale or next-token model over the tokens of a tokenizer.

    Args:
        transformer: ``Transformer(GeneratorConfig.for_tokenizer(tokenizer, ...))``.
        tokenizer: frozen in place: evaluation mode, no gradients.

    Attributes:
        config: settings of the transformer.
        transformer: the part that is trained.
        tokenizer: always in evaluation mode.

    Raises:
        ConfigError: the transformer predicts other tokens than those of the tokenizer.
    """

    def __init__(self, transformer: Transformer, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        transformer.config.check_tokenizer(tokenizer)
        self.config = transformer.config
        self.transformer = transformer
        self.tokenizer = tokenizer.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(
        self, labels: Tensor | None, inputs: Tensor, dropped: Tensor | None = None
    ) -> Tensor:
        """Return the logits of every token, given the label and all earlier tokens.

        Args:
            labels: int64 [B]; None: no labels.
            inputs: [B, L - L_1, code_dim], the result of ``tokenizer.idxBl_to_var_input``. With
                next-token prediction the code of the last token may be there; it is not used.
            dropped: bool [B], rows to treat as if they had no label. None: in training mode a
                random share of ``label_drop`` of them, in evaluation mode none.

        Returns:
            [B, L, V] in float32; in float64 if the weights are.
        """
        num_inputs = sum(self.config.steps[1:])
        lengths = {num_inputs, num_inputs + (self.config.order == "next-token")}
        fits = inputs.ndim == 3 and inputs.shape[1] in lengths
        if not fits or inputs.shape[2] != self.config.code_dim:
            raise InputError(
                f"got {describe(inputs)}; expected inputs [B, {num_inputs}, "
                f"{self.config.code_dim}]. Pass the result of tokenizer.idxBl_to_var_input."
            )
        device = self.transformer.head.weight.device
        labels = checked_labels(labels, len(inputs), self.config, device)
        if dropped is None and self.training and self.config.num_classes:
            dropped = torch.rand(len(labels), device=labels.device) < self.config.label_drop
        if dropped is not None:
            labels = labels.masked_fill(dropped, self.config.num_classes)
        return _precise(self.transformer(labels, inputs[:, :num_inputs]))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        rows, columns = self.config.grids[-1]
        return rows * self.tokenizer.stride, columns * self.tokenizer.stride

    def fingerprint(self) -> str:
        """Return the SHA-256 of the transformer and of the tokenizer, in hexadecimal."""
        own = fingerprint(self.config, self.transformer.state_dict())
        return hashlib.sha256(f"{own} {self.tokenizer.fingerprint()}".encode()).hexdigest()

    def for_inference(self, precision: Precision = "float32") -> Generator:
        """Return a copy for generation.

        Args:
            precision: ``"bf16"`` runs the blocks of the transformer, which is most of the work, and
                the decoder in bfloat16. Embeddings, sums over blocks, logits and the quantizer
                keep their precision.
        """
        transformer = copy.deepcopy(self.transformer)
        if precision == "bf16":
            for part in (transformer.blocks, transformer.modulation):
                if part is not None:
                    part.to(torch.bfloat16)
        return Generator(transformer, self.tokenizer.for_inference(precision)).eval()

    def for_grids(self, grids: Sequence[tuple[int, int]]) -> Generator:
        """Return a copy for images of another size, such as another aspect ratio.

        The position embeddings of each grid are resized. The transformer has not been trained for
        that size, so expect worse images the farther it is from the trained one.

        Args:
            grids: (rows, columns) of each grid, as ``tokenizer.layout(height, width).grids``.

        Raises:
            InputError: their number is not that of the trained grids.
            ConfigError: they are not a layout of the tokenizer.
        """
        config = self.config
        if len(grids) != len(config.grids):
            raise InputError(
                f"got {len(grids)} grids; expected {len(config.grids)}, as in training. Use "
                "generator.tokenizer.layout(height, width).grids."
            )
        data = config.model_dump() | {"grids": tuple((int(h), int(w)) for h, w in grids)}
        resized = copy.deepcopy(self.transformer)
        resized.resize(parse_config(GeneratorConfig, data, "grids"))
        tokenizer = copy.deepcopy(self.tokenizer)
        return Generator(resized, tokenizer).train(self.training)

    def new_cache(self, num_images: int) -> KVCache:
        """Return a cache with which ``generate`` makes so many images at a time."""
        transformer = self.transformer
        device = transformer.head.weight.device
        return KVCache(self.config, 2 * num_images, transformer.block_dtype, device)

    def images_at_a_time(self) -> int:
        """Return how many images ``generate`` makes at a time without a cache of the caller."""
        per_row = KVCache.bytes_per_row(self.config, self.transformer.block_dtype)
        return max(1, MAX_CACHE_BYTES // (2 * per_row))

    @torch.no_grad()
    def generate(
        self,
        labels: Labels = None,
        *,
        num_images: int | None = None,
        guidance: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        smooth: bool = False,
        seeds: Sequence[int] | Tensor | None = None,
        fixed: Fixed | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        cache: KVCache | None = None,
        on_scale: Callable[[int, list[Tensor]], None] | None = None,
    ) -> Samples:
        """Make new images.

        Args:
            labels: one integer per image, or one for all; None: no labels.
            num_images: how many, if ``labels`` is one integer or None; default 1.
            guidance: strength t of classifier-free guidance. In step k of K, from 0, the logits are
                ``(1 + s)·conditional - s·unconditional`` with s = t·k/(K - 1), as in VAR, or s = t
                for next-token prediction. 0: none. Without labels it has no effect.
            top_k: draw from this many likeliest codes; 0: from all.
            top_p: draw from the likeliest codes of this probability in sum; 0: from all.
            temperature: divides the logits; 0: the likeliest code is taken.
            smooth: compute inputs and images from mixtures of codes with Gumbel noise, not from the
                drawn ones (VAR's ``more_smooth``). ``idx_Bl`` then decodes to similar images only.
            seeds: one integer per image; None: random ones. An image depends on its label, its seed
                and the settings. In float64 its tokens are the same in any batch; in float32 they
                are as a rule, because sums are rounded in another order.
            fixed: tokens to keep.
            grids: (rows, columns) of each grid, for images of another size than in training; see
                ``for_grids``. A ``cache`` must then be that of ``for_grids(grids)``.
            cache: of ``new_cache``: its size decides how many images are made at a time. None: a
                new one of at most 1 GiB.
            on_scale: called after each grid with the number of images that are finished and the
                token blocks so far of those in the making, for example to show a preview.

        Raises:
            InputError: a value is out of range, or sizes do not fit.
        """
        if grids is not None and tuple(map(tuple, grids)) != self.config.grids:
            return self.for_grids(grids).generate(
                labels,
                num_images=num_images,
                guidance=guidance,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                smooth=smooth,
                seeds=seeds,
                fixed=fixed,
                cache=cache,
                on_scale=on_scale,
            )
        like = self.transformer.head.weight
        labels, seeds = labels_and_seeds(labels, num_images, seeds, self.config, like.device)
        settings = SamplingSettings(guidance, top_k, top_p, temperature, smooth)
        settings.check()
        if smooth and self.config.order != "next-scale":
            raise InputError(
                "got smooth=True for next-token prediction; mixtures are for next-scale "
                "prediction. Use smooth=False."
            )
        fixed = checked_fixed(fixed, len(labels), self.config, like.device)
        if cache is None:
            cache = self.new_cache(min(self.images_at_a_time(), len(labels)))
        cache.check(self.config, 2, self.transformer.block_dtype, like.device)
        device = next(self.tokenizer.parameters()).device
        if device != like.device:
            raise InputError(
                f"got the tokenizer on {device} and the transformer on {like.device}; expected "
                f"one device. Use generator.to({str(like.device)!r})."
            )
        at_a_time = cache.rows // 2
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        parts = []
        try:
            for first in range(0, len(labels), at_a_time):
                rows = slice(first, first + at_a_time)
                kept = None if fixed is None else fixed.rows(rows)
                report = partial(on_scale, first) if on_scale else None
                parts.append(
                    self._generate(labels[rows], seeds[rows], settings, kept, cache, report)
                )
        finally:
            for module, mode in modes:
                module.training = mode
        by_grid = zip(*(part.idx_Bl for part in parts), strict=True)
        images = torch.cat([part.images for part in parts])
        return Samples([torch.cat(blocks) for blocks in by_grid], images, seeds)

    def _generate(
        self,
        labels: Tensor,
        seeds: Tensor,
        settings: SamplingSettings,
        fixed: Fixed | None,
        cache: KVCache,
        report: Callable[[list[Tensor]], None] | None,
    ) -> Samples:
        """Make images together, step by step."""
        config = self.config
        layout = config.layout
        order = ORDERS[config.order](self.tokenizer.quantize, layout)
        inputs = self.transformer.head.weight.new_zeros(len(labels), 0, config.code_dim)
        tokens = labels.new_zeros(len(labels), 0)
        has_guidance = settings.guidance != 0 and bool((labels < config.num_classes).any())
        if has_guidance:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        ends = list(itertools.accumulate(layout.lengths))
        cache.reset()
        for step, length in enumerate(config.steps):
            first = tokens.shape[1]
            positions = torch.arange(first, first + length, device=labels.device)
            inputs = inputs.repeat(2, 1, 1) if has_guidance else inputs
            logits = _precise(self.transformer(labels, inputs, cache))
            if has_guidance:
                strength = order.guidance(settings.guidance, step, len(config.steps))
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, strength)
            logits = settings.filtered(logits)
            drawn = settings.draw(logits, seeds, positions)
            if fixed is not None:
                kept = fixed.mask[:, positions]
                drawn = torch.where(kept, fixed.tokens[:, positions], drawn)
            tokens = torch.cat([tokens, drawn], dim=1)
            codes = order.lookup(step, drawn)
            if settings.smooth:
                codebook = self.tokenizer.get_codebook()
                assert codebook is not None
                progress = step / max(1, len(config.steps) - 1)
                mixtures = settings.mixtures(logits, codebook, progress, seeds, positions)
                codes = mixtures if fixed is None else torch.where(kept[..., None], codes, mixtures)
            next_inputs = order.add(step, codes)
            if report is not None and tokens.shape[1] in ends:
                grids = ends.index(tokens.shape[1]) + 1
                report(list(tokens.split(layout.lengths[:grids], dim=1)))
            if next_inputs is not None:
                inputs = next_inputs
        images = self.tokenizer.decode_latents(order.quantized(tokens))
        return Samples(list(tokens.split(layout.lengths, dim=1)), images, seeds)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
