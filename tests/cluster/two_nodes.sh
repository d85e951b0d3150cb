#!/usr/bin/env bash
# cluster/slurm/scan.sbatch, as it is, on Debian's Slurm: one machine, two nodes, one census of the planted world.
#
#     PYTHON=.venv/bin/python tests/cluster/two_nodes.sh
#
# The job is signalled as near its time limit (it stops, and is put back into the queue), resumes, is put back from
# outside as by a preemption, resumes again, and ends complete with every prompt once. Needs slurm-wlm and munge; where
# they are not installed one line says so, and the exit code is 0. It takes some minutes, and leaves nothing running.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}")
for program in slurmctld slurmd sbatch scontrol munged; do
    PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || {
        echo "skipped: no $program here (apt-get install slurm-wlm munge)"
        exit 0
    }
done
PATH=$PATH:/usr/sbin
patience=${PATIENCE:-1800} # seconds for each step: on an idle machine one takes less than a minute
work=$(mktemp -d /tmp/memscan-slurm.XXXXXX)
started=()
finish() {
    code=$?
    [[ -z ${job:-} ]] || scancel "$job" 2>/dev/null || true
    for _ in $(seq 20); do [[ -n $(squeue -h 2>/dev/null) ]] && sleep 1 || break; done
    for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if ((code)); then
        tail -n 30 "$work"/job-*.out "$work"/slurmctld.log 2>/dev/null || true
        echo "FAILED, logs are in $work"
    else
        rm -rf "$work"
    fi
}
trap finish EXIT

# The commands that the script calls are those of this checkout; token and caches go below the work folder.
mkdir -p "$work"/{bin,home,state,spool}
printf '#!/bin/sh\nexec "%s" -m pipelines.cli "$@"\n' "$PYTHON" >"$work/bin/memscan"
printf '#!/bin/sh\nexec "%s" -m ray.scripts.scripts "$@"\n' "$PYTHON" >"$work/bin/ray"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" >"$work/bin/python3"
chmod +x "$work"/bin/*
export PATH=$work/bin:$PATH PYTHONPATH=$root HOME=$work/home MEMSCAN_CACHE=$work/cache OMP_NUM_THREADS=1

cat >"$work/slurm.conf" <<CONF
ClusterName=memscan
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket,cred_expire=30
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
GresTypes=gpu
NodeName=node[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[16821-16822] CPUs=2 RealMemory=8000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
printf 'NodeName=node[1-2] Name=gpu File=/dev/null\n' >"$work/gres.conf"
export SLURM_CONF=$work/slurm.conf

(umask 077 && head -c 1024 /dev/urandom >"$work/munge.key")
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
    --pid-file="$work/munged.pid" --log-file="$work/munged.log" --seed-file="$work/munged.seed" >/dev/null 2>&1 &
started+=($!)
for _ in $(seq 50); do [[ -S $work/munge.socket ]] && break || sleep 0.2; done
slurmctld -D >/dev/null 2>&1 &
started+=($!)
for node in node1 node2; do
    slurmd -D -N "$node" >/dev/null 2>&1 &
    started+=($!)
done
for _ in $(seq 60); do
    [[ $(sinfo -h -t idle -o %D 2>/dev/null) == 2 ]] && break || sleep 1
done
[[ $(sinfo -h -t idle -o %D) == 2 ]] || { echo "the two nodes did not come up"; exit 1; }
echo "two nodes are up"

"$PYTHON" - "$work" <<'PY'
import sys
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from memscan.planted.world import world_config

work = Path(sys.argv[1])
config = world_config()
pq.write_table(pq.read_table(config.index.source).slice(0, 96), work / "references.parquet")
data = config.model_dump(mode="json")
data["out"], data["part_size"] = str(work / "run"), 12
data["index"]["source"] = str(work / "references.parquet")
data["prompts"]["limit"] = 240
data["resources"]["device"] = "cpu"
(work / "census.yaml").write_text(yaml.safe_dump(data))
PY

job=$(sbatch --parsable --nodes=2 --cpus-per-task=1 --mem=4G --time=60 --output="$work/job-%j.out" --open-mode=append \
    "$root/cluster/slurm/scan.sbatch" "$work/census.yaml")
commits() { find "$work/run/census" -maxdepth 1 -name '_part-*.json' 2>/dev/null | wc -l; }
field() { scontrol show job "$job" | grep -o "$1=[^ ]*" | head -n 1 | cut -d = -f 2; }
state() { "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$work/run/run.json" 2>/dev/null || echo none; }
until_true() { # what, seconds, command
    local what=$1 left=$2
    shift 2
    while ! "$@"; do
        ((left-- > 0)) || { echo "waited in vain until $what; job $(field JobState), run $(state)"; exit 1; }
        sleep 1
    done
    echo "$what"
}
committed() { (($(commits) >= $1)) && [[ $(state) == running ]]; }
restarted() { [[ $(field Restarts) == "$1" ]]; }
interrupted() { [[ $(state) == interrupted ]]; }
complete() { [[ $(field JobState) == COMPLETED ]]; }

until_true "two parts are committed by two nodes" "$patience" committed 2
grep -q 'only .* nodes joined' "$work/job-$job.out" && exit 1
before=$(commits)
scancel --batch --signal=USR1 "$job" # what Slurm sends two minutes before the time limit
until_true "signalled: the run is interrupted" "$patience" interrupted
until_true "the job is back in the queue" "$patience" restarted 1
grep -q 'put back into the queue' "$work/job-$job.out"
until_true "resumed: more parts are committed" "$patience" committed $((before + 2))
before=$(commits)
scontrol requeue "$job" # what a preemption does
until_true "requeued: the run is interrupted" "$patience" interrupted
until_true "the job is back in the queue again" "$patience" restarted 2
until_true "the job is complete" "$patience" complete
[[ $(state) == complete && $(field ExitCode) == 0:0 ]]
"$PYTHON" - "$work" <<'PY'
import sys

from pipelines.run_folder.runs import Run
from pipelines.run_folder.tables import read_table

run = Run.load(f"{sys.argv[1]}/run")
ids = [one for number in run.parts for file in run.files(number) for one in read_table(file, ["prompt_id"])["prompt_id"].to_pylist()]
assert run.state == "complete"
assert len(ids) == len(set(ids)) == run.manifest["prompts"]["distinct"], (len(ids), len(set(ids)))
print(f"complete: {len(ids)} prompts, each once, in {len(run.parts)} parts")
PY
