"""Labelled images of any form: folders, tables, data sets, splits."""
