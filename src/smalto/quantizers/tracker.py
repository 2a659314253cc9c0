"""Per-codebook state of the updater, and the observer that feeds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smalto.core.errors import InputError
from smalto.quantizers.code_space import ExplicitCodes
from smalto.quantizers.codebook import EMACodebook, ProjectedCodebook
from smalto.quantizers.statistics import Statistics
from smalto.search import USAGE_WINDOW

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # not in torch 2.6


class SearchObserver:
    """Observer of one code space's searches, which adds them to its tracker's statistics.

    Copied or pickled with the model it becomes None, so a copy of the model does not feed the
    updater.
    """

    def __init__(self, tracker: CodebookTracker) -> None:
        self.tracker = tracker

    def __call__(
        self, module: nn.Module, vectors: Tensor, codes: Tensor, indices: Tensor, valid: Tensor
    ) -> None:
        if torch.compiler.is_compiling():
            if _is_exporting():
                return
        # Inside a backward pass: activation checkpointing recomputes the forward.
        elif torch._C._current_graph_task_id() != -1:
            self.tracker.num_recomputed += 1
            return
        if (module.training and torch.is_grad_enabled()) or self.tracker.collecting:
            with torch.no_grad():
                self.tracker.follow(vectors).add(vectors, codes, indices, valid)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class CodebookTracker:
    """State of one codebook: statistics since the last step, and slow averages of code use.

    Attributes:
        space: the code space.
        number: its position in the model, part of the random seed.
        started: whether its codes have been placed.
        after: tracker of the previous residual stage. Until that stage's codes are placed, the
            vectors of this one are meaningless.
        num_starts: how many times ``start()`` places the codes.
        collecting: whether calls count in evaluation mode too, as during ``start()``.
        num_recomputed: recomputed calls of activation checkpointing, which are not counted.
        statistics: statistics since the last step.
        idle: tokens since each code was last used, int64 [K].
    """

    def __init__(self, space: ExplicitCodes, number: int, started: bool) -> None:
        self.space = space
        self.number = number
        self.started = started
        self.after: CodebookTracker | None = None
        self.num_starts = 1
        self.collecting = False
        self.num_recomputed = 0
        size = space.codebook_size
        self.statistics = Statistics(size, space.code_dim, torch.zeros(0, dtype=space.dtype))
        # Not a buffer of the learned codebook, whose only state is the weight.
        self._learned_use = torch.ones(size, dtype=space.dtype)
        self.idle = torch.full((size,), USAGE_WINDOW * size)

    @property
    def places_codes(self) -> bool:
        """Whether single codes may be moved: not in projected codebooks, nor in frozen ones."""
        embedding = self.space.embedding
        return isinstance(embedding, EMACodebook) or (
            embedding.weight.requires_grad and not isinstance(embedding, ProjectedCodebook)
        )

    @property
    def use(self) -> Tensor:
        """Slow moving average of every code's share of the tokens, [K]; 1 is an even share."""
        embedding = self.space.embedding
        return embedding.ema_counts if isinstance(embedding, EMACodebook) else self._learned_use

    def follow(self, tensor: Tensor) -> Statistics:
        """Return the statistics, on the device of ``tensor``.

        If the model has moved to another device or dtype, they are reset there.
        """
        if tensor.is_meta:  # without data yet
            return self.statistics
        if (
            self.statistics.sums.device != tensor.device
            or self.statistics.sums.dtype != self.space.dtype
        ):
            self.statistics = self.statistics.empty_like(tensor.to(self.space.dtype))
            self._learned_use = self._learned_use.to(self.statistics.sums)
            self.idle = self.idle.to(tensor.device)
        return self.statistics

    @property
    def was_called(self) -> bool:
        """Whether a search was counted since the last step."""
        return bool(self.statistics.num_calls > 0)

    @property
    def num_not_finite(self) -> int:
        """Number of vectors since the last step that were not valid."""
        return int(self.statistics.counts[-1])

    def usage(self) -> float:
        """Return the share of codes used within the last 32·K tokens, in [0, 1]."""
        return float((self.idle < USAGE_WINDOW * self.space.codebook_size).float().mean())

    def absorb(self, scale: float, decay: float) -> None:
        """Update the moving averages by the statistics times ``scale``."""
        counts = self.statistics.counts[:-1] * scale
        embedding = self.space.embedding
        if isinstance(embedding, EMACodebook):
            embedding.absorb(counts, self.statistics.sums * scale, decay)
        else:
            self.use.mul_(decay).add_(counts, alpha=1 - decay)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that must be equal in all processes."""
        own = [*self.space.embedding.parameters(), *self.space.embedding.buffers()]
        return [*(tensor.detach() for tensor in own), self.use, self.idle]

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "idle": self.idle.clone(), "use": self.use.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            InputError: the state is for another number of codes.
        """
        for name, own in (("idle", self.idle), ("use", self.use)):
            if state[name].shape != own.shape:
                raise InputError(
                    f"got a state of {len(state[name])} codes; this codebook has {len(own)}. "
                    f"Load it into a model with {len(state[name])} codes."
                )
        self.started = bool(state["started"])
        self.idle.copy_(state["idle"])
        self.use.copy_(state["use"])
