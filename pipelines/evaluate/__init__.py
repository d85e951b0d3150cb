"""How right the methods are on a run: the work behind `memscan evaluate`."""
