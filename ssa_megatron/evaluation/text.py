"""The text that models are evaluated on: a dataset's held-out documents or any files, with a fingerprint.

Every model of one evaluation reads the same text through its own tokenizer, and two evaluations read the same when the
sha256 is equal. It refuses text that is missing, and text too short for the lengths asked for.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import ssa_pipelines
from ssa_megatron.config import Recipe
from ssa_megatron.errors import ConfigError, DataProblem


@dataclass(frozen=True)
class Text:
    name: str
    documents: list[str]

    @property
    def fingerprint(self) -> dict:
        """What results say about the text."""
        digest, size = hashlib.sha256(), 0
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
            size += len(data)
        return {"name": self.name, "sha256": digest.hexdigest(), "documents": len(self.documents), "bytes": size}


def from_sources(sources: Sequence[str], size: int) -> Text:
    """The first `size` bytes of documents of files, folders, globs or package:king-james; the last one is whole."""
    return Text(" ".join(sources), _first(ssa_pipelines.iter_documents(list(sources)), size))


def held_out(location: str, size: int) -> Text:
    """The first `size` bytes of the documents of a prepared dataset's validation split, the last one whole."""
    info = ssa_pipelines.load_dataset_info(location)
    if "validation" not in info.splits or not info.splits["validation"].rows:
        raise DataProblem(
            f"{location}: nothing was held out",
            remedy="prepare it with a validation fraction, or give --text",
            id="no-validation-split",
        )
    tokenizer = ssa_pipelines.Tokenizer.load(info.tokenizer_path)
    return Text(
        f"{location} (validation)", _first(_documents(location, info.splits["validation"].rows, tokenizer), size)
    )


def of_run(recipe: Recipe, size: int) -> Text:
    """Of the dataset a run trained on; of the first by name, when there are several."""
    sources = recipe.data.sources
    location = sources[min(sources)] if sources else recipe.data.path
    if location is None:
        raise ConfigError(
            "the run's recipe names no dataset",
            remedy="give --text FILE, or --data DATASET",
            id="recipe-without-dataset",
        )
    return held_out(str(location), size)


def encode(tokenizer, text: str) -> list[int]:
    """Token ids without marks."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # not verbose: it warns of long texts


def pieces(tokenizer, text: Text, length: int, limit: int) -> tuple[list[list[int]], int]:
    """(documents cut into pieces of at most `length` tokens, `limit` tokens in all; bytes of what they predict).

    The first piece of a document begins with bos, as in training; of every other its first token is context only.
    """
    marks = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found: list[list[int]] = []
    size = 0
    for document in text.documents:
        tokens = (marks + encode(tokenizer, document))[:limit]
        limit -= len(tokens)
        cut = [piece for at in range(0, len(tokens), length) if len(piece := tokens[at : at + length]) > 1]
        size += sum(len(tokenizer.decode(piece[1:]).encode()) for piece in cut)
        found += cut
        if limit <= 0:
            break
    if not found:
        raise DataProblem(
            f"{text.name}: not two tokens to predict one from",
            remedy="give longer text with --text",
            id="text-too-short",
        )
    return found, size


def sequences(tokenizer, text: Text, length: int, count: int) -> list[list[int]]:
    """Up to `count` sequences of exactly `length` tokens, each bos and a stretch of the documents joined by newlines."""
    marks = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stretch = length - len(marks)
    stream: list[int] = []
    for document in text.documents:
        stream += encode(tokenizer, document + "\n")
        if len(stream) >= stretch * count:
            break
    count = min(count, len(stream) // stretch)
    if not count:
        raise DataProblem(
            f"{text.name}: {len(stream):,} tokens, and a sequence has {length:,}",
            remedy="give longer text with --text, or shorter --lengths",
            id="text-shorter-than-sequence",
        )
    return [marks + stream[i * stretch : (i + 1) * stretch] for i in range(count)]


def _first(documents: Iterable[str], size: int) -> list[str]:
    found = []
    for document in documents:
        found.append(document)
        size -= len(document.encode())
        if size <= 0:
            break
    return found


def _documents(location: str, rows: int, tokenizer: ssa_pipelines.Tokenizer) -> Iterator[str]:
    """Rows hold the documents one after the other, each begun by bos and ended by eos: joined, they are whole again."""
    begun: list[int] = []
    for row in ssa_pipelines.evaluation_rows(
        location, rows=rows, micro_batch_rows=1, data_parallel_rank=0, data_parallel_size=1
    ):
        for token in row.tokens[0].tolist():
            if token == tokenizer.bos_id and begun:
                yield tokenizer.decode(begun)
                begun = []
            begun.append(token)
    if begun:
        yield tokenizer.decode(begun)
