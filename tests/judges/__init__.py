"""Other people's clients, each in a process of its own, judging a server that runs."""
