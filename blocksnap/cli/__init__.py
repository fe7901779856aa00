"""Parse, print, exit codes: nothing else in the package prints."""
