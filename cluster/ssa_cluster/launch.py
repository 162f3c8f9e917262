"""Starts `ssa train` on this node, together with the other nodes: torchrun for machines that fail and schedulers that preempt.

Give the same command on every node; without a scheduler each needs its own `--node-rank`, under SLURM nothing more is needed:

    python -m ssa_cluster.launch --nodes 2 --node-rank 0 --host 10.0.0.1 --nproc-per-node 8 \\
        train ssa-1b data.path=/shared/data --run-folder /shared/runs/first

Ends with the code the ranks agreed on: 0 done, 75 start the same command again, 2 to 7 with a remedy in the log; 128 + signal
when it was killed, 1 when the nodes did not meet. A crash restarts from the last committed checkpoint; with `--nodes 1:2` on
as few nodes as 1.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from ssa_cluster.addresses import interface, own_address, resolve
from ssa_cluster.errors import AddressProblem
from ssa_cluster.exit_codes import FORWARDED, START_AGAIN, Interrupted, RestartBudget, say

PORT = 29500
# the run folder's own account allows three from one checkpoint, so the fifth is refused by it, with the batch
RESTARTS = 5
_requests: list[str] = []
"""Signals that came before there were ranks."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, completed from SLURM's variables; exits with 2 on what cannot be."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID") if "SLURM_NODEID" in environment else None
    parser = argparse.ArgumentParser(
        "python -m ssa_cluster.launch", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--nodes", default=environment.get("SLURM_NNODES", "") if job else "1", help="N, or MIN:MAX")
    parser.add_argument(
        "--node-rank", type=int, default=int(environment["SLURM_NODEID"]) if job else 0, help="0 on the machine --host"
    )
    parser.add_argument("--host", default=environment.get("SSA_HOST"), help="HOST[:PORT] of node rank 0; port 29500")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks on this node: one per GPU")
    parser.add_argument("--grace", type=float, default=120, help="seconds from a signal to SIGKILL; 120 by default")
    parser.add_argument("--silence", type=float, default=15, help="seconds after which a silent node is lost; 15")
    parser.add_argument("--join-timeout", type=int, default=600, help="seconds to wait for the other nodes; 600")
    parser.add_argument(
        "--last-call", type=int, default=30, help="with MIN:MAX, seconds to wait for more than MIN nodes; 30"
    )
    parser.add_argument("--id", default=f"slurm-{job}" if job else "ssa", help="the same on all nodes of a launch")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train ...", help="the verb and its arguments")
    found = parser.parse_args(arguments)
    launchers, machines = (int(environment.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("TASKS", "NODES"))
    if job and launchers > machines:  # each would take the node's rank, and start all of its ranks
        parser.error(f"srun started {launchers} launchers on {machines} node(s); one a node: srun --ntasks-per-node=1")
    nodes = re.fullmatch(r"(\d+)(?::(\d+))?", found.nodes)
    if not nodes or not 0 < int(nodes[1]) <= int(nodes[2] or nodes[1]):
        parser.error(f"--nodes {found.nodes} is neither N nor MIN:MAX with 0 < MIN <= MAX")
    found.fewest, found.most = int(nodes[1]), int(nodes[2] or nodes[1])
    runs = [after for word, after in pairwise(found.command) if word == "--run-folder"]
    runs += [word.partition("=")[2] for word in found.command if word.startswith("--run-folder=")]
    if found.command[:1] != ["train"] or len(runs) != 1 or not runs[0]:
        parser.error(
            "give `train RECIPE ... --run-folder RUN` after the options: restarts are counted in the run folder"
        )
    found.run = Path(runs[0])
    if found.most > 1 and not found.host:
        parser.error("--host is needed with several nodes: the address of node rank 0, as the others reach it")
    if found.nproc_per_node < 1 or found.node_rank < 0:
        parser.error("--nproc-per-node must be at least 1, --node-rank at least 0")
    for name in ("grace", "silence", "join_timeout", "last_call"):
        if not 0 < getattr(found, name) < 10**6:  # nan too, for which nothing is ever too late
            parser.error(f"--{name.replace('_', '-')} {getattr(found, name)} is no number of seconds above 0")
    where = re.fullmatch(r"(?:\[(.+)\]|([^:\[\]]+))(?::(\d+))?", found.host or "127.0.0.1")
    if not where or not 0 < int(where[3] or PORT) < 65536:
        parser.error(f"--host {found.host} is neither HOST nor HOST:PORT, nor [IPV6]:PORT")
    found.host, found.hosting = where[1] or where[2], found.node_rank == 0
    if where[3]:
        found.port = int(where[3])
    elif found.most == 1:
        found.port = _free_port(found.host)
    else:
        # Jobs that share a node must not share a port, so SLURM's job number picks it; below the range of outgoing connections.
        found.port = 10000 + int(job) % 20000 if job else PORT
    return found


def main(arguments: list[str] | None = None) -> int:
    """Launch, watch, restart; returns the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal is no reason to stop training
    for number in FORWARDED:
        signal.signal(number, _interrupt)
    try:
        address = own_address(options.host, hosting=options.hosting, nodes=options.most)
        host = resolve(options.host)
        if options.most > 1 and (name := interface(address)):
            # gloo would bind to whatever this machine's own name resolves to, NCCL to the first interface it likes
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
        # The ranks' store is made anew in each round. torchrun's shared one keeps the address of the first round's rank 0, and
        # a node that joins later waits in vain to be told (torch 2.13, dynamic_rendezvous.py, next_rendezvous).
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; torchrun's own default
        # where a collective's time-out leaves the last ones of each rank; torch's default is the node's own disk
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(options.run.absolute() / "logs" / "collectives-rank-"))
        say(
            f"node {options.node_rank} ({socket.gethostname()}, {address}) of {options.nodes}, "
            f"{options.nproc_per_node} rank(s); rendezvous at {host}:{options.port}"
        )
        if not options.hosting and not _answers(host, options.port, options.join_timeout):
            say(
                f"{host}:{options.port} did not answer for {options.join_timeout} s: is node rank 0 up, and the port open?"
            )
            # as where too few nodes came: the first one may have died, and a job that is requeued gets another
            return 1
        with tempfile.TemporaryDirectory(prefix="ssa-launch-") as logs:
            code = _launch(options, host, address, Path(logs))
    except AddressProblem as problem:
        say(f"error[{problem.id}]: {problem}")
        return 7
    except Interrupted as reason:
        say(f"{reason}; the same command starts the run")
        return START_AGAIN
    if code is None:  # afresh: the old connection cannot be trusted, nor the threads that wait on it be ended
        os.execv(sys.executable, sys.orig_argv)
    return code


def _launch(options: argparse.Namespace, host: str, address: str, logs: Path) -> int | None:
    """The exit code, or None to try again because the rendezvous host fell silent."""
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import (
        RendezvousConnectionError,
        RendezvousError,
        RendezvousParameters,
        RendezvousTimeoutError,
        registry,
    )

    from ssa_cluster.agent import Agent
    from ssa_cluster.peers import Lost, WatchedRendezvous

    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"[{host}]:{options.port}" if ":" in host else f"{host}:{options.port}",
        run_id=options.id,
        min_nodes=options.fewest,
        max_nodes=options.most,
        local_addr=address,
        is_host=options.hosting,  # said, not guessed: torchrun compares names, which fails with aliases
        join_timeout=options.join_timeout,
        last_call_timeout=options.last_call,
        read_timeout=30,
    )
    agent = None
    name = f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()} at {address}"
    try:
        rendezvous = WatchedRendezvous(
            registry.get_rendezvous_handler(parameters),
            host=host,
            port=options.port,
            hosting=options.hosting,
            name=name,
            silence=options.silence,
        )
        spec = WorkerSpec(
            role="train",
            local_world_size=options.nproc_per_node,
            entrypoint=sys.executable,
            args=("-u", "-m", "ssa_megatron", *options.command),
            rdzv_handler=rendezvous,
            max_restarts=1_000_000,  # the budget decides
            monitor_interval=0.1,
            local_addr=address,
        )
        agent = Agent(
            spec,
            DefaultLogsSpecs(log_dir=str(logs)),
            rendezvous,
            RestartBudget(options.run, RESTARTS),
            grace=options.grace,
        )
        agent.listen()
        _check_requests()
        codes = agent.run().return_values
    except RendezvousTimeoutError:
        say(
            f"fewer than {options.fewest} node(s) came to {host}:{options.port} within {options.join_timeout} s; "
            "were all of them started, and do all of them live?"
        )
        return 1
    except (Lost, RendezvousError, DistError) as problem:
        if isinstance(problem, RendezvousConnectionError) and options.hosting:
            say(f"port {options.port} of {host} cannot be used ({problem.__cause__}); --host {host}:PORT takes another")
            return 1
        if agent is not None and agent.asked:  # coming back would forget it
            say(f"{problem}; asked to stop, so not coming back")
            return START_AGAIN if agent.killed_by is None else 128 + agent.killed_by
        say(f"{problem}; " + ("giving up" if options.hosting else f"trying to come back for {options.join_timeout} s"))
        return 1 if options.hosting else None
    rendezvous.shutdown()
    if agent.killed_by is not None:
        return 128 + agent.killed_by
    return next((code for code in codes.values() if code), 0) if codes else 0


def _free_port(host: str) -> int:
    try:
        with socket.create_server((host, 0)) as probe:
            return probe.getsockname()[1]
    except OSError:
        return PORT  # `own_address` says what is wrong with the host


def _answers(host: str, port: int, patience: float) -> bool:
    """Wait until the rendezvous host accepts connections. torch's own attempt prints a page of C++ each time it fails."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        _check_requests()
        try:
            socket.create_connection((host, port), timeout=5).close()
            return True
        except OSError:
            time.sleep(1)
    return False


def _leave(code: int) -> None:
    """End with `code`. Threads that still talk to the store would abort an ordinary exit: Python ends them when they ask for
    its lock, in the middle of C++, and std::terminate turns every code into 134 (torch 2.13), which a scheduler requeues.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _interrupt(number: int, _frame) -> None:
    _requests.append(signal.Signals(number).name)
    if len(_requests) == 1:  # SLURM, srun and scancel each send theirs: a second one must not become a traceback
        _check_requests()


def _check_requests() -> None:
    """Raise Interrupted when a signal has come: raised in the handler alone it may be lost in a library's C code."""
    if _requests:
        raise Interrupted(f"{_requests[0]} before any rank ran")


if __name__ == "__main__":
    _leave(main())
