"""Labelled images: data sets, splits, loading."""
