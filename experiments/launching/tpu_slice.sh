#!/usr/bin/env bash
# Runs a config on a spot Cloud TPU slice until it is done: requests the slice, waits for it, sets all
# workers up, starts the same command on each, and begins again when the slice is preempted.
#
#   BUCKET=gs://mine CONFIG=configs/imagenet_tpu.py experiments/launching/tpu_slice.sh [FLAGS OF THE COMMAND]
#
# The run is in $BUCKET/runs/$NAME. Prepared images are copied from $BUCKET/data to each worker's disk
# (prepare them once, on any machine: --mode prepare, then gcloud storage rsync -r data $BUCKET/data).
set -euo pipefail

: "${BUCKET:?the bucket of runs and data, such as gs://mine}" "${CONFIG:?a config, such as configs/imagenet_tpu.py}"
NAME=${NAME:-rdm-jax}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
REPOSITORY=${REPOSITORY:-https://github.com/rdm-jax/rdm_jax}
POLL=${POLL:-60} # seconds

tpus=(gcloud compute tpus)
here=(--zone "$ZONE" --quiet)

state() {
    "${tpus[@]}" queued-resources describe "$NAME" "${here[@]}" --format='value(state.state)' || echo GONE
}

on_all_workers() {
    "${tpus[@]}" tpu-vm ssh "$NAME" "${here[@]}" --worker=all --command="$1"
}

await_slice() {
    "${tpus[@]}" queued-resources create "$NAME" --node-id="$NAME" "${here[@]}" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot
    local now
    until now=$(state) && [[ $now == ACTIVE ]]; do
        if [[ $now == FAILED || $now == SUSPENDED || $now == GONE ]]; then
            echo "the request $NAME is $now: ${tpus[*]} queued-resources describe $NAME --zone $ZONE" >&2
            exit 1
        fi
        sleep "$POLL"
    done
}

delete_slice() {
    "${tpus[@]}" queued-resources delete "$NAME" "${here[@]}" --force
}

trap 'echo "the slice $NAME is kept, and costs: ${tpus[*]} queued-resources delete $NAME --zone $ZONE --force" >&2; exit 130' INT TERM
while true; do
    await_slice
    # A worker may lose its connection while it installs; what failed here is tried again on a new slice.
    status=0
    on_all_workers "
        set -e
        [ -d rdm_jax ] || git clone -q $REPOSITORY rdm_jax
        cd rdm_jax
        python3 -m venv .venv
        .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' gcsfs
        mkdir -p data
        gcloud storage rsync -r $BUCKET/data data" &&
        on_all_workers "cd rdm_jax && .venv/bin/python -m rdm_jax.main --config $CONFIG --workdir $BUCKET/runs/$NAME ${*@Q}" ||
        status=$?
    preempted=$([[ $(state) == ACTIVE ]] || echo yes)
    delete_slice
    # Of a slice that is still there the status is the command's own, and another try would end alike.
    [[ $status == 0 || -z $preempted ]] && exit "$status"
    echo "$NAME was preempted; the run goes on from its last checkpoint"
done
