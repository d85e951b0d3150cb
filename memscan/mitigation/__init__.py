"""This package repairs a model that reproduces its training images, and tests whether the repair holds.

    units          names the value units of cross-attention, switches them off, and unites sets of them
    activations    measures how strongly captions drive each unit (NeMo)
    score          scores a prompt by the similarity of its first noise predictions (NeMo)
    nemo           finds the units that carry one prompt's memorisation
    union          unites the units of a cluster of prompts (NeMo-C)
    augment        makes more samples of a cluster's captions: paraphrases, embeddings with noise
    wanda          finds single weights that memorised prompts use and empty ones do not
    pairs          chooses the images and captions of a fine-tuning
    finetune       trains further, with or without an adversary inside the training
    attack         searches for a text embedding that brings a training image back (DoRI)
    locality       tests whether embeddings, activations and weights of one image are in one place
    utility        measures the cost of the repair: Fréchet distance, diversity, prompt alignment
    patch          writes, applies and reverts changed tensors
    card           says what was changed, for which prompts, on what evidence

A mitigation ends in an ordinary diffusers folder. This package does not know the files of a run, or workers.
"""
