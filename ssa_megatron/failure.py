"""How a process ends on an error that a user can act on: printed once, by one rank of a node, with the error's exit code."""

import os
import sys
import time
import zlib
from pathlib import Path
from typing import NoReturn

from ssa_megatron.errors import SSAError

_SAID_BY_RANK_0 = 2.0  # seconds after which an error that local rank 0 has not said is another rank's own


def fail(error: SSAError) -> NoReturn:
    """Say the error, once a node, and end this process with its exit code."""
    # Once the ranks have met, an error is the same on all of them, and once a node is enough; before, it may be one rank's own.
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_initialized()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        _is_news(str(error))
        print(f"error{_tag(error)}: {error}", file=sys.stderr, flush=True)
    elif not met and _is_news(str(error), wait=_SAID_BY_RANK_0):
        print(f"error{_tag(error)} of rank {os.environ.get('RANK', '?')}: {error}", file=sys.stderr, flush=True)
    if met:
        sys.stdout.flush()
        os._exit(error.exit_code)  # destructors of process groups in use abort the process and hide the exit code
    sys.exit(error.exit_code)


def _tag(error: SSAError) -> str:
    return f"[{error.id}]" if error.id else ""


def _is_news(text: str, *, wait: float = 0.0) -> bool:
    """Whether no rank of this node has said it in this start, asked after `wait` seconds; from now on one has.

    torchrun gives its ranks folders side by side. Without one each rank speaks: better twice than never.
    """
    folder = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not folder:
        return True
    time.sleep(wait)
    try:
        Path(folder).parents[1].joinpath(f"said-{zlib.crc32(text.encode()):08x}").touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True
