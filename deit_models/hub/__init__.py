"""The weights hub: published files fetched, checked and loaded into a model; the cache; the manifest's records."""
