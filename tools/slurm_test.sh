#!/usr/bin/env bash
# Test through Slurm.
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
# GPUS (all, default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (more arguments of srun) come from the
# environment; GPUS_PER_NODE=0 runs on the CPU, with GPUS processes.
set -euo pipefail

if [ "$#" -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
checkpoint=$4
shift 4
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
tasks_per_node=$gpus_per_node
resources=("--gres=gpu:$gpus_per_node")
if [ "$gpus_per_node" -eq 0 ]; then
    tasks_per_node=$gpus
    resources=()
fi
read -r -a srun_args <<< "${SRUN_ARGS:-}"
tools=$(cd "$(dirname "$0")" && pwd)
[ ! -d "$tools/../carafe_plugin" ] || export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"  # a checkout

exec srun -p "$partition" \
    --job-name="$job_name" \
    ${resources[@]+"${resources[@]}"} \
    --ntasks="$gpus" \
    --ntasks-per-node="$tasks_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "${PYTHON:-python}" -u "$tools/test.py" "$config" "$checkpoint" --launcher slurm "$@"
