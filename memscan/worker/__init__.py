"""This package does what one worker does, without Ray.

Rows go in and rows come out, and one bad row never spoils its neighbours.

In the order in which a row meets them:

* `prompt`: a caption on its way to the sampling; `screen` decides before generation whether it is sampled at all.
* `generation`: captions and seeds to images and signals. `generated` is the value that travels on.
* `encoder`: segmenter and embedder, alike for generations and reference images (masks, vectors of three regions).
* `detector`: candidates out of the index, FB-Mem on each, the one that decides. `classification` makes records
  for the census table of it, `semantic` adds similarity of meaning where an image encoder is configured, and `folder`
  does the same for images that exist already.
* `indexing` makes an index of some images in memory; `pair` compares two images without one.
* `isolation` keeps rows apart when something fails; `overlap` samples one chunk while the one before it is classified.
"""
