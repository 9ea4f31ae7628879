"""One module per subcommand: the composition root, heavy imports inside functions."""
