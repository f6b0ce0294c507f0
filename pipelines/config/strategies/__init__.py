"""Strategies that come with the package: what a run does, by one name. Keys lie under those that a user gives."""
