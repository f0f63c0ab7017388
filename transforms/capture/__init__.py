"""A graph of any model, and a look at one that leaves it as it was."""
