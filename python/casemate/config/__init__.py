"""Configuration documents: parsed, checked, with their defaults."""
