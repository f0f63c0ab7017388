"""DropConnect in the graphs that a user traced."""
