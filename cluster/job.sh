# shellcheck shell=bash
# What every job script of ours does: starts one command, forwards signals to it, and requeues the job when that is right.
#
# `#SBATCH --signal=B:` and a user's `scancel --batch` reach this shell and nothing else; without a trap it would die of them, and
# the job with it. A trap only runs while bash waits in `wait`, so the command runs in the background.

# The address of the job's first node as SLURM itself reaches it: its name need not resolve, least of all on that node.
ssa_host() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# ssa_job RUN COMMAND...: the command's exit code is the job's, unless the job is requeued.
#   75      the ranks stopped on a signal with a committed checkpoint: requeue, unless this shell was told to end (scancel)
#   0, 2-7  done, or a message with a remedy that no restart can replace
#   128+    INT, USR1, USR2 or TERM came a second time: somebody is in a hurry
#   other   a crash that the launcher could not mend, or a lost node: requeue while there is progress, at most 3 times without
ssa_job() {
    local run=$1 child code before ended=""
    shift
    before=$(ssa_latest "$run")
    "$@" &
    child=$!
    # srun kills its tasks at once when it gets TERM, and passes USR1 on: so every request to stop travels as USR1.
    trap 'echo "job: USR1"; kill -USR1 "$child" 2>/dev/null' USR1
    trap 'echo "job: USR2"; kill -USR1 "$child" 2>/dev/null' USR2
    trap 'echo "job: TERM"; ended=yes; kill -USR1 "$child" 2>/dev/null' TERM
    trap 'echo "job: INT"; ended=yes; kill -USR1 "$child" 2>/dev/null' INT
    while :; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break # wait also returns when a trap has run
    done
    wait "$child" 2>/dev/null && code=0 # a signal that arrived with the end has hidden the command's own code
    trap - USR1 USR2 TERM INT
    echo "job: the ranks ended with $code"
    case $code in
        0 | [2-7]) return "$code" ;;
        130 | 138 | 140 | 143)
            echo "job: the same signal came twice, so not requeued; submit it again to go on"
            return "$code"
            ;;
        75) ;;
        *)
            if [[ $(ssa_latest "$run") == "$before" && ${SLURM_RESTART_COUNT:-0} -ge 3 ]]; then
                echo "job: no checkpoint since this start, and it was not the first: not requeued"
                return "$code"
            fi
            ;;
    esac
    if [[ -n $ended ]]; then
        echo "job: told to end, so not requeued; submit it again to go on"
        return "$code"
    fi
    echo "job: requeued, to go on from $(ssa_latest "$run")"
    scontrol requeue "$SLURM_JOB_ID" || echo "job: SLURM does not requeue it; sbatch the same script again to go on"
    return "$code"
}

# The name of the newest committed checkpoint; empty before the first.
ssa_latest() {
    cat "$1/checkpoints/latest" 2>/dev/null
}
