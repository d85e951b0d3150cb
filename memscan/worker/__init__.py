"""This package does what one worker does, without Ray.

Rows go in and rows come out, and one bad row never spoils its neighbours.

The modules are listed in the order in which a row passes through them:

* `prompt` is a caption before it is sampled. `screen` decides before generation whether it is sampled at all.
* `generation` turns captions and seeds into images and signals. `generated` is the value that the later steps get.
* `encoder` applies segmenter and embedder, alike to generations and reference images (masks, vectors of three regions).
* `detector` searches candidates in the index, compares each by FB-Mem, and chooses the one that decides.
  `classification` makes records for the census table from this. `semantic` adds semantic similarity if an image encoder
  is configured. `folder` does the same for images that exist already.
* `indexing` makes an index of some images in memory. `pair` compares two images without one.
* `isolation` separates rows when one fails. `overlap` samples one chunk while the one before it is classified.
"""
