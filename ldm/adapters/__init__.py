"""What changes a model without being one: put in, taken out, or made part of it."""
