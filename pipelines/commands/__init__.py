"""The commands of `memscan` by group; `pipelines.cli` puts them together."""
