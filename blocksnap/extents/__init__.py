"""Which bytes of a volume hold data, and which changed since its parent backup."""
