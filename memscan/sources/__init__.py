"""This package reads sources of reference images.

`layouts` recognises the layout of a source, and `reading` reads it in chunks.
"""
