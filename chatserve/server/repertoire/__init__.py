"""The models of one server: which there are, which are loaded, and who makes room for whom."""
