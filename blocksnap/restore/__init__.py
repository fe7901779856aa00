"""Bring a backup back: plan by pack, write in parallel, verify."""
