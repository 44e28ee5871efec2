"""A pretrained model on other classes: heads, settings, split, training or a head on cached features, and a report."""
