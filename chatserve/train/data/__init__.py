"""Questions with voted answers, from a dump to the tables of the recipe's steps."""
