"""L3: the run folder, checkpoints and tensor files. Each module is imported by its own name."""
