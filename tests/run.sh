#!/bin/sh
# Runs the suite in two processes side by side: the tests that start Ray or sleep, which mostly wait, and all others.
# usage: sh tests/run.sh PYTHON. The first one's output comes after the second one's; a failure in either fails.
export OMP_NUM_THREADS=1  # one thread per test process: two would fight for two cores
log=$(mktemp)
# To collect all files twice takes some 20 s of a core. A marked test in another file is refused (tests/conftest.py).
MEMSCAN_TESTS_BESIDE=$(grep -rlE 'ray_once|census_on_ray|mark\.(ray|waits)' --include='test_*.py' tests | sort)
export MEMSCAN_TESTS_BESIDE
# shellcheck disable=SC2086
"$1" -m pytest -m "(ray or waits) and not long" $MEMSCAN_TESTS_BESIDE >"$log" 2>&1 &
ray=$!
trap 'kill "$ray" 2>/dev/null; cat "$log"; rm -f "$log"; exit 130' INT TERM HUP
"$1" -m pytest -m "not ray and not waits and not long"
others=$?
wait "$ray"
starting=$?
echo "== the tests that start Ray or wait =="
cat "$log"
rm -f "$log"
[ "$others" -eq 0 ] && [ "$starting" -eq 0 ]
