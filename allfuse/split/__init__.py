"""L2: cuts model and data."""
