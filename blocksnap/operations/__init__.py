"""One module for each thing an administrator does."""
