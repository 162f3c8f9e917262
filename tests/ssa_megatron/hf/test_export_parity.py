"""What was trained is what is exported: logits of the Megatron model and of the exported class, fp32, to 1e-5; greedy tokens.

Four kinds, both inference modes, tied and untied, lengths around block edges, alone and in a padded batch. A mode that a kind
does not train in is compared with the trainer of the kind that computes it, with the same weights.
"""

import pytest
import torch

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.hf.export import export
from tests.oracle import model as oracle
from tests.ssa_megatron.conftest import corpus, tokenizer  # noqa: F401 (fixtures: 400 pieces, where hf has 697)
from tests.ssa_megatron.hf.conftest import oracle_config, write_run
from tests.ssa_megatron.support import tiny

SIZES = {"vocab_size": 400, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12,
         "ffn_size": 64, "max_sequence_length": 2048, "rope_theta": 10000.0}  # fmt: skip
SHORT, LONG = (1, 15, 16, 17, 255), (512, 2048)
KINDS = ("full", "moba", "nsa", "ssa")
MODES = ("full", "sparse")


def recipe_of(kind: str, tied: bool, block_count: int = 4):
    return tiny(
        model={**SIZES, "tied_embeddings": tied},
        attention={"kind": kind, "block_size": 16, "block_count": block_count, "window": 40},
        train__sequence_length=2048,
    )


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(length))


class Trainer:
    """The Megatron model of a run's weights, in either inference mode."""

    def __init__(self, run, kind: str, tied: bool, parallel):
        checkpoint = Checkpoint.open(run)
        self.weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        self.kind, self.tied, self.parallel, self.models = kind, tied, parallel, {}

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, mode: str) -> torch.Tensor:
        """[1, N] -> [1, N, vocabulary]."""
        from ssa_megatron.model.batch import ForwardContext, SSABatch
        from ssa_megatron.model.build import build_model
        from tests.workers.oracle_agreement import set_weights

        kind, count = self.kind, 4
        if kind == "nsa" and mode == "full":
            count = 128  # its selected stream then attends to everything
        elif kind in ("full", "moba"):
            kind = "full" if mode == "full" else "moba"
        recipe = recipe_of(kind, self.tied, count)
        if (kind, count) not in self.models:
            model = self.models[kind, count] = build_model(recipe, self.parallel).eval()
            set_weights(model, recipe, self.parallel, self.weights)
        starts = torch.zeros(tokens.shape, dtype=torch.int32)
        batch = SSABatch.pack(tokens, starts, self.parallel, trunk=mode)
        return self.models[kind, count](tokens, None, None, packed_seq_params=ForwardContext.begin(batch, recipe))


@pytest.fixture(scope="module")
def pair(alone, tokenizer, tmp_path_factory):  # noqa: F811
    """(kind, tied) -> (Trainer, the exported model), made once."""
    from transformers import AutoModelForCausalLM

    made = {}

    def get(kind: str, tied: bool):
        if (kind, tied) not in made:
            folder, recipe = tmp_path_factory.mktemp(f"{kind}-{tied}"), recipe_of(kind, tied)
            weights = oracle.random_weights(oracle_config(recipe), seed=11, std=0.1)
            run = write_run(folder / "run", recipe, weights, tokenizer)
            out = export(run, folder / "out")
            exported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto").eval()
            made[kind, tied] = Trainer(run, kind, tied, alone), exported
        return made[kind, tied]

    return get


@torch.no_grad()
@pytest.mark.parametrize("lengths", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_trainers_at_every_length_in_both_modes(pair, kind, tied, lengths):
    trainer, exported = pair(kind, tied)
    for length in lengths:
        for mode in MODES:
            want = trainer.logits(tokens_of(length), mode)
            got = exported(tokens_of(length), inference_mode=mode, use_cache=False).logits
            assert want.abs().max() > 0.1
            assert (got - want).abs().max() <= 1e-5, (length, mode)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_padded_batch_are_the_trainers(pair, kind):
    trainer, exported = pair(kind, True)
    rows = [tokens_of(length)[0] for length in (255, 200, 17, 1)]
    tokens, mask = torch.zeros(4, 255, dtype=torch.long), torch.zeros(4, 255, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, 255 - len(row) :], mask[i, 255 - len(row) :] = row, 1
    for mode in MODES:
        got = exported(tokens, attention_mask=mask, inference_mode=mode).logits
        for i, row in enumerate(rows):
            assert (got[i, 255 - len(row) :] - trainer.logits(row[None], mode)[0]).abs().max() <= 1e-5, (mode, len(row))


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k != "ssa" else ()) for k in KINDS])
def test_64_greedy_tokens_are_the_trainers_with_and_without_a_cache(pair, kind):
    trainer, exported = pair(kind, False)
    for mode in MODES:
        tokens = tokens_of(50)
        for _ in range(64):
            tokens = torch.cat((tokens, trainer.logits(tokens, mode)[:, -1:].argmax(-1)), 1)
        for use_cache in (True, False):
            options = {"max_new_tokens": 64, "do_sample": False, "use_cache": use_cache, "eos_token_id": -1}
            got = exported.generate(tokens_of(50), inference_mode=mode, **options)
            assert got.tolist() == tokens.tolist(), (mode, use_cache)


@pytest.mark.slow
def test_the_files_are_the_same_whatever_topology_wrote_the_checkpoint(tmp_path, tokenizer):  # noqa: F811
    """Weights loaded, and saved again, at six places, are exported as the same bytes, model card and parity report included."""
    from tests.launch import run as launch
    from tests.workers.topology_export import PLACES

    recipe = recipe_of("ssa", True)
    write_run(tmp_path / "start", recipe, oracle.random_weights(oracle_config(recipe), seed=1), tokenizer)
    for processes in {count for count, _ in PLACES.values()}:
        launch(processes, "tests.workers.topology_export", str(tmp_path), timeout=240)
    found = {}
    for place in PLACES:
        out = export(tmp_path / place, tmp_path / "exports" / place / "model")
        found[place] = {path.name: path.read_bytes() for path in out.iterdir()}
    first = found.pop("one process")
    assert len(found) == 5
    assert len(first) > 10
    for place, files in found.items():
        assert files == first, place
