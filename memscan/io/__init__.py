"""Bytes in and out: `storage` opens local paths and object stores, `images` decodes and encodes pixels and masks."""
