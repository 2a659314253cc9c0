"""CodebookUpdater: everything that changes a codebook outside the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smalto.errors import ConfigError, InputError
from smalto.quantizers.codebook import EMACodebook
from smalto.quantizers.kmeans import kmeans
from smalto.quantizers.vector import VectorQuantizer
from smalto.search import USAGE_WINDOW, code_sums

VECTORS_PER_CODE = 8  # how many vectors the k-means start asks for


@dataclass(frozen=True)
class Revive:
    """When a code counts as dead: it gets less than ``below`` of an even share of the tokens."""

    below: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.below < 1:
            raise ConfigError(f"Revive.below is a share of uniform use, in [0, 1); got {self.below}.")


class CodebookUpdater:
    """Keeps the codebooks of a model alive: k-means start, moving averages, revival of dead codes.

    Used like an optimizer, after it::

        updater = CodebookUpdater(model, optimizer)
        loss.backward(); optimizer.step(); updater.step()

    It listens to every ``VectorQuantizer`` of the model through hooks of its own and counts a call only in training mode, with
    gradients on and outside the backward pass; so evaluation and activation checkpointing do not count, and the micro-batches of an
    accumulated step add up. Between steps it keeps counts, sums and a bounded random sample of vectors: O(K·D) memory. A model has one
    updater: a newer one takes over. Copies of the model have none.

    Args:
        model: holds at least one VectorQuantizer.
        optimizer: the one that trains learned codes; the moments of revived rows are zeroed in it.
        revive: when a code is dead; None never revives.
        memory: how far moving averages look back, in tokens per code. A batch of N tokens decays the past by
            ``exp(-N / (K·memory))``, so the setting means the same for every batch and codebook size.
        seed: random choices depend on (seed, step) alone, so a resumed run makes the same ones.
        keep_codes: begin with the codes as they are, as for a trained tokenizer; otherwise ``start``, or else the first ``step``,
            places them anew.

    Raises:
        InputError: the model has no VectorQuantizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        revive: Revive | None = Revive(),
        *,
        memory: float = 160.0,
        seed: int = 0,
        keep_codes: bool = False,
    ) -> None:
        if not 0 < memory < math.inf:
            raise ConfigError(f"memory is in tokens per code and must be positive; got {memory}.")
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError("CodebookUpdater works in one process for now: codebooks of several would drift apart.")
        self.model, self.optimizer, self.revive, self.memory, self.seed = model, optimizer, revive, memory, seed
        self.num_steps = 0
        quantizers = {name: module for name, module in model.named_modules() if isinstance(module, VectorQuantizer)}
        self._books = {name: _Book(quantizer, started=keep_codes) for name, quantizer in quantizers.items()}
        if not self._books:
            raise InputError(f"{type(model).__name__} holds no VectorQuantizer: there is no codebook to look after.")
        for book in self._books.values():
            for hook in list(book.quantizer.nearest._forward_hooks.values()):
                if isinstance(hook, _Listener):
                    hook.updater.close()
        self._hooks = [book.quantizer.nearest.register_forward_hook(_Listener(self, book)) for book in self._books.values()]

    def start(self, images: Tensor | Iterable[Tensor]) -> None:
        """Place all codes by k-means on the latents of ``images``: what ``model`` takes, one batch or several.

        Give at least 8 vectors per code where the data has them. Not called, the first ``step`` does it with what it saw.
        """
        batches = [images] if isinstance(images, Tensor) else list(images)
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            # One quantizer after the other: what a later one sees depends on the codes of those before it.
            for book in self._books.values():
                book.forget()
                book.collecting = True
                with torch.no_grad():
                    for batch in batches:
                        self.model(batch)
                book.collecting = False
                if book.sample is None or not len(book.sample):
                    raise InputError("start() saw no finite latents: give it at least one batch of images.")
                self._start(book)
        finally:
            for module, training in modes.items():
                module.training = training
            for book in self._books.values():
                book.collecting = False
                book.forget()

    @torch.no_grad()
    def step(self) -> None:
        """Bring all codebooks up to date with what was seen since the last step.

        Raises:
            RuntimeError: nothing was seen: no forward in training mode with gradients on.
        """
        if not any(book.num_calls for book in self._books.values()):
            raise RuntimeError(
                "CodebookUpdater.step() saw no forward pass since the last step. Call model.train() and run the model with gradients "
                "on before it; one step() per optimizer step."
            )
        for book in self._books.values():
            if book.num_calls:
                self._update(book)
                book.forget()
        self.num_steps += 1

    def discard(self) -> None:
        """Forget what was seen since the last step, as ``optimizer.zero_grad()`` does: for a batch that is skipped."""
        for book in self._books.values():
            book.forget()

    def usage(self) -> dict[str, float]:
        """Share of each quantizer's codes that were hit within the last 32·K tokens (usage@W, W = 32·K)."""
        return {name: book.usage() for name, book in self._books.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state: tensors and plain numbers only."""
        return {"num_steps": self.num_steps, "seed": self.seed, "books": {n: b.state_dict() for n, b in self._books.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["books"]) != set(self._books):
            raise InputError(f"the state is of the quantizers {sorted(state['books'])}; this model has {sorted(self._books)}.")
        self.num_steps, self.seed = int(state["num_steps"]), int(state["seed"])
        self.discard()
        for name, book in self._books.items():
            book.load_state_dict(state["books"][name])

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def _generator(self, book: _Book) -> torch.Generator:
        generator = torch.Generator()
        generator.manual_seed(((self.seed * 1_000_003 + self.num_steps) * 1_000_003 + book.num_calls) % 2**63)
        return generator

    def _update(self, book: _Book) -> None:
        if not book.started:
            if book.sample is not None and len(book.sample):
                self._start(book)
            return
        num_tokens = int(book.counts.sum())
        if not num_tokens:
            return
        size = book.quantizer.codebook_size
        decay = math.exp(-num_tokens / (size * self.memory))
        book.absorb(book.counts * (size / num_tokens), book.sums * (size / num_tokens), decay)
        book.idle.add_(num_tokens).masked_fill_(book.counts > 0, 0)
        if self.revive is not None:
            self._revive(book, (book.use < self.revive.below).nonzero().squeeze(1))

    def _revive(self, book: _Book, dead: Tensor) -> None:
        if not len(dead) or book.sample is None or not len(book.sample):
            return
        dead = dead[book.use[dead].argsort(stable=True)]
        vectors = _distinct(book.sample[: 2 * len(dead)])[: len(dead)]
        self._place(book, dead[: len(vectors)], vectors)

    def _start(self, book: _Book) -> None:
        assert book.sample is not None
        centres = kmeans(book.sample, book.quantizer.codebook_size, book.quantizer.nearest.metric, self._generator(book))
        self._place(book, torch.arange(len(centres), device=centres.device), centres)
        book.started = True

    def _place(self, book: _Book, rows: Tensor, vectors: Tensor) -> None:
        book.place(rows, vectors)
        weight = book.quantizer.embedding.weight
        for moment in (self.optimizer.state.get(weight, {}) if self.optimizer is not None else {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment[rows] = 0


class _Listener:
    """The hook on one quantizer's search. Copied or pickled with the model, it becomes deaf: a copy feeds nobody's updater."""

    def __init__(self, updater: CodebookUpdater, book: _Book) -> None:
        self.updater, self._book = updater, book

    def __call__(self, module: nn.Module, args: tuple[Tensor, Tensor, Tensor], indices: Tensor) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # a recomputation by activation checkpointing
        learning = module.training and torch.is_grad_enabled() and not in_backward and not torch.compiler.is_compiling()
        if learning or self._book.collecting:
            with torch.no_grad():
                self._book.add(args[0].detach(), indices, args[2], self.updater._generator(self._book))

    def __reduce__(self) -> tuple[type[_Deaf], tuple[()]]:
        return _Deaf, ()


class _Deaf:
    """What a listener is in a copy of the model."""

    def __call__(self, *args: Any) -> None:
        pass


class _Book:
    """What the updater knows of one quantizer: statistics since the last step, and slow ones in units of uniform use."""

    def __init__(self, quantizer: VectorQuantizer, started: bool) -> None:
        self.quantizer = quantizer
        self.started, self.collecting = started, False
        size = quantizer.codebook_size
        # Learned codebooks have no buffer of their own for this: their only state is the weight.
        self._learned_use = torch.ones(size)
        self.idle = torch.full((size,), USAGE_WINDOW * size)
        self.forget()

    @property
    def use(self) -> Tensor:
        """Slow average of every code's share of the tokens; 1 is an even share."""
        embedding = self.quantizer.embedding
        return embedding.ema_counts if isinstance(embedding, EMACodebook) else self._learned_use

    def usage(self) -> float:
        return float((self.idle < USAGE_WINDOW * self.quantizer.codebook_size).float().mean())

    def forget(self) -> None:
        self.num_calls = 0
        self.counts: Tensor = torch.zeros(0)
        self.sums: Tensor = torch.zeros(0)
        self.sample: Tensor | None = None
        self._keys: Tensor | None = None

    def add(self, vectors: Tensor, indices: Tensor, valid: Tensor, generator: torch.Generator) -> None:
        """Take in one call: vectors [N, D], indices [N], valid [N]."""
        self.idle, self._learned_use = self.idle.to(vectors.device), self._learned_use.to(vectors.device)
        size = self.quantizer.codebook_size
        counts, sums = code_sums(vectors, torch.where(valid, indices, size), size + 1)  # the last bin takes what is not finite
        self.counts = counts[:size] + self.counts if self.num_calls else counts[:size]
        self.sums = sums[:size] + self.sums if self.num_calls else sums[:size]
        self.num_calls += 1
        starting = self.collecting or not self.started
        # Every vector draws a key, and the largest keys stay: a random sample of all calls, without their number being known
        # (Efraimidis and Spirakis 2006). For the start all weigh the same; for revival the squared error weighs, because that is where
        # another code helps most, and a vector that already is a code needs none.
        keys = torch.rand(len(vectors), generator=generator).log().to(vectors.device)
        if not starting:
            keys = keys / (vectors - self.quantizer.embedding.weight[indices]).square().sum(dim=1)
        keys = keys.masked_fill(~valid, -torch.inf)
        if self._keys is not None and self.sample is not None:
            keys, vectors = torch.cat([self._keys, keys]), torch.cat([self.sample, vectors])
        keys, order = keys.topk(min(VECTORS_PER_CODE * size if starting else size, len(keys)))
        order = order[keys > -torch.inf]
        self._keys, self.sample = keys[: len(order)], vectors[order]

    def absorb(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        embedding = self.quantizer.embedding
        if isinstance(embedding, EMACodebook):
            embedding.absorb(counts, sums, decay)
        else:
            self.use.mul_(decay).add_(counts, alpha=1 - decay)

    def place(self, rows: Tensor, vectors: Tensor) -> None:
        self.quantizer.embedding.place(rows, vectors)
        self.use[rows] = 1

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "idle": self.idle.clone(), "use": self.use.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in (("idle", self.idle), ("use", self.use)):
            if state[name].shape != own.shape:
                raise InputError(f"the state is of {len(state[name])} codes; this quantizer has {len(own)}.")
        self.started = bool(state["started"])
        self.idle.copy_(state["idle"])
        self.use.copy_(state["use"])


def _distinct(vectors: Tensor) -> Tensor:
    """The different rows of [N, D], in order of first appearance."""
    _, group = torch.unique(vectors, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(group), device=group.device)
    first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
    return vectors[first.sort().values]
