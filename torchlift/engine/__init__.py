"""Loops over pytrees: the plain loop that defines them and the compiled ones that equal it. Knows no modules."""
