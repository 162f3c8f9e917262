"""Every fused operation under Triton's interpreter against its plain reference in fp64, on small odd sizes.

The file runs itself again in a process where the interpreter is chosen before triton is imported.
"""

import pytest

from tests.kernels.interpreted import INSIDE, run_again

if not INSIDE:

    @pytest.mark.slow
    def test_fused_operations_under_the_interpreter():
        run_again(__file__)

else:
    import torch

    from ssa_megatron.model.build import build_model
    from ssa_megatron.train.step import Drawn, draw_batches, forward_backward
    from tests.ssa_megatron.model import fused_checks as checks
    from tests.ssa_megatron.support import own_rows, tiny

    @pytest.mark.parametrize("dtype", checks.BOUND)
    @pytest.mark.parametrize("shape", checks.SWIGLU)
    def test_swiglu_equals_its_reference(shape, dtype):
        checks.check_swiglu(shape, dtype, "cpu")

    @pytest.mark.parametrize("dtype", checks.BOUND)
    @pytest.mark.parametrize("adds", [False, True])
    @pytest.mark.parametrize("passed", [False, True])
    @pytest.mark.parametrize("shape", checks.SUM_AND_NORM)
    def test_sum_and_norm_equal_their_reference(shape, passed, adds, dtype):
        checks.check_sum_and_norm(shape, passed, adds, dtype, "cpu")

    @pytest.mark.parametrize("dtype", checks.BOUND)
    @pytest.mark.parametrize("sizes", checks.QKV)
    def test_split_and_rotation_equal_their_reference(sizes, dtype):
        checks.check_split_and_rotation(*sizes, dtype, "cpu")

    @pytest.mark.parametrize("dtype", checks.BOUND)
    @pytest.mark.parametrize("case", checks.CROSS_ENTROPY)
    def test_cross_entropy_equals_its_reference(alone, case, dtype):
        checks.check_cross_entropy(alone.tp_group, *case, dtype, "cpu")

    @pytest.mark.parametrize(
        ("kind", "recompute", "vocabulary"), [("ssa", "none", 53), ("ssa", "full", 64), ("nsa", "selective", 53)]
    )
    def test_a_fused_model_has_the_plain_models_loss_and_gradients(alone, kind, recompute, vocabulary):
        found = []
        for pointwise in ("plain", "fused"):
            recipe = tiny(
                attention__kind=kind,
                model__vocab_size=vocabulary,
                train__recompute=recompute,
                train__micro_batch_rows=2,
                train__pointwise=pointwise,
            )
            model = build_model(recipe, alone)
            model.train()
            batches = draw_batches(own_rows(recipe, alone, 0), recipe, alone, step=0)
            done = forward_backward(model, Drawn(batches, 100.0), recipe, alone)
            found.append((done.losses(), {name: p.grad for name, p in model.named_parameters()}))
        (plain, wanted), (fused, gradients) = found
        assert fused.cross_entropy == pytest.approx(plain.cross_entropy, rel=1e-6)
        assert fused.alignment == pytest.approx(plain.alignment, rel=1e-5)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            assert checks.error(gradient, wanted[name].double()) <= 1e-5, name
        assert any(not torch.equal(gradients[name], wanted[name]) for name in wanted), "the kernels did not run"
