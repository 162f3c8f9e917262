"""Assertions on errors by class and stable id, so that wording is free to improve."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(kind: type[Exception], id: str, *mentions: object) -> Iterator[pytest.ExceptionInfo]:
    """Inside, an error of class `kind` with this id is raised. mentions: field names, values and paths its text must contain."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert error.id == id, f"{type(error).__name__} has id {error.id!r}, not {id!r}: {error}"
    for text in mentions:
        assert str(text) in str(error), f"{text!s} is not in: {error}"
