"""Models written down in the layouts of this package, timm and transformers."""
