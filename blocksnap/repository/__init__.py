"""The stored format and its invariants (docs/design.md)."""
