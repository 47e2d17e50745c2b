"""The doctor of datasets, `maskrcnn inspect-dataset`: what is wrong with the data, and what the settings make of it."""
