"""The formats of corpora, one file each: how a file of it is recognised and opened."""
