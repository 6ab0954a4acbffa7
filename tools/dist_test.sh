#!/usr/bin/env bash
# Test on several GPUs of this machine, or on several machines; without GPUs, with as many processes on the CPU.
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT (environment) say how this machine takes part in a run on several.
source "$(dirname "$0")/launch.sh"
require 3 "CONFIG CHECKPOINT GPUS [options of tools/test.py]" "$@"
by_torchrun "$3" test.py "$1" "$2" --launcher pytorch "${@:4}"
