"""A rank that meets the others and leaves: what `parallel.initialize` says and ends with, through the command line's `fail`."""

from ssa_megatron.errors import SSAError
from ssa_megatron.failure import fail
from ssa_megatron.parallel import state as parallel
from tests.ssa_megatron.support import tiny

if __name__ == "__main__":
    try:
        parallel.initialize(tiny())
    except SSAError as error:
        fail(error)
    print("met")
    parallel.finalize()
