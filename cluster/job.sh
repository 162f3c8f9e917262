# shellcheck shell=bash
# What every job script of ours does: starts one command, forwards signals to it, and requeues the job when that is right.
#
# `#SBATCH --signal=B:` and a user's `scancel --batch` reach this shell and nothing else; without a trap it would die of them, and
# the job with it. A trap only runs while bash waits in `wait`, so the command runs in the background.

# Until the command runs, a request is only remembered. TERM and INT are what scancel and people send to be rid of a job.
ssa_asked=0
ssa_ended=""
trap 'ssa_asked=$((ssa_asked + 1))' USR1 USR2
trap 'ssa_asked=$((ssa_asked + 1)); ssa_ended=yes' TERM INT

# The address of the job's first node as SLURM itself reaches it: its name need not resolve, least of all on that node.
ssa_host() {
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-$first}" # a controller that does not answer just now is no reason to end: the name may do
}

# ssa_job RUN COMMAND...: the command's exit code is the job's, unless the job is requeued.
#   75      the ranks stopped on a signal with a committed checkpoint: requeue, unless this shell was told to end (scancel)
#   0, 2-7  done, or a message with a remedy that no restart can replace
#   128+    INT, USR1, USR2 or TERM came a second time: somebody is in a hurry
#   other   a crash that the launcher could not mend, or a lost node: requeue while there is progress, at most 3 times without
ssa_job() {
    local run=$1 job=$SLURM_JOB_ID child code=75 from
    shift
    if [[ $ssa_asked -eq 0 ]]; then
        "$@" &
        child=$!
        # srun kills its tasks at once when it gets TERM, and passes USR1 on: so every request to stop travels as USR1.
        trap 'ssa_forward USR1 "$child"' USR1 USR2
        trap 'ssa_ended=yes; ssa_forward TERM "$child"' TERM INT
        [[ $ssa_asked -eq 0 ]] || kill -USR1 "$child" 2>/dev/null # asked between the command's start and these traps
        while :; do
            wait "$child"
            code=$?
            kill -0 "$child" 2>/dev/null || break # wait also returns when a trap has run
        done
        wait "$child" 2>/dev/null
        code=$? # a signal that came with the end has hidden the command's own code; bash remembers it
        trap - USR1 USR2 TERM INT
    fi
    echo "job: the ranks ended with $code"
    case $code in
        0 | [2-7]) return "$code" ;;
        75) ;;
        130 | 138 | 140 | 143)
            if [[ $ssa_asked -ne 1 ]]; then # asked once, it is srun that died of it, before it could pass it on
                echo "job: the same signal came twice, so not requeued; submit it again to go on"
                return "$code"
            fi
            ;;
        *)
            if [[ $(ssa_crashes "$run") -gt 3 ]]; then
                echo "job: crashed four times in a row without a newer checkpoint: not requeued"
                return "$code"
            fi
            ;;
    esac
    if [[ -n $ssa_ended ]]; then
        echo "job: told to end, so not requeued; submit it again to go on"
        return "$code"
    fi
    from=$(ssa_latest "$run")
    echo "job: requeued, to go on from ${from:-the beginning}"
    # A task of an array by its place in it: one of the tasks has the array's own number, and requeueing that restarts them all.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    scontrol requeue "$job" || echo "job: SLURM does not requeue it; sbatch the same script again to go on"
    return "$code"
}

# ssa_forward KIND CHILD: pass a request on.
ssa_forward() {
    ssa_asked=$((ssa_asked + 1))
    echo "job: $1"
    kill -USR1 "$2" 2>/dev/null
}

# ssa_crashes RUN: how often in a row this job has crashed since the newest checkpoint, now included. SLURM's own count of restarts
# would do only for a job that is never preempted: after three time limits the first crash of a node would be the last.
ssa_crashes() {
    local file=$1/logs/crashes latest crashes=0 job="" from=""
    latest=$(ssa_latest "$1")
    [[ -r $file ]] && read -r crashes job from <"$file"
    [[ $crashes =~ ^[0-9]+$ && $job == "$SLURM_JOB_ID" && $from == "$latest" ]] || crashes=0
    crashes=$((crashes + 1))
    if ! { mkdir -p "$1/logs" && echo "$crashes $SLURM_JOB_ID $latest" >"$file"; } 2>/dev/null; then
        crashes=$((${SLURM_RESTART_COUNT:-0} + 1)) # nothing can be kept, so no crash can be told from a preemption
    fi
    echo "$crashes"
}

# The name of the newest committed checkpoint; empty before the first.
ssa_latest() {
    cat "$1/checkpoints/latest" 2>/dev/null
}
