"""transformers' own Trainer and device maps with an exported folder; they need accelerate, which this project does not."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

pytest.importorskip("accelerate", reason="no accelerate: pip install -e '.[evaluation]', or make test-transformers")


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto", **options)


def texts(tokenizer):
    lines = ["The model runs with either stream.", "Every layer computes full attention and", "a = b + c\n" * 30]
    return [tokenizer(line, truncation=True, max_length=96) for line in lines * 4]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_lowers_the_ssa_loss_and_what_it_saves_loads_again(tmp_path, folder, checkpointing):
    tokenizer, model = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), load(folder)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=3e-3,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, gradient_checkpointing=checkpointing, seed=3,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=texts(tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 12
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    trainer.save_model(str(tmp_path / "saved"))
    tokens = torch.arange(3, 80)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved").eval()(tokens).logits, model.eval()(tokens).logits)


def test_trainer_evaluates_and_predicts_logits_whatever_transformers_calls_the_cache(tmp_path, folder):
    """Under 5.24 the cache, by its new name, was gathered among the predictions."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), load(folder)
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=lambda found: {"width": found.predictions.shape[-1]},
    )
    model.config.use_cache = True  # 5.x sets False unless TrainingArguments say otherwise
    data = texts(tokenizer)
    found = trainer.predict(data)
    assert found.predictions.shape[0] == len(data)
    assert found.metrics["test_width"] == model.config.vocab_size
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])


def test_a_flattening_collator_is_refused_and_not_silently_trained_across_its_sequences(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), load(folder)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in texts(tokenizer)[:3]]
    batch = DataCollatorWithFlattening()(rows)
    with pytest.raises(ValueError, match="begin anew inside a row"):
        model.train()(**batch)


def test_a_device_map_places_layers_and_changes_nothing(folder):
    tokens = torch.arange(3, 80)[None]
    with torch.no_grad():
        want = load(folder).eval()(tokens, inference_mode="sparse").logits
        for where in ("auto", "cpu", {"": "cpu"}):
            placed = load(folder, device_map=where).eval()
            assert torch.equal(placed(tokens, inference_mode="sparse").logits, want)


def test_layers_offloaded_to_disk_are_brought_back_for_their_turn(tmp_path, folder):
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers.0": "cpu"}
    places["model.layers.1"] = "disk"
    tokens = torch.arange(3, 80)[None]
    model = load(folder, device_map=places, offload_folder=str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(folder).eval()(tokens).logits)
        got = model.generate(tokens, max_new_tokens=8, do_sample=False, inference_mode="sparse")
    assert got.shape == (1, 85)
