"""Sources of reference images: `layouts` recognises the layout of a source, `reading` reads it in chunks."""
