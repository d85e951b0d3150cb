"""This package scores how likely a prompt is memorised, from the model's first step, before any image is made.

`base` says what a detector is, `first_step` computes what they share (the prediction without caption once per seed),
`one_step` and `sharpness` score it. Higher always means more memorised; a detector that does not apply to a model has
no score, never 0. What a whole sampling has for nothing is in `sampled`.
"""
