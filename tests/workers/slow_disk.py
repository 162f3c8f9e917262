"""Worker: the command line on a machine whose disk takes ten minutes for each file of one checkpoint.

usage: python -m tests.workers.slow_disk STEP ARGUMENTS...
"""

import sys
import time

from ssa_megatron.checkpoint import writer
from ssa_megatron.cli import main

if __name__ == "__main__":
    step, write = int(sys.argv.pop(1)), writer.write_safetensors

    def slowly(path, *args):
        if path.parent.name.endswith(f"step-{step:08d}"):
            path.write_bytes(b"half a file")
            time.sleep(600)
        return write(path, *args)

    writer.write_safetensors = slowly
    main()
