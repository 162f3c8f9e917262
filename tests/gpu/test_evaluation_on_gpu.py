"""`ssa evaluate --device cuda` gives what the CPU gives: in fp32 to rounding, in bf16 to bf16's."""

import json

import pytest
import torch

from ssa_megatron.evaluation.evaluate_command import evaluate
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.hf.export import export
from tests.oracle import model as oracle
from tests.ssa_megatron.hf.conftest import corpus, oracle_config, tiny_recipe, write_run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from ssa_pipelines import train_tokenizer

    home = tmp_path_factory.mktemp("evaluation")
    tokenizer = train_tokenizer(iter([corpus()]), home / "t.model", vocab_size=697)
    recipe = tiny_recipe(hidden_size=64, head_dim=32)  # head dimensions of 16 and more run on the Triton kernels
    weights = oracle.random_weights(oracle_config(recipe), seed=7, std=0.2)
    return export(write_run(home / "run", recipe, weights, tokenizer), home / "folder")


@pytest.mark.parametrize(("dtype", "close"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_every_part_on_the_gpu_equals_the_cpu(folder, tmp_path, dtype, close):
    (tmp_path / "text.txt").write_text(corpus(), encoding="utf-8")
    models = []
    for device, precision in (("cpu", "fp32"), ("cuda", dtype)):
        settings = Settings(lengths=(128, 512), budgets=(2, 4, "all"), tokens=4000, sequences=2, dtype=precision)
        evaluate([folder], settings, out=tmp_path / device, sources=[str(tmp_path / "text.txt")], device=device)
        models += json.loads((tmp_path / device / "results.json").read_text())["models"]
    cpu, gpu = models
    assert gpu["device"] == torch.cuda.get_device_name()
    for one, other in zip(cpu["budget"]["rows"], gpu["budget"]["rows"], strict=True):
        assert other["nats"] == pytest.approx(one["nats"], rel=close)
    for one, other in zip(cpu["length"]["rows"], gpu["length"]["rows"], strict=True):
        assert other["nats"] == pytest.approx(one["nats"], rel=close)
    for one, other in zip(cpu["needle"]["cells"], gpu["needle"]["cells"], strict=True):
        assert other["margin"] == pytest.approx(one["margin"], abs=20 * close)
    for one, other in zip(cpu["attention"]["layers"], gpu["attention"]["layers"], strict=True):
        assert other["sparsity"] == pytest.approx(one["sparsity"], abs=close)
        assert other["entropy"] == pytest.approx(one["entropy"], abs=5 * close)
        assert other["theorem"]["violations"] == 0
        assert other["overlap"][0] == pytest.approx(one["overlap"][0], abs=close)
