"""This package has the commands of `memscan`, one module per group; `pipelines.cli` combines them."""
