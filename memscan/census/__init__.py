"""This package turns the labels of generations into everything that a census reports.

* `verdict` judges one prompt; `tally` a batch of census rows, in counts that add up; `summary` makes the figures of
  census.json from them. `rates` has intervals, `signals` what detectors said, `screened` estimates behind a screen.
* `matches` are the training images that a prompt reaches; `correspondence` is their graph with the prompts,
  one-to-many, and what a data team would remove; `duplicates` folds near-duplicates; `clusters` groups flagged prompts.
* `flagged` writes and reads the flagged list. `diff` compares two runs, `trend` many checkpoints, by the `policy` file
  of a nightly.
"""
