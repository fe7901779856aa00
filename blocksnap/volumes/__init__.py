"""What can be protected: each kind of volume behind one protocol."""
