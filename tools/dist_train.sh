#!/usr/bin/env bash
# Train on several GPUs of this machine, or on several machines; without GPUs, with as many processes on the CPU.
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT (environment) say how this machine takes part in a run on several.
source "$(dirname "$0")/launch.sh"
require 2 "CONFIG GPUS [options of tools/train.py]" "$@"
by_torchrun "$2" train.py "$1" --launcher pytorch "${@:3}"
