"""What the GPUs say now."""
