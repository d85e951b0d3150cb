"""This package turns the labels of generations into everything that a census reports.

* `verdict` makes the verdict on one prompt. `tally` does so for a batch of census rows, in counts that can be added.
  `summary` makes the figures of census.json from these counts. `rates` computes intervals, `signals` summarises
  detector signals, and `screened` makes the estimates of a run with a screen.
* `matches` finds the training images that a prompt reaches. `correspondence` builds their graph with the prompts
  (one-to-many), and the list of images that a data team would remove. `duplicates` merges near-duplicates, and
  `clusters` groups flagged prompts.
* `flagged` writes and reads the flagged list. `diff` compares two runs. `trend` compares many checkpoints, by the
  `policy` file of a nightly.
"""
