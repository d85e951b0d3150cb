"""This package is the scan: its stages, the work of its actors, the waves of parts, and the access to an index."""
