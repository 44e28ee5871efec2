"""Batches of images: the one loader, inputs of models, images kept in memory."""
