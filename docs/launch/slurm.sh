#!/bin/bash
# A run on SLURM, one task a GPU, begun again until it is finished: sbatch docs/launch/slurm.sh output_dir=runs/joint ...
# Change what stands before "nothing to change below". docs/launch.md explains it.
#SBATCH --job-name=bevt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Five minutes before the time is up the ranks get SIGUSR1. The run ends within a step, its validation, and a commit.
#SBATCH --signal=USR1@300
# SLURM itself begins a job again after a lost node; a run that was stopped is begun again below.
#SBATCH --requeue
set -uo pipefail

recipe=(--deepspeed_config zero2 recipe=joint_swin_b tokenizer.weights=encoder.pkl)
cache=${BEVT_CACHE:-${SLURM_TMPDIR:-/tmp}/bevt-${USER:-run}}  # on a local disk of each node: remote shards
most_lost=10                                                  # times that a run with a lost rank is begun again

# -- nothing to change below --
stopped=75 rank_lost=7  # docs/reliability.md
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}" || exit
# shellcheck disable=SC1091  # made by "make env"
source .venv/bin/activate || exit
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))  # two jobs that share a node do not meet
export OMP_NUM_THREADS=1
trap 'asked=1' TERM USR1  # the ranks get the signal too; without this line bash would end before them

# shellcheck disable=SC2016  # each task reads its own variables
srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python bevt_ds/pretrain.py "$@"' rank \
    "${recipe[@]}" "data.cache_dir=$cache" resume=auto "$@"
code=$?

echo "$(date -Is) the ranks ended with $code${asked:+, after a signal to this script}"
again=no
[ "$code" = "$stopped" ] && again=yes
[ "$code" = "$rank_lost" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most_lost" ] && again=yes
# A job that scancel ends is no longer RUNNING by now, and stays ended.
if [ "$again" = yes ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
