"""Rollouts and the formulas of reinforcement learning."""
