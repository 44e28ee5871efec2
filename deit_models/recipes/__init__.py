"""Settings of a training run, and the papers' settings by name."""
