"""Configurations of other training tools as recipes: one table for each tool, and an account of every key of the file."""
