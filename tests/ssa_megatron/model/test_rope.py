"""Rotary positions: against complex multiplication in fp64, and against transformers' Llama-3 scaling."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ssa_megatron.config.sections import RopeScaling
from ssa_megatron.model.rope import apply_rotary, inverse_frequencies, rotary_table


def turned(x_nbhd: torch.Tensor, positions_bn: torch.Tensor, theta: float) -> torch.Tensor:
    """Channel i and i + D/2 as one complex number, turned by position * theta**(-2i/D); fp64."""
    half = x_nbhd.shape[-1] // 2
    z = torch.complex(x_nbhd[..., :half].double(), x_nbhd[..., half:].double())
    angles = positions_bn.t().double()[:, :, None, None] / theta ** (torch.arange(half).double() / half)
    z = z * torch.exp(1j * angles)
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10000.0), (6, 1000.0), (64, 500000.0)])
def test_rotation_is_complex_multiplication(head_dim, theta):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, 3, 5, head_dim, generator=generator)
    positions = torch.randint(0, 300, (3, 37), generator=generator)
    found = apply_rotary(x, rotary_table(positions, head_dim, theta, None))
    assert found.dtype == torch.float32
    assert (found - turned(x, positions, theta)).abs().max() < 1e-4  # fp32 angles up to 300 radians


def test_rotation_keeps_bf16_and_rounds_once():
    x = torch.randn(9, 1, 2, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    table = rotary_table(torch.arange(9)[None], 8, 100.0, None)
    found = apply_rotary(x, table)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, apply_rotary(x.float(), table).bfloat16())


def test_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator).expand(20, 1, 1, 16) for _ in range(2))
    table = rotary_table(torch.arange(20)[None], 16, 100.0, None)
    scores = apply_rotary(q, table).flatten(1) @ apply_rotary(k, table).flatten(1).t()
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[1, 0], atol=1e-3)


def test_a_packed_document_is_rotated_bit_for_bit_as_alone():
    starts = torch.tensor([[0] * 5 + [5] * 7 + [12] * 3])
    cos, sin = rotary_table(torch.arange(15)[None] - starts, 8, 1000.0, None)
    for first, length in ((0, 5), (5, 7), (12, 3)):
        alone = rotary_table(torch.arange(length)[None], 8, 1000.0, None)
        assert torch.equal(cos[first : first + length], alone[0])
        assert torch.equal(sin[first : first + length], alone[1])


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high", "original"),
    [(64, 500000.0, 4.0, 1.0, 4.0, 8192), (128, 500000.0, 8.0, 1.0, 4.0, 8192), (32, 10000.0, 2.5, 2.0, 7.0, 700)],
)
def test_llama3_scaling_is_that_of_transformers(head_dim, theta, factor, low, high, original):
    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling={"rope_type": "llama3", "rope_theta": theta, **scaling},
        max_position_embeddings=int(original * factor),
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    found = inverse_frequencies(head_dim, theta, RopeScaling(**scaling), torch.device("cpu"))
    assert attention_factor == 1.0
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    plain = inverse_frequencies(head_dim, theta, None, torch.device("cpu"))
    assert found[0] == plain[0]  # short waves stay, long ones are stretched by the whole factor
    assert found[-1] == pytest.approx(float(plain[-1]) / factor)


def test_without_scaling_the_wavelengths_are_a_geometric_series():
    found = inverse_frequencies(64, 500000.0, None, torch.device("cpu")).double()
    expected = torch.tensor([500000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
