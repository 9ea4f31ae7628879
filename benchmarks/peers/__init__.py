"""One module per engine that is compared: how it is started, asked and read."""
