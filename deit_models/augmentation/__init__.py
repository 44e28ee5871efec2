"""Training images: drawn, cropped, changed at random, mixed."""
