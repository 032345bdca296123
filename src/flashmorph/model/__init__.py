"""The morphable model: layers with several branches, their recomputation and their sharding."""
