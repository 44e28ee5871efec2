"""Architecture search for ViT-ResNAS; no other part of the package needs this one."""
