"""Ways in: each finds the blocks, the domain or the configuration, and nothing else."""
