"""The network, one file a stage, in the order in which data flows."""
