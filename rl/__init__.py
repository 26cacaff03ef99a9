"""Reinforcement-learning post-training: the public door."""
