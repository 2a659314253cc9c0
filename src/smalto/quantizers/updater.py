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
from smalto.quantizers.codebook import ProjectedCodebook
from smalto.quantizers.kmeans import kmeans
from smalto.quantizers.multiscale import MultiScaleVQ
from smalto.quantizers.residual import ResidualVQ
from smalto.quantizers.tracker import CodebookTracker, SearchObserver
from smalto.quantizers.vector import VectorQuantizer

VECTORS_PER_CODE = 8  # how many vectors the k-means start asks for
REVIVALS_PER_STEP = 1024  # at most: what a step exchanges between processes stays small
MULTISCALE_STARTS = 4  # what a finer scale sees depends on the codes themselves, so they are placed again for what they leave
_START_FLOATS = 2**25  # 128 MiB: what the start exchanges between processes, about


@dataclass(frozen=True)
class Revive:
    """When a code counts as dead: it gets less than ``below`` of an even share of the tokens."""

    below: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.below < 1:
            raise ConfigError(
                f"Revive.below is a share of uniform use, in [0, 1); got {self.below}."
            )


class CodebookUpdater:
    """Keeps the codebooks of a model alive: k-means start, moving averages, revival of dead codes.

    Used like an optimizer, after it::

        updater = CodebookUpdater(model, optimizer)
        loss.backward(); optimizer.step(); updater.step()

    It listens to every ``VectorQuantizer`` of the model, those inside other quantizers too, and counts a call only in training mode, with
    gradients on and outside the backward pass; so evaluation, a discriminator's pass under ``no_grad`` and activation checkpointing do
    not count, and the micro-batches of an accumulated step add up. ``torch.compile`` takes the counting into its graph. Between steps it
    keeps counts, sums and a bounded sample of vectors: O(K·D) memory. A model has one updater: a newer one takes over. Copies of the
    model have none.

    In several processes every one builds an updater and calls ``step`` after each of its own batches, whatever their sizes: one all-reduce
    of fixed size gives all of them what one process would have seen (only where the k-means start would have to exchange more than about
    128 MiB, every process gives it an even share). The processes may be joined before or after the updater is built.

    Args:
        model: holds at least one VectorQuantizer.
        optimizer: the one that trains learned codes; the moments of revived rows are zeroed in it.
        revive: when a code is dead; None never revives. Projected codebooks (SimVQ) need no revival; a learned codebook that does not
            require gradients is frozen, and stays as it is.
        decay_tokens: how far moving averages look back, in tokens per code. A batch of N tokens decays the past by
            ``exp(-N / (K·decay_tokens))``, so the setting means the same for every batch and codebook size.
        seed: random choices depend on (seed, step) and on the vectors alone, so a resumed run makes the same ones.
        keep_codes: begin with the codes as they are, as for a trained tokenizer; otherwise ``start``, or else the first ``step``,
            places them anew (of a ``ResidualVQ`` one stage a step).

    Raises:
        InputError: the model has no VectorQuantizer.
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
                f"optimizer must be a torch optimizer or None; got {describe(optimizer)}. Name the others: revive=Revive(...)."
            )
        if not 0 < decay_tokens < math.inf:
            raise ConfigError(
                f"decay_tokens is in tokens per code and must be positive; got {decay_tokens}."
            )
        self.model, self.optimizer, self.revive, self.decay_tokens, self.seed = (
            model,
            optimizer,
            revive,
            decay_tokens,
            seed,
        )
        self.num_steps = 0
        self.num_not_finite = 0  # vectors of the last step that were left out: with a NaN, an infinity or numbers beyond 1e15
        self._codebooks_agree = False  # between processes
        quantizers = {
            name: module
            for name, module in _unwrapped(model).named_modules()
            if isinstance(module, VectorQuantizer)
        }
        self._trackers = {
            name: CodebookTracker(quantizer, number, keep_codes)
            for number, (name, quantizer) in enumerate(quantizers.items())
        }
        by_quantizer = {tracker.quantizer: tracker for tracker in self._trackers.values()}
        for residual in [module for module in model.modules() if isinstance(module, ResidualVQ)]:
            stages = [
                by_quantizer[stage]
                for stage in residual.stages
                if isinstance(stage, VectorQuantizer)
            ]
            for earlier, later in itertools.pairwise(stages):
                later.after = earlier
        for multiscale in [
            module for module in model.modules() if isinstance(module, MultiScaleVQ)
        ]:
            by_quantizer[multiscale.scale].num_starts = MULTISCALE_STARTS
        if not self._trackers:
            raise InputError(
                f"{type(model).__name__} holds no VectorQuantizer: there is no codebook to look after."
            )
        for tracker in self._trackers.values():
            self._clear(tracker)
            tracker.quantizer.nearest.observer = SearchObserver(tracker)

    @torch.inference_mode(False)
    def start(self, images: Tensor | Iterable[Tensor]) -> None:
        """Place all codes by k-means on the latents of ``images``: what ``model`` takes, one batch or several.

        Give at least 8 vectors per code where the data has them; in several processes all call it, each with its share. Not
        called, the first ``step`` does it with what it saw.

        Raises:
            InputError: there was no finite latent.
        """
        batches = [images] if isinstance(images, Tensor) else list(images)
        started = {tracker: tracker.started for tracker in self._trackers.values()}
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            # One quantizer after the other: what a later one sees depends on the codes of those before it.
            for tracker in self._trackers.values():
                for _ in range(tracker.num_starts):
                    tracker.started, tracker.collecting = False, True
                    self._clear(tracker)
                    with torch.no_grad():
                        for batch in batches:
                            self.model(batch)
                    tracker.collecting = False
                    self._exchange([tracker])
                    if not self._start(tracker):
                        raise InputError(
                            "start() saw no finite latents: give it at least one batch of images."
                        )
                    self._agree()
        except BaseException:
            for tracker, before in started.items():
                tracker.started = (
                    before  # codes that had learned are not placed anew by the next step
                )
            raise
        finally:
            for module, training in modes.items():
                module.training = training
            for tracker in self._trackers.values():
                tracker.collecting = False
            self.discard()
        self._agree()

    @torch.no_grad()
    def step(self) -> None:
        """Bring all codebooks up to date with what was seen since the last step.

        Raises:
            RuntimeError: nothing was seen: no forward in training mode with gradients on, in any process.
        """
        trackers = list(self._trackers.values())
        self._exchange(trackers)
        if not any(tracker.was_called for tracker in trackers):
            hint = (
                " Activation checkpointing must be the non-reentrant kind (use_reentrant=False)."
                if _recomputed(trackers)
                else ""
            )
            raise RuntimeError(
                "CodebookUpdater.step() saw no forward pass since the last step. Call model.train() and run the model with gradients "
                f"on before it; one step() per optimizer step.{hint}"
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
        """Forget what was seen since the last step, as ``optimizer.zero_grad()`` does: for a batch that is skipped."""
        for tracker in self._trackers.values():
            self._clear(tracker)

    def usage(self) -> dict[str, float]:
        """Share of each quantizer's codes that were hit within the last 32·K tokens (usage@W, W = 32·K), counted in whole steps."""
        return {name: tracker.usage() for name, tracker in self._trackers.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state: tensors and plain numbers only."""
        return {
            "num_steps": self.num_steps,
            "seed": self.seed,
            "trackers": {n: b.state_dict() for n, b in self._trackers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or not {"trackers", "num_steps", "seed"} <= set(state):
            raise InputError(
                f"this is no state of a CodebookUpdater: {sorted(state) if isinstance(state, dict) else describe(state)}."
            )
        if set(state["trackers"]) != set(self._trackers):
            raise InputError(
                f"the state is of the quantizers {sorted(state['books'])}; this model has {sorted(self._trackers)}."
            )
        self.num_steps, self.seed = int(state["num_steps"]), int(state["seed"])
        for name, tracker in self._trackers.items():
            tracker.load_state_dict(state["trackers"][name])
        self.discard()
        self._codebooks_agree = False

    def close(self) -> None:
        """Stop listening."""
        for tracker in self._trackers.values():
            observer = tracker.quantizer.nearest.observer
            if isinstance(observer, SearchObserver) and observer.tracker is tracker:
                tracker.quantizer.nearest.observer = None

    def _clear(self, tracker: CodebookTracker) -> None:
        size = tracker.quantizer.codebook_size
        sample_size = min(size, REVIVALS_PER_STEP) if tracker.started else VECTORS_PER_CODE * size
        salt = ((self.seed * 1_000_003 + self.num_steps) * 1_000_003 + tracker.number) % 2**63
        tracker.follow(tracker.quantizer.embedding.weight).clear(
            sample_size, salt, by_error=tracker.started
        )
        tracker.num_recomputed = 0

    def _exchange(self, trackers: list[CodebookTracker]) -> None:
        """Give every process what all of them saw: one all-reduce, whose size depends on the codebooks alone."""
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
        """Once, and after every start: the first process's codebooks for all. From then on equal sums keep them equal."""
        if distributed.world_size() > 1 and not self._codebooks_agree:
            distributed.broadcast(
                tensor for tracker in self._trackers.values() for tensor in tracker.tensors()
            )
            self._codebooks_agree = True

    def _update(self, tracker: CodebookTracker) -> None:
        if not tracker.started:
            self._start(tracker)
            return
        num_tokens = float(tracker.statistics.counts[:-1].double().sum())
        if not num_tokens:
            return
        size = tracker.quantizer.codebook_size
        tracker.absorb(size / num_tokens, decay=math.exp(-num_tokens / (size * self.decay_tokens)))
        tracker.idle.add_(int(num_tokens)).masked_fill_(tracker.statistics.counts[:-1] > 0, 0)
        if self.revive is not None and tracker.places_codes:
            dead = (tracker.use < self.revive.below).nonzero().squeeze(1)
            dead = dead[tracker.use[dead].argsort(stable=True)]
            vectors = tracker.statistics.candidates()[: len(dead)]
            self._place(tracker, dead[: len(vectors)], vectors)

    def _start(self, tracker: CodebookTracker) -> bool:
        """Place the codes by what was sampled; False where that is nothing."""
        vectors = tracker.statistics.candidates()
        if not len(vectors):
            return False
        embedding = tracker.quantizer.embedding
        if isinstance(embedding, ProjectedCodebook):
            embedding.fit(vectors)
            self._zero_moments(embedding.projection, slice(None))
        elif tracker.places_codes:
            generator = torch.Generator().manual_seed(tracker.statistics.seed)
            centers = kmeans(
                vectors,
                tracker.quantizer.codebook_size,
                tracker.quantizer.nearest.metric,
                generator,
            )
            self._place(tracker, torch.arange(len(centers), device=centers.device), centers)
        tracker.started, self._codebooks_agree = True, False
        return True

    def _place(self, tracker: CodebookTracker, rows: Tensor, vectors: Tensor) -> None:
        tracker.quantizer.embedding.place(rows, vectors)
        tracker.use[rows] = 1
        self._zero_moments(tracker.quantizer.embedding.weight, rows)

    def _zero_moments(self, parameter: Tensor, rows: Tensor | slice) -> None:
        """Make the optimizer forget in which direction ``rows`` were going."""
        for moment in (
            self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        ).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                moment[rows] = 0


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel, so that a state fits with and without them."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _recomputed(trackers: list[CodebookTracker]) -> bool:
    return any(tracker.num_recomputed for tracker in trackers)
