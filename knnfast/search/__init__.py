"""Wing 1: exact top-k over resident FP16 rows. Imports without torch."""
