"""This package is the nightly scan: the checkpoints that it watches, and what it publishes."""
