"""Measures this package on this machine: `python -m pipelines.measure [--copies N] [--row-length N] [--compression C]`.

The corpus is the King James text several times over, so figures compare between machines; everything is written to a
temporary folder that is removed. It measures nothing that touches the network.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import pipelines


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of tokenizer, preparation, verification and stream.")
    parser.add_argument("--copies", type=int, default=5, help="how often to repeat the 4.2 MB of text (5)")
    parser.add_argument("--row-length", type=int, default=8192, help="tokens in a row (8192)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of the tokenizer (8192)")
    parser.add_argument("--compression", default=None, help="of the shards, such as zstd:3 (none)")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, {options}")
    documents = list(pipelines.demo_documents())
    import streaming  # noqa: F401 (its import takes seconds and is no part of the figures)

    with tempfile.TemporaryDirectory() as folder:
        corpus, data = Path(folder, "corpus.jsonl"), Path(folder, "data")
        corpus.write_text(
            "".join(json.dumps({"text": f"{n} {d}"}) + "\n" for n in range(options.copies) for d in documents)
        )
        megabytes = corpus.stat().st_size / 1e6

        began = time.perf_counter()
        tokenizer = pipelines.train_tokenizer(corpus, Path(folder, "tokenizer.model"), vocab_size=options.vocab_size)
        print(f"train tokenizer   {megabytes / (time.perf_counter() - began):8.1f} MB/s of text ({megabytes:.0f} MB)")

        began = time.perf_counter()
        pipelines.prepare(
            corpus,
            tokenizer,
            data,
            row_length=options.row_length,
            validation_fraction=0,
            compression=options.compression,
        )
        print(f"prepare           {megabytes / (time.perf_counter() - began):8.1f} MB/s of text")

        began = time.perf_counter()
        pipelines.verify(data)
        tokens = pipelines.load_dataset_info(data).splits["train"].tokens
        print(f"verify            {tokens / 1e6 / (time.perf_counter() - began):8.1f} M tokens/s")

        for read_ahead in (0, 2):
            layout = {"micro_batch_rows": 4, "global_batch_rows": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
            rows = pipelines.TrainStream(data, **layout, seed=1, read_ahead=read_ahead)
            next(rows)
            began, first = time.perf_counter(), rows.samples_seen
            while time.perf_counter() - began < 2:
                next(rows)
            speed = (rows.samples_seen - first) * options.row_length / (time.perf_counter() - began)
            rows.close()
            print(f"stream            {speed / 1e6:8.1f} M tokens/s with read_ahead={read_ahead}")


if __name__ == "__main__":
    main()
