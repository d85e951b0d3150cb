"""This package repairs a model that reproduces its training images, and tests whether the repair holds.

    units          the value units of cross-attention: naming them, switching them off, unions
    activations    how strongly a caption drives each unit, and what is ordinary (NeMo)
    score          is this prompt memorised, by how alike its first noise predictions are (NeMo)
    nemo           which units carry one prompt's memorisation
    union          the units of a cluster of prompts, together (NeMo-C)
    augment        more samples of a cluster's captions: paraphrases, embeddings with noise
    wanda          single weights that memorised prompts use and empty ones do not
    pairs          which images and captions it may see
    finetune       further training, with or without an adversary inside it
    attack         search for a text embedding that brings a training image back (DoRI)
    locality       are the embeddings, activations and weights of one image in one place?
    utility        what the repair cost: Fréchet distance, diversity, prompt alignment
    patch          changed tensors: written, applied, taken back
    card           what was changed, for which prompts, on what evidence

A mitigation ends in an ordinary diffusers folder. Nothing here knows of files of a run, or of workers.
"""
