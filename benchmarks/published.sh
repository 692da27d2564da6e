#!/bin/sh
# The published search of DrNAS in NAS-Bench-201 (arXiv:2006.10355, Table 4) at full size, on one GPU:
#
#   benchmarks/published.sh CIFAR10 TABLE [METHOD] [SEED] [SECONDS]
#
# CIFAR10 is the folder of the official archive, TABLE the CSV file of the cells' accuracies. It searches for SECONDS
# (540) at the most, then stops after the step under way with status 143; run again, it goes on from there, and ends with
# status 0 when the search is finished. Unattended:
#
#   while benchmarks/published.sh data cells.csv.gz; [ $? -eq 143 ]; do :; done
set -eu
data=$1 table=$2 method=${3:-drnas} seed=${4:-0} seconds=${5:-540}
out=runs/published-$method-$seed
if [ -f "$out/checkpoint.pt" ]; then resume=--resume; else resume=--overwrite; fi
set +e
timeout --preserve-status "$seconds" fastnas search $resume --out "$out" --space nb201 --method "$method" \
  --data cifar10 --root "$data" --table "$table" --seed "$seed"
status=$?
set -e
[ "$status" -ne 0 ] || fastnas report "$out"
exit "$status"
