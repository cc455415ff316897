"""gpu-tenancy: rent A100 servers by the second, whole or as MIG slices, and mine on what is not rented."""
