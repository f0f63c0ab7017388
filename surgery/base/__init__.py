"""What every room stands on, and what knows nothing of DropConnect: changes that are made whole, files
that are written whole, caches, plugins."""
