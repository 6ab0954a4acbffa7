# What the launchers share; sourced by them.
set -euo pipefail

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ ! -d "$tools/../carafe_plugin" ] || export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"  # a checkout

# require N WORDS ARGUMENT...: end where fewer than N arguments came, with the WORDS that were expected.
require() {
    if [ "$#" -lt "$(($1 + 2))" ]; then
        echo "usage: $0 $2" >&2
        exit 2
    fi
}

# by_torchrun GPUS SCRIPT ARGUMENT...: a process a GPU; dist_train.sh says what comes from the environment.
by_torchrun() {
    exec "${PYTHON:-python}" -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$1" \
        "$tools/$2" "${@:3}"
}

# by_srun PARTITION JOB_NAME SCRIPT ARGUMENT...: slurm_train.sh says what comes from the environment.
by_srun() {
    local gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-8} srun_args
    local tasks_per_node=$gpus_per_node resources=("--gres=gpu:$gpus_per_node")
    if [ "$gpus_per_node" -eq 0 ]; then
        tasks_per_node=$gpus
        resources=()
    fi
    read -r -a srun_args <<< "${SRUN_ARGS:-}"
    exec srun -p "$1" \
        --job-name="$2" \
        ${resources[@]+"${resources[@]}"} \
        --ntasks="$gpus" \
        --ntasks-per-node="$tasks_per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${srun_args[@]+"${srun_args[@]}"} \
        "${PYTHON:-python}" -u "$tools/$3" "${@:4}"
}
