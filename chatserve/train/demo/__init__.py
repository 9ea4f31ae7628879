"""The recipe's whole chain on a small task whose answers can be checked by a program."""
