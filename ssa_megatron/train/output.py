"""Standard output and error that outlive who reads them: a closed terminal, an ended pipe, a full disk under the log.

A line that nobody can read is dropped. It must not end a run, nor the threads that say why a run is ending.
"""

import io
import logging
import sys


class _Lossy(io.FileIO):
    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Replace sys.stdout and sys.stderr; what is no file of the system (captured, closed) is left alone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            raw = _Lossy(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError, ValueError):
            continue
        layers = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": True}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **layers))


class _Component(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.name.removeprefix('ssa.')}: {super().format(record)}"


def log_to_stderr() -> None:
    """Show what the loggers under `ssa` report as `watchdog: text`, on every rank; the progress line is not among it."""
    logger = logging.getLogger("ssa")
    handler = logging.StreamHandler()
    handler.setFormatter(_Component())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
