"""Tasks, judges and ratings that compare models."""
