"""Take, watch and remove snapshots, and clean up after anything."""
