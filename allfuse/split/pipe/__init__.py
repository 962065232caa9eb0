"""One model cut between its layers into stages."""
