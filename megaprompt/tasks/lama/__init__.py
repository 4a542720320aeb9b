"""Facts of the LAMA family: one token of the vocabulary for an answer."""
