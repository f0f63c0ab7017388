"""Transforms of graphs (torch.fx, torch.export). Nothing is here yet: surgery works on modules."""
