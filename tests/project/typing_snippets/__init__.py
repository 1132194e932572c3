"""Code as a user writes it, for a type checker."""
