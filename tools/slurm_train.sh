#!/usr/bin/env bash
# Train through Slurm.
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]
# GPUS (all, default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (more arguments of srun) come from the
# environment; GPUS_PER_NODE=0 runs on the CPU, with GPUS processes.
source "$(dirname "$0")/launch.sh"
require 3 "PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]" "$@"
partition=$1
job_name=$2
config=$3
shift 3
options=()
if [ "$#" -gt 0 ] && [ "${1#-}" = "$1" ]; then
    options=(--work-dir "$1")
    shift
fi
by_srun "$partition" "$job_name" train.py "$config" --launcher slurm ${options[@]+"${options[@]}"} "$@"
