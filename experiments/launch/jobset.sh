#!/usr/bin/env bash
# Trains on the pods of a Kubernetes JobSet: fills jobset.yaml and applies it.
#
#   HOSTS=4 IMAGE=REGISTRY/IMAGE CLAIM=NAME WORKDIR=/shared/runs/NAME \
#     DEVICE=nvidia.com/gpu DEVICES=8 \
#     experiments/launch/jobset.sh [FLAGS of experiments.train]
#
# The cluster needs the JobSet controller. To stop, saving the run, or before
# HOSTS is changed: kubectl delete jobset NAME
set -euo pipefail
: "${NAME:=jaxfl}"  # of the JobSet
: "${HOSTS:?set it to the number of pods}"
: "${IMAGE:?set it to an image with this checkout, installed, as its directory}"
: "${CLAIM:?set it to a ReadWriteMany volume claim, mounted at /shared}"
: "${WORKDIR:?set it to the directory of the run, below /shared}"
: "${DEVICE:?set it to the resource to ask for, such as nvidia.com/gpu or cpu}"
: "${DEVICES:?set it to how many of DEVICE a pod gets}"

FLAGS=
for flag in "$@"; do
  flag=${flag//\\/\\\\}
  flag=${flag//\"/\\\"}
  FLAGS+="${FLAGS:+, }\"$flag\""
done
text=$(< "$(dirname "$0")/jobset.yaml")
for name in NAME HOSTS IMAGE CLAIM WORKDIR DEVICE DEVICES FLAGS; do
  text=${text//"<$name>"/"${!name}"}
done
kubectl apply -f - <<< "$text"
