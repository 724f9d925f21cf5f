"""Wing 2: the fused ops, one file each; `reference` holds their FP64 definitions."""
