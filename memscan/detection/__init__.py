"""This package scores how likely a prompt is memorised, from the model's first step, before any image is made.

`base` specifies a detector. `first_step` computes what detectors share (the prediction without caption, once per seed),
and `one_step` and `sharpness` compute scores from it. A higher score always means more memorised. A detector that does
not apply to a model has no score, and never 0. `sampled` has the detectors that use a whole sampling at no extra cost.
"""
