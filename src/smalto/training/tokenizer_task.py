"""What one step of tokenizer training does."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it anyway: here, where Ctrl-C still may leave at once
import torch.nn.functional as F
from torch import Tensor

from smalto.autoencoders import CheckpointedNetwork
from smalto.device import computing
from smalto.errors import RunError
from smalto.metrics import psnr
from smalto.quantizers import CodebookUpdater
from smalto.tokenizer import ImageTokenizer
from smalto.training.recipe import Recipe


class TokenizerTask:
    """Reconstruction plus the quantizer's loss, AdamW, codebook upkeep.

    Args:
        tokenizer: already on its device.
        recipe: how.
        held_out: fixed crops [N, C, size, size] in [-1, 1] to look at now and then.
    """

    def __init__(self, tokenizer: ImageTokenizer, recipe: Recipe, held_out: Tensor) -> None:
        self.tokenizer, self._recipe, self._held_out = tokenizer, recipe, held_out
        self.device = next(tokenizer.parameters()).device
        for part in (tokenizer.encoder, tokenizer.decoder):
            if isinstance(part, CheckpointedNetwork):
                part.gradient_checkpointing = recipe.gradient_checkpointing
        self._optimizer = torch.optim.AdamW(
            [p for p in tokenizer.parameters() if p.requires_grad], lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay
        )
        self._updater = CodebookUpdater(
            tokenizer, self._optimizer, recipe.codebook.revive(), memory=recipe.codebook.memory, seed=recipe.seed
        )

    @property
    def num_start_images(self) -> int:
        """Crops that the k-means start wants: 8 vectors per code."""
        layout = self.tokenizer.layout(self._recipe.data.size, self._recipe.data.size)
        return math.ceil(8 * self.tokenizer.quantize.codebook_size / max(layout.lengths))

    def start(self, batches: list[Tensor]) -> None:
        """The codebook's k-means start."""
        self._updater.start(batch.to(self.device) for batch in batches)

    def train_step(self, batch: Tensor, step: int) -> dict[str, float]:
        self.tokenizer.train()
        self._set_learning_rate(step)
        images = batch.to(self.device)
        with computing(self.device, self._recipe.precision, len(images)):
            reconstruction, vq_loss, _ = self.tokenizer(images)
            reconstruction_loss = F.mse_loss(reconstruction.float(), images)
            loss = reconstruction_loss + vq_loss
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self._optimizer.step()
        self._updater.step()
        if not math.isfinite(loss.item()):
            raise RunError(
                f"the loss is {loss.item()} at step {step}: training has diverged. Resume with a smaller --set optimizer.lr, "
                "or look for broken values in the data."
            )
        return {
            "loss": round(loss.item(), 7),
            "reconstruction_loss": round(reconstruction_loss.item(), 7),
            "vq_loss": round(vq_loss.item(), 7),
            "psnr": round(float(psnr(reconstruction.detach(), images).mean()), 4),
            "usage": round(min(self._updater.usage().values()), 5),
            "not_finite": self._updater.num_not_finite,
            "lr": self._optimizer.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.tokenizer.eval()
        values = []
        for images in self._held_out.split(self._recipe.data.batch):
            with computing(self.device, self._recipe.precision, len(images)):
                images = images.to(self.device)
                values.append(psnr(self.tokenizer(images).reconstruction, images))
        return {"held_out_psnr": round(float(torch.cat(values).mean()), 4)} if values else {}

    def state(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), "updater": self._updater.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._updater.load_state_dict(state["updater"])

    def _set_learning_rate(self, step: int) -> None:
        settings, steps = self._recipe.optimizer, self._recipe.steps
        share = min(1.0, step / settings.warmup) if settings.warmup else 1.0
        if settings.decay:
            share *= 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 1) / max(steps, 1))))
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr * share
