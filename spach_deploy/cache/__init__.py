"""Finished exports kept by their content, so that the same export is not done twice.

key.py      what an export depends on, as one digest
store.py    a directory of entries: whole or not there, least recently used go first
exports.py  an export taken from the store, and put into it

An entry is a whole bundle, evidence and all. It is only taken where everything that made it is the same: weights,
images, options, this package's code, the packages under it and the machine. $SPACH_CACHE is its place, or "none" to
have none; $SPACH_CACHE_SIZE its limit, such as 20G.
"""
