"""Errors of the data pipeline that a user can act on.

Each has a problem (file or setting, and its value), a remedy, and a stable id for tests and scripts. Any other exception
that escapes this package is a bug in it and keeps its traceback.
"""


class DataError(Exception):
    """Base of every data error.

    `problem` names the file or field and the value found; `remedy` states what would work; `id` is short, stable and
    kebab-case, for tests and scripts.
    """

    def __init__(self, problem: str, *, remedy: str = "", id: str = ""):
        self.problem, self.remedy, self.id = problem, remedy, id
        super().__init__(problem + (f"\n  remedy: {remedy}" if remedy else ""))

    def __reduce__(self):  # errors travel between processes, and their classes differ in their arguments
        return _rebuild, (type(self), self.args, self.__dict__)


class CorpusError(DataError):
    """The text to prepare is missing, empty or unreadable; names file and line."""


class TokenizerError(DataError):
    """The tokenizer model cannot be trained, loaded or used for this purpose."""


class DatasetError(DataError):
    """A prepared dataset is missing, incomplete, already there, or asked for more than it holds."""


class DatasetMismatch(DatasetError):
    """Dataset and recipe, or dataset and saved position, do not match; names both values."""


class ShardError(DatasetError):
    """A shard is missing, truncated or damaged; `shard` is its path."""

    def __init__(self, shard: object, problem: str, *, remedy: str = "", id: str = ""):
        self.shard = str(shard)
        remedy = remedy or "restore this file from a copy, or prepare the dataset again from its corpus"
        super().__init__(f"shard {self.shard}: {problem}", remedy=remedy, id=id)


def _rebuild(kind: type[DataError], args: tuple, state: dict) -> DataError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error
