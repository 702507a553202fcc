"""What computes: the contract of a backend, what both share, and the two that there are."""
