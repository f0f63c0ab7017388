"""The names of other libraries for what this one does, for code that was written for them."""
