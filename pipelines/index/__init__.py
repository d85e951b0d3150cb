"""This package builds the reference index.

It holds the encoding of sources, the steps of a build, and a look inside an index.
"""
