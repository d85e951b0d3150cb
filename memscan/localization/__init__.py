"""Where in the image is something memorised? Maps over the latent grid from the model alone, without a reference."""
