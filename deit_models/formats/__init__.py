"""Saved models in the layouts of this package, timm and transformers, written and read."""
