#!/usr/bin/env bash
# Test through Slurm.
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
# GPUS (all, default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS (more arguments of srun) come from the
# environment; GPUS_PER_NODE=0 runs on the CPU, with GPUS processes.
source "$(dirname "$0")/launch.sh"
require 4 "PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]" "$@"
by_srun "$1" "$2" test.py "$3" "$4" --launcher slurm "${@:5}"
