"""Reinforcement learning against a reward model: proximal policy optimisation, written here."""
