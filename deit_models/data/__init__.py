"""Labelled images: decoding, transforms, data sets, loading."""
