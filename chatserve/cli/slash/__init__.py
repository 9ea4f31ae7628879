"""What the commands of a chat do: a file for each group, `table` for all."""
