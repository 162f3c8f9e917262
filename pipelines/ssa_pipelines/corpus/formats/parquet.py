"""Parquet tables: one document per row, from one column. A position is the number of a row group.

Nulls are blank records. It refuses a missing column and a column that is not text.
"""

from collections.abc import Iterator

from ssa_pipelines.corpus.compression import unreadable
from ssa_pipelines.corpus.formats import FORMATS
from ssa_pipelines.corpus.formats.base import CorpusFormat, InputFile, ReadOptions
from ssa_pipelines.errors import CorpusError
from ssa_pipelines.storage.object_store import open_binary

_BATCH = 256  # rows decoded at a time


@FORMATS.register(".parquet")
class Parquet(CorpusFormat):
    bytes_are_positions = False

    @classmethod
    def records(cls, file: InputFile, options: ReadOptions, begin: int, end: int | None) -> Iterator[tuple[int, str]]:
        import pyarrow as pa
        from pyarrow import parquet

        field, remedy = options.text_field, "set text_field to the column that holds the text"
        try:
            with open_binary(file.path) as data, parquet.ParquetFile(data) as table:
                names = table.schema_arrow.names
                column = table.schema_arrow.get_field_index(field)
                if column < 0:
                    problem = f"{file.path}: no column {field!r} ({names})"
                    raise CorpusError(problem, remedy=remedy, id="corpus-no-column")
                kind = table.schema_arrow.field(column).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                    problem = f"{file.path}: column {field!r} is {kind}, not text"
                    raise CorpusError(problem, remedy=remedy, id="corpus-column-not-text")
                last = table.num_row_groups if end is None else min(end, table.num_row_groups)
                for group in range(begin, last):
                    for batch in table.iter_batches(_BATCH, row_groups=[group], columns=[field], use_threads=False):
                        yield from ((group, text or "") for text in batch.column(0).to_pylist())
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise unreadable(file.path, error) from error
