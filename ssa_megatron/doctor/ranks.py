"""Which rank of how many this process is, from whoever started it: torchrun, or srun alone. Imports no torch.

It refuses a --cluster that nobody started on several machines.
"""

import os
import subprocess

from ssa_megatron.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def find() -> None:
    """Complete torchrun's variables in the environment, under srun from SLURM's. Raises ConfigError when there are none."""
    # a batch script has SLURM_PROCID too, but is no step: nobody else would come
    if "RANK" not in os.environ and {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= os.environ.keys():
        _from_slurm()
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"--cluster, and {', '.join(missing)} not set: nobody started us together",
            remedy="torchrun --nnodes N --nproc-per-node G ... -m ssa_megatron doctor --cluster, or the same under srun",
            id="cluster-not-launched",
        )


def _from_slurm() -> None:
    """srun without torchrun: the first node is the meeting place, the job's number chooses the port."""
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_node(
            os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
        )
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]
    # not the port of a launch in this job, and below those of outgoing connections (from 32768 up), one of which may have it
    os.environ.setdefault("MASTER_PORT", str(10000 + (int(os.environ.get("SLURM_JOB_ID", "0")) + 10000) % 20000))
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks,
    )


def _first_node(nodes: str) -> str:
    try:
        said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        found, problem = said.stdout.split(), said.stderr.strip()
    except OSError as error:
        found, problem = [], str(error)
    if found:
        return found[0]
    if set("[,") & set(nodes):
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodes} cannot be expanded: {problem}",
            remedy="MASTER_ADDR=ADDRESS_OF_THE_FIRST_NODE srun ...",
            id="nodelist-not-expanded",
        )
    return nodes
