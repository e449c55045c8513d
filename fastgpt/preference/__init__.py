"""Ranked answers: batches, the reward model, how well scores tell them apart."""
