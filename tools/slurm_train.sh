#!/usr/bin/env bash
# Train through Slurm.
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]
# GPUS (all, default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (more arguments of srun) come from the
# environment; GPUS_PER_NODE=0 runs on the CPU, with GPUS processes.
source "$(dirname "$0")/launch.sh"
require 3 "PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]" "$@"
if [ "$#" -gt 3 ] && [ "${4#-}" = "$4" ]; then
    set -- "${@:1:3}" --work-dir "${@:4}"
fi
by_srun "$1" "$2" train.py "$3" --launcher slurm "${@:4}"
