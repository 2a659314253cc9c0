"""The transformer of VAR (Tian et al. 2024, arXiv 2404.02905), for any layout of tokens.

It predicts tokens step by step. A step is a grid of tokens (next-scale prediction) or one token
(next-token prediction). Read it from the top: the inputs of the steps are embedded, go through
blocks of attention and MLP, and are projected to logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalto.core.precision import without_autocast
from smalto.generator.config import GeneratorConfig
from smalto.generator.kv_cache import KVCache

FIRST_SCALE, MAX_SCALE = 4.0, 100.0  # of l2-normalized attention, learned per head
EPSILON = 1e-6  # of layer norms

Grids = Sequence[tuple[int, int]]
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Transformer(nn.Module):
    """Labels and inputs of the steps -> logits of the tokens.

    A position attends to all positions of its own step and of those before. The first step's
    tokens have learned inputs. The inputs of a later step are computed from the tokens before it.

    Args:
        config: sizes and layout.

    Attributes:
        gradient_checkpointing: whether training keeps only the input of each block and recomputes
            its activations in the backward pass.
    """

    gradient_checkpointing = False

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last: no label
        self.start_embedding = nn.Parameter(torch.empty(1, config.steps[0], width))
        self.word_embedding = nn.Linear(config.code_dim, width)
        self.level_embedding = nn.Embedding(len(config.grids), width)
        self.position_embedding = nn.Parameter(torch.empty(1, sum(config.steps), width))
        self.modulation = Modulation(width, 6) if config.shared_adaln else None
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_norm = ModulatedNorm(width)
        self.head = nn.Linear(width, config.codebook_size)
        self.reset_parameters()

    def forward(self, labels: Tensor, inputs: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits [B, n, V], in the dtype of the head's weights.

        Args:
            labels: int64 [B]; ``num_classes`` stands for no label.
            inputs: [B, m, code_dim]. Without a cache they are those of the first steps, but the
                very first step has none: n = L_1 + m. With a cache they are those of the step after
                the ones in the cache.
            cache: keys and values of earlier steps; those of this call are added.
        """
        start = 0 if cache is None else cache.length
        condition = self.class_embedding(labels)
        x = self._embed(condition, inputs, start)
        mask = self._mask(start, start + x.shape[1], x.device)
        modulation = condition if self.modulation is None else self.modulation(condition)
        for number, block in enumerate(self.blocks):
            if self.gradient_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, mask, use_reentrant=False)
            else:
                remember = None if cache is None else partial(cache.append, number)
                x = block(x, modulation, mask, remember)
        if cache is not None:
            cache.length += x.shape[1]
        with without_autocast(x.device):
            out: Tensor = self.head(self.head_norm(x.to(self.head.weight.dtype), condition))
        return out

    @torch.no_grad()
    def resize(self, config: GeneratorConfig) -> None:
        """Resize the embeddings of positions, in place, to other grids of the same number."""
        before = self.config.grids
        positions = _resized(self.position_embedding, before, config.grids)
        if config.steps[0] != self.config.steps[0]:
            start = _resized(self.start_embedding, before[:1], config.grids[:1])
            self.start_embedding = nn.Parameter(start)
        self.position_embedding = nn.Parameter(positions)
        self.config = config

    @property
    def block_dtype(self) -> torch.dtype:
        """The dtype of the blocks' weights, and of their keys and values."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attention.qkv.weight.dtype

    def _embed(self, condition: Tensor, inputs: Tensor, start: int) -> Tensor:
        """Return the embedded inputs of the positions from ``start`` on, [B, n, width]."""
        with without_autocast(inputs.device):
            x = self.word_embedding(inputs.to(self.word_embedding.weight.dtype))
            if start == 0:
                x = torch.cat([condition.unsqueeze(1) + self.start_embedding, x], dim=1)
            here = slice(start, start + x.shape[1])
            levels = numbered(self.config.layout.lengths)[here].to(x.device)
            out: Tensor = x + (self.level_embedding(levels) + self.position_embedding[:, here])
        return out

    def _mask(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """Return which of the first ``end`` positions each one from ``start`` on attends to.

        Bool [end - start, end]; None: all of them.
        """
        steps = numbered(self.config.steps)[:end]
        if steps[start] == steps[-1]:
            return None
        return (steps[start:, None] >= steps).to(device)

    def undecayed(self) -> list[Tensor]:
        """Return the parameters that weight decay leaves out, besides norms and biases."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        per_block = [p for block in blocks for p in (block.offset, block.attention.log_scale)]
        embeddings = [self.start_embedding, self.position_embedding, self.level_embedding.weight]
        return [*embeddings, *(p for p in per_block if p is not None)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize weights as VAR's ``init_weights`` does with ``init_std = -1``.

        The biases of queries and values and the scales of attention keep their values.
        """
        std = math.sqrt(1 / self.config.width / 3)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_embedding, std=std)
        nn.init.trunc_normal_(self.position_embedding, std=std)
        self.head.weight.mul_(0.02)
        self.head_norm.modulation.linear.weight.mul_(0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_branches(self.config.depth)


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm that the label modulates (AdaLN).

    Peebles and Xie 2023, arXiv 2212.09748. The modulation is a layer of the block, or with
    ``shared_adaln`` an offset to that of a layer which all blocks share.
    """

    def __init__(self, config: GeneratorConfig, drop_path: float) -> None:
        super().__init__()
        width = config.width
        hidden = round(width * config.mlp_ratio)
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.attention = Attention(config)
        self.mlp = MLP(width, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.modulation = None if config.shared_adaln else Modulation(width, 6)
        self.offset = nn.Parameter(torch.empty(1, 1, 6, width)) if config.shared_adaln else None

    def forward(
        self, x: Tensor, condition: Tensor, mask: Tensor | None, remember: Remember | None = None
    ) -> Tensor:
        """Return x [B, n, width] after the block.

        Args:
            x: [B, n, width].
            condition: [B, width], or with ``shared_adaln`` the shared modulation [B, 1, 6, width].
            mask: bool [n, m], whether a position attends to another; None: to all.
            remember: adds keys and values to the cache and returns all of them.
        """
        if self.modulation is not None:
            modulation = self.modulation(condition)
        else:
            assert self.offset is not None
            modulation = self.offset + condition
        gain_1, gain_2, scale_1, scale_2, shift_1, shift_2 = modulation.unbind(2)
        attended = self.attention(self.norm(x) * (scale_1 + 1) + shift_1, mask, remember)
        x = x + self._drop_rows(attended * gain_1)
        hidden = self.dropout(self.mlp(self.norm(x) * (scale_2 + 1) + shift_2))
        return x + self._drop_rows(hidden * gain_2)

    def _drop_rows(self, branch: Tensor) -> Tensor:
        """Drop the branch of some rows in training (stochastic depth, arXiv 1603.09382)."""
        if not self.training or not self.drop_path:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def reset_branches(self, depth: int) -> None:
        """Initialize both branches of a block small: their gains start near zero."""
        self.attention.project.weight.div_(math.sqrt(2 * depth))
        self.mlp.narrow.weight.div_(math.sqrt(2 * depth))
        if self.modulation is not None:
            parts = self.modulation.linear.weight.unflatten(0, (6, -1))
        else:
            assert self.offset is not None
            width = self.offset.shape[-1]
            parts = self.offset.normal_(std=1 / math.sqrt(width))[0, 0]
        parts[:2].mul_(1e-5)  # gains
        parts[2:].mul_(0.5)


class Attention(nn.Module):
    """Multi-head self-attention.

    With ``l2_attention`` queries and keys have length 1 and a learned scale per head, at most 100.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # a bias of keys would have no effect
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        first = torch.full((1, self.num_heads, 1, 1), math.log(FIRST_SCALE))
        self.log_scale = nn.Parameter(first) if config.l2_attention else None

    def forward(self, x: Tensor, mask: Tensor | None, remember: Remember | None) -> Tensor:
        """Return the values that positions attend to: [B, n, width] -> [B, n, width]."""
        x = x.to(self.qkv.weight.dtype)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, n, d]
        scale = 0.25 / math.sqrt(queries.shape[-1])  # as in VAR
        if self.log_scale is not None:
            scale = 1.0
            sharpness = self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()
            queries = F.normalize(queries, dim=-1) * sharpness.to(queries.dtype)
            keys = F.normalize(keys, dim=-1)
        if remember is not None:
            keys, values = remember(keys, values)
        found = attend(queries, keys, values, mask, scale)
        out: Tensor = self.dropout(self.project(found.transpose(1, 2).flatten(2)))
        return out


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return the values that queries attend to: [B, heads, n, d].

    In training on a CPU it computes in float32: the backward pass of the fused kernel takes 64 ms
    in bfloat16 and 18 ms in float32 (32 rows, 7 heads, 147 tokens, two cores of an AMD EPYC).
    """
    if queries.device.type == "cpu" and queries.requires_grad:
        with without_autocast(queries.device):
            dtype = torch.promote_types(queries.dtype, torch.float32)
            return F.scaled_dot_product_attention(
                queries.to(dtype), keys.to(dtype), values.to(dtype), attn_mask=mask, scale=scale
            )
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)


class MLP(nn.Module):
    """Two layers with a GELU between them: [B, n, width] -> [B, n, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Linear(width, hidden)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.widen.weight.dtype)
        out: Tensor = self.narrow(F.gelu(self.widen(x), approximate="tanh"))
        return out


class Modulation(nn.Module):
    """Condition [B, width] -> ``number`` vectors that modulate a layer, [B, 1, number, width]."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(width, number * width)

    def forward(self, condition: Tensor) -> Tensor:
        out: Tensor = self.linear(F.silu(condition).to(self.linear.weight.dtype))
        return out.unflatten(1, (1, self.number, -1))


class ModulatedNorm(nn.Module):
    """Layer norm of x [B, n, width] with scale and shift from the condition [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).unbind(2)
        out: Tensor = self.norm(x) * (scale + 1) + shift
        return out


def numbered(lengths: Sequence[int]) -> Tensor:
    """Return for each position the number of the part that it belongs to: 0 ... 0 1 ... 1 2 ..."""
    sizes = torch.tensor(lengths, device="cpu")
    return torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)


def _resized(embedding: Tensor, before: Grids, after: Grids) -> Tensor:
    """Resize the embedding of each grid's positions [1, L, width] by bicubic interpolation."""
    parts = embedding.split([rows * columns for rows, columns in before], dim=1)
    resized = []
    for part, old, new in zip(parts, before, after, strict=True):
        maps = part.transpose(1, 2).unflatten(2, old)
        if old != new:
            maps = F.interpolate(maps, new, mode="bicubic", align_corners=False)
        resized.append(maps.flatten(2).transpose(1, 2))
    return torch.cat(resized, dim=1)
