"""fastgpt: pretraining, finetuning, reward modelling and reinforcement learning of GPT models."""

__version__ = "0.1.0"
