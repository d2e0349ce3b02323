#!/bin/bash
# A Ray cluster for one study on Slurm:
#   sbatch --nodes=4 cluster/slurm.sh study.yaml [--set key=value ...]
# `out` and the recipe must lie on storage that all nodes see. Cancelled or out of time: submit the same again.
#SBATCH --job-name=deltaray
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=deltaray-%j.out
set -euo pipefail
recipe=${1:?usage: sbatch --nodes=N cluster/slurm.sh RECIPE [--set key=value ...]}
shift
: "${SLURM_JOB_ID:?run this with sbatch}"

# The token that every process of this cluster asks for; a file that only its owner can read, gone with the job.
umask 077
state=$(mktemp -d "$PWD/.ray-$SLURM_JOB_ID-XXXX")
trap 'rm -rf "$state"' EXIT
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
python -c 'import secrets; print(secrets.token_hex(32))' >"$RAY_AUTH_TOKEN_PATH"

export RAY_USAGE_STATS_ENABLED=0 RAY_LOGGER_LEVEL=warning
port=$((20000 + SLURM_JOB_ID % 20000))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# --block: Slurm ends these steps, and with them Ray, when the job ends. Each node makes a folder in /tmp whose name
# nobody can know before and that only its owner may enter; it is gone with the step.
# shellcheck disable=SC2016 # the node expands it
in_own_folder='folder=$(mktemp -d /tmp/ray-XXXXXXXXXX); trap "rm -rf \"$folder\"" EXIT; "$@" --temp-dir="$folder" --block'
srun --nodes=1 --ntasks=1 --nodelist="$head" bash -c "$in_own_folder" head \
  ray start --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 &
until ray health-check --address "$address:$port" >/dev/null 2>&1; do sleep 2; done
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    bash -c "$in_own_folder" worker ray start --address="$address:$port" &
fi
nodes() { python -c 'import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(len(ray.nodes()))' "$1"; }
until [ "$(nodes "$address:$port")" -ge "$SLURM_JOB_NUM_NODES" ]; do sleep 2; done

# In the background, so that a signal is heard at once and passed on: deltaray commits and says how to resume.
deltaray run "$recipe" --set "cluster.address=$address:$port" "$@" &
study=$!
trap 'kill -TERM "$study"' TERM INT
code=0
wait "$study" || code=$?
if kill -0 "$study" 2>/dev/null; then wait "$study" || code=$?; fi
exit "$code"
