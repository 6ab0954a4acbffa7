#!/usr/bin/env bash
# Train through Slurm.
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]
# GPUS (all, default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (more arguments of srun) come from the
# environment; GPUS_PER_NODE=0 runs on the CPU, with GPUS processes.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
options=()
if [ "$#" -gt 0 ] && [ "${1#-}" = "$1" ]; then
    options=(--work-dir "$1")
    shift
fi
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
    "${PYTHON:-python}" -u "$tools/train.py" "$config" --launcher slurm ${options[@]+"${options[@]}"} "$@"
