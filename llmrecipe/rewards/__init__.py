"""Rewards: what a sampled answer is worth, one kind a file."""
