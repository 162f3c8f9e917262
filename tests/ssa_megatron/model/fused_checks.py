"""Each fused operation against its plain reference in fp64, forward and backward; on the device that is given."""

import torch

from ssa_megatron.model.fused import add_norm, cross_entropy, qkv, swiglu
from ssa_megatron.model.rope import rotary_table

BOUND = {
    torch.float32: 1e-6,
    torch.bfloat16: 8e-3,
}  # of one element: 2^-9 rounded, 2^-8 truncated, as the interpreter does
SWIGLU = [(1, 1, 2), (3, 5, 14), (7, 2, 2050)]
SUM_AND_NORM = [(1, 1, 3), (3, 5, 33), (9, 2, 520)]
QKV = [(1, 1, 1, 1, 6), (37, 3, 2, 3, 24), (20, 2, 1, 4, 16)]  # n, batch, groups, heads per group, head width
CROSS_ENTROPY = [((1,), 3, 2), ((5, 3), 4097, 4096), ((7, 2), 320, 320)]  # tokens, columns, of which vocabulary


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.norm().clamp(min=1e-30))


def check_swiglu(shape, dtype, device) -> None:
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=device, dtype=dtype)
    expected, found = swiglu.reference(wide), swiglu.swiglu(x)
    expected.backward(dy.double())
    found.backward(dy)
    assert error(found, expected) <= BOUND[dtype]
    assert error(x.grad, wide.grad) <= BOUND[dtype]


def check_sum_and_norm(shape, passed, adds, dtype, device) -> None:
    """passed: the sum has a gradient of its own. adds: there is something to add."""
    x, delta, upstream, passing = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    weight = torch.randn(shape[-1], device=device, dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in ([x, delta, weight] if adds else [x, weight])]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def run(function, x, *rest):
        total, y = function(x, rest[0] if adds else None, rest[-1], 1e-5)
        results = [y, total] if passed else [y]
        torch.autograd.backward(results, [g.to(y.dtype) for g in (upstream, passing)][: len(results)])
        return total, y

    expected, found = run(add_norm.reference, *wide), run(add_norm.add_norm, *leaves)
    pairs = zip((*found, *(leaf.grad for leaf in leaves)), (*expected, *(leaf.grad for leaf in wide)), strict=True)
    for one, other in pairs:
        assert error(one, other) <= 3 * BOUND[dtype]  # the sum is rounded before it is normalized


def check_split_and_rotation(n, batch, groups, group, dim, dtype, device) -> None:
    mixed = torch.randn(n, batch, groups * (group + 2) * dim, device=device, dtype=dtype, requires_grad=True)
    table = rotary_table(torch.randint(0, 4000, (batch, n), device=device), dim, 500000.0, None)
    wide = mixed.detach().double().requires_grad_()
    expected = qkv.reference(wide, tuple(x.double() for x in table), group, dim)
    found = qkv.split_and_rotate(mixed, table, group, dim)
    upstream = [torch.randn_like(x) for x in found]
    torch.autograd.backward(expected, [x.double() for x in upstream])
    torch.autograd.backward(found, upstream)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) <= BOUND[dtype]
        assert one.transpose(0, 1).is_contiguous()
    assert error(mixed.grad, wide.grad) <= BOUND[dtype]


def check_cross_entropy(group, tokens, width, real, dtype, device) -> None:
    logits = (4 * torch.randn(*tokens, width, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, real, tokens, device=device)
    wide = logits.detach().double().requires_grad_()
    expected = cross_entropy.reference(wide, labels, real)
    upstream = torch.rand(tokens, device=device)
    expected.backward(upstream.double())
    found = cross_entropy.cross_entropy(logits * 1, labels, real, group)
    found.backward(upstream)
    assert (found.detach().double() - expected.detach()).abs().max() <= 1e-5  # nats, of logits around 16
    assert (logits.grad.double() - wide.grad).norm() <= BOUND[dtype] * upstream.double().norm()
    assert not logits.grad[..., real:].any()
