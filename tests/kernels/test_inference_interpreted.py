"""The inference kernels on a machine without a GPU: small caches under Triton's interpreter, against the PyTorch backend.

As in test_triton_interpreted.py, one test runs this file again in a process of its own; bf16 is left to the GPU.
"""

import pytest

from .interpreted import INSIDE, run_again

if not INSIDE:

    def test_inference_kernels_under_the_interpreter():
        run_again(__file__)

else:
    import torch

    from ssa_kernels import BlockSpec, cached_attention, cached_blocks
    from ssa_kernels.triton import decode as triton_decode

    from .cached import fill, make_cache, sequences, step
    from .support import assert_close

    # lengths before and after, Hq, Hkv, D, block_size, block_count, tokens a step, dtype
    CASES = [
        ([0, 3, 31], 4, 1, 16, 16, 2, 1, torch.float32),
        ([63, 48, 17], 3, 1, 20, 8, 3, 3, torch.float32),
        ([70, 5], 2, 2, 32, 4, 6, 1, torch.float32),
        ([95, 64], 4, 2, 16, 16, 3, 2, torch.float16),
    ]

    @pytest.mark.parametrize("spans", [False, True], ids=["one program", "spans"])
    @pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_decode(case, paged, spans, monkeypatch):
        held, h_q, h_kv, dim, size, count, tokens, dtype = case
        if spans:  # what a long cache takes
            monkeypatch.setattr(triton_decode, "ONE_PROGRAM", 1)
            monkeypatch.setattr(triton_decode, "span_of", lambda pairs, slots, count: 4)
        spec, batch = BlockSpec(size, count), len(held)
        data = sequences([n + tokens for n in held], h_q, h_kv, dim, dtype=dtype)
        ours, theirs = (make_cache(paged, batch, 112, h_kv, dim, block_size=size, dtype=dtype) for _ in range(2))
        fill(ours, data, held, "torch")
        fill(theirs, data, held, "torch")
        q = step(ours, data, tokens, "triton")
        step(theirs, data, tokens, "torch")
        for name in ("keys", "values", "pooled"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-6, equal_nan=True)
        assert ours.lengths.tolist() == theirs.host_lengths
        assert torch.equal(*(cached_blocks(q, ours, spec, backend=b) for b in ("triton", "torch")))
        for mode in ("sparse", "full"):
            got, expected = (cached_attention(q, ours, spec, mode=mode, backend=b) for b in ("triton", "torch"))
            assert_close([got], [expected], 1e-5 if dtype == torch.float32 else 2e-3, mode)

    def test_a_long_list_of_blocks_is_split(monkeypatch):
        monkeypatch.setattr(triton_decode, "MOST_BLOCKS", 2)
        data = sequences([600], 2, 1, 16, dtype=torch.float32)
        cache = make_cache(False, 1, 640, 1, 16, dtype=torch.float32)
        fill(cache, data, [599], "torch")
        q = step(cache, data, 1, "triton")
        got, expected = (cached_attention(q, cache, BlockSpec(16, 33), backend=b) for b in ("triton", "torch"))
        assert_close([got], [expected], 1e-5)

    def test_an_idle_sequence_is_left_alone():
        data = sequences([40, 40], 2, 1, 16, dtype=torch.float32)
        cache = make_cache(True, 2, 64, 1, 16, dtype=torch.float32)
        cache.assign(1, [], length=-1)
        cache.append(*(torch.cat([x[i][:, :39] for x in data]) for i in (1, 2)), [39, 0], backend="torch")
        cache.append(*(torch.cat([x[i][:, 39:] for x in data]) for i in (1, 2)), backend="triton")
        assert cache.lengths.tolist() == cache.host_lengths == [40, -1]
        q = torch.cat([x[0][:, 39:] for x in data])
        for mode in ("sparse", "full"):
            got, expected = (
                cached_attention(q, cache, BlockSpec(16, 2), mode=mode, backend=b) for b in ("triton", "torch")
            )
            assert_close([got], [expected], 1e-5)
            assert not got[1].any()
