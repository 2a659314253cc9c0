"""Generators: one image's tokens depend on its label and seed alone, with and without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smalto.autoencoders import SimpleAutoencoderConfig
from smalto.core.errors import ConfigError, InputError, RunError
from smalto.generator import (
    Fixed,
    Generator,
    GeneratorConfig,
    KVCache,
    Transformer,
    load_generator,
    save_generator,
)
from smalto.quantizers import (
    MultiScaleVQConfig,
    ProductVQConfig,
    ResidualVQConfig,
    VectorQuantizerConfig,
)
from smalto.tokenizer import ImageTokenizer, TokenizerConfig

VECTOR = VectorQuantizerConfig(codebook_size=24, latent_dim=8)
QUANTIZERS = {
    "multiscale": MultiScaleVQConfig(scales=[1, (2, 3), (4, 6)], scale=VECTOR),
    "one scale": MultiScaleVQConfig(scales=[(4, 6)], scale=VECTOR),
    "vector": VECTOR,
    "residual": ResidualVQConfig(num_stages=2, stage=VECTOR),
    "product": ProductVQConfig(
        num_heads=2, head=VectorQuantizerConfig(codebook_size=24, latent_dim=4)
    ),
}
kinds = pytest.mark.parametrize("kind", QUANTIZERS)
SETTINGS = {"depth": 3, "width": 32, "num_heads": 4, "num_classes": 5}


def generator_of(kind: str, **settings: object) -> Generator:
    torch.manual_seed(0)
    config = TokenizerConfig(
        autoencoder=SimpleAutoencoderConfig(latent_dim=8, hidden_dim=8),
        quantizer=QUANTIZERS[kind],
    )
    tokenizer: ImageTokenizer = config.build()
    shape = GeneratorConfig.for_tokenizer(tokenizer, (16, 24), **(SETTINGS | settings))
    transformer = Transformer(shape)
    with torch.no_grad():
        for parameter in transformer.parameters():  # the initialization is nearly uniform
            parameter.normal_(std=0.3)
    return Generator(transformer, tokenizer).double().eval()


def equal(own: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@kinds
def test_teacher_forcing_gives_logits_of_all_tokens(kind: str) -> None:
    generator = generator_of(kind)
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
    blocks = generator.tokenizer.img_to_idxBl(images, blocks="whole")
    layout = generator.config.layout
    patch_hws = layout.grids if kind in ("multiscale", "one scale") else None
    inputs = generator.tokenizer.idxBl_to_var_input(blocks, patch_hws)
    logits = generator(torch.tensor([0, 4]), inputs)
    assert logits.shape == (2, layout.num_tokens, 24)


@kinds
def test_the_logits_of_a_cache_are_those_of_teacher_forcing(kind: str) -> None:
    generator = generator_of(kind)
    samples = generator.generate([3, 1], seeds=[5, 6], guidance=0)
    patch_hws = generator.config.grids if kind in ("multiscale", "one scale") else None
    inputs = generator.tokenizer.idxBl_to_var_input(samples.idx_Bl, patch_hws)
    labels = torch.tensor([3, 1])
    whole = generator(labels, inputs)
    cache = KVCache(generator.config, 2, torch.float64)
    inputs = inputs[:, : sum(generator.config.steps[1:])]
    steps = generator.config.steps
    first = 0
    for length in steps:
        part = inputs[:, max(0, first - steps[0]) : first - steps[0] + length if first else 0]
        logits = generator.transformer(labels, part, cache)
        torch.testing.assert_close(logits, whole[:, first : first + length], atol=1e-10, rtol=0)
        first += length
    assert cache.length == generator.config.layout.num_tokens


@kinds
def test_an_image_does_not_depend_on_the_batch(kind: str) -> None:
    generator = generator_of(kind)
    labels, seeds = [0, 1, 2, 3, 4, 0, 1, 2], list(range(100, 108))
    settings = {"guidance": 2.0, "top_k": 9, "top_p": 0.95, "temperature": 1.1}
    whole = generator.generate(labels, seeds=seeds, **settings)
    for number in (1, 3):
        some = generator.generate(labels[2 : 2 + number], seeds=seeds[2 : 2 + number], **settings)
        assert equal(some.idx_Bl, [block[2 : 2 + number] for block in whole.idx_Bl])
        torch.testing.assert_close(some.images, whole.images[2 : 2 + number])
    chunked = generator.generate(labels, seeds=seeds, cache=generator.new_cache(3), **settings)
    assert equal(chunked.idx_Bl, whole.idx_Bl)
    other = generator.generate(labels, seeds=[s + 1000 for s in seeds], **settings)
    assert not equal(other.idx_Bl, whole.idx_Bl)


@kinds
def test_images_are_those_of_the_tokens(kind: str) -> None:
    generator = generator_of(kind)
    samples = generator.generate(2, num_images=2, seeds=[1, 2])
    tokens = torch.cat(samples.idx_Bl, 1)
    expected = generator.tokenizer.decode(tokens, generator.config.layout)
    torch.testing.assert_close(samples.images, expected)
    assert samples.images.shape == (2, 3, 16, 24)
    assert samples.images.abs().max() <= 1


@kinds
def test_unconditional_generators_need_no_label(kind: str) -> None:
    generator = generator_of(kind, num_classes=0)
    first = generator.generate(num_images=2, seeds=[1, 2], guidance=3.0)
    again = generator.generate(num_images=2, seeds=[1, 2], guidance=0.0)
    assert equal(first.idx_Bl, again.idx_Bl)
    with pytest.raises(InputError, match="expected none"):
        generator.generate([0, 0])


@kinds
def test_fixed_tokens_stay_and_the_others_see_them(kind: str) -> None:
    generator = generator_of(kind)
    num_tokens = generator.config.layout.num_tokens
    free = torch.cat(generator.generate([1, 1], seeds=[1, 2]).idx_Bl, 1)
    tokens = (free[:1] + 1) % 24
    mask = torch.zeros(1, num_tokens, dtype=torch.bool)
    mask[:, ::2] = True
    kept = torch.cat(generator.generate([1, 1], seeds=[1, 2], fixed=Fixed(tokens, mask)).idx_Bl, 1)
    assert torch.equal(kept[:, ::2], tokens[:, ::2].expand(2, -1))
    all_free = Fixed(tokens, torch.zeros_like(mask))
    same = torch.cat(generator.generate([1, 1], seeds=[1, 2], fixed=all_free).idx_Bl, 1)
    assert torch.equal(same, free)
    with pytest.raises(InputError, match="fixed"):
        generator.generate([1, 1], fixed=Fixed(tokens[:, 1:], mask[:, 1:]))
    with pytest.raises(InputError, match="fixed token 24"):
        generator.generate([1, 1], fixed=Fixed(tokens * 0 + 24, mask))


@kinds
def test_tokens_are_the_likeliest_ones_after_those_that_are_fixed(kind: str) -> None:
    generator = generator_of(kind)
    layout = generator.config.layout
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(24, (2, layout.num_tokens), generator=random)
    mask = torch.rand(tokens.shape, generator=random) < 0.5
    made = generator.generate(
        [1, 3],
        guidance=0,
        temperature=0,
        fixed=Fixed(tokens, mask),
        cache=generator.new_cache(1),
    ).idx_Bl
    patch_hws = layout.grids if kind in ("multiscale", "one scale") else None
    inputs = generator.tokenizer.idxBl_to_var_input(made, patch_hws)
    likeliest = generator(torch.tensor([1, 3]), inputs).argmax(-1)
    assert torch.equal(torch.cat(made, 1), torch.where(mask, tokens, likeliest))


@kinds
def test_guidance_is_the_formula_at_every_step(kind: str) -> None:
    generator = generator_of(kind)
    config = generator.config
    made = generator.generate([3], guidance=2.0, temperature=0).idx_Bl
    patch_hws = config.grids if kind in ("multiscale", "one scale") else None
    inputs = generator.tokenizer.idxBl_to_var_input(made, patch_hws)
    label, none = generator(torch.tensor([3]), inputs), generator(None, inputs)
    strengths = torch.full((config.layout.num_tokens,), 2.0, dtype=torch.float64)
    if kind == "multiscale":  # grows from 0 over the three scales
        strengths = torch.tensor([0.0] + [1.0] * 6 + [2.0] * 24, dtype=torch.float64)
    strengths = strengths[:, None]
    likeliest = ((1 + strengths) * label - strengths * none).argmax(-1)
    assert torch.equal(torch.cat(made, 1), likeliest)


def test_the_scale_of_attention_is_at_most_100() -> None:
    generator = generator_of("multiscale")
    inputs = torch.randn(1, 30, 8, dtype=torch.float64)
    logits = []
    for value in (math.log(100), 50.0):
        with torch.no_grad():
            for name, parameter in generator.named_parameters():
                if name.endswith("log_scale"):
                    parameter.fill_(value)
        logits.append(generator(torch.tensor([1]), inputs))
    torch.testing.assert_close(logits[0], logits[1])


@kinds
def test_a_preview_sees_every_grid(kind: str) -> None:
    generator = generator_of(kind)
    seen: list[tuple[int, int]] = []

    def look(finished: int, blocks: list[Tensor]) -> None:
        seen.append((finished, len(blocks)))

    generator.generate([1, 2, 3], seeds=[1, 2, 3], cache=generator.new_cache(2), on_scale=look)
    grids = range(1, len(generator.config.grids) + 1)
    assert seen == [(0, n) for n in grids] + [(2, n) for n in grids]


def test_greedy_is_temperature_zero_and_top_k_one() -> None:
    generator = generator_of("multiscale")
    cold = generator.generate([1], temperature=0)
    assert equal(cold.idx_Bl, generator.generate([1], top_k=1).idx_Bl)


def test_smooth_images_come_from_mixtures() -> None:
    generator = generator_of("multiscale")
    smooth = generator.generate([1, 2], seeds=[1, 2], smooth=True)
    again = generator.generate([2], seeds=[2], smooth=True)
    torch.testing.assert_close(again.images, smooth.images[1:])
    tokens = torch.cat(smooth.idx_Bl, 1)
    assert not torch.equal(
        smooth.images, generator.tokenizer.decode(tokens, generator.config.layout)
    )
    one = generator.generate([1], seeds=[1], smooth=True, top_k=1)  # mixtures of one code
    torch.testing.assert_close(one.images, generator.generate([1], top_k=1).images)
    fixed = Fixed(tokens, torch.ones_like(tokens, dtype=torch.bool))
    kept = generator.generate([1, 2], smooth=True, fixed=fixed)
    torch.testing.assert_close(
        kept.images, generator.tokenizer.decode(tokens, generator.config.layout)
    )
    with pytest.raises(InputError, match="smooth=False"):
        generator_of("vector").generate([1], smooth=True)
    with pytest.raises(InputError, match="need noise"):
        generator.generate([1], smooth=True, temperature=0)


def test_labels_are_dropped_in_training_mode_only() -> None:
    """VAR drops them in evaluation too, so its validation loss is one of other inputs."""
    generator = generator_of("multiscale", label_drop=1.0)
    inputs = torch.zeros(4, 30, 8, dtype=torch.float64)
    labels = torch.arange(4)
    none = generator(None, inputs)
    assert not torch.equal(generator(labels, inputs), none)
    torch.testing.assert_close(generator.train()(labels, inputs), none)
    assert not generator.tokenizer.training


def test_an_exception_leaves_nothing_behind() -> None:
    """VAR's cache stays switched on after one."""
    generator = generator_of("multiscale").train()
    before = generator.generate([1], seeds=[3]).idx_Bl

    def fail(finished: int, blocks: list[Tensor]) -> None:
        raise KeyboardInterrupt

    cache = generator.new_cache(1)
    with pytest.raises(KeyboardInterrupt):
        generator.generate([1], seeds=[3], cache=cache, on_scale=fail)
    assert generator.training
    assert equal(generator.generate([1], seeds=[3], cache=cache).idx_Bl, before)


def test_without_a_label_no_random_one_is_taken() -> None:
    """VAR draws one for each image."""
    generator = generator_of("multiscale")
    one = generator.generate(None, num_images=1, seeds=[4])
    assert equal(one.idx_Bl, generator.generate(num_images=1, seeds=[4], guidance=0).idx_Bl)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g: g.generate([5]), "label 5; expected 0 to 4"),
        (lambda g: g.generate([-1]), "label -1"),
        (lambda g: g.generate([1, 2], num_images=3), "num_images=3, 2 labels and no seeds"),
        (lambda g: g.generate([1], seeds=[1, 2]), "1 labels and 2 seeds"),
        (lambda g: g.generate(num_images=0), "num_images=0, no labels"),
        (lambda g: g.generate([]), "labels"),
        (lambda g: g.generate(["cat"]), r"labels \['cat'\]; expected a list of integers"),
        (lambda g: g.generate(torch.tensor(1)), "expected a list of integers"),
        (lambda g: g.generate([1], seeds=[0.5]), "seeds"),
        (lambda g: g.generate([1], top_k=2.5), "top_k=2.5"),
        (lambda g: g.generate([1], top_p=1.5), "top_p=1.5"),
        (lambda g: g.generate([1], temperature=-1), "temperature=-1"),
        (lambda g: g.generate([1], cache=KVCache(g.config, 1, torch.float64)), "new_cache"),
        (lambda g: g.generate([1], cache=KVCache(g.config, 2)), "new_cache"),
        (lambda g: g(torch.tensor([1]), torch.zeros(1, 3, 8)), "idxBl_to_var_input"),
    ],
)
def test_mistakes_are_named(call: Callable[[Generator], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        call(generator_of("multiscale"))


def test_a_tokenizer_that_does_not_fit_is_refused() -> None:
    transformer = generator_of("multiscale").transformer
    for kind in ("vector", "residual", "one scale"):
        with pytest.raises(ConfigError, match="with which the generator was trained"):
            Generator(transformer, generator_of(kind).tokenizer)


@kinds
def test_the_cache_has_the_bytes_of_its_formula(kind: str) -> None:
    config = generator_of(kind).config
    cache = KVCache(config, 6, torch.bfloat16)
    assert cache.num_bytes == 6 * KVCache.bytes_per_row(config, torch.bfloat16)


def test_shared_and_own_modulation_and_both_attentions_train() -> None:
    for shared in (False, True):
        for l2 in (False, True):
            generator = generator_of("multiscale", shared_adaln=shared, l2_attention=l2)
            generator.train().transformer.reset_parameters()
            generator.transformer.gradient_checkpointing = shared
            logits = generator(torch.tensor([0, 1]), torch.randn(2, 30, 8, dtype=torch.float64))
            logits.square().sum().backward()
            trained = {n for n, p in generator.named_parameters() if p.grad is not None}
            assert trained == {n for n, _ in generator.named_parameters() if "transformer" in n}


@kinds
def test_a_saved_generator_makes_the_same_images(kind: str, tmp_path: Path) -> None:
    generator = generator_of(kind)
    save_generator(generator, tmp_path / "generator")
    again = load_generator(tmp_path / "generator")
    first = generator.generate([1, 2], seeds=[1, 2])
    second = again.generate([1, 2], seeds=[1, 2])
    assert torch.equal(first.images, second.images)
    assert equal(first.idx_Bl, second.idx_Bl)


@kinds
def test_other_precisions(kind: str) -> None:
    generator = generator_of(kind).float()
    fast = Generator(generator.transformer, generator.tokenizer.for_inference("bf16"))
    samples = fast.generate([1, 2], seeds=[1, 2])
    images = fast.tokenizer.decode(torch.cat(samples.idx_Bl, 1), fast.config.layout)
    torch.testing.assert_close(samples.images, images)
    half = generator_of(kind).bfloat16().generate([1], seeds=[1])
    assert half.images.isfinite().all()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    generator = generator_of("vector")
    with torch.no_grad():
        generator.transformer.head.bias[0] = torch.nan
    with pytest.raises(RunError, match="was not saved"):
        save_generator(generator, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_folders_without_a_generator_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold a generator"):
        load_generator(tmp_path / "none")
    save_generator(generator_of("vector"), tmp_path / "one")
    save_generator(generator_of("multiscale"), tmp_path / "other")
    (tmp_path / "one" / "tokenizer").rename(tmp_path / "one" / "old")
    (tmp_path / "other" / "tokenizer").rename(tmp_path / "one" / "tokenizer")
    with pytest.raises(ConfigError, match="with which the generator was trained"):
        load_generator(tmp_path / "one")


@kinds
def test_images_of_another_size(kind: str) -> None:
    generator = generator_of(kind)
    same = generator.generate([1], seeds=[5], grids=generator.config.grids)
    assert equal(same.idx_Bl, generator.generate([1], seeds=[5]).idx_Bl)
    grids = generator.tokenizer.layout(24, 24).grids
    samples = generator.generate([1, 2], seeds=[5, 6], grids=grids)
    assert samples.images.shape == (2, 3, 24, 24)
    assert [block.shape[1] for block in samples.idx_Bl] == [h * w for h, w in grids]
    wider = generator.for_grids(grids)
    cache = wider.new_cache(2)
    again = generator.generate([1, 2], seeds=[5, 6], grids=grids, cache=cache)
    assert equal(samples.idx_Bl, again.idx_Bl)
    back = wider.for_grids(generator.config.grids)
    assert back.config == generator.config
    with pytest.raises(InputError, match="as in training"):
        generator.generate([1], grids=[(1, 1)] * 7)


def test_grids_that_are_not_a_layout_are_refused() -> None:
    generator = generator_of("multiscale")
    with pytest.raises(ConfigError, match="grids"):
        generator.for_grids([(1, 1), (1, 1), (6, 6)])


@pytest.mark.parametrize("shared", [False, True])
def test_weights_start_as_in_var(shared: bool) -> None:
    """init_weights(init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02, init_std=-1)."""
    config = generator_of("multiscale", width=256, depth=4, shared_adaln=shared).config
    transformer = Transformer(config).requires_grad_(False)
    std = math.sqrt(1 / 256 / 3)
    block = transformer.blocks[1]
    modulation = block.offset[0, 0] if shared else block.modulation.linear.weight.view(6, -1)
    of_modulation = 1 / math.sqrt(256) if shared else std
    for weights, expected in (
        (transformer.head.weight, 0.02 * std),
        (transformer.head_norm.modulation.linear.weight, 0.5 * std),
        (transformer.class_embedding.weight, std),
        (transformer.position_embedding, std),
        (transformer.word_embedding.weight, std),
        (block.attention.qkv.weight, std),
        (block.attention.project.weight, std / math.sqrt(8)),
        (block.mlp.widen.weight, std),
        (block.mlp.narrow.weight, std / math.sqrt(8)),
        (modulation[:2], 1e-5 * of_modulation),
        (modulation[2:], 0.5 * of_modulation),
    ):
        assert float(weights.std()) == pytest.approx(expected, rel=0.15)
        assert abs(float(weights.mean())) < 0.1 * expected
    for bias in (block.attention.project.bias, block.mlp.widen.bias, transformer.head.bias):
        assert not bias.any()
    assert float(block.attention.log_scale.mean()) == pytest.approx(math.log(4))
