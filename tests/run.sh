#!/bin/sh
# Runs the suite in two processes side by side: the tests that start Ray, which mostly wait for its processes, and all
# others. usage: sh tests/run.sh PYTHON. The first one's output comes after the second one's; a failure in either fails.
export OMP_NUM_THREADS=1  # one thread per test process: two would fight for two cores
log=$(mktemp)
"$1" -m pytest -m "ray and not long" >"$log" 2>&1 &
ray=$!
trap 'kill "$ray" 2>/dev/null; cat "$log"; rm -f "$log"; exit 130' INT TERM HUP
"$1" -m pytest -m "not ray and not long"
others=$?
wait "$ray"
starting=$?
echo "== the tests that start Ray =="
cat "$log"
rm -f "$log"
[ "$others" -eq 0 ] && [ "$starting" -eq 0 ]
