"""Files in and out: our own format, and other people's names for the same tensors."""
