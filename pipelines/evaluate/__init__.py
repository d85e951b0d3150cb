"""This package holds the work behind `memscan evaluate`, which measures on a run how correct the methods are."""
