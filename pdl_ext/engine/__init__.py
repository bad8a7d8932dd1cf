"""The way of a loss from checked arguments to the compiled ops. Private: `functional` and `PDLLoss` are its doors."""
