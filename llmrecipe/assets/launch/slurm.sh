#!/bin/bash
#SBATCH --job-name=%%{name}
#SBATCH --nodes=%%{nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
%%{options}

%%{variables}
%%{setup}

# One launcher on each node starts the processes of that node. The run continues from its newest checkpoint where it has begun.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=1800 %%{step} \
    %%{command}
code=$?

# A run that a signal has stopped is queued again; a run that has failed by itself is not.
if [ "$code" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt %%{restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
