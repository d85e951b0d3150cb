"""This package reads and writes bytes.

`storage` opens local paths and object stores, and `images` decodes and encodes pixels and masks.
"""
