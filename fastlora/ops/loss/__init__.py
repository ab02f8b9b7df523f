"""Log-probabilities of labels under a linear head, computed in chunks of rows."""
