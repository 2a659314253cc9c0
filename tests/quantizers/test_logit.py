"""LogitVQ: the code of the highest logit, with the gradient of the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smalto.core.errors import InputError
from smalto.quantizers import LogitVQ, logit

KINDS = pytest.mark.parametrize("code_dim", [None, 3])


def built(code_dim: int | None = None, dtype: torch.dtype = torch.float32) -> LogitVQ:
    torch.manual_seed(0)
    return LogitVQ(20, 6, code_dim, kl_weight=0.1).to(dtype)


def latents(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 3, 4, generator=generator, dtype=torch.float64).to(dtype)


def written_out(quantizer: LogitVQ, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean codes behind the projection, loss, indices), with the matrix of all logits."""
    vectors = quantizer.project_in(z.permute(0, 2, 3, 1).reshape(-1, 6))
    shares = torch.nn.functional.linear(
        vectors, quantizer.proj.weight, quantizer.proj.bias
    ).softmax(dim=1)
    means = quantizer.project_out(shares @ quantizer.embedding.weight)
    loss = 0.1 * (shares * (shares * 20).log()).sum(dim=1).mean()
    return means.view(2, 3, 4, 6).permute(0, 3, 1, 2), loss, shares.argmax(dim=1)


@KINDS
def test_values_loss_and_gradients_are_the_formula_s(code_dim: int | None) -> None:
    quantizer, z = built(code_dim, torch.float64), latents(torch.float64).requires_grad_()
    out = quantizer(z)
    means, loss, indices = written_out(quantizer, z)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.loss, loss)
    assert torch.equal(quantizer.decode(indices.view(2, -1), quantizer.layout(3, 4)), out.quantized)
    weights = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    parameters = [z, quantizer.proj.weight, quantizer.proj.bias]
    got = torch.autograd.grad((out.quantized * weights).sum() + out.loss, parameters)
    want = torch.autograd.grad((means * weights).sum() + loss, parameters)
    for ours, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ours, expected)


@KINDS
def test_tiles_change_nothing(code_dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, z = built(code_dim), latents().requires_grad_()
    whole = quantizer(z)
    (whole.quantized.sum() + whole.loss).backward()
    gradient = z.grad
    assert gradient is not None
    monkeypatch.setattr(logit, "TILE", 100)  # five vectors
    z.grad = None
    tiled = quantizer(z)
    (tiled.quantized.sum() + tiled.loss).backward()
    assert torch.equal(tiled.indices, whole.indices)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, gradient)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(code_dim: int | None, dtype: torch.dtype) -> None:
    quantizer, z = built(code_dim, dtype), latents(dtype)
    out = quantizer(z)
    tokens = quantizer.encode(z)
    assert out.quantized.dtype == dtype
    assert torch.equal(out.indices, tokens.flatten())
    assert torch.equal(quantizer.decode(tokens, quantizer.layout(3, 4)), out.quantized)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z).quantized, out.quantized)
    assert out.loss.dtype == torch.promote_types(dtype, torch.float32)


@KINDS
def test_a_broken_vector_stays_alone(code_dim: int | None) -> None:
    quantizer, z = built(code_dim), latents()
    reference = quantizer(z)
    z[1, 2, 1, 3] = math.nan
    z.requires_grad_()
    out = quantizer(z)
    tokens = out.indices.view(2, 3, 4)
    assert int(tokens[1, 1, 3]) == 0
    assert torch.equal(out.quantized[0], reference.quantized[0])
    (out.loss + out.quantized.square().sum()).backward()
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())
    assert float(z.grad[1, :, 1, 3].abs().sum()) == 0
    empty = quantizer(torch.zeros(0, 6, 3, 4))
    assert (empty.quantized.shape, empty.loss.item()) == ((0, 6, 3, 4), 0)


def test_gaps_of_tokens_and_wrong_input() -> None:
    quantizer, z = built(), latents()
    tokens, layout = quantizer.encode(z), quantizer.layout(3, 4)
    assert float(quantizer.token_gaps(z, tokens, layout).max()) == 0
    assert float(quantizer.token_gaps(z, (tokens + 1) % 20, layout).min()) > 0
    with pytest.raises(InputError, match="has one stage"):
        quantizer(z, num_stages=2)
    with pytest.raises(InputError, match=r"\[0, 20\)"):
        quantizer.decode(tokens + 20, layout)
    assert quantizer.codebook().shape == (20, 6)
    assert quantizer.codebook_parameters() == []
