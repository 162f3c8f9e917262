"""Measures this package on this machine: `python -m ssa_pipelines.throughput [--copies N] [--row-length N] [--compression C]`.

The corpus is the King James text repeated, so that figures compare between machines. Everything is written to a temporary
folder, and nothing touches the network.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import ssa_pipelines


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of tokenizer, preparation, verification and stream")
    parser.add_argument("--copies", type=int, default=5, help="copies of the 4.2 MB of text (5)")
    parser.add_argument("--row-length", type=int, default=8192, help="tokens per row (8192)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of the tokenizer (8192)")
    parser.add_argument("--compression", default=None, help="of the shards, such as zstd:3 (none)")
    parser.add_argument("--workers", type=int, default=1, help="processes of prepare; 1 measures one core (1)")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, {options}")
    documents = list(ssa_pipelines.demo_documents())
    import streaming  # noqa: F401 (takes seconds to import, which the figures leave out)

    with tempfile.TemporaryDirectory() as folder:
        corpus, data = Path(folder, "corpus.jsonl"), Path(folder, "data")
        texts = [f"{n} {d}" for n in range(options.copies) for d in documents]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        megabytes = corpus.stat().st_size / 1e6

        began = time.perf_counter()
        tokenizer = ssa_pipelines.train_tokenizer(
            corpus, Path(folder, "tokenizer.model"), vocab_size=options.vocab_size
        )
        print(f"train tokenizer   {megabytes / (time.perf_counter() - began):8.1f} MB/s of text ({megabytes:.0f} MB)")

        sample = texts[:: max(len(texts) // 1000, 1)]
        began = time.process_time()
        tokenizer.encode(sample)
        own = sum(map(len, sample)) / 1e6 / (time.process_time() - began)
        print(f"tokenizer alone   {own:8.1f} MB/s of text per core")

        began, spent = time.perf_counter(), _cpu_seconds()
        settings = {"row_length": options.row_length, "validation_fraction": 0, "compression": options.compression}
        ssa_pipelines.prepare(corpus, tokenizer, data, workers=options.workers, **settings)
        speed, core = megabytes / (time.perf_counter() - began), megabytes / (_cpu_seconds() - spent)
        print(
            f"prepare           {speed:8.1f} MB/s of text, {core:.1f} per core: {core / own:.0%} of the tokenizer's own"
        )

        began = time.perf_counter()
        ssa_pipelines.verify(data)
        split = ssa_pipelines.load_dataset_info(data).splits["train"]
        print(f"verify            {split.tokens / 1e6 / (time.perf_counter() - began):8.1f} M tokens/s")
        print(f"padding           {split.padding / (split.tokens + split.padding):8.4%} of all tokens")

        for read_ahead in (0, 2):
            layout = {"micro_batch_rows": 4, "global_batch_rows": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
            began = time.perf_counter()
            rows = ssa_pipelines.TrainStream(data, **layout, seed=1, read_ahead=read_ahead)
            next(rows)
            start = time.perf_counter() - began
            began, first = time.perf_counter(), rows.samples_seen
            while time.perf_counter() - began < 2:
                next(rows)
            speed = (rows.samples_seen - first) * options.row_length / (time.perf_counter() - began)
            rows.close()
            print(
                f"stream            {speed / 1e6:8.1f} M tokens/s with read_ahead={read_ahead}; first batch {start:.2f} s"
            )


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
