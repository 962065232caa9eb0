"""L0: errors, units, events and tensor helpers. Imports torch only."""
