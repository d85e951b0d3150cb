"""Our numbers beside those of the authors' released code, which are stored here: what docs/parity.md is made of.

    python -m benchmarks.parity table                 the table, from the stored outputs and what this version computes
    python -m benchmarks.parity store fbmem CLONE     run the authors' code from a clone of their repository, and store

`stored/` has one JSON file per comparison: repository, commit, what was run, on which inputs, and the numbers. Inputs
are made by `cases`, from seeds and from the shipped planted world, so that both sides see the same. Nothing of the
authors' code is in this project; `authors` runs it from the clone, with the parts that it imports and that have no
part in the numbers (plotting, the network of a segmenter) left out.
"""
