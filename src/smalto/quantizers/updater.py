"""CodebookUpdater: everything that changes a codebook outside the optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smalto.core import distributed
from smalto.core.errors import ConfigError, InputError, describe
from smalto.quantizers.code_space import ExplicitCodes
from smalto.quantizers.codebook import ProjectedCodebook
from smalto.quantizers.kmeans import kmeans
from smalto.quantizers.multiscale import MultiScaleVQ
from smalto.quantizers.residual import ResidualVQ
from smalto.quantizers.tracker import CodebookTracker, SearchObserver

VECTORS_PER_CODE = 8  # sample size of the k-means start
REVIVALS_PER_STEP = 1024  # at most, so that processes exchange little in a step
# The residuals of finer scales depend on the codes, so the codes are placed again for them.
MULTISCALE_STARTS = 4
_START_FLOATS = 2**25  # about 128 MiB of float32, exchanged between processes at the start


@dataclass(frozen=True)
class Revive:
    """Criterion for dead codes: a use of less than ``below`` of an even share of the tokens."""

    below: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.below < 1:
            raise ConfigError(
                f"got Revive(below={self.below}); below must be a share of uniform use in [0, 1). "
                "Use for example Revive(below=0.1)."
            )


class CodebookUpdater:
    """Updater of all codebooks of a model: k-means start, moving averages, revival of dead codes.

    Call ``step`` after each step of the optimizer::

        updater = CodebookUpdater(model, optimizer)
        loss.backward(); optimizer.step(); updater.step()

    The updater observes every explicit codebook of the model, including those inside other
    quantizers. It counts a call only in training mode, with gradients enabled and outside the
    backward pass. So evaluation, a discriminator's pass under ``no_grad`` and activation
    checkpointing do not count, and the micro-batches of an accumulated step add up.
    ``torch.compile`` includes the counting in its graph. Between steps the updater keeps counts,
    sums and a bounded sample of vectors: O(K·D) memory. A model has one updater: a newer one
    replaces it. Copies of the model have none.

    In distributed training every process builds an updater and calls ``step`` after each of its own
    batches, whatever their sizes. One all-reduce of fixed size gives all processes the statistics
    that a single process would have. The only exception is a k-means start that would exchange more
    than about 128 MiB: then every process contributes an even share of the sample. The process
    group may be initialized before or after the updater is built.

    Args:
        model: a module with at least one explicit codebook.
        optimizer: the optimizer of learned codes; its moments of revived rows are set to zero.
        revive: when a code is dead; None never revives. Projected codebooks (SimVQ) do not need
            revival. A learned codebook that does not require gradients is frozen and never changes.
        decay_tokens: time constant of the moving averages, in tokens per code. A batch of N tokens
            decays the past by ``exp(-N / (K·decay_tokens))``, so the setting means the same for
            every batch size and codebook size.
        seed: random seed. Random choices depend on (seed, step) and on the vectors alone, so a
            resumed run repeats them.
        keep_codes: keep the current codes, as for a trained tokenizer. Otherwise ``start`` places
            them, or the first ``step`` if ``start`` is not called (one stage of a ``ResidualVQ``
            per step).

    Attributes:
        num_steps: calls of ``step``.
        num_not_finite: vectors of the last step that were left out, because they held a NaN, an
            infinity or a value beyond 1e15.

    Raises:
        InputError: the model does not hold an explicit codebook.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        revive: Revive | None = Revive(),
        *,
        decay_tokens: float = 160.0,
        seed: int = 0,
        keep_codes: bool = False,
    ) -> None:
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                f"got {describe(optimizer)}; optimizer must be a torch optimizer or None. "
                "Pass the other arguments by keyword, such as revive=Revive()."
            )
        if not 0 < decay_tokens < math.inf:
            raise ConfigError(
                f"got decay_tokens={decay_tokens}; expected a positive number of tokens per code. "
                "Use for example decay_tokens=160."
            )
        self.model = model
        self.optimizer = optimizer
        self.revive = revive
        self.decay_tokens = decay_tokens
        self.seed = seed
        self.num_steps = 0
        self.num_not_finite = 0
        self._codebooks_agree = False  # between processes
        spaces = {
            name: module
            for name, module in _unwrapped(model).named_modules()
            if isinstance(module, ExplicitCodes)
        }
        if not spaces:
            raise InputError(
                f"{type(model).__name__} does not hold an explicit codebook, so there is nothing "
                "to update. Train it without a CodebookUpdater."
            )
        self.trackers = {
            name: CodebookTracker(space, number, keep_codes)
            for number, (name, space) in enumerate(spaces.items())
        }
        by_space: dict[nn.Module, CodebookTracker] = {
            tracker.space: tracker for tracker in self.trackers.values()
        }
        for module in model.modules():
            if isinstance(module, ResidualVQ):
                stages = [by_space[stage] for stage in module.stages if stage in by_space]
                for earlier, later in itertools.pairwise(stages):
                    later.after = earlier
            elif isinstance(module, MultiScaleVQ) and module.scale in by_space:
                by_space[module.scale].num_starts = MULTISCALE_STARTS
        for tracker in self.trackers.values():
            self._clear(tracker)
            tracker.space.nearest.observer = SearchObserver(tracker)

    @torch.inference_mode(False)
    def start(self, images: Tensor | Iterable[Tensor]) -> None:
        """Place all codes by k-means on the latents of ``images``.

        If it is not called, the first ``step`` places the codes by the vectors of its batch.

        Args:
            images: input of ``model``, one batch or an iterable of batches. Give at least 8 vectors
                per code if the data has them. In distributed training every process calls
                ``start`` with its share.

        Raises:
            InputError: there was no finite latent.
        """
        batches = [images] if isinstance(images, Tensor) else list(images)
        started = {tracker: tracker.started for tracker in self.trackers.values()}
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            # One codebook after the other: the input of a later one depends on the earlier codes.
            for tracker in self.trackers.values():
                for _ in range(tracker.num_starts):
                    tracker.started = False
                    tracker.collecting = True
                    self._clear(tracker)
                    with torch.no_grad():
                        for batch in batches:
                            self.model(batch)
                    tracker.collecting = False
                    self._exchange([tracker])
                    if not self._start(tracker):
                        raise InputError(
                            "start() saw no finite latents; expected at least one. Pass at least "
                            "one batch of finite images."
                        )
                    self._agree()
        except BaseException:
            for tracker, before in started.items():
                tracker.started = before  # so that the next step does not replace trained codes
            raise
        finally:
            for module, training in modes.items():
                module.training = training
            for tracker in self.trackers.values():
                tracker.collecting = False
            self.discard()
        self._agree()

    @torch.no_grad()
    def step(self) -> None:
        """Update all codebooks by the statistics since the last step.

        Raises:
            RuntimeError: no process ran a forward pass in training mode with gradients enabled.
        """
        trackers = list(self.trackers.values())
        self._exchange(trackers)
        if not any(tracker.was_called for tracker in trackers):
            hint = (
                " Use non-reentrant activation checkpointing (use_reentrant=False)."
                if _recomputed(trackers)
                else ""
            )
            raise RuntimeError(
                "CodebookUpdater.step() saw no forward pass since the last step; expected at least "
                "one in training mode with gradients enabled. Call model.train() and run the model "
                f"before step(), and call step() once per optimizer step.{hint}"
            )
        ready = [
            tracker
            for tracker in trackers
            if tracker.started or tracker.after is None or tracker.after.started
        ]
        for tracker in ready:
            self._update(tracker)
        self.num_not_finite = max(tracker.num_not_finite for tracker in trackers)
        self.num_steps += 1
        self.discard()
        self._agree()

    def discard(self) -> None:
        """Clear the statistics since the last step, for a skipped batch.

        It is the counterpart of ``optimizer.zero_grad()``.
        """
        for tracker in self.trackers.values():
            self._clear(tracker)

    def usage(self) -> dict[str, float]:
        """Return the share of each codebook's codes used within the last 32·K tokens, in [0, 1].

        This is usage@W with W = 32·K, at the resolution of one step. Keys are module names.
        """
        return {name: tracker.usage() for name, tracker in self.trackers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run, beside the model's own: tensors and numbers only."""
        return {
            "num_steps": self.num_steps,
            "seed": self.seed,
            "trackers": {n: b.state_dict() for n, b in self.trackers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            InputError: it is not a state of a CodebookUpdater, or it belongs to other codebooks.
        """
        if not isinstance(state, dict) or not {"trackers", "num_steps", "seed"} <= set(state):
            given = sorted(state) if isinstance(state, dict) else describe(state)
            raise InputError(
                f"got {given}; expected a state of a CodebookUpdater with num_steps, seed and "
                "trackers. Pass the result of updater.state_dict()."
            )
        if set(state["trackers"]) != set(self.trackers):
            raise InputError(
                f"got a state of the codebooks {sorted(state['trackers'])}; this model has "
                f"{sorted(self.trackers)}. Load it into the model that it was saved with."
            )
        self.num_steps = int(state["num_steps"])
        self.seed = int(state["seed"])
        for name, tracker in self.trackers.items():
            tracker.load_state_dict(state["trackers"][name])
        self.discard()
        self._codebooks_agree = False

    def close(self) -> None:
        """Detach the updater from the model, so that calls are not counted any more."""
        for tracker in self.trackers.values():
            observer = tracker.space.nearest.observer
            if isinstance(observer, SearchObserver) and observer.tracker is tracker:
                tracker.space.nearest.observer = None

    def _clear(self, tracker: CodebookTracker) -> None:
        size = tracker.space.codebook_size
        sample_size = min(size, REVIVALS_PER_STEP) if tracker.started else VECTORS_PER_CODE * size
        salt = ((self.seed * 1_000_003 + self.num_steps) * 1_000_003 + tracker.number) % 2**63
        tracker.follow(tracker.space.embedding.weight).clear(
            sample_size, salt, by_error=tracker.started
        )
        tracker.num_recomputed = 0

    def _exchange(self, trackers: list[CodebookTracker]) -> None:
        """Sum the statistics over all processes.

        It is one all-reduce, and its size depends on the codebooks alone.
        """
        world = distributed.world_size()
        if world > 1:
            packed = [
                tracker.statistics.pack(distributed.rank(), world, _START_FLOATS)
                for tracker in trackers
            ]
            summed = distributed.all_reduce(torch.cat([p.to(packed[0].dtype) for p in packed]))
            for tracker, part in zip(trackers, summed.split([len(p) for p in packed]), strict=True):
                tracker.statistics.unpack(part)

    def _agree(self) -> None:
        """Broadcast the codebooks of rank 0 once, and after every start.

        From then on equal sums keep the codebooks equal.
        """
        if distributed.world_size() > 1 and not self._codebooks_agree:
            distributed.broadcast(
                tensor for tracker in self.trackers.values() for tensor in tracker.tensors()
            )
            self._codebooks_agree = True

    def _update(self, tracker: CodebookTracker) -> None:
        if not tracker.started:
            self._start(tracker)
            return
        num_tokens = float(tracker.statistics.counts[:-1].double().sum())
        if not num_tokens:
            return
        size = tracker.space.codebook_size
        tracker.absorb(size / num_tokens, decay=math.exp(-num_tokens / (size * self.decay_tokens)))
        tracker.idle.add_(int(num_tokens)).masked_fill_(tracker.statistics.counts[:-1] > 0, 0)
        if self.revive is not None and tracker.places_codes:
            dead = (tracker.use < self.revive.below).nonzero().squeeze(1)
            dead = dead[tracker.use[dead].argsort(stable=True)]
            vectors = tracker.statistics.candidates()[: len(dead)]
            self._place(tracker, dead[: len(vectors)], vectors)

    def _start(self, tracker: CodebookTracker) -> bool:
        """Place the codes by the sample; return False if the sample is empty."""
        vectors = tracker.statistics.candidates()
        if not len(vectors):
            return False
        embedding = tracker.space.embedding
        if isinstance(embedding, ProjectedCodebook):
            embedding.fit(vectors)
            self._zero_moments(embedding.projection, slice(None))
        elif tracker.places_codes:
            generator = torch.Generator().manual_seed(tracker.statistics.seed)
            centers = kmeans(
                vectors,
                tracker.space.codebook_size,
                tracker.space.nearest.metric,
                generator,
            )
            self._place(tracker, torch.arange(len(centers), device=centers.device), centers)
        tracker.started = True
        self._codebooks_agree = False
        return True

    def _place(self, tracker: CodebookTracker, rows: Tensor, vectors: Tensor) -> None:
        tracker.space.embedding.place(rows, vectors)
        tracker.use[rows] = 1
        self._zero_moments(tracker.space.embedding.weight, rows)

    def _zero_moments(self, parameter: Tensor, rows: Tensor | slice) -> None:
        """Set the optimizer's moments of ``rows`` to zero."""
        state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        for moment in state.values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[rows] = 0


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and DistributedDataParallel.

    So a state loads with and without these wrappers.
    """
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _recomputed(trackers: list[CodebookTracker]) -> bool:
    return any(tracker.num_recomputed for tracker in trackers)
