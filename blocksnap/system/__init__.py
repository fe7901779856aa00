"""The kernel and its tools: the only package that spawns, asks udev, or does ioctls."""
