"""Answers held to a grammar: specs compiled with llguidance, tried first in a process of their own.

Knows no HTTP and no network of a model; gives what `chatserve.engine.grammar` asks for. Imports
llguidance only where the first grammar is compiled.
"""
