"""Figures: models scored on labelled images, metrics, embeddings."""
