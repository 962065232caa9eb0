"""L4: weights on disk, streamed."""

OF_DATA = ("fisher", "regmean", "regmean++", "adamerging")
"""Rules that look at data: the names of learned's table, which loads torch."""
