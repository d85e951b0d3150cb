"""This package makes maps over the latent grid that show where in the image something is memorised.

The maps come from the model alone, without a reference.
"""
