"""L4: the session and the loop over it."""
