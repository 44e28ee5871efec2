"""Model families: one file each, pure `nn.Module`, no I/O and no training code."""
