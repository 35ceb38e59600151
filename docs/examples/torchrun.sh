#!/bin/bash
# A run on all GPUs of this machine that is started again when it dies: bash docs/examples/torchrun.sh configs/llama3_8b_1m_8gpu.yaml
#
# NPROC=2 says how many processes (2 on a machine without GPUs: gloo). A process that dies or gets stuck ends all of them within 30 seconds,
# torchrun restarts them up to three times, and `checkpoint.resume: auto` goes on from the newest whole checkpoint. torchrun takes every
# exit code but 0 for a crash, so --stop-after wants --max-restarts=0 (or srun: slurm.sbatch).
exec torchrun --standalone --nproc-per-node="${NPROC:-gpu}" --max-restarts=3 -m longtrain train "${1:?bash docs/examples/torchrun.sh CONFIG}" "${@:2}"
