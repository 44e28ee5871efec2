"""Architecture search for ViT-ResNAS: a super-network, the networks inside it, and evolution among them."""
