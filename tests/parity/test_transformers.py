"""VQVAEs of transformers: the same weights give the same tokens and images as the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import smalto
from smalto.core.errors import ConfigError, DataError
from smalto.interop.open_tokenizer import recognize
from smalto.interop.transformers import (
    CHAMELEON_KEYS,
    EMU3_KEYS,
    JANUS_KEYS,
    for_one_image,
    is_folder,
    load_tokenizer,
    with_logits,
)
from smalto.interop.vqgan import fitting_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}
LATENTS: dict[str, Any] = {"latent_channels": 16, "embed_dim": 8, "num_embeddings": 64}
EMU3: dict[str, Any] = SMALL | {
    "latent_channels": 4,
    "embed_dim": 4,
    "codebook_size": 64,
    "hidden_size": 64,
    "attn_resolutions": [1],
}


def model_of(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}VQVAEConfig")(**settings)
    model = getattr(transformers, f"{kind}VQVAE")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        model.quantize.embedding.weight.normal_(0, 0.3)
    return model.eval()


def images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_janus() -> None:
    model = model_of("Janus", num_patches=16, **SMALL, **LATENTS)
    tokenizer = load_tokenizer(model.state_dict())
    square = images(32, 32)
    expected = model.encode(square).image_tokens.view(2, -1)
    tokens = tokenizer.encode(square)
    assert expected.unique().numel() >= 6
    assert torch.equal(tokens, expected)
    image = tokenizer.decode(tokens, tokenizer.layout(32, 32), clamp=False)
    torch.testing.assert_close(image, model.decode(expected), rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_chameleon_has_no_decoder() -> None:
    for embed_dim in (16, 8):
        settings = SMALL | LATENTS | {"embed_dim": embed_dim, "resolution": 32}
        model = model_of("Chameleon", attn_resolutions=[16], **settings)
        tokenizer = load_tokenizer(model.state_dict())
        expected = model.encode(images()).image_tokens.view(2, -1)
        tokens = tokenizer.encode(images())
        assert expected.unique().numel() >= 6
        assert torch.equal(tokens, expected)
        with pytest.raises(ConfigError, match="has no decoder"):
            tokenizer.decode(tokens, tokenizer.layout(32, 48))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_emu3(frames: int) -> None:
    model = model_of("Emu3", temporal_downsample_factor=frames, **EMU3)
    tokenizer = load_tokenizer(model.state_dict())
    expected = torch.stack(model.encode(images(), torch.tensor([[32, 48]] * 2)).image_tokens)
    tokens = tokenizer.encode(images())
    assert expected.unique().numel() >= 6
    assert torch.equal(tokens, expected.flatten(1))
    image = tokenizer.decode(tokens, tokenizer.layout(32, 48), clamp=False)
    torch.testing.assert_close(image, model.decode(expected), rtol=1e-4, atol=5e-5)


def test_folders_and_files(tmp_path: Path) -> None:
    for kind, settings in (
        ("Janus", SMALL | LATENTS | {"num_patches": 16}),
        ("Chameleon", SMALL | LATENTS),
        ("Emu3", EMU3),
    ):
        model = model_of(kind, **settings)
        fingerprint = load_tokenizer(model.state_dict()).fingerprint()
        model.save_pretrained(tmp_path / kind)
        assert smalto.load(tmp_path / kind).fingerprint() == fingerprint
        assert recognize(tmp_path / kind / "model.safetensors").project == "transformers"
    settings_file = tmp_path / "Emu3" / "config.json"
    settings = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(settings | {"num_attention_heads": 2}))
    with pytest.raises(ConfigError, match="num_attention_heads 2; expected 1"):
        smalto.load(tmp_path / "Emu3")
    settings_file.write_text("[")
    assert not is_folder(tmp_path / "Emu3")


def test_the_tokenizer_of_a_language_model_in_shards(tmp_path: Path) -> None:
    model = model_of("Janus", num_patches=16, **SMALL, **LATENTS)
    inside = {f"model.vqmodel.{key}": tensor for key, tensor in model.state_dict().items()}
    names = sorted(inside)
    shards = {
        "model-00001-of-00002.safetensors": {k: inside[k] for k in names[::2]}
        | {"lm_head.weight": torch.zeros(3, dtype=torch.float16)},
        "model-00002-of-00002.safetensors": {k: inside[k] for k in names[1::2]},
    }
    index = {}
    for name, shard in shards.items():
        save_file({k: tensor.contiguous() for k, tensor in shard.items()}, tmp_path / name)
        index |= dict.fromkeys(shard, name)
    (tmp_path / "config.json").write_text('{"model_type": "janus", "vq_config": {}}')
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": index}))
    expected = load_tokenizer(model.state_dict()).fingerprint()
    assert smalto.load(tmp_path).fingerprint() == expected
    for foreign in ("lm_head.weight", "../vqmodel.x"):
        index_file.write_text(json.dumps({"weight_map": {foreign: foreign}}))
        with pytest.raises(DataError, match="names no file"):
            smalto.load(tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    state = model_of("Emu3", **EMU3).state_dict()
    key = "encoder.time_res_stack.0.norm1.running_var"
    with pytest.raises(ConfigError, match=rf"'{key}' is \[3\]; expected equal shapes"):
        load_tokenizer(state | {key: torch.ones(3)})
    janus = model_of("Janus", num_patches=16, **SMALL, **LATENTS).state_dict()
    for wrong in (torch.ones(64, 8, dtype=torch.int64), "text"):
        with pytest.raises(ConfigError, match=r"quantize\.embedding\.weight"):
            load_tokenizer(janus | {"quantize.embedding.weight": wrong})  # type: ignore[dict-item]
    model_of("Chameleon", **SMALL, **LATENTS).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vq_config": 3}))
    with pytest.raises(DataError, match="expected a table"):
        smalto.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(DataError, match="names no file"):
        smalto.load(tmp_path)


def test_what_is_missing_is_named_as_in_the_file() -> None:
    state = model_of("Emu3", **EMU3).state_dict()
    key = "decoder.time_res_stack.0.norm2.running_var"
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        load_tokenizer({k: v for k, v in state.items() if k != key})


@pytest.mark.parametrize("kind", ["Janus", "Chameleon", "Emu3"])
def test_official_sizes_fit(kind: str) -> None:
    config = getattr(transformers, f"{kind}VQVAEConfig")()
    with torch.device("meta"):
        state = getattr(transformers, f"{kind}VQVAE")(config).state_dict()
    keys, prepare = {
        "Janus": (JANUS_KEYS, with_logits),
        "Chameleon": (CHAMELEON_KEYS, lambda state, source: state),
        "Emu3": (EMU3_KEYS, for_one_image),
    }[kind]
    tokenizer, _ = fitting_tokenizer(prepare(state, kind), keys, kind, 0.25)
    assert tokenizer.stride == {"Janus": 16, "Chameleon": 16, "Emu3": 8}[kind]
    sizes = {"Janus": 16384, "Chameleon": 8192, "Emu3": 32768}
    assert tokenizer.quantize.codebook_size == sizes[kind]
