#!/bin/sh
# Every figure that needs a GPU, one after another (docs/speed.md): about an hour on a large one, most of it compiling.
# A part that fails says so and the next one runs; the exit code says whether all went well. `make gpu` calls this.
PYTHON=${PYTHON:-python}
RUN=${RUN:-runs/gpu-agreement}
failed=

part() {
    echo "== $*"
    "$@" || failed="$failed [$*]"
}

part "$PYTHON" -m pytest -m gpu -q
for compile in off graphs inductor; do
    part "$PYTHON" -m benchmarks.sampling --model sd1 --batch 16 --compile $compile --lossy
    part "$PYTHON" -m benchmarks.chain --model sd1 --batch 16 --compile $compile
done
for compile in off inductor; do
    part "$PYTHON" -m benchmarks.sampling --model xl --batch 8 --compile $compile --screen 64 --screen-batch 8
done
part "$PYTHON" -m benchmarks.sampling --model sd1 --dtype float16 --batch 16 --probe
part "$PYTHON" -m pipelines.cli scan --world shipped --set out="$RUN" --set resources.device=cuda
part "$PYTHON" -m pipelines.cli evaluate sampling "$RUN"
part "$PYTHON" -m pipelines.cli evaluate sampling "$RUN" --set generator.steps=50 --set generator.samples=1 \
    --mode solver --mode late-guidance --mode cached

[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
