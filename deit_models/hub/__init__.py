"""The weights hub: what is published, its bytes, names and config, a verified model from them, and the way back."""
