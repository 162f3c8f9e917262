"""The ledger says which documents a step saw, and the corpus says the same."""

import json

import ssa_pipelines
from tests.pipelines.support import ROW_LENGTH, SETTINGS, stream, take


def test_the_ledger_of_any_rows_names_file_and_record_of_every_token(tmp_path, documents, tokenizer):
    for name, texts in (("a", documents[:70]), ("b", documents[70:])):
        lines = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)  # every second line is blank
        (tmp_path / f"{name}.jsonl").write_text(lines)
    ssa_pipelines.prepare(tmp_path, tokenizer, tmp_path / "data", **SETTINGS)
    rows = stream(tmp_path / "data", micro=1, batch=1)
    texts = {
        f"{name}.jsonl": [json.loads(line)["text"] if line else None for line in text.split("\n")]
        for name in "ab"
        for text in [(tmp_path / f"{name}.jsonl").read_text()]
    }
    entries = list(ssa_pipelines.read_ledger(rows, 0, 90))
    for entry, row in zip(entries, take(rows, 90), strict=True):
        covered = 0
        for document in entry["documents"]:
            tokens = row.tokens[0, document["begin"] : document["end"]].tolist()
            text = texts[document["file"]][document["record"]]
            whole = [tokenizer.bos_id, *tokenizer.encode([text])[0], tokenizer.eos_id]
            assert any(whole[i : i + len(tokens)] == tokens for i in range(len(whole)))
            covered += len(tokens)
        assert covered == ROW_LENGTH or entry["row"] == rows.rows_per_epoch - 1
    assert [entry["position"] for entry in entries] == list(range(90))


def test_the_ledger_is_the_same_in_every_layout(prepared):
    alone = list(ssa_pipelines.read_ledger(stream(prepared), 300, 24))
    assert alone == list(ssa_pipelines.read_ledger(stream(prepared, rank=1, size=3, micro=4), 300, 24))
    assert alone[0]["dataset"] == ssa_pipelines.load_dataset_info(prepared).fingerprint
