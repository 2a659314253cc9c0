"""Whole jobs, one function each; a verb of the command line calls one of them."""
