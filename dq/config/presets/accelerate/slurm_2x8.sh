#!/bin/bash
# A run of dq on two nodes of eight GPUs under SLURM. From the root of the repository:
#   sbatch configs/accelerate/slurm_2x8.sh run --config FILE --output_dir SHARED/run --cache_dir SHARED/cache
# Everything behind the script's name goes to dq. Both folders must lie on a file system that all nodes share.
#
# Preemption and the end of the time limit: SLURM sends USR1 two minutes before, the batch shell puts the job back into
# the queue, and when it starts again the same command goes on from the files that are there. What is lost is the work
# on units that were not finished.
#SBATCH --job-name=dq
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dq-%j.log

set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
export MAIN_IP MAIN_PORT PROCESSES ACCELERATE
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_IP=${HOSTS%%$'\n'*}
MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))  # jobs that share a node do not share a port
PROCESSES=$((SLURM_NNODES * GPUS_PER_NODE))
ACCELERATE=${ACCELERATE:-accelerate}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / GPUS_PER_NODE))}
export TQDM_DISABLE=1  # a log file is no place for bars

requeue() {
    echo "about to be stopped: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1

# one launcher on each node; which node it is on, only its own shell knows
srun --kill-on-bad-exit=1 bash -c '
    exec "$ACCELERATE" launch --config_file configs/accelerate/nodes2x8.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" -m dq.cli "$@"
' dq "$@" &
job=$!
# wait also returns when the signal comes, and then srun is still there
status=0
wait "$job" || status=$?
if kill -0 "$job" 2>/dev/null; then
    status=0
    wait "$job" || status=$?
fi
exit "$status"
