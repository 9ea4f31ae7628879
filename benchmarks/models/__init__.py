"""Models to measure on, made from the default model or from random numbers; none is committed."""
