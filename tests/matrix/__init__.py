"""The matrix: transforms x modules x forms x contexts, each cell equal to a plain loop or refused by name."""
