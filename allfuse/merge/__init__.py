"""L4: weights on disk, streamed."""
