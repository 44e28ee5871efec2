"""Other classes for a pretrained model: new heads, training or heads on cached features, and a report."""
