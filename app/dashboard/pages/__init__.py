"""Pages: one file each, which registers itself."""
