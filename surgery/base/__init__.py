"""What every room stands on: changes that are made whole, files that are written whole, caches,
plugins, names of torch functions."""
