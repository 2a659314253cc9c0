"""What one step does to everything that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smalto
from smalto.quantizers.codebook import Codebook
from smalto.training.optimization import WeightAverage, cosine_schedule, parameter_groups
from smalto.training.recipe import change_recipe
from smalto.training.tokenizer_recipe import TokenizerRecipe
from smalto.training.tokenizer_task import TokenizerTask
from tests.conftest import TINY

ADVERSARIAL = {
    "losses.adversarial.weight": 0.3,
    "losses.adversarial.start": 4,
    "losses.adversarial.lead": 2,
    "losses.adversarial.layers": 2,
    "losses.adversarial.width": 4,
}
CNN = {
    "tokenizer.autoencoder.kind": "cnn",
    "tokenizer.autoencoder.ch": 32,
    "tokenizer.autoencoder.ch_mult": [1, 1, 1],
    "tokenizer.autoencoder.num_res_blocks": 1,
    "tokenizer.autoencoder.latent_dim": 8,
}


def tiny(**settings: Any) -> TokenizerRecipe:
    own = {key.replace("__", "."): value for key, value in settings.items()}
    kept = {
        key: value
        for key, value in TINY.items()
        if "tokenizer.autoencoder.kind" not in own or "autoencoder" not in key
    }
    return change_recipe(TokenizerRecipe(), kept | {"steps": 20} | own)


def batches(number: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(number)]


def begin(recipe: TokenizerRecipe) -> TokenizerTask:
    torch.manual_seed(0)
    task = TokenizerTask(recipe.tokenizer.build(), recipe, batches()[0])
    task.start(batches(4))
    return task


def train(recipe: TokenizerRecipe, steps: int = 8) -> TokenizerTask:
    task = begin(recipe)
    for step, batch in enumerate(batches(steps), start=1):
        task.train_step(batch, step)
    return task


def weights(task: TokenizerTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.tokenizer.state_dict().items()}


def test_norms_biases_and_codes_do_not_decay() -> None:
    tokenizer = tiny(**CNN, **{"tokenizer.quantizer.codebook": "learned"}).tokenizer.build()
    decaying, others = parameter_groups(tokenizer, 0.1, tokenizer.quantize.codebook_parameters())
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decaying["params"])
    codes = [p for m in tokenizer.modules() if isinstance(m, Codebook) for p in m.parameters()]
    assert codes
    assert all(any(p is other for other in others["params"]) for p in codes)
    total = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    assert sum(p.numel() for group in (decaying, others) for p in group["params"]) == total


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    shares = [cosine_schedule(step, 100, warmup=10) for step in range(1, 101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(shares[9])
    assert shares[-1] < 1e-3
    assert cosine_schedule(100, 100, warmup=0, decay=False) == 1


def test_a_batch_in_parts_is_the_batch() -> None:
    whole, parts = train(tiny()), train(tiny(optimizer__accumulate=2))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-4, atol=1e-5)


def test_long_gradients_are_shortened() -> None:
    task = begin(tiny(optimizer__clip=1e-3))
    task.optimizer = torch.optim.SGD(task.optimizer.param_groups, lr=1.0)
    before = weights(task)
    metrics = task.train_step(batches()[0], 1)
    assert metrics["gradient_norm"] > 1e-3  # before it was shortened
    lr = metrics["lr"]
    moved = sum(
        float((after - before[name]).square().sum())
        for name, after in weights(task).items()
        if "quantize.embedding" not in name
    )
    assert moved**0.5 <= 1e-3 * lr * 1.1 + 1e-4


def test_averaged_weights_are_what_is_saved_and_codes_are_not_averaged_twice() -> None:
    task = train(tiny(optimizer__ema_decay=0.9))
    assert task.result is not task.tokenizer
    own, average = task.tokenizer.state_dict(), task.result.state_dict()
    assert torch.equal(own["quantize.embedding.weight"], average["quantize.embedding.weight"])
    assert not torch.equal(own["encoder.0.weight"], average["encoder.0.weight"])


def test_a_moving_average_is_one() -> None:
    tokenizer = tiny().tokenizer.build()
    average = WeightAverage(tokenizer, 0.5)
    expected = tokenizer.encoder[0].weight.detach().clone()  # type: ignore[index]
    for step in range(1, 12):
        with torch.no_grad():
            tokenizer.encoder[0].weight.add_(1)  # type: ignore[index]
        average.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * tokenizer.encoder[0].weight  # type: ignore[index]
    torch.testing.assert_close(average.model.encoder[0].weight, expected.detach())  # type: ignore[index]


def test_the_tokenizer_does_not_feel_the_discriminator_before_its_start() -> None:
    recipe = tiny(**ADVERSARIAL)
    plain, judged = begin(tiny()), begin(recipe)
    for step, batch in enumerate(batches(6), start=1):
        plain.train_step(batch, step)
        metrics = judged.train_step(batch, step)
        same = all(
            torch.equal(a, b)
            for a, b in zip(weights(plain).values(), weights(judged).values(), strict=True)
        )
        assert same == (step <= 4)
        assert ("discriminator_loss" in metrics) == (step > 2)
        assert ("adversarial_gradient" in metrics) == (step > 4)
    assert metrics["adversarial_gradient"] == pytest.approx(0.3, rel=1e-3)


def test_a_broken_batch_changes_nothing() -> None:
    task = begin(tiny(**ADVERSARIAL, optimizer__ema_decay=0.9))
    for step, batch in enumerate(batches(6), start=1):
        task.train_step(batch, step)
    before = {
        **weights(task),
        **{
            f"judge.{k}": v.clone()
            for k, v in task.state()["discriminator"].items()
            if "_u" not in k
        },
    }  # type: ignore[union-attr]
    moments = [state["exp_avg"].clone() for state in task.optimizer.state.values()]
    broken = torch.full((4, 3, 16, 16), torch.nan)
    metrics = task.train_step(broken, 7)
    assert metrics["skipped"] == 1
    assert all(
        value == value for value in metrics.values()
    )  # no NaN in the log: it would be no JSON
    after = {
        **weights(task),
        **{f"judge.{k}": v for k, v in task.state()["discriminator"].items() if "_u" not in k},
    }  # type: ignore[union-attr]
    for name, tensor in before.items():
        if "._v" not in name and ".0._" not in name:
            assert torch.equal(tensor, after[name]), name
    assert all(
        torch.equal(a, state["exp_avg"])
        for a, state in zip(moments, task.optimizer.state.values(), strict=True)
    )
    assert "skipped" not in task.train_step(batches()[0], 8)


@pytest.mark.parametrize("codebook", ["learned", "ema", "projected"])
def test_what_fine_tuning_leaves_alone_stays_bitwise(codebook: str) -> None:
    settings = {"tokenizer.quantizer.codebook": codebook}
    start = train(tiny(**settings)).tokenizer
    for learn, fixed in (
        ("decoder", ("encoder.", "quantize.")),
        ("all-but-codebook", ("quantize.embedding.",)),
    ):
        recipe = tiny(**settings, finetune__learn=learn)
        tokenizer = recipe.tokenizer.build()
        tokenizer.load_state_dict(start.state_dict())
        task = TokenizerTask(tokenizer, recipe, batches()[0], keep_codes=True)
        for step, batch in enumerate(batches(4, seed=5), start=1):
            task.train_step(batch, step)
        for name, tensor in start.state_dict().items():
            changed = not torch.equal(tensor, task.tokenizer.state_dict()[name])
            if name.startswith(fixed):
                assert not changed, name
            elif name.startswith("decoder.") and "weight" in name:
                assert changed, name
        images = torch.cat(batches(3, seed=9))
        same = torch.equal(start.eval().encode(images), task.tokenizer.eval().encode(images))
        assert same or learn != "decoder"


def test_channels_last_and_bf16_train_what_float32_does_about() -> None:
    plain, last = train(tiny(**CNN)), train(tiny(**CNN, channels_last=True))
    assert last.evaluate()["held_out_psnr"] == pytest.approx(
        plain.evaluate()["held_out_psnr"], abs=0.05
    )
    short = train(tiny(**CNN, precision="bf16", **ADVERSARIAL))
    assert all(p.dtype == torch.float32 for p in short.tokenizer.parameters())
    assert short.evaluate()["held_out_psnr"] == pytest.approx(
        train(tiny(**CNN, **ADVERSARIAL)).evaluate()["held_out_psnr"], abs=0.5
    )


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's compiler imports what torch itself deprecates
def test_compiled_steps_train_what_plain_ones_do() -> None:
    plain, compiled = train(tiny()), train(tiny(compile=True))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(compiled)[name], rtol=1e-3, atol=1e-4)


def test_state_resumes_bitwise(tmp_path: Path) -> None:
    recipe = tiny(**ADVERSARIAL, optimizer__ema_decay=0.9)
    whole, first = begin(recipe), begin(recipe)
    for step, batch in enumerate(batches(8), start=1):
        whole.train_step(batch, step)
        if step <= 5:
            first.train_step(batch, step)
    first.save(tmp_path)
    second = TokenizerTask(smalto.load(tmp_path), recipe, batches()[0], keep_codes=True)
    second.load(tmp_path)
    second.load_state(first.state())
    for step, batch in enumerate(batches(8), start=1):
        if step > 5:
            second.train_step(batch, step)
    for a, b in zip(
        whole.result.state_dict().values(), second.result.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    for a, b in zip(weights(whole).values(), weights(second).values(), strict=True):
        assert torch.equal(a, b)
