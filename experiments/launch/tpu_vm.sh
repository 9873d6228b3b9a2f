#!/usr/bin/env bash
# Trains on all hosts of a TPU slice that is there; after a preemption, make the
# slice anew, with as many hosts as you like, and run the same command again.
#
#   TPU_NAME=NAME ZONE=ZONE WORKDIR=/shared/runs/NAME \
#     experiments/launch/tpu_vm.sh [FLAGS of experiments.train]
#
# JAX learns from the slice which host it runs on. To stop, saving the run:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command='pkill -TERM -f experiments[.]train'
set -euo pipefail
: "${TPU_NAME:?set it to the name of the slice}"
: "${ZONE:?set it to the zone of the slice}"
: "${WORKDIR:?set it to the directory of the run, on a disk of all hosts}"
: "${CHECKOUT:=jaxfl}"  # on every host, installed

command="cd $(printf %q "$CHECKOUT") && exec python3 -m experiments.train"
command+=" --multihost --auto_resume$(printf ' %q' --workdir="$WORKDIR" "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
  --command="$command"
