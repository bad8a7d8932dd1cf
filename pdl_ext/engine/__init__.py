"""The path of a loss from checked arguments to the compiled ops. Private: use `functional` or `PDLLoss`."""
