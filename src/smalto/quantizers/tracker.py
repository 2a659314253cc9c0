"""What the updater knows of one quantizer, and how it hears of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smalto.core.errors import InputError
from smalto.quantizers.codebook import EMACodebook, ProjectedCodebook
from smalto.quantizers.statistics import Statistics
from smalto.quantizers.vector import VectorQuantizer
from smalto.search import USAGE_WINDOW

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6


class SearchObserver:
    """What one quantizer's search calls. Copied or pickled with the model it becomes None: a copy feeds nobody's updater."""

    def __init__(self, tracker: CodebookTracker) -> None:
        self.tracker = tracker

    def __call__(
        self, module: nn.Module, vectors: Tensor, codes: Tensor, indices: Tensor, valid: Tensor
    ) -> None:
        if torch.compiler.is_compiling():
            if _is_exporting():
                return
        elif torch._C._current_graph_task_id() != -1:  # a recomputation by activation checkpointing
            self.tracker.num_recomputed += 1
            return
        if (module.training and torch.is_grad_enabled()) or self.tracker.collecting:
            with torch.no_grad():
                self.tracker.follow(vectors).add(vectors, codes, indices, valid)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class CodebookTracker:
    """What the updater knows of one quantizer: statistics since the last step, and slow ones in units of uniform use.

    ``after`` is the book of the residual stage before: until that one's codes are placed, what this one sees means nothing.
    """

    def __init__(self, quantizer: VectorQuantizer, number: int, started: bool) -> None:
        self.quantizer, self.number, self.started = quantizer, number, started
        self.after: CodebookTracker | None = None
        self.num_starts = 1  # how often start() places the codes
        self.collecting = False
        self.num_recomputed = 0
        size = quantizer.codebook_size
        self.statistics = Statistics(
            size, quantizer.embedding.embedding_dim, torch.zeros(0, dtype=quantizer.dtype)
        )
        # Learned codebooks have no buffer of their own for this: their only state is the weight.
        self._learned_use = torch.ones(size, dtype=quantizer.dtype)
        self.idle = torch.full((size,), USAGE_WINDOW * size)

    @property
    def places_codes(self) -> bool:
        """Whether single codes may be put elsewhere: not in projected codebooks, nor in frozen ones."""
        embedding = self.quantizer.embedding
        return isinstance(embedding, EMACodebook) or (
            embedding.weight.requires_grad and not isinstance(embedding, ProjectedCodebook)
        )

    @property
    def use(self) -> Tensor:
        """Slow average of every code's share of the tokens; 1 is an even share."""
        embedding = self.quantizer.embedding
        return embedding.ema_counts if isinstance(embedding, EMACodebook) else self._learned_use

    def follow(self, tensor: Tensor) -> Statistics:
        """The statistics, begun anew where ``tensor`` is when the model has moved."""
        if tensor.is_meta:  # not yet anywhere
            return self.statistics
        if (
            self.statistics.sums.device != tensor.device
            or self.statistics.sums.dtype != self.quantizer.dtype
        ):
            self.statistics = self.statistics.anew(tensor.to(self.quantizer.dtype))
            self._learned_use, self.idle = (
                self._learned_use.to(self.statistics.sums),
                self.idle.to(tensor.device),
            )
        return self.statistics

    @property
    def was_called(self) -> bool:
        return bool(self.statistics.num_calls > 0)

    @property
    def num_not_finite(self) -> int:
        return int(self.statistics.counts[-1])

    def usage(self) -> float:
        return float((self.idle < USAGE_WINDOW * self.quantizer.codebook_size).float().mean())

    def absorb(self, scale: float, decay: float) -> None:
        """Take the statistics times ``scale`` into the moving averages."""
        counts, embedding = self.statistics.counts[:-1] * scale, self.quantizer.embedding
        if isinstance(embedding, EMACodebook):
            embedding.absorb(counts, self.statistics.sums * scale, decay)
        else:
            self.use.mul_(decay).add_(counts, alpha=1 - decay)

    def tensors(self) -> list[Tensor]:
        """All that processes must have in common."""
        own = [*self.quantizer.embedding.parameters(), *self.quantizer.embedding.buffers()]
        return [*(tensor.detach() for tensor in own), self.use, self.idle]

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "idle": self.idle.clone(), "use": self.use.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in (("idle", self.idle), ("use", self.use)):
            if state[name].shape != own.shape:
                raise InputError(
                    f"the state is of {len(state[name])} codes; this quantizer has {len(own)}."
                )
        self.started = bool(state["started"])
        self.idle.copy_(state["idle"])
        self.use.copy_(state["use"])
