"""Training: one loop, and one task file for each thing that is trained."""
