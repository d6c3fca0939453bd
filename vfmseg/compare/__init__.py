"""A grid of recipes, trained with several seeds and put into one table.

grid.py        which recipes: the product of the alternatives on the command line
equal.py       how many parameters each trains, and wider decoders or adapters where it trains fewer
runs.py        the run of one recipe with one seed: finished, to go on with, or to start
measure.py     what is measured of a trained one: time and memory of a tile, the test split if asked for
table.py       means, spreads, which is best and whether that can be said
comparison.py  all of it, in order
"""
