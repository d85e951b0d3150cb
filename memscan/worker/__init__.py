"""What one worker does, without Ray: rows in, rows out, one bad row never takes its neighbours with it.

In the order in which a row meets them:

* `prompt`: a caption on its way to the sampling; `screen` decides before generation whether it is sampled at all.
* `generation`: captions and seeds to images and signals. `generated` is the value that travels on.
* `encoder`: segmenter and embedder, alike for generations and reference images (masks, vectors of three regions).
* `classification`: candidates out of the reference index, FB-Mem on each, a record for the census table. `semantic`
  adds similarity of meaning where an image encoder is configured.
* `folder`: the same for a folder of images that exist already.
* `isolation` keeps rows apart when something fails; `overlap` samples one chunk while the one before it is classified.
"""
