"""Worker: many command lines in one start of Python, each in a forked process of its own.

usage: python -m tests.workers.command_lines CASES.json OUT.json
CASES: a list of lists of arguments; ones like NAME=value in front (NAME in capitals) are its environment. OUT: for each,
its exit code, its seconds and what it printed. Importing torch, megatron-core and
DeepSpeed takes seconds; here it happens once, and every case still has its own process, locks and process group.
"""

import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIMIT = 40  # seconds a case may take


def run_case(arguments: list[str]) -> dict:
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 1
            try:
                from ssa_megatron.cli import main

                while arguments and (pair := re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", arguments[0])):
                    os.environ[pair[1]] = pair[2]
                    arguments = arguments[1:]
                sys.argv = ["ssa", *arguments]
                main()
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began, "output": output.read()}


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    os.environ["DS_ACCELERATOR"] = "cpu"
    for module in (
        "ssa_pipelines.stream.train_stream",
        "ssa_pipelines.shards.preparation",
        "ssa_megatron.train.trainer",
    ):
        importlib.import_module(module)  # here, so that no case has to
    out.write_text(json.dumps([run_case(arguments) for arguments in json.loads(cases.read_text())]))


if __name__ == "__main__":
    main()
