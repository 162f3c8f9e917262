"""JSON lines: one object per line with the text in one field. Blank lines are blank records.

Every line becomes a document or raises: invalid JSON, a missing field, a field that is not text, half a surrogate pair.
"""

import json
from collections.abc import Iterator

from ssa_pipelines.corpus.formats import FORMATS
from ssa_pipelines.corpus.formats.base import BadRecord, LineFormat, ReadOptions, TextStream, decode


@FORMATS.register(".jsonl")
class JsonLines(LineFormat):
    @classmethod
    def is_splittable(cls, options: ReadOptions) -> bool:
        return True

    @classmethod
    def parse(cls, stream: TextStream, options: ReadOptions, end: int | None) -> Iterator[tuple[int, str]]:
        field = options.text_field
        for position, line in stream.lines():
            text = decode(line, position).removeprefix("\ufeff")
            del line  # as large as the text, and so is what it is parsed into
            if not text.strip():
                yield position, ""
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:  # RecursionError: lists nested thousands deep
                problem, remedy = f"not valid JSON ({error})", "write one JSON object per line"
                raise BadRecord(position, problem, remedy=remedy, id="corpus-not-json") from error
            if not isinstance(record, dict) or field not in record:
                found = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
                problem, remedy = f"no field {field!r} ({found})", "set text_field to the field that holds the text"
                raise BadRecord(position, problem, remedy=remedy, id="corpus-no-field")
            document = record[field]
            if not isinstance(document, str):
                problem = f"field {field!r} is {type(document).__name__}, not text"
                remedy = "remove the record, or set text_field to a field of strings"
                raise BadRecord(position, problem, remedy=remedy, id="corpus-field-not-text")
            if "\\ud" in text or "\\uD" in text:  # only an escape can hide half of a surrogate pair
                try:
                    document.encode()
                except UnicodeEncodeError as error:
                    problem = f"field {field!r} holds half of a surrogate pair ({error.reason})"
                    remedy = "replace lone \\ud800-\\udfff escapes before preparing"
                    raise BadRecord(position, problem, remedy=remedy, id="corpus-lone-surrogate") from error
            held = [document]
            del text, record, document
            yield position, held.pop()
