"""This package holds the work of a mitigation's workers: search, fine-tuning and surrogate images."""
