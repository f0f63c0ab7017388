"""Adapters to other people's software. Each imports its library only when it is used."""
