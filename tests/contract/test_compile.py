"""Compiled, exported, checkpointed or accumulated: the same as the plain run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalto.quantizers import CodebookUpdater, Quantizer
from smalto.tokenizer import TokenizerConfig
from smalto.tokenizer.exporting import export_tokenizer
from tests.contract.kinds import KINDS, C, build, latents

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


class Model(nn.Module):
    """An encoder of one convolution around a quantizer."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Conv2d(C, C, 1)
        self.quantizer = build(kind, seed)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.quantizer(self.encoder(images))


def train(model: nn.Module, run: nn.Module, backend_steps: int = 4, seed: int = 0) -> list[Tensor]:
    """A few steps with upkeep; ``run`` is ``model`` or what came of it. All state, and the last
    output.
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    updater = CodebookUpdater(model, optimizer, decay_tokens=4.0, seed=seed)
    for step in range(backend_steps):
        out = run(latents(batch=3, seed=step))
        optimizer.zero_grad()
        (out[1] + out[0].square().mean()).backward()
        optimizer.step()
        updater.step()
    return [
        out[0].detach(),
        out[1].detach(),
        *(tensor.detach() for tensor in model.state_dict().values()),
        *_trackers(updater),
    ]


def _trackers(updater: CodebookUpdater) -> list[Tensor]:
    return [
        tracker[key]
        for tracker in updater.state_dict()["trackers"].values()
        for key in ("idle", "use")
    ]


@every_kind
def test_training_compiles_in_one_graph_and_is_the_same(kind: str) -> None:
    plain, compiled = Model(kind), Model(kind)
    expected = train(plain, plain)
    got = train(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True))
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference)


def test_steps_do_not_compile_anew() -> None:
    torch._dynamo.utils.counters.clear()
    model = Model("ema")
    train(model, torch.compile(model, backend="aot_eager", fullgraph=True), backend_steps=12)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    )  # before the codes are placed, and after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
@every_kind
def test_inductor_gives_the_same(kind: str) -> None:
    plain, compiled = Model(kind), Model(kind)
    expected = train(plain, plain)
    got = train(compiled, torch.compile(compiled, fullgraph=True))
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ema", "residual-learned-code_dim", "product-shared"])
def test_encode_and_decode_compile_too(kind: str) -> None:
    quantizer, z = build(kind), latents()
    tokens = torch.compile(quantizer.encode, backend="aot_eager", fullgraph=True)(z)
    assert torch.equal(tokens, quantizer.encode(z))


def test_two_models_of_one_class_keep_their_books_apart() -> None:
    models = [Model("ema", seed) for seed in (0, 1)]
    twins = copy.deepcopy(models)
    expected = [train(model, model) for model in models]
    runs = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in twins]
    got = [train(model, run) for model, run in zip(twins, runs, strict=True)]
    for ours, reference in zip(got, expected, strict=True):
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b)


def test_an_updater_that_comes_after_the_first_compiled_call_is_heard() -> None:
    # A forward hook would not be: the compiler does not look for new ones.
    model = Model("ema")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(latents())
    updater = CodebookUpdater(model)
    run(latents())
    updater.step()
    updater.close()
    run(latents())
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        updater.step()


def test_an_updater_of_the_compiled_model_has_the_same_state() -> None:
    model = Model("residual-ema")
    plain, compiled = (
        CodebookUpdater(model),
        CodebookUpdater(torch.compile(model, backend="aot_eager")),
    )
    compiled.load_state_dict(plain.state_dict())
    compiled.start(latents())
    assert set(compiled.usage()) == {
        "quantizer.stages.0",
        "quantizer.stages.1",
        "quantizer.stages.2",
    }


def test_compiled_evaluation_is_not_counted() -> None:
    model = Model("ema")
    updater = CodebookUpdater(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(latents())
    updater.step()
    model.eval()
    run(latents())
    model.train()
    with torch.no_grad():
        run(latents())
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        updater.step()


@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_export_with_a_dynamic_batch(kind: str, training: bool) -> None:
    quantizer = build(kind).train(training)
    updater = CodebookUpdater(quantizer)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        quantizer, (latents(batch=3),), dynamic_shapes={"latents": {0: batch}}
    )
    updater.close()
    for size in (2, 7):
        z = latents(batch=size, seed=size)
        for ours, reference in zip(exported.module()(z), quantizer(z), strict=True):
            assert torch.equal(ours, reference)


class Checkpointed(Model):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return checkpoint(super().forward, images, use_reentrant=False)  # type: ignore[return-value]


@every_kind
def test_activation_checkpointing_counts_once(kind: str) -> None:
    plain, saving = Model(kind), Checkpointed(kind)
    for ours, reference in zip(train(saving, saving), train(plain, plain), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_and_compiling_together_count_once(inside: bool) -> None:
    plain, saving = Model("ema"), Checkpointed("ema") if inside else Model("ema")
    compiled = torch.compile(saving, backend="aot_eager")
    run = compiled if inside else lambda images: checkpoint(compiled, images, use_reentrant=False)
    for ours, reference in zip(train(saving, run), train(plain, plain), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(ours, reference)


def test_reentrant_checkpointing_is_refused() -> None:
    quantizer = build("learned")
    updater = CodebookUpdater(quantizer)
    out = checkpoint(
        lambda z: quantizer(z).quantized, latents().requires_grad_(), use_reentrant=True
    )
    out.sum().backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        updater.step()


@every_kind
def test_a_discriminators_pass_does_not_count(kind: str) -> None:
    class Twice(Model):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = super().forward(images)
            with torch.no_grad():
                super().forward(images + 1)
            return out

    once, twice = Model(kind), Twice(kind)
    for ours, reference in zip(train(twice, twice), train(once, once), strict=True):
        assert torch.equal(ours, reference)


@every_kind
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_add_up_to_the_batch(kind: str, parts: int) -> None:
    whole, split = build(kind).double(), build(kind).double()
    updaters = [CodebookUpdater(quantizer, decay_tokens=1.0) for quantizer in (whole, split)]
    for step in range(8):
        z = latents(batch=6, seed=step, dtype=torch.float64)
        whole(z)
        for part in z.split(6 // parts):
            split(part)
        for updater in updaters:
            updater.step()
        for ours, reference in zip(
            split.state_dict().values(), whole.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_bf16_autocast_around_training_changes_nothing_in_the_quantizer() -> None:
    def run(quantizer: Quantizer, autocast: bool) -> list[Tensor]:
        updater = CodebookUpdater(quantizer)
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                quantizer(latents(seed=step))
            updater.step()
        return list(quantizer.state_dict().values())

    for ours, reference in zip(run(build("ema"), True), run(build("ema"), False), strict=True):
        assert torch.equal(ours, reference)


TOKENIZERS = {
    "vector": {"kind": "vector", "codebook_size": 16, "latent_dim": 8},
    "cosine": {"codebook_size": 16, "latent_dim": 8, "code_dim": 4, "metric": "cosine"},
    "residual": {"kind": "residual", "num_stages": 2, "stage": {"latent_dim": 8, "code_dim": 4}},
    "product": {"kind": "product", "num_heads": 2, "head": {"latent_dim": 4}},
    "logit": {"kind": "logit", "codebook_size": 16, "latent_dim": 8, "code_dim": 4},
    "multiscale": {"kind": "multiscale", "scales": (1, 2, 4), "scale": {"latent_dim": 8}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_encode_and_decode_export_with_dynamic_batch_height_and_width(kind: str) -> None:
    torch.manual_seed(0)
    config = {"autoencoder": {"latent_dim": 8, "hidden_dim": 8}, "quantizer": TOKENIZERS[kind]}
    tokenizer = TokenizerConfig.model_validate(config).build().eval()
    encoder, decoder, num_maps = export_tokenizer(tokenizer)
    images = torch.rand(3, 3, 20, 32) * 2 - 1
    guards = {"check_guards": False} if kind == "multiscale" else {}
    maps = encoder.module(**guards)(images)
    layout = tokenizer.layout(20, 32)
    assert [tuple(tokens.shape[1:]) for tokens in maps] == list(layout.grids)
    assert len(maps) == num_maps
    tokens = torch.cat([tokens.flatten(1) for tokens in maps], dim=1)
    assert torch.equal(tokens, tokenizer.encode(images))
    with torch.no_grad():
        image = decoder.module(**guards)(*maps)
    torch.testing.assert_close(image, tokenizer.decode(tokens, layout))
