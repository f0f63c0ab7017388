"""What the nodes of a graph do with weights."""
