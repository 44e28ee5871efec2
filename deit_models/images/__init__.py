"""Images: from files and arrays to pixels, and from pixels to the input of a model."""
