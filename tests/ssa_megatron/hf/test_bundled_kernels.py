"""The Triton kernels of an exported folder against its PyTorch, under Triton's interpreter in fp32, and compiled for GPUs.

The interpreter must be chosen before triton is imported: one test runs this file again in a process of its own, as
tests/kernels does. Speed, bf16 and real launches are tests/gpu/test_export_on_gpu.py.
"""

import pytest
import torch

from ssa_megatron.hf.bundle import attention_ssa, cache_ssa, modeling_ssa, triton_ssa
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from tests.kernels.interpreted import INSIDE, run_again

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}


def build(kind="ssa", *, heads=(6, 2), **options):
    torch.manual_seed(3)
    options = {"head_dim": 12, "block_size": 8, "block_count": 3, "window": 20, "initializer_range": 0.1} | options
    config = SSAConfig(
        **SIZES, num_attention_heads=heads[0], num_key_value_heads=heads[1], attention_kind=kind, **options
    )
    return SSAForCausalLM(config).eval()


def tokens_of(length, rows=1):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(length))


def streams_input(rows, heads, group, tokens, total, dim, size, padded):
    """q, k, v, pooled keys, positions, starts: k as a cache's buffer gives it, v as a projection does."""
    generator = torch.Generator().manual_seed(total)
    q = torch.randn(rows, tokens, heads * group, dim, generator=generator).transpose(1, 2)
    k = torch.randn(rows, heads, total + 9, dim, generator=generator)[:, :, :total]
    v = torch.randn(rows, total, heads, dim, generator=generator).transpose(1, 2)
    start = torch.arange(rows) * 11 if padded else None
    position = torch.arange(total - tokens, total)[None]
    if padded:
        position = (position - start[:, None]).clamp(min=0)
    return q, k, v, cache_ssa.pool_blocks(k, 0, total // size, size, start), position, start


if INSIDE:
    CASES = [  # rows, key/value heads, group, new tokens, all tokens, head dim, block size, blocks, padded
        (1, 1, 4, 40, 40, 16, 16, 2, False),
        (2, 2, 2, 37, 70, 12, 8, 3, True),
        (2, 1, 1, 1, 70, 20, 8, 3, True),
        (2, 3, 1, 20, 40, 16, 8, 2, False),  # one head a group: the stride of that axis means nothing
        (1, 2, 16, 5, 200, 16, 4, 6, False),
        (1, 1, 3, 130, 130, 33, 5, 9, False),
        (3, 1, 1, 9, 9, 16, 16, 4, False),  # no block is complete yet
    ]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_scores_and_attention_are_pytorchs(case):
        *shape, size, blocks, padded = case
        q, k, v, pooled, position, start = streams_input(*shape, size, padded)
        scaled = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))
        config = SSAConfig(block_size=size)
        if pooled.shape[2]:
            want = attention_ssa.group_scores(scaled, pooled, position, size)
            got = triton_ssa.group_scores(scaled, pooled, position, size)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
        chosen = attention_ssa.select_blocks(scaled, pooled, position, config, blocks, triton_ssa.group_scores)
        assert torch.equal(chosen, attention_ssa.select_blocks(scaled, pooled, position, config, blocks))
        want = attention_ssa.sparse_stream(q, k, v, pooled, position, start, config, blocks)
        got = triton_ssa.attend(scaled, k, v, chosen, position, start, size)
        if blocks * size < k.shape[2]:
            assert (got - want).abs().max() <= 2e-6

    @pytest.fixture
    def calls(monkeypatch):
        """As on a GPU: the kernels serve whatever needs no gradient; returns how often they did."""
        served = []

        def serve(config, *tensors):
            if config.sparse_backend == "torch" or torch.is_grad_enabled():
                return None
            served.append(len(tensors))
            return triton_ssa.group_scores, triton_ssa.attend

        monkeypatch.setattr(modeling_ssa, "kernels_for", serve)
        return served

    MODELS = [("ssa", (6, 2), "exact"), ("nsa", (4, 4), "exact"), ("moba", (4, 1), "reference")]

    @pytest.mark.parametrize(("kind", "heads", "topk"), MODELS)
    def test_a_models_logits_whole_padded_and_cached_are_pytorchs(kind, heads, topk, calls):
        authors = {"block_size": 4, "block_count": 16} if topk == "reference" else {}
        model = build(kind, heads=heads, topk=topk, **authors)
        model.config.sparse_backend = "auto"
        tokens, mask = tokens_of(74, 2), torch.ones(2, 74, dtype=torch.long)
        mask[1, :5] = 0
        with torch.no_grad():
            got = model(tokens, attention_mask=mask, inference_mode="sparse", use_cache=False).logits
            first = model(tokens[:, :70], attention_mask=mask[:, :70], inference_mode="sparse", use_cache=True)
            cache, steps = getattr(first, cache_ssa.CACHE), [first.logits]
            for t in range(70, 74):
                inputs = {"attention_mask": mask[:, : t + 1], "past_key_values": cache, "use_cache": True}
                steps.append(model(tokens[:, t : t + 1], inference_mode="sparse", **inputs).logits)
            assert len(calls) == 2 * 6
            model.config.sparse_backend = "torch"
            want = model(tokens, attention_mask=mask, inference_mode="sparse", use_cache=False).logits
            assert len(calls) == 2 * 6
        real = mask.bool()
        assert want[real].abs().max() > 0.1
        assert (got - want)[real].abs().max() <= 1e-5
        assert (torch.cat(steps, 1) - want)[real].abs().max() <= 1e-5

    def test_chunks_of_queries_do_not_change_what_the_kernels_give(calls, monkeypatch):
        model, tokens = build(), tokens_of(50)
        model.config.sparse_backend = "auto"
        with torch.no_grad():
            want = model(tokens, inference_mode="sparse").logits
            monkeypatch.setattr(attention_ssa, "CHUNK_ELEMENTS", 1000)
            assert torch.equal(model(tokens, inference_mode="sparse").logits, want)
        assert calls

else:

    @pytest.mark.slow
    def test_under_the_interpreter_the_kernels_give_what_pytorch_gives():
        run_again(__file__)

    def test_without_a_gpu_they_are_not_asked():
        q = torch.zeros(1, 2, 1, 16)
        assert modeling_ssa.kernels_for(SSAConfig(), q, q, q) is None

    def test_transformers_asks_nobody_to_install_triton(monkeypatch):
        """It refuses to load a file that imports a missing package outside of `try`, also where the file is never run."""
        from transformers.dynamic_module_utils import get_imports, get_relative_imports

        assert set(get_imports(triton_ssa.__file__)) == {"torch"}
        assert "triton_ssa" in get_relative_imports(modeling_ssa.__file__)  # so the file is carried along
        monkeypatch.setitem(__import__("sys").modules, triton_ssa.__name__, None)  # imports as if it were not installed
        modeling_ssa.bundled_kernels.cache_clear()
        assert modeling_ssa.bundled_kernels() is None
        monkeypatch.undo()
        modeling_ssa.bundled_kernels.cache_clear()
        assert modeling_ssa.bundled_kernels()[1] is triton_ssa.group_scores

    @pytest.mark.parametrize("capability", [80, 90])
    def test_they_compile_for_a_gpu_that_is_not_here(capability):
        """The interpreter accepts what the compiler does not; shared memory must fit the smallest GPU served (99 KB)."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        dim, group = 64, 16
        shape = {"SIZE": 16, "GROUP": group, "GROUP_P": group, "D": dim, "D_P": dim}
        routing = shape | {"TOKENS": 4, "TILE": triton_ssa.TILE_ELEMENTS // dim}
        kernels = {
            triton_ssa._statistics: routing,
            triton_ssa._scores: routing | {"NONE": triton_ssa.NEVER},
            triton_ssa._attend: shape | {"KEYS": 64, "PADDED": True},
        }
        types = {"pooled_ptr": "*fp32", "lse_ptr": "*fp32", "score_ptr": "*fp32", "position_ptr": "*i64"}
        types |= {"block_ptr": "*i64", "start_ptr": "*i64"}
        for kernel, constants in kernels.items():
            names = kernel.arg_names
            given = {n: types.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
            signature = {n: "constexpr" if n in constants else given[n] for n in names}
            known = {(names.index(n),): value for n, value in constants.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=known)
            options = {"num_stages": 2, "num_warps": 1 if kernel is triton_ssa._attend else 4}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert made.metadata.shared <= 99 * 1024
            assert "bf16" in made.asm["ptx"]
