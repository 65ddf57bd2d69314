"""One file for each family of models; each registers itself in `interp.images.layouts`."""
