"""The geometry of MIG: which partitions of a GPU exist and which sets of them can exist together. Pure tables."""
