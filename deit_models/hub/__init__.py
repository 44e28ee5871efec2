"""The weights hub: what is published (manifest), bytes (fetch), tensor names (layouts), models (load), back (publish)."""
