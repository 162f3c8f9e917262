"""RMSNorm: against fp64, in both precisions."""

from types import SimpleNamespace

import pytest
import torch

from ssa_megatron.model.norm import RMSNorm


def norm(width: int, dtype=torch.float32, **options) -> RMSNorm:
    made = RMSNorm(SimpleNamespace(params_dtype=dtype), width, **options)
    weight = torch.linspace(0.5, 1.5, width).to(dtype)
    made.weight.data.copy_(weight)
    return made


def expected(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("width", [1, 7, 32])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_output_and_gradients_are_those_of_fp64(width, eps):
    generator = torch.Generator().manual_seed(width)
    module = norm(width, eps=eps)
    x = torch.randn(5, 3, width, generator=generator, requires_grad=True)
    upstream = torch.randn(5, 3, width, generator=generator)
    module(x).backward(upstream)
    x64 = x.detach().double().requires_grad_()
    w64 = module.weight.detach().double().requires_grad_()
    expected(x64, w64, eps).backward(upstream.double())
    assert torch.allclose(module(x).double(), expected(x64, w64, eps), rtol=1e-5, atol=1e-6)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(module.weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-5)


def test_bf16_computes_its_statistics_in_fp32_and_rounds_once():
    x = (torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)) * 30).bfloat16()
    module = norm(1024, torch.bfloat16)
    found = module(x)
    assert found.dtype == torch.bfloat16
    exact = expected(x, module.weight, 1e-5)
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(norm(8)(torch.zeros(2, 8)), torch.zeros(2, 8))
