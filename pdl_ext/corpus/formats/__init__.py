"""The formats of corpora, one file each: how its files are recognised and opened."""
