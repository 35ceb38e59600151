#!/bin/bash
# A run that is started again when it dies: bash docs/examples/torchrun.sh configs/quickstart.yaml
#
# torchrun watches the process and restarts it up to three times after a crash (a GPU error, the out-of-memory killer); `checkpoint.resume:
# auto` goes on from the newest whole checkpoint. A run is one process: more than one is refused by name.
exec torchrun --standalone --nproc-per-node=1 --max-restarts=3 --module longtrain.cli train "${1:?bash docs/examples/torchrun.sh CONFIG}" "${@:2}"
