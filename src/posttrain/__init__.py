"""posttrain: reinforcement-learning post-training of language models on one GPU."""

__version__ = "0.1.0"
