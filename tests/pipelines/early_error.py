"""Worker: `ssa data verify` of the argument at its rank's place, before any ranks meet; "wait" is a rank without an error."""

import os
import sys
import time

from ssa_megatron import cli

path = sys.argv[1 + int(os.environ["RANK"])]
if path == "wait":
    time.sleep(60)  # until torchrun ends it
sys.argv = ["ssa", "data", "verify", path]
cli.main()
