"""Measures of pictures and of models."""
