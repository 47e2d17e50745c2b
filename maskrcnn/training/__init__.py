"""What turns a model and a stream of batches into trained weights."""
