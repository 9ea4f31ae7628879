"""The terminal side: subcommands, the chat loop, its HTTP client and its drawing."""
