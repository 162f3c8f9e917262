"""Decoding through a CUDA graph gives what the exported class gives, step by step, on the GPU."""

import pytest
import torch

from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from ssa_megatron.hf.decode import Decoder

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def model_of(dtype):
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    return SSAForCausalLM(SSAConfig(**sizes, **heads, block_count=8)).to("cuda", dtype).eval()


@pytest.mark.parametrize(
    ("mode", "dtype"), [("full", torch.float32), ("sparse", torch.float32), ("full", torch.bfloat16)]
)
def test_captured_steps_give_the_models_logits(mode, dtype):
    model, steps = model_of(dtype), 40
    tokens = torch.randint(512, (2, 500 + steps), generator=torch.Generator().manual_seed(1)).cuda()
    decoder = Decoder(model, 2, 500 + steps, mode=mode)
    got = [decoder.prefill(tokens[:, :500])]
    got += [decoder.step(tokens[:, 500 + t]).clone() for t in range(steps)]
    with torch.no_grad():
        want = model(tokens, inference_mode=mode).logits[:, 499:].float()
    for t, logits in enumerate(got):
        error = (logits.float() - want[:, t]).norm() / want[:, t].norm()
        assert error < TOLERANCE[dtype], (t, error)
    assert decoder.length == 500 + steps
