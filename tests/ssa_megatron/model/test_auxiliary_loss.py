"""The alignment loss on its way into the graph: the output passes unchanged, the loss gets its constant gradient."""

import pytest
import torch

from ssa_megatron.model.auxiliary_loss import attach_auxiliary_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_passes_unchanged(dtype):
    output = torch.randn(3, 5).to(dtype)
    hung = attach_auxiliary_loss(output, torch.tensor(7.0), 0.5)
    assert torch.equal(hung, output)
    assert hung.dtype == dtype


@pytest.mark.parametrize("upstream", [1.0, 0.0, -3.0])
def test_the_losss_gradient_is_the_scale_whatever_comes_from_above(upstream):
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.randn(3, requires_grad=True)
    hung = attach_auxiliary_loss(2 * x, (y**2).sum(), 0.125)
    hung.backward(torch.full_like(hung, upstream))
    assert torch.equal(y.grad, 0.125 * 2 * y.detach())
    assert torch.equal(x.grad, torch.full_like(x, 2 * upstream))


def test_the_gradient_is_that_of_a_loss_added_at_the_end():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    found = []
    for hangs in (True, False):
        w = weights.clone().requires_grad_()
        hidden = x @ w
        loss = hidden.abs().mean()
        if hangs:
            attach_auxiliary_loss(hidden, loss, 0.3).tanh().sum().backward()
        else:
            (hidden.tanh().sum() + 0.3 * loss).backward()
        found.append(w.grad)
    assert torch.allclose(*found, rtol=1e-12)


def test_a_half_precision_loss_gets_a_gradient_of_its_own_type():
    loss = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    attach_auxiliary_loss(torch.ones(2, requires_grad=True), loss, 0.5).sum().backward()
    assert loss.grad.dtype == torch.bfloat16
    assert loss.grad == 0.5
