"""This package is a run's folder.

It has manifest, parts, commit records, the lease, a journal of rows that kill workers, and checks of inputs.
"""
