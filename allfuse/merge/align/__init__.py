"""Has the hidden units of models that began from different seeds stand in one order."""
